"""A set of documents on disk, of which only the sizes are held in memory."""

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from ._checks import check_count
from ._hash import hashed

# How far to look for the end of a line when one document is cut in two.
LINE = 1 << 16


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """Documents: stretches of files, each nearly always a whole file.

    Made by [`find_corpus`][pararnn.training.find_corpus]. Contents are read when they
    are needed and never kept, so that the corpus may be larger than the memory.

    **Arguments:**

    - `root`: the folder that names are relative to.
    - `names`: of the file of each document, with `/` between folders.
    - `starts`, `sizes`: int64 `[documents]`, where in its file each document is, in
        bytes.
    - `file_sizes`: int64 `[documents]`, of the whole files, by which a file that
        changes is noticed.
    """

    root: Path
    names: tuple[str, ...]
    starts: Int64[np.ndarray, " documents"]
    sizes: Int64[np.ndarray, " documents"]
    file_sizes: Int64[np.ndarray, " documents"]

    def __post_init__(self) -> None:
        arrays = (self.starts, self.sizes, self.file_sizes)
        shapes = [f"{a.dtype}{list(a.shape)}" for a in arrays]
        if not self.names or shapes != 3 * [f"int64[{len(self.names)}]"]:
            raise ValueError(
                f"Corpus: {len(self.names)} names with `starts`, `sizes` and "
                f"`file_sizes` of {', '.join(shapes)}; expected int64 [documents] for "
                "at least one document. `find_corpus(path)` makes a corpus."
            )

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.names)

    def __repr__(self) -> str:
        size = f"{len(self)} documents, {self.num_bytes:,} bytes"
        return f"Corpus({size}, root={str(self.root)!r})"

    @property
    def num_bytes(self) -> int:
        """The size of all documents together."""
        return int(self.sizes.sum())

    @property
    def identity(self) -> str:
        """A hash of names and sizes: the same for a copy in another folder."""
        state = hashlib.sha256()
        for name in self.names:
            state.update(os.fsencode(name) + b"\0")
        for array in (self.starts, self.sizes):
            state.update(array.astype("<i8").tobytes())
        return state.hexdigest()

    def read(self, document: int, start: int, stop: int) -> bytes:
        """The bytes `[start, stop)` of a document.

        **Raises:** `RuntimeError` if the file is no longer of the size that it had when
        the corpus was made; `ValueError` if the document has no such bytes.
        """
        if not 0 <= start <= stop <= self.sizes[document]:
            raise ValueError(
                f"Corpus.read: bytes {start} to {stop} of {self.names[document]!r}, "
                f"which has {self.sizes[document]}."
            )
        # A mapped file that someone truncates kills the process (SIGBUS) when the lost
        # part is touched; a read only comes back short.
        try:
            with open(os.path.join(self.root, self.names[document]), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(int(self.starts[document]) + int(start))
                data = file.read(stop - start)
        except OSError as error:
            raise self._changed(document, str(error)) from error
        if size != self.file_sizes[document] or len(data) != stop - start:
            raise self._changed(document, f"it has {size} now")
        return data

    def _changed(self, document: int, what: str) -> RuntimeError:
        return RuntimeError(
            f"Corpus.read: {self.names[document]!r} below {str(self.root)!r} had "
            f"{self.file_sizes[document]} bytes when the corpus was made; {what}. "
            "Likely cause: the file was edited, moved or is still being written. "
            "Positions in the corpus are no longer those that they were: leave the "
            "files alone while they are used, and make the corpus anew."
        )

    def take(self, documents: np.ndarray) -> "Corpus":
        """The corpus of some of the documents, int `[n]`, in that order."""
        return dataclasses.replace(
            self,
            names=tuple(self.names[i] for i in documents),
            starts=self.starts[documents],
            sizes=self.sizes[documents],
            file_sizes=self.file_sizes[documents],
        )

    def split(
        self, fraction: float = 0.05, *, seed: int = 0
    ) -> tuple["Corpus", "Corpus"]:
        """Training and validation documents, none in both.

        A document is for validation if a hash of `seed` and its name is among the
        lowest `fraction` of all hashes, so that it stays on its side when others are
        added; if that leaves one side empty, the document nearest to the limit changes
        sides. A single document is cut in two instead, at the end of a line.

        **Arguments:** `fraction` of the documents, in (0, 1), that is expected in
        validation (of the bytes, for a single document); `seed`, an integer.

        **Returns:** `(train, validation)`.

        **Raises:** `TypeError`, `ValueError` for wrong arguments, or a single document
        of a single byte.
        """
        if not isinstance(fraction, int | float) or not 0 < fraction < 1:
            raise ValueError(
                f"Corpus.split: `fraction` is {fraction!r:.80}, expected a number "
                "between 0 and 1, both excluded: the share of validation. For training "
                "without validation use the corpus itself."
            )
        check_count("Corpus.split", "seed", seed, 0)
        if len(self) == 1:
            return self._cut(fraction)
        hashes = [hashed("split", seed, name) / 2**64 for name in self.names]
        order = np.argsort(hashes, kind="stable")
        count = int(np.sum(np.array(hashes) < fraction))
        count = min(max(count, 1), len(self) - 1)
        chosen = np.zeros(len(self), bool)
        chosen[order[:count]] = True
        return self.take(np.flatnonzero(~chosen)), self.take(np.flatnonzero(chosen))

    def _cut(self, fraction: float) -> tuple["Corpus", "Corpus"]:
        size = int(self.sizes[0])
        if size < 2:
            raise ValueError(
                "Corpus.split: the corpus is a single document of a single byte, "
                f"{self.names[0]!r}, which cannot be split."
            )
        at = min(max(round(size * (1 - fraction)), 1), size - 1)
        line, newline, _ = self.read(0, at, min(at + LINE, size)).partition(b"\n")
        if newline and at + len(line) + 1 < size:
            at += len(line) + 1
        before = dataclasses.replace(self, sizes=np.full(1, at, np.int64))
        behind = dataclasses.replace(
            self, starts=self.starts + at, sizes=self.sizes - at
        )
        return before, behind
