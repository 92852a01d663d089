"""Training language models; needs `pip install 'pararnn[train]'`."""

from .data import (
    ByteTokenizer as ByteTokenizer,
    Corpus as Corpus,
    FileTokenizer as FileTokenizer,
    Packed as Packed,
    Tokenizer as Tokenizer,
    Window as Window,
    find_corpus as find_corpus,
    make_batches as make_batches,
    ngram_bits_per_byte as ngram_bits_per_byte,
    stream_text as stream_text,
)
