"""Raw data: the pixels of images, and the bytes of Python's standard library."""

import ast
import functools
import hashlib
import importlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..._parameters import check_size
from ._task import Example, Lengths, Metric, Sampler, Task, within

# Fractions of the images for training and for validation; the rest is the test.
TRAIN, VALIDATION = 0.7, 0.1


def _load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Load pixels, float32 `[images, 64]` in [0, 1], and classes, int32 `[images]`."""
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise ImportError(
            "digits: the images come with scikit-learn, which is not installed: "
            "`pip install 'pararnn[compare]'`, or `pip install scikit-learn`. Or leave "
            "this task out."
        ) from error
    digits = datasets.load_digits()
    pixels = np.asarray(digits.images, np.float32).reshape(len(digits.target), -1)
    return pixels / 16, np.asarray(digits.target, np.int32)


def _draw_digit(pixels, classes, key, size, length):
    """Draw a random image; as a sampler, a pytree of its first two arguments."""
    image = jr.randint(key, (), 0, len(classes), jnp.int32)
    inputs = jnp.zeros((size, 1), pixels.dtype).at[: pixels.shape[1], 0]
    # An image is always a sequence of all its pixels, whatever `length` says.
    last = jnp.arange(size, dtype=jnp.int32) == pixels.shape[1] - 1
    return Example(
        inputs.set(pixels[image]), jnp.full(size, classes[image], jnp.int32), last
    )


def digits(*, permuted: bool = False) -> Task:
    """Which digit an image of 8 by 8 pixels shows, read pixel by pixel."""
    pixels, classes = _load_digits()
    generator = np.random.default_rng(0)
    order = generator.permutation(len(classes))
    if permuted:
        pixels = pixels[:, generator.permutation(pixels.shape[1])]
    ends = (np.cumsum([TRAIN, VALIDATION]) * len(classes)).astype(int)
    train, validation, test = (
        jtu.Partial(_draw_digit, jnp.asarray(pixels[part]), jnp.asarray(classes[part]))
        for part in np.split(order, ends)
    )
    size = pixels.shape[1]
    how = "in one random order" if permuted else "row by row"
    return Task(
        name="digits",
        summary=f"Which digit an image of 8 by 8 pixels shows, read {how}.",
        source="The digits of scikit-learn (Alpaydin and Kaynak, 1998), pixel by pixel "
        "as in Le et al. (1504.00941)",
        differs="8 by 8 pixels instead of MNIST's 28 by 28.",
        features=1,
        outputs=10,
        metric=Metric("accuracy", 1 / 10),
        lengths=Lengths((size, size), (size,)),
        scored="all",
        image=not permuted,
        train=train,
        validation=validation,
        test=test,
    )


# In pixels: half the arrow, its barbs, half the width of a line, the disc's radius, and
# the distance of centres from the border and, if there is room, from each other.
SHAFT, BARB, THICK, RADIUS, MARGIN, APART = 3.0, 2.5, 0.5, 2.0, 4.0, 8.0
# In radians: the angle between barbs and shaft, and how far an arrow that points
# elsewhere is off at least.
SPREAD, OFF = 0.6, jnp.pi / 6
# How many pairs of places are drawn, to find one that is far enough apart.
TRIES = 16


class Scene(NamedTuple):
    """Centres of arrow and disc in pixels from the upper left corner, rows first, the
    direction of the arrow, and whether it points at the disc."""

    arrow: Float[Array, "2"]
    disc: Float[Array, "2"]
    heading: Float[Array, "2"]
    points: Bool[Array, ""]


def draw_scene(key: PRNGKeyArray, extent: Float[Array, ""]) -> Scene:
    """Draw an arrow and a disc on a square of `extent` pixels; half of the arrows point
    at the disc, and the others are at least 30 degrees off."""
    place, turn, choice = jr.split(key, 3)
    pairs = MARGIN + jr.uniform(place, (TRIES, 2, 2)) * (extent - 2 * MARGIN)
    apart = jnp.linalg.norm(pairs[:, 1] - pairs[:, 0], axis=-1)
    arrow, disc = pairs[jnp.argmax(jnp.minimum(apart, APART))]
    towards = (disc - arrow) / jnp.linalg.norm(disc - arrow)
    points = jr.bernoulli(choice)
    off = jr.uniform(turn, minval=OFF, maxval=2 * jnp.pi - OFF)
    heading = _rotate(towards, jnp.where(points, 0.0, off))
    return Scene(arrow, disc, heading, points)


def render(scene: Scene, pixels: Float[Array, "*pixels 2"]) -> Float[Array, "*pixels"]:
    """Return the brightness at the centres of pixels, from 0 to 1."""
    tip, tail = scene.arrow + SHAFT * scene.heading, scene.arrow - SHAFT * scene.heading
    strokes = [(tail, tip)]
    for side in (SPREAD, -SPREAD):
        strokes.append((tip, tip - BARB * _rotate(scene.heading, side)))
    inside = [THICK - _distance(pixels, *stroke) for stroke in strokes]
    inside.append(RADIUS - jnp.linalg.norm(pixels - scene.disc, axis=-1))
    # A pixel whose centre lies on an edge is half covered.
    return jnp.clip(jnp.max(jnp.stack(inside), 0) + 0.5, 0, 1)


def _rotate(v: Float[Array, "2"], angle) -> Float[Array, "2"]:
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([c * v[0] - s * v[1], s * v[0] + c * v[1]])


def _distance(pixels, start, end) -> Array:
    """Return the distance of every pixel from the line between two places."""
    line = end - start
    along = jnp.sum((pixels - start) * line, -1) / jnp.sum(line**2)
    nearest = start + jnp.clip(along, 0, 1)[..., None] * line
    return jnp.linalg.norm(pixels - nearest, axis=-1)


def _pixels(size: int, side: Int[Array, ""], patch: int) -> Float[Array, "T d 2"]:
    """Return the centres of the pixels of each patch, both row by row."""
    step = jnp.arange(size, dtype=jnp.int32)
    corner = patch * jnp.stack([step // side, step % side], -1)
    inner = jnp.arange(patch * patch, dtype=jnp.int32)
    offset = jnp.stack([inner // patch, inner % patch], -1)
    return (corner[:, None] + offset[None]).astype(float) + 0.5


def _images(patch: int) -> Sampler:
    def sample(key, size, length):
        side = jnp.floor(jnp.sqrt(length.astype(float) + 0.5)).astype(jnp.int32)
        with jax.numpy_rank_promotion("allow"):
            scene = draw_scene(key, (patch * side).astype(float))
            image = render(scene, _pixels(size, side, patch))
        shown = within(size, length)
        step = jnp.arange(size, dtype=jnp.int32)
        return Example(
            jnp.where(shown[:, None], image, 0).astype(jnp.float32),
            jnp.full(size, scene.points, jnp.int32),
            step == length.astype(jnp.int32) - 1,
        )

    return sample


def arrow_pointing(*, patch: int = 4) -> Task:
    """Whether an arrow points at a disc, in images of `patch * patch` pixels a step."""
    patch = check_size("arrow_pointing", "patch", patch, 2)
    return Task(
        name="arrow_pointing",
        summary=f"Whether an arrow in an image points at a disc, read by patches of "
        f"{patch} by {patch} pixels, row by row; asked at the last patch.",
        source='Pöppel et al., "pLSTM" (2506.11997), arrow pointing extrapolation',
        differs="Images of 12 by 12 patches instead of 192 by 192 pixels, and larger "
        "ones in the test, with arrow and disc of the same size in pixels; 8 by 8 "
        "patches in a small budget. The answer is read at the last patch instead of "
        "from all of them.",
        features=patch * patch,
        outputs=2,
        metric=Metric("scaled accuracy", 1 / 2),
        lengths=Lengths((144, 144), (144, 196, 256, 576)),
        short=Lengths((64, 64), (64, 100, 144)),
        scored="all",
        image=True,
        train=_images(patch),
    )


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
