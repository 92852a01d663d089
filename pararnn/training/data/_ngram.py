"""An n-gram model of bytes: the score that a model has to beat."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from ..._checks import check_whole_count
from ._packed import Packed
from ._tokenizer import ByteTokenizer

SYMBOLS = 257
# An int64 holds at most seven symbols of 257.
LONGEST = 6
# Tokens to process at a time, at a few tens of bytes of memory for each.
TOKENS_AT_ONCE = 1 << 22


class Counts(NamedTuple):
    """How often each gram (a context and the byte after it) occurred."""

    grams: Int64[np.ndarray, " grams"]
    counts: Int64[np.ndarray, " grams"]

    def add(self, grams: Int64[np.ndarray, " n"]) -> "Counts":
        new, counts = np.unique(grams, return_counts=True)
        both = np.concatenate([self.grams, new])
        order = np.argsort(both, kind="stable")
        both = both[order]
        first = np.flatnonzero(np.diff(both, prepend=-1))
        weights = np.concatenate([self.counts, counts])[order]
        return Counts(both[first], np.add.reduceat(weights, first, dtype=np.int64))


def ngram_bits_per_byte(
    train: Packed, validation: Packed, *, context: int = 2
) -> float:
    r"""Return the bits per byte of Witten and Bell's n-gram model of bytes.

    The model is interpolated. With N(c, b) the number of times that byte b followed
    context c in `train`, N(c) its sum over b, D(c) the number of different bytes that
    did, and c' the context without its oldest byte,

    $$
    P(b \mid c) = \frac{N(c, b) + D(c) \, P(b \mid c')}{N(c) + D(c)},
    $$

    down to the empty context, whose c' has the uniform distribution 1/256. The counts
    of a context with many different successors are trusted less. There is nothing to
    tune. Kneser and Ney's counts would give somewhat fewer bits, for more code.

    The score is comparable with that of a model on the same windows: the mean of
    $-\log_2 P$ over all targets of weight 1 in `validation`, given only the bytes
    before them in the window and the document, begin token included. At the starts of
    both, contexts are shorter.

    **Arguments:**

    - `train`: what is counted: the whole stream, so its `length` does not matter.
    - `validation`: what is scored; `length` as for the model to compare with.
    - `context`: bytes of context, 0 to 6. "Order 3" is `context=2` for n-grams of
        three bytes (trigrams), and `context=3` in data compression.

    **Returns:** bits per byte, comparable with
    $\ell / (\log 2 \cdot \mathrm{bytes\_per\_target})$ of a model of any tokenizer on
    the same corpus.

    **Raises:** `TypeError`, `ValueError` for wrong arguments, or tokens that are not
    bytes.

    Source: Witten and Bell, "The zero-frequency problem" (1991), method C; interpolated
    as in Chen and Goodman, "An empirical study of smoothing techniques for language
    modeling" (1998), section 2.
    """
    for name, packed in (("train", train), ("validation", validation)):
        _check_bytes(name, packed)
    check_whole_count("ngram_bits_per_byte", "context", context)
    if context > LONGEST:
        raise ValueError(
            f"ngram_bits_per_byte: `context` is {context}, expected at most {LONGEST}: "
            "longer ones do not fit in 64 bits."
        )
    tables = [_Table(counts) for counts in _count(train, context)]
    bits, scored = 0.0, 0
    for tokens, begins in _windows(validation):
        grams = _grams(tokens, begins, context)
        probability = np.full(tokens.shape, 1 / 256)
        for table, (keys, known) in zip(tables, grams, strict=True):
            probability[known] = table.refine(keys[known], probability[known])
        targets = ~begins
        targets[:, 0] = False
        bits -= float(np.log2(probability[targets]).sum())
        scored += int(targets.sum())
    return bits / scored


class _Table:
    """The counts for one length of context, for lookup."""

    def __init__(self, counts: Counts):
        self.grams, self.counts = counts
        contexts = self.grams // SYMBOLS
        first = np.flatnonzero(np.diff(contexts, prepend=-1))
        self.contexts = contexts[first]
        self.totals = np.add.reduceat(self.counts, first)
        self.distinct = np.diff(first, append=len(contexts))

    def refine(self, keys: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """Return P(b | c) from P(b | c'); the same if c was never seen."""
        total = _find(self.contexts, self.totals, keys // SYMBOLS)
        distinct = _find(self.contexts, self.distinct, keys // SYMBOLS)
        count = _find(self.grams, self.counts, keys)
        longer = (count + distinct * shorter) / np.maximum(total + distinct, 1)
        return np.where(total > 0, longer, shorter)


def _find(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the value of each wanted key, 0 for missing ones."""
    if not len(keys):
        return np.zeros_like(wanted)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def _count(train: Packed, context: int) -> list[Counts]:
    """Count the grams for each length of context, the empty one first."""
    none = np.zeros(0, np.int64)
    found = [Counts(none, none)] * (context + 1)
    for start in range(0, train.num_tokens, TOKENS_AT_ONCE):
        overlap = min(start, context)
        stop = min(start + TOKENS_AT_ONCE, train.num_tokens)
        tokens, begins = train.read(start - overlap, stop)
        grams = _grams(tokens[None], begins[None], context)
        for length, (keys, known) in enumerate(grams):
            # The overlap is only context: it was counted before.
            known[:, :overlap] = False
            found[length] = found[length].add(keys[known])
    return found


def _windows(packed: Packed) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all windows, tokens and begins `[n, T + 1]`, some at a time."""
    T = packed.length
    some = max(1, TOKENS_AT_ONCE // T)
    for first in range(0, len(packed), some):
        last = min(first + some, len(packed))
        stream = packed.read(first * T, last * T + 1)
        tokens, begins = (
            np.lib.stride_tricks.sliding_window_view(part, T + 1)[::T]
            for part in stream
        )
        yield tokens, begins


def _grams(
    tokens: np.ndarray, begins: np.ndarray, context: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, for each length of context, the gram that ends at each token `[n, length]`
    and whether it is valid.

    It is valid if the context lies in the row and in the document, and the last token
    is not a begin token. The predicted byte is the lowest digit.
    """
    column = np.arange(tokens.shape[1])[None]
    before = column - np.maximum.accumulate(np.where(begins, column, 0), axis=1)
    keys = tokens.astype(np.int64)
    yield keys, ~begins
    for length in range(1, context + 1):
        keys = keys.copy()
        keys[:, length:] += SYMBOLS**length * tokens[:, :-length].astype(np.int64)
        yield keys, (before >= length) & ~begins


def _check_bytes(name: str, packed: Packed) -> None:
    if not isinstance(packed, Packed) or not isinstance(
        packed.tokenizer, ByteTokenizer
    ):
        found = packed.tokenizer if isinstance(packed, Packed) else packed
        raise TypeError(
            f"ngram_bits_per_byte: `{name}` is of {found!r:.80}, expected "
            "`Packed(corpus, ByteTokenizer(), length)`: the model reads bytes. Its "
            "score is comparable with a model of any tokens by `bytes_per_target`."
        )
