"""A corpus: documents on disk, of which only the sizes are held in memory."""

import dataclasses
import glob
import hashlib
import os
import stat
import sysconfig
from pathlib import Path
from typing import NoReturn

import numpy as np
from jaxtyping import Int64

from ..._checks import check_whole_count

# How far to look for the end of a line when a single document is split.
MAX_LINE = 1 << 16


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """Documents: ranges of bytes in files, each usually a whole file.

    Made by [`find_corpus`][pararnn.training.find_corpus]. Contents are read when
    needed and never kept, so the corpus may be larger than the memory.

    **Arguments:**

    - `root`: the folder that names are relative to.
    - `names`: the file of each document, with `/` between folders.
    - `starts`, `sizes`: int64 `[documents]`, where each document is in its file, in
        bytes.
    - `file_sizes`: int64 `[documents]`, the sizes of the whole files, by which changes
        of a file are detected.
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
        """The total size of all documents."""
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
        """Return the bytes `[start, stop)` of a document.

        **Raises:** `RuntimeError` if the size of the file has changed since the corpus
        was made; `ValueError` if the document has no such bytes.
        """
        if not 0 <= start <= stop <= self.sizes[document]:
            raise ValueError(
                f"Corpus.read: bytes {start} to {stop} of {self.names[document]!r}, "
                f"which has {self.sizes[document]}."
            )
        # If a mapped file is truncated, access to the lost bytes kills the process
        # (SIGBUS); a read only returns fewer bytes.
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
            "Positions in the corpus are no longer valid: leave the files alone while "
            "they are used, and make the corpus again."
        )

    def take(self, documents: np.ndarray) -> "Corpus":
        """Return the corpus of some of the documents, int `[n]`, in that order."""
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
        """Split into training and validation documents, none in both.

        A document is for validation if a hash of `seed` and its name is in the lowest
        `fraction` of all possible hashes, so it stays where it is when others are
        added. If that leaves one side empty, the document nearest to the limit changes
        sides. A single document is cut in two instead, at the end of a line.

        **Arguments:** `fraction`, the expected fraction of the documents in validation
        (of the bytes, for a single document), in (0, 1); `seed`, an integer.

        **Returns:** `(train, validation)`.

        **Raises:** `TypeError`, `ValueError` for wrong arguments, or a single document
        of a single byte.
        """
        if not isinstance(fraction, int | float) or not 0 < fraction < 1:
            raise ValueError(
                f"Corpus.split: `fraction` is {fraction!r:.80}, expected a number "
                "between 0 and 1, both excluded: the fraction for validation. For "
                "training without validation use the corpus itself."
            )
        check_whole_count("Corpus.split", "seed", seed)
        if len(self) == 1:
            return self._cut(fraction)
        hashes = [stable_hash("split", seed, name) / 2**64 for name in self.names]
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
        line, newline, _ = self.read(0, at, min(at + MAX_LINE, size)).partition(b"\n")
        if newline and at + len(line) + 1 < size:
            at += len(line) + 1
        before = dataclasses.replace(self, sizes=np.full(1, at, np.int64))
        after = dataclasses.replace(
            self, starts=self.starts + at, sizes=self.sizes - at
        )
        return before, after


# Written at installation, and therefore different on each machine.
LOCAL = ("_sysconfigdata", "sitecustomize.py", "usercustomize.py")
LOCAL_FOLDERS = ("site-packages", "dist-packages", "config-")


def find_corpus(path: str | os.PathLike[str] | None = None) -> Corpus:
    """Find the documents at a path: every file is one, whatever its content.

    Of the files, only the sizes are read. Empty ones have nothing to predict and are
    left out. The order is that of the names relative to the root, by code points.

    **Arguments:**

    - `path`: a file; a folder, of which every file at any depth is taken, except
        hidden ones (names that start with a dot) and folders that are symbolic links;
        or a pattern with `*`, `?`, `[...]` and `**` for any depth. `~` is expanded.
        Defaults to the source of Python's own standard library, about 30 MB of `*.py`,
        which is the same in all complete installations of a version of Python (some
        distributions leave out its tests).

    **Returns:** a [`Corpus`][pararnn.training.Corpus].

    **Raises:** `TypeError` if `path` is not a path; `FileNotFoundError` if nothing is
    there; `OSError` if a file cannot be read; `ValueError` if all files are empty.
    """
    if path is None:
        looked, (root, files) = "the standard library", _standard_library()
    else:
        looked = f"`path={os.fspath(_check_path(path))!r}`"
        root, files = _look_up(os.fspath(path), looked)
    if not files:
        raise FileNotFoundError(
            f"find_corpus: no files at {looked}; looked below {str(root)!r}. Likely "
            "causes: (a) a pattern without `**` matches in one folder only; (b) all "
            "files are hidden, or in hidden folders."
        )
    names = sorted({_name(file, root) for file in files})
    sizes = np.array([_size(root / name) for name in names], np.int64)
    if not sizes.any():
        raise ValueError(
            f"find_corpus: all {len(names)} files at {looked} are empty, {names[0]!r} "
            "for instance. Likely cause: an interrupted download or copy."
        )
    kept = tuple(name for name, size in zip(names, sizes, strict=True) if size)
    sizes = sizes[sizes > 0]
    return Corpus(root, kept, np.zeros_like(sizes), sizes, sizes)


def _check_path(path) -> str | os.PathLike[str]:
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise TypeError(
            f"find_corpus: `path` is {path!r:.80}, expected a string or a `Path`: a "
            "file, a folder, or a pattern. For several, give a pattern that fits all."
        )
    return path


def _look_up(text: str, looked: str) -> tuple[Path, list[str]]:
    """Return the root, and the files below it."""
    path = os.path.expanduser(text)
    # A name may look like a pattern; if it exists, it is a name.
    if os.path.isfile(path):
        return Path(os.path.dirname(path) or "."), [path]
    if os.path.isdir(path):
        return Path(path), _walk(path)
    if glob.has_magic(path):
        found = glob.glob(path, recursive=True)
        return _literal_folder(path), [
            file for file in found if not os.path.isdir(file)
        ]
    raise FileNotFoundError(
        f"find_corpus: nothing at {looked}: there is no file and no folder {path!r} "
        f"(from {os.getcwd()!r}), and it is not a pattern. Without `path` the corpus "
        "is the source of Python's standard library."
    )


def _walk(folder: str) -> list[str]:
    files = []
    for inner, folders, names in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(inner, n) for n in names if not n.startswith(".")]
    return files


def _literal_folder(pattern: str) -> Path:
    """Return the folder before the first wildcard."""
    parts = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _standard_library() -> tuple[Path, list[str]]:
    root = sysconfig.get_paths()["stdlib"]
    files = []
    for file in _walk(root):
        *folders, name = Path(file).relative_to(root).parts
        local = any(folder.startswith(LOCAL_FOLDERS) for folder in folders)
        if name.endswith(".py") and not local and not name.startswith(LOCAL):
            files.append(file)
    return Path(root), files


def _name(file: str, root: Path) -> str:
    return Path(os.path.relpath(file, root)).as_posix()


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError as error:
        _raise_unreadable(error)
    if not stat.S_ISREG(status.st_mode) or not os.access(path, os.R_OK):
        _raise_unreadable(
            PermissionError(f"{str(path)!r} is not a regular file, or not readable")
        )
    return status.st_size


def _raise_unreadable(error: OSError) -> NoReturn:
    raise OSError(
        f"find_corpus: a file or folder of the corpus cannot be read: {error}. "
        "Likely causes: (a) a symbolic link to nothing; (b) missing permissions; (c) a "
        "pipe or a device. Remove it, or give a pattern that leaves it out."
    ) from error


def stable_hash(purpose: str, seed: int, name: str) -> int:
    """Return 64 random bits that depend only on a purpose, a seed and a name.

    They are the same on every machine, with any version of any library, which NumPy's
    generators do not promise, and whatever other names there are.
    """
    text = f"{purpose}\0{seed}\0{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
