"""Handwritten digits, one pixel after the other."""

import importlib

import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from ._metric import Metric
from ._task import Example, Lengths, Task

# Of the images, for training and for validation; the rest is the test.
TRAIN, VALIDATION = 0.7, 0.1


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Pixels, float32 `[images, 64]` in [0, 1], and classes, int32 `[images]`."""
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
    """A random image; a pytree of its first two arguments."""
    image = jr.randint(key, (), 0, len(classes), jnp.int32)
    inputs = jnp.zeros((size, 1), pixels.dtype).at[: pixels.shape[1], 0]
    # No other length has a meaning: an image is a sequence of all its pixels.
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
