"""Numbers from numbers: the adding problem and superimposed oscillators."""

import jax.numpy as jnp
import jax.random as jr

from ..._parameters import check_size
from ._draw import within
from ._metric import Metric
from ._task import Example, Lengths, Sampler, Task


def _add(key, size, length):
    length = jnp.maximum(length.astype(jnp.int32), 2)
    draw, early, late = jr.split(key, 3)
    values = jr.uniform(draw, (size,), jnp.float32)
    half = length // 2
    first = jr.randint(early, (), 0, half, jnp.int32)
    second = jr.randint(late, (), half, length, jnp.int32)
    step = jnp.arange(size, dtype=jnp.int32)
    marked = (step == first) | (step == second)
    total = jnp.sum(jnp.where(marked, values, 0))
    inputs = jnp.stack([values, marked.astype(jnp.float32)], -1)
    return Example(inputs, jnp.full(size, total), step == length - 1)


def adding() -> Task:
    """The sum of the two marked ones among random numbers."""
    return Task(
        name="adding",
        summary="The sum of two marked numbers, one in each half of random numbers in "
        "[0, 1].",
        source="Hochreiter and Schmidhuber (1997), experiment 4, as in Arjovsky et al. "
        "(1511.06464)",
        differs="Lengths in training are random, and the test goes beyond them.",
        features=2,
        outputs=1,
        # The variance of a sum of two uniform numbers.
        metric=Metric("mean squared error", 2 / 12),
        lengths=Lengths((50, 100), (100, 200, 400)),
        short=Lengths((20, 40), (40, 80, 160)),
        scored="all",
        train=_add,
    )


# Frequencies in the order in which the literature adds them.
FREQUENCIES = (0.2, 0.311, 0.42, 0.51, 0.63, 0.74, 0.85, 0.97)
SEEN = 400


def _oscillate(count: int, start: int, starts: int) -> Sampler:
    """Windows of one signal that begin at a time of `starts` from `start` on."""

    def sample(key, size, length):
        begin = start + jr.randint(key, (), 0, starts, jnp.int32)
        time = begin + jnp.arange(size + 1, dtype=jnp.int32)
        # Phases of whole steps, within float32 at any time that is reached here.
        angle = time.astype(jnp.float32)[:, None] * jnp.asarray(
            FREQUENCIES[:count], jnp.float32
        ).reshape(1, count)
        signal = jnp.sum(jnp.sin(angle), -1)
        return Example(signal[:-1, None], signal[1:], within(size, length))

    return sample


def oscillators(*, count: int = 5) -> Task:
    """The next value of a sum of sines whose frequencies have no common period."""
    count = check_size("oscillators", "count", count)
    if count > len(FREQUENCIES):
        raise ValueError(
            f"oscillators: `count` is {count}; frequencies are known for up to "
            f"{len(FREQUENCIES)}."
        )
    window = 100
    return Task(
        name="oscillators",
        summary=f"The next value of a sum of {count} sines.",
        source="Multiple superimposed oscillators: Jaeger (2004); eight of them in "
        "Roeschies and Igel (2010)",
        differs="One step ahead is predicted, from windows of the first "
        f"{SEEN} steps in training and of later ones in the test, instead of running "
        "freely.",
        features=1,
        outputs=1,
        # The variance of sines.
        metric=Metric("mean squared error", count / 2),
        lengths=Lengths((window, window), (100, 200, 400)),
        short=Lengths((window, window), (100, 200)),
        scored="prefixes",
        train=_oscillate(count, 0, SEEN - window),
        validation=_oscillate(count, SEEN, SEEN),
        test=_oscillate(count, 3 * SEEN, SEEN),
    )
