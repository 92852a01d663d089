"""Real bytes: the source of Python's standard library, as text and by package."""

import ast
import functools
import hashlib
from collections.abc import Sequence

import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from ..._parameters import check_size
from ._task import Example, Lengths, Metric, Task, within

PACKAGES = (
    "asyncio",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "xml",
)
PAD = 256
# Functions of fewer bytes say little about their package.
SHORTEST = 64
SOURCE = "The bytes of the standard library that runs this"


def _corpus():
    # This also imports grain and Orbax, which other tasks do not need.
    from ...training.data import find_corpus

    return find_corpus()


def _split(names: Sequence[bytes]) -> np.ndarray:
    """Return 0 (training), 1 (validation) or 2 (test) for each name, by its hash."""
    hashes = [hashlib.sha256(name).digest()[:8] for name in names]
    fractions = np.array([int.from_bytes(h, "big") / 2**64 for h in hashes])
    return np.digitize(fractions, (0.8, 0.9))


def _read_window(data, ends, key, size, length):
    """Draw a sequence from a stream; its mask ends where the first document does."""
    start = jr.randint(key, (), 0, len(data) - size - 1, jnp.int32)
    step = start + jnp.arange(size + 1, dtype=jnp.int32)
    window = data[step].astype(jnp.int32)
    end = ends[jnp.searchsorted(ends, start, side="right")]
    mask = within(size, length) & (step[1:] < end)
    return Example(window[:-1], window[1:], mask)


@functools.cache
def _streams(megabytes: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Return bytes, and where documents end, for training, validation and test."""
    corpus = _corpus()
    sides = _split([name.encode() for name in corpus.names])
    order = np.random.default_rng(0).permutation(len(corpus))
    streams = []
    for side, share in enumerate((0.8, 0.1, 0.1)):
        limit, parts, total = share * megabytes * 2**20, [], 0
        for document in order[sides[order] == side]:
            if total >= limit:
                break
            parts.append(corpus.read(document, 0, int(corpus.sizes[document])))
            total += len(parts[-1])
        ends = np.cumsum([len(part) for part in parts]).astype(np.int32)
        streams.append((np.frombuffer(b"".join(parts), np.uint8), ends))
    return tuple(streams)


def library_text(*, megabytes: int = 4) -> Task:
    """The next byte of Python source."""
    megabytes = check_size("library_text", "megabytes", megabytes)
    train, validation, test = (
        jtu.Partial(_read_window, jnp.asarray(data), jnp.asarray(ends))
        for data, ends in _streams(megabytes)
    )
    return Task(
        name="library_text",
        summary=f"The next byte of Python source, learned from {megabytes} megabytes; "
        "training, validation and test are of different files.",
        source=SOURCE,
        vocabulary=256,
        outputs=256,
        metric=Metric("bits per byte", 8.0),
        lengths=Lengths((256, 256), (256, 512, 1024)),
        short=Lengths((128, 128), (128, 256)),
        scored="prefixes",
        train=train,
        validation=validation,
        test=test,
    )


def _functions(source: bytes) -> list[bytes]:
    """Return the source of every function and method that is not inside another."""
    lines, found = source.splitlines(keepends=True), []

    def visit(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append(b"".join(lines[child.lineno - 1 : child.end_lineno]))
            else:
                visit(child)

    visit(ast.parse(source))
    return [text for text in found if len(text) >= SHORTEST]


@functools.cache
def _functions_by_package() -> tuple[tuple[tuple[bytes, ...], ...], ...]:
    """Return the functions of every package, for training, validation and test."""
    corpus = _corpus()
    found = [[[] for _ in PACKAGES] for _ in range(3)]
    for document, name in enumerate(corpus.names):
        package = name.split("/")[0]
        if package in PACKAGES and "/" in name:
            text = corpus.read(document, 0, int(corpus.sizes[document]))
            functions = _functions(text)
            # Some packages have few files, so functions are split rather than files.
            # All copies of a function are on the same side.
            for side, function in zip(_split(functions), functions, strict=True):
                found[side][PACKAGES.index(package)].append(function)
    return tuple(tuple(map(tuple, side)) for side in found)


def _pack(packages: tuple[tuple[bytes, ...], ...], size: int):
    """Return the first `size` bytes of functions, int16 `[packages, functions, size]`
    padded with `PAD`, their lengths, and how many functions a package has."""
    counts = np.array([len(functions) for functions in packages], np.int32)
    texts = np.full((len(packages), counts.max(), size), PAD, np.int16)
    lengths = np.zeros(texts.shape[:2], np.int32)
    for i, functions in enumerate(packages):
        for j, function in enumerate(functions):
            cut = np.frombuffer(function[:size], np.uint8)
            texts[i, j, : len(cut)] = cut
            lengths[i, j] = len(cut)
    return tuple(map(jnp.asarray, (texts, lengths, counts)))


def _classify(texts, lengths, counts, key, size, length):
    which, draw = jr.split(key)
    # All packages are equally likely, however many functions they have.
    package = jr.randint(which, (), 0, len(counts), jnp.int32)
    function = jr.randint(draw, (), 0, counts[package], jnp.int32)
    inputs = texts[package, function, :size].astype(jnp.int32)
    end = jnp.minimum(lengths[package, function], length.astype(jnp.int32))
    inputs = jnp.where(within(size, end), inputs, PAD)
    last = jnp.arange(size, dtype=jnp.int32) == end - 1
    return Example(inputs, jnp.full(size, package), last)


def library_package() -> Task:
    """Which package of the standard library a function's source comes from."""
    sides = _functions_by_package()
    empty = {p for side in sides for p, f in zip(PACKAGES, side, strict=True) if not f}
    if empty:
        raise ValueError(
            f"library_package: no functions in {', '.join(sorted(empty))}. Likely "
            "cause: this Python was installed without the source of parts of its "
            "library. Install all of it, or leave this task out."
        )
    lengths, short = (
        Lengths((256, 256), (64, 128, 256, 512)),
        Lengths((128, 128), (64, 128, 256)),
    )
    train, validation, test = (
        jtu.Partial(_classify, *_pack(side, lengths.test[-1])) for side in sides
    )
    return Task(
        name="library_package",
        summary="Which of "
        f"{len(PACKAGES)} packages of the standard library ({', '.join(PACKAGES)}) a "
        "function's source comes from, after its last byte, or the last within the "
        "length; training, validation and test are different functions.",
        source=SOURCE,
        vocabulary=PAD + 1,
        outputs=len(PACKAGES),
        metric=Metric("accuracy", 1 / len(PACKAGES)),
        lengths=lengths,
        short=short,
        scored="all",
        train=train,
        validation=validation,
        test=test,
    )
