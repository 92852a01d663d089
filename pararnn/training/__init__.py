"""Training language models; needs `pip install 'pararnn[train]'`."""

from ._config import (
    Config as Config,
    DataConfig as DataConfig,
    MeshConfig as MeshConfig,
    ModelConfig as ModelConfig,
    OptimiserConfig as OptimiserConfig,
)
from ._metrics import draw_curves as draw_curves, read_metrics as read_metrics
from ._run import Outcome as Outcome, TrainingFailed as TrainingFailed
from ._step import evaluate as evaluate
from ._train import load_model as load_model, train as train
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
