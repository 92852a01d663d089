"""Data for language models: files to batches of tokens."""

from ._batches import make_batches as make_batches
from ._corpus import Corpus as Corpus, find_corpus as find_corpus
from ._ngram import ngram_bits_per_byte as ngram_bits_per_byte
from ._packed import Packed as Packed, Window as Window
from ._tokenizer import (
    ByteTokenizer as ByteTokenizer,
    FileTokenizer as FileTokenizer,
    Tokenizer as Tokenizer,
    stream_text as stream_text,
)
