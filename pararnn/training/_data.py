"""Make the batches that a configuration asks for."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from ._config import Config
from .data import (
    ByteTokenizer,
    FileTokenizer,
    Packed,
    Tokenizer,
    Window,
    find_corpus,
    make_batches,
)


class Data(NamedTuple):
    """Training and validation windows of one corpus."""

    tokenizer: Tokenizer
    training: Packed
    validation: Packed


def bits_per_nat(packed: Packed) -> float:
    """Return the factor from a mean loss in nats to bits per byte."""
    return 1 / (math.log(2) * packed.bytes_per_target)


def make_tokenizer(config: Config) -> Tokenizer:
    """Make the tokenizer. **Raises:** as `FileTokenizer`."""
    file = config.data.tokenizer
    return ByteTokenizer() if file is None else FileTokenizer(file)


def open_data(config: Config) -> Data:
    """Find the corpus and split it by documents.

    **Raises:** as `find_corpus`, `Corpus.split`, `Packed` and `FileTokenizer`.
    """
    tokenizer = make_tokenizer(config)
    corpus = find_corpus(config.data.corpus)
    parts = corpus.split(config.data.validation, seed=config.seed)
    training, validation = (
        Packed(part, tokenizer, config.data.length, seed=config.seed) for part in parts
    )
    return Data(tokenizer, training, validation)


def training_batches(config: Config, data: Data):
    """Return an endless iterator of windows `[microbatches * batch, T]`, whose position
    can be saved.

    Every host reads all of them and gives its devices their shards: reading is about a
    thousand times faster than training, and batch and time can be sharded in any way.
    """
    size = config.data.batch * config.optimiser.accumulate
    return iter(make_batches(data.training, size, seed=config.seed))


def validation_batches(config: Config, data: Data) -> Iterator[Window]:
    """Yield the same windows at every call, `[batch, T]`, at most
    `validation_batches` batches."""
    batches = make_batches(
        data.validation,
        config.data.batch,
        seed=config.seed,
        epochs=1,
    )
    for _, batch in zip(range(config.data.validation_batches), batches, strict=False):
        yield batch
