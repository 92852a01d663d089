"""Documents packed into windows of one length, with random access."""

import operator
import os
from typing import Any, SupportsIndex, TypedDict

import numpy as np
from jaxtyping import Bool, Float32, Int32

from ..._checks import check_count
from ._corpus import Corpus, stable_hash
from ._encoded import Stream, encode_corpus
from ._tokenizer import Tokenizer


class Window(TypedDict):
    """One training sequence, or a batch of them with a leading axis on each array.

    - `tokens`: int32 `[T]`, what the model reads.
    - `targets`: int32 `[T]`, what it predicts at each of them: the next token.
    - `reset`: bool `[T]`, true where a document begins, as for `reset` of a layer: it
        starts from a fresh state there.
    - `weights`: float32 `[T]`, 1 for targets that are scored and 0 for others.
    """

    tokens: Int32[np.ndarray, "*batch T"]
    targets: Int32[np.ndarray, "*batch T"]
    reset: Bool[np.ndarray, "*batch T"]
    weights: Float32[np.ndarray, "*batch T"]


class Packed:
    r"""A corpus as windows of T tokens for a language model.

    The documents, in a random order and each after a begin token, are one stream s of L
    tokens. Window i is

    $$
    \mathrm{tokens} = s_{iT}, \dots, s_{iT+T-1}, \qquad
    \mathrm{targets} = s_{iT+1}, \dots, s_{iT+T},
    \qquad i < \lfloor (L - 1) / T \rfloor,
    $$

    so every token except the first is a target once, apart from fewer than T tokens at
    the end of the stream, which are in no window. A window may start within a document;
    the model then has not seen the beginning, and `reset` is false there.

    The begin token of the next document is a target of weight 0. The end of a document
    is known from its size and is not part of its content, so exactly the content is
    scored; for bytes, the mean over targets is a mean over bytes.

    **Arguments:**

    - `corpus`: from [`find_corpus`][pararnn.training.find_corpus].
    - `tokenizer`: a [`Tokenizer`][pararnn.training.Tokenizer]. Bytes are read from the
        files at each use; for any other tokenizer the documents are encoded once, and
        the tokens stored in a file.
    - `length`: T.
    - `seed`: seed of the order of documents.
    - `cache`: the folder for encoded documents. Defaults to
        `$XDG_CACHE_HOME/pararnn/tokens` (`~/.cache` if unset). Its entries are found
        by the tokenizer and the names, sizes and times of the files.

    **Raises:** `TypeError`, `ValueError` for wrong arguments, or if the corpus is
    shorter than one window; `RuntimeError`, also from `packed[i]`, if a file has
    changed.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    length: int
    seed: int

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        length: int,
        *,
        seed: int = 0,
        cache: str | os.PathLike[str] | None = None,
    ):
        _check_corpus(corpus)
        _check_tokenizer(tokenizer)
        self.corpus, self.tokenizer = corpus, tokenizer
        check_count("Packed", "length", length, least=1)
        check_count("Packed", "seed", seed)
        self.length, self.seed = int(length), int(seed)
        encoded = encode_corpus(corpus, tokenizer, cache)
        names = corpus.names
        keys = np.array([stable_hash("order", self.seed, n) for n in names], np.uint64)
        order = np.argsort(keys, kind="stable")
        self._stream = Stream(encoded, order, tokenizer.begin)
        self._scored = int(encoded.lengths.sum())
        if len(self) == 0:
            raise ValueError(
                f"Packed: the corpus is shorter than one window: {len(corpus)} "
                f"documents of {corpus.num_bytes} bytes are {self.num_tokens} tokens, "
                f"and `length={self.length}` needs {self.length + 1}. Take a smaller "
                "`length` or more files; for validation, a larger `fraction`."
            )

    def __len__(self) -> int:
        """The number of windows."""
        return (self.num_tokens - 1) // self.length

    def __repr__(self) -> str:
        tokens = f"{len(self)} windows of {self.length}, {self.num_tokens:,} tokens"
        return f"Packed({tokens}, {self.corpus!r})"

    @property
    def num_tokens(self) -> int:
        """L: the length of the stream, including a begin token for each document."""
        return len(self._stream)

    @property
    def bytes_per_target(self) -> float:
        r"""Bytes for each scored target: 1 for `ByteTokenizer`.

        A mean loss of $\ell$ nats per scored target is $\ell / (\log 2 \cdot r)$ bits
        per byte, where r is this ratio.
        """
        return self.corpus.num_bytes / max(self._scored, 1)

    @property
    def identity(self) -> dict[str, Any]:
        """What the content of every window depends on, for JSON."""
        return {
            "corpus": self.corpus.identity,
            "tokenizer": self.tokenizer.identity,
            "length": self.length,
            "order of documents": self.seed,
        }

    def read(
        self, start: int, stop: int
    ) -> tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Return tokens `[start, stop)` of the stream, and where documents begin.

        **Raises:** `ValueError` if the stream has no such positions.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(
                f"Packed.read: positions {start} to {stop} of a stream of "
                f"{self.num_tokens} tokens."
            )
        return self._stream.read(start, stop)

    def __getitem__(self, index: SupportsIndex) -> Window:
        """Return window `index`, counted from 0.

        **Raises:** `IndexError` outside [0, len); `RuntimeError` if a file has
        changed.
        """
        i = operator.index(index)
        if not 0 <= i < len(self):
            raise IndexError(f"Packed: window {i} of {len(self)}.")
        tokens, begins = self.read(i * self.length, (i + 1) * self.length + 1)
        return {
            "tokens": tokens[:-1],
            "targets": tokens[1:],
            "reset": begins[:-1],
            "weights": np.where(begins[1:], np.float32(0), np.float32(1)),
        }


def _check_corpus(corpus: Corpus) -> None:
    if not isinstance(corpus, Corpus):
        raise TypeError(
            f"Packed: `corpus` is {corpus!r:.80}, expected a `Corpus`: "
            "`find_corpus(path)` makes one, `.split()` two of it (pass one of them)."
        )


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    wanted = ("vocab_size", "begin", "identity", "encode", "decode")
    missing = [name for name in wanted if not hasattr(tokenizer, name)]
    if missing or isinstance(tokenizer, type):
        raise TypeError(
            f"Packed: `tokenizer` is {tokenizer!r:.80}, which is not a tokenizer "
            f"(missing: {', '.join(missing) or 'the call of the class'}). Expected "
            "`ByteTokenizer()`, `FileTokenizer(path)` or one of your own."
        )
    if not 0 <= tokenizer.begin < tokenizer.vocab_size:
        raise ValueError(
            f"Packed: the tokenizer begins documents with token {tokenizer.begin}, but "
            f"its `vocab_size` is {tokenizer.vocab_size}. Likely cause: `vocab_size` "
            "leaves out the special tokens."
        )
