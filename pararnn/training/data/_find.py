"""Which files a path stands for, in an order that every machine agrees on."""

import glob
import os
import stat
import sysconfig
from pathlib import Path
from typing import NoReturn

import numpy as np

from ._corpus import Corpus

# Written at installation, and so another text on each machine.
LOCAL = ("_sysconfigdata", "sitecustomize.py", "usercustomize.py")
LOCAL_FOLDERS = ("site-packages", "dist-packages", "config-")


def find_corpus(path: str | os.PathLike[str] | None = None) -> Corpus:
    """The documents at a path: every file is one, of any content.

    Files are looked at only for their size. Empty ones hold nothing to predict and are
    left out. The order is that of the names relative to the root, by code points.

    **Arguments:**

    - `path`: a file; a folder, of which every file below is taken, except hidden ones
        (names that start with a dot) and folders behind symbolic links; or a pattern
        with `*`, `?`, `[...]` and `**` for any depth. `~` is expanded. Not given: the
        source of Python's own standard library, some 30 MB of `*.py`, which is the
        same wherever the same version of Python was installed whole (some
        distributions leave its tests out).

    **Returns:** a [`Corpus`][pararnn.training.Corpus].

    **Raises:** `TypeError` if `path` is no path; `FileNotFoundError` if nothing is
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
            "causes: (a) a pattern without `**` looks into one folder only; (b) all "
            "files are hidden, or in hidden folders."
        )
    names = sorted({_name(file, root) for file in files})
    sizes = np.array([_size(root / name) for name in names], np.int64)
    if not sizes.any():
        raise ValueError(
            f"find_corpus: all {len(names)} files at {looked} are empty, {names[0]!r} "
            "for instance. Likely cause: a download or a copy that was interrupted."
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
    """The root, and the files below it."""
    path = os.path.expanduser(text)
    # A name may look like a pattern; what exists is meant.
    if os.path.isfile(path):
        return Path(os.path.dirname(path) or "."), [path]
    if os.path.isdir(path):
        return Path(path), _walk(path)
    if glob.has_magic(path):
        found = glob.glob(path, recursive=True)
        return _fixed_part(path), [file for file in found if not os.path.isdir(file)]
    raise FileNotFoundError(
        f"find_corpus: nothing at {looked}: there is no file and no folder {path!r} "
        f"(seen from {os.getcwd()!r}), and it is no pattern. Without `path` the corpus "
        "is the source of Python's standard library."
    )


def _walk(folder: str) -> list[str]:
    files = []
    for inner, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [os.path.join(inner, n) for n in names if not n.startswith(".")]
    return files


def _fixed_part(pattern: str) -> Path:
    """The folder in front of the first wildcard."""
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
        _refuse(error)
    if not stat.S_ISREG(status.st_mode) or not os.access(path, os.R_OK):
        _refuse(PermissionError(f"{str(path)!r} is no regular file, or not readable"))
    return status.st_size


def _refuse(error: OSError) -> NoReturn:
    raise OSError(
        f"find_corpus: a file or folder of the corpus cannot be read: {error}. "
        "Likely causes: (a) a symbolic link to nothing; (b) missing permissions; (c) a "
        "pipe or a device. Remove it, or give a pattern that leaves it out."
    ) from error
