"""Documents encoded once, cached, and packed into windows of one length."""

import hashlib
import json
import operator
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, TypedDict

import numpy as np
from jaxtyping import Bool, Float32, Int32

from ..._checks import check_whole_count
from ._corpus import Corpus, stable_hash
from ._tokenizer import ByteTokenizer, Tokenizer

# Documents are encoded in pieces of at least this many bytes, so that any size fits in
# memory. Part of the cache's key, because a cut may change the tokens beside it.
PIECE = 1 << 24


class Encoded(Protocol):
    """Tokens by document: how many, int64 `[documents]`, and any range of them."""

    lengths: np.ndarray

    def read(self, document: int, start: int, stop: int) -> np.ndarray: ...


class BytesAsTokens:
    """Every byte is a token: there is nothing to encode or to cache."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus
        self.lengths = corpus.sizes

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        return np.frombuffer(self.corpus.read(document, start, stop), np.uint8)


class CachedTokens:
    """Tokens in a folder: `tokens.npy`, memory-mapped, and `lengths.npy`."""

    def __init__(self, folder: Path):
        self.lengths = np.load(folder / "lengths.npy")
        self.ends = np.cumsum(self.lengths)
        # Mapping is safe: these files are never written after they get their name.
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")
        if self.tokens.shape != (self.lengths.sum(),):
            raise ValueError(
                f"Packed: the encoded documents in {str(folder)!r} are damaged "
                f"({self.lengths.sum()} tokens expected, {self.tokens.shape} found). "
                "Delete the folder, so that they are encoded again."
            )

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        base = int(self.ends[document] - self.lengths[document])
        return self.tokens[base + start : base + stop]


def encode_corpus(
    corpus: Corpus, tokenizer: Tokenizer, cache: str | os.PathLike[str] | None
) -> Encoded:
    """Return the tokens of a corpus, from the cache if they are there."""
    if isinstance(tokenizer, ByteTokenizer):
        return BytesAsTokens(corpus)
    parent = Path(cache).expanduser() if cache is not None else _default_cache()
    folder = parent / _key(corpus, tokenizer)
    if not folder.exists():
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as temporary:
            made = Path(temporary, "made")
            made.mkdir()
            _write(made, corpus, tokenizer)
            try:
                os.rename(made, folder)
            except OSError:
                # Another process was faster and wrote the same.
                if not folder.exists():
                    raise
    return CachedTokens(folder)


def _default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "pararnn" / "tokens"


def _key(corpus: Corpus, tokenizer: Tokenizer) -> str:
    root = os.path.abspath(corpus.root)
    changed = [os.stat(os.path.join(root, name)).st_mtime_ns for name in corpus.names]
    identity = [tokenizer.identity, PIECE, root, corpus.identity, changed]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _write(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    lengths = np.zeros(len(corpus), np.int64)
    broken = []
    with open(folder / "tokens.npy", "wb") as file:
        _write_header(file, dtype, 0)
        for document, name in enumerate(corpus.names):
            for data in _pieces(corpus, document):
                text = data.decode("utf-8", "replace")
                if text.encode("utf-8") != data:
                    broken.append(name)
                tokens = tokenizer.encode(text)
                _check_tokens(tokens, tokenizer, name)
                lengths[document] += len(tokens)
                file.write(tokens.astype(dtype).tobytes())
        # NumPy pads the header, so that a longer shape fits.
        file.seek(0)
        _write_header(file, dtype, int(lengths.sum()))
    np.save(folder / "lengths.npy", lengths)
    if broken:
        warnings.warn(
            f"Packed: {len(set(broken))} documents are not valid UTF-8, "
            f"{broken[0]!r} for instance; invalid bytes became U+FFFD, because the "
            "tokenizer takes text. ByteTokenizer takes any bytes.",
            stacklevel=4,
        )


def _write_header(file, dtype: np.dtype, length: int) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def _pieces(corpus: Corpus, document: int) -> Iterator[bytes]:
    """Yield a document, cut at the ends of lines if it is long."""
    size, start, rest = int(corpus.sizes[document]), 0, b""
    while start < size:
        stop = min(start + PIECE, size)
        data = rest + corpus.read(document, start, stop)
        # Never within a character: without a newline, cut before the last lead byte.
        end = data.rfind(b"\n") + 1 or _last_lead(data)
        if stop == size:
            end = len(data)
        yield data[:end]
        start, rest = stop, data[end:]


def _last_lead(data: bytes) -> int:
    """Return where the last UTF-8 character starts."""
    for back in range(1, min(len(data), 4) + 1):
        if data[-back] & 0xC0 != 0x80:
            return len(data) - back
    return len(data)


def _check_tokens(tokens: np.ndarray, tokenizer: Tokenizer, name: str) -> None:
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
        raise ValueError(
            f"Packed: `tokenizer.encode` gave tokens from {tokens.min()} to "
            f"{tokens.max()} for {name!r}, but its `vocab_size` is "
            f"{tokenizer.vocab_size}."
        )


class Stream:
    """All documents in a row, each after a begin token, read by position.

    `starts`, int64 `[documents + 1]`, holds the position of each begin token, then the
    length of the stream.
    """

    def __init__(self, encoded: Encoded, order: np.ndarray, begin: int):
        self.encoded, self.order, self.begin = encoded, order, begin
        self.starts = np.zeros(len(order) + 1, np.int64)
        np.cumsum(encoded.lengths[order] + 1, out=self.starts[1:])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens `[start, stop)`, int32, and where documents begin, bool."""
        tokens = np.empty(stop - start, np.int32)
        begins = np.zeros(stop - start, bool)
        place = int(np.searchsorted(self.starts, start, side="right")) - 1
        at = start
        while at < stop:
            base, end = int(self.starts[place]), int(self.starts[place + 1])
            if at == base:
                tokens[at - start], begins[at - start] = self.begin, True
                at += 1
            end = min(end, stop)
            # The document's own tokens come after the begin token.
            first = base + 1
            if at < end:
                document = int(self.order[place])
                found = self.encoded.read(document, at - first, end - first)
                tokens[at - start : end - start] = found
            at, place = end, place + 1
        return tokens, begins


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
        check_whole_count("Packed", "length", length, least=1)
        check_whole_count("Packed", "seed", seed)
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
