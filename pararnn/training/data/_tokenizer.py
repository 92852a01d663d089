"""Text to integers and back: bytes, or the file of a trained tokenizer."""

import hashlib
import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int32

# What published tokenizers call the token at the beginning of a document.
BEGINS = (
    "<|begin_of_text|>",
    "<|endoftext|>",
    "<s>",
    "<bos>",
    "[BOS]",
    "[CLS]",
)


class Tokenizer(Protocol):
    """What the pipeline needs of a tokenizer; there is nothing to subclass.

    - `vocab_size`: tokens are less than it.
    - `begin`: the token before every document.
    - `identity`: a string that differs if `encode` differs. It names the file of
        encoded documents, and checkpoints are compared by it.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def begin(self) -> int: ...

    @property
    def identity(self) -> str: ...

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " n"]:
        """Return the tokens of a text, without `begin`."""
        ...

    def decode(self, tokens: Sequence[int] | Int32[np.ndarray, " n"]) -> str:
        """Return the text of tokens; invalid UTF-8 becomes U+FFFD."""
        ...


class ByteTokenizer:
    """Every byte is a token, and 256 begins a document: 257 tokens in all.

    Nothing is lost: a file of any encoding is a sequence of bytes.
    """

    vocab_size = 257
    begin = 256
    identity = "bytes"

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " n"]:
        """Return the bytes of `text` (UTF-8 of a string), as int32 `[n]`.

        **Raises:** `TypeError` if `text` is neither a string nor bytes.
        """
        data = _as_bytes("ByteTokenizer.encode", text)
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode(self, tokens: Sequence[int] | Int32[np.ndarray, " n"]) -> str:
        """Return the text of tokens `[n]`.

        Begin tokens have no text. Invalid UTF-8, for instance a sequence that is cut
        within a character, becomes U+FFFD;
        [`stream_text`][pararnn.training.stream_text] waits for the rest of it.

        **Raises:** `TypeError`, `ValueError` if a token is not an integer in [0, 256].
        """
        array = _as_tokens("ByteTokenizer.decode", tokens, self.vocab_size)
        return array[array < 256].astype(np.uint8).tobytes().decode("utf-8", "replace")


class FileTokenizer:
    """A tokenizer of Hugging Face's `tokenizers`, from its `tokenizer.json`.

    Text that looks like a special token is encoded as text, so that no document can
    forge one. Truncation and padding are off, even if the file asks for them.
    `decode(encode(text))` is the text if the tokenizer is byte-level; others may
    normalise it (lower case, ...).

    **Arguments:**

    - `path`: the file; `~` is expanded.
    - `begin`: the token to put before documents, for instance `"<s>"`. Defaults to the
        first of the usual names that the file knows.

    **Raises:** `ImportError` without the package `tokenizers`; `FileNotFoundError`;
    `ValueError` if the file is not a tokenizer, or no begin token is found.
    """

    vocab_size: int
    begin: int
    identity: str

    def __init__(self, path: str | os.PathLike[str], *, begin: str | None = None):
        self._tokenizer = _load(path)
        # Many published files set these, which would silently cut documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        # Not the number of tokens: published vocabularies have gaps.
        self.vocab_size = max(vocabulary.values()) + 1
        self.begin = _find_begin(vocabulary, self._tokenizer, path, begin)
        content = f"{self.begin} {self._tokenizer.to_str()}".encode()
        self.identity = f"tokenizers {hashlib.sha256(content).hexdigest()}"

    def encode(self, text: str | bytes) -> Int32[np.ndarray, " n"]:
        """Return the tokens of `text`, as int32 `[n]`.

        **Raises:** `TypeError` if `text` is neither a string nor bytes, `ValueError`
        if it is bytes that are not UTF-8.
        """
        if not isinstance(text, str):
            text = _as_text(_as_bytes("FileTokenizer.encode", text))
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, np.int32)

    def decode(self, tokens: Sequence[int] | Int32[np.ndarray, " n"]) -> str:
        """Return the text of tokens `[n]`; special ones have none.

        **Raises:** `TypeError`, `ValueError` if a token is not an integer in
        [0, vocab_size).
        """
        array = _as_tokens("FileTokenizer.decode", tokens, self.vocab_size)
        return self._tokenizer.decode(array.tolist(), skip_special_tokens=True)


def _load(path: str | os.PathLike[str]) -> Any:
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ImportError as error:
        raise ImportError(
            "FileTokenizer reads its file with Hugging Face's tokenizers, which could "
            f"not be imported ({error}): `pip install tokenizers`. ByteTokenizer needs "
            "no package."
        ) from error
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"FileTokenizer: there is no file {str(file)!r} (looked for from "
            f"{os.getcwd()!r}). Expected the `tokenizer.json` that a `tokenizers` "
            "tokenizer saves; likely cause: this is its folder."
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain `Exception`
        raise ValueError(
            f"FileTokenizer: {str(file)!r} could not be read as a tokenizer: {error}. "
            "Likely causes: (a) it is another file of the model (vocab.json, "
            "tokenizer_config.json, a SentencePiece .model): give `tokenizer.json`; "
            "(b) it was written by a newer version: `pip install -U tokenizers`."
        ) from error


def _find_begin(vocabulary: dict[str, int], tokenizer, path, begin: str | None) -> int:
    for name in BEGINS if begin is None else (begin,):
        if name in vocabulary:
            return vocabulary[name]
    added = tokenizer.get_added_tokens_decoder().values()
    special = sorted(token.content for token in added if token.special)
    looked = "none of " + ", ".join(BEGINS) if begin is None else f"not {begin!r}"
    raise ValueError(
        f"FileTokenizer: {os.fspath(path)!r} has no token to begin documents with: it "
        f"knows {looked}. Its special tokens are {special}; pass one as `begin=`."
    )


def _as_bytes(where: str, text: str | bytes) -> bytes:
    if isinstance(text, str):
        return text.encode("utf-8")
    if isinstance(text, bytes | bytearray | memoryview):
        return bytes(text)
    raise TypeError(f"{where}: `text` is {text!r:.80}, expected a string or bytes.")


def _as_text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"FileTokenizer.encode: the bytes are not UTF-8: {error}. Decode them by "
            "their own encoding first, or use ByteTokenizer, which takes any bytes."
        ) from error


def _as_tokens(where: str, tokens, vocab_size: int) -> np.ndarray:
    array = np.asarray(tokens)
    if array.size == 0:
        return np.zeros(0, np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"{where}: `tokens` is {array.dtype}{list(array.shape)}, expected integers "
            "[n]. Decode the sequences of a batch one by one."
        )
    if array.min() < 0 or array.max() >= vocab_size:
        raise ValueError(
            f"{where}: tokens from {array.min()} to {array.max()}, but the vocabulary "
            f"is 0 to {vocab_size - 1}. Likely causes: (a) the model's output is "
            "padded to a larger vocabulary; (b) the tokens are of another tokenizer."
        )
    return array


UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def stream_text(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Decode tokens as they arrive, and never yield half a character.

    A token may end within a UTF-8 character. Then only the last U+FFFD of the text so
    far can still change, so it is held back until it is certain.

    **Arguments:** `tokenizer`; `tokens`, integers, for instance samples of a model.

    **Returns:** an iterator of pieces of text, none empty. Together they are
    `tokenizer.decode` of all tokens if `decode` maps each token to its bytes, as in
    byte-level tokenizers.

    **Raises:** as `tokenizer.decode`.
    """
    settled: list[int] = []
    pending: list[int] = []
    known = 0  # characters of `settled`, and yielded ones of `pending`
    text = ""
    for token in tokens:
        pending.append(int(token))
        text = tokenizer.decode(settled + pending)
        sure = text.removesuffix(UNKNOWN)
        if len(sure) > known:
            yield sure[known:]
            known = len(sure)
        if sure == text and text:
            # Some decoders treat the first token of a text differently, so a few
            # settled tokens stay before those to come.
            settled, pending = pending, []
            text = tokenizer.decode(settled)
            known = len(text)
    if len(text) > known:
        yield text[known:]
