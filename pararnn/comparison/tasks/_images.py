"""Images, read as sequences: handwritten digits, and arrow pointing."""

import importlib
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


def _load() -> tuple[np.ndarray, np.ndarray]:
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


def _draw(pixels, classes, key, size, length):
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
    pixels, classes = _load()
    generator = np.random.default_rng(0)
    order = generator.permutation(len(classes))
    if permuted:
        pixels = pixels[:, generator.permutation(pixels.shape[1])]
    ends = (np.cumsum([TRAIN, VALIDATION]) * len(classes)).astype(int)
    train, validation, test = (
        jtu.Partial(_draw, jnp.asarray(pixels[part]), jnp.asarray(classes[part]))
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
