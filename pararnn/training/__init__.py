"""Training language models; needs `pip install 'pararnn[train]'`."""

from ._config import (
    Config as Config,
    DataConfig as DataConfig,
    MeshConfig as MeshConfig,
    ModelConfig as ModelConfig,
    OptimiserConfig as OptimiserConfig,
)
from ._curves import draw_curves as draw_curves
from ._evaluate import evaluate as evaluate
from ._load import load_model as load_model
from ._metrics import read_metrics as read_metrics
from ._run import Outcome as Outcome, TrainingFailed as TrainingFailed
from ._train import train as train
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
