"""The tokens of all documents, encoded once, and read as one stream."""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from ._corpus import Corpus
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
