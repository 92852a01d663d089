"""What was read before: symbols, values of keys, and numbers."""

import jax.numpy as jnp
import jax.random as jr

from ..._parameters import check_size
from ._task import Example, Lengths, Metric, Sampler, Task, integers, within


def _copying(symbols: int, items: int, selective: bool) -> Sampler:
    """Sample tokens: `[0, symbols)` are to be copied; then a blank and the signal."""
    blank, signal = symbols, symbols + 1

    def sample(key, size, length):
        length = jnp.maximum(length.astype(jnp.int32), 2 * items + 1)
        draw, scatter = jr.split(key)
        copied = integers(draw, items, symbols)
        step = jnp.arange(size, dtype=jnp.int32)
        start = length - items
        places = jnp.arange(items, dtype=jnp.int32)
        if selective:
            # The places of the smallest random numbers are a random subset.
            chance = jr.uniform(scatter, (size,), jnp.float32)
            order = jnp.argsort(jnp.where(step < start - 1, chance, jnp.inf))
            places = jnp.sort(order[:items]).astype(jnp.int32)
        inputs = jnp.full(size, blank, jnp.int32).at[places].set(copied)
        inputs = jnp.where(step == start - 1, signal, inputs)
        targets = copied[jnp.clip(step - start, 0, items - 1)]
        return Example(inputs, targets, (step >= start) & within(size, length))

    return sample


def _task(name: str, symbols, items, selective: bool, source: str, which: str) -> Task:
    symbols = check_size(name, "symbols", symbols, 2)
    items = check_size(name, "items", items)
    least = 2 * items + 1

    def lengths(*test: int) -> Lengths:
        return Lengths((least, least + test[0]), tuple(least + n for n in test))

    return Task(
        name=name,
        summary=f"{items} symbols {which}, blanks, a signal; then the symbols have to "
        "be repeated in order.",
        source=source,
        differs="Sequences are shorter, and of random length in training.",
        vocabulary=symbols + 2,
        outputs=symbols,
        metric=Metric("accuracy", 1 / symbols),
        lengths=lengths(100, 200, 400),
        short=lengths(40, 80, 160),
        scored="all",
        train=_copying(symbols, items, selective),
    )


def copying(*, symbols: int = 8, items: int = 10) -> Task:
    """Symbols at the beginning, to be repeated at the end."""
    source = "Hochreiter and Schmidhuber (1997), as in Arjovsky et al. (1511.06464)"
    return _task("copying", symbols, items, False, source, "at the beginning")


def selective_copying(*, symbols: int = 8, items: int = 10) -> Task:
    """Symbols scattered among blanks, to be repeated at the end."""
    source = 'Gu and Dao, "Mamba" (2312.00752), section 4.1'
    return _task("selective_copying", symbols, items, True, source, "among blanks")


def _recall(keys: int, values: int) -> Sampler:
    """Sample tokens: `[0, keys)` are keys, those after them values."""

    def sample(key, size, length):
        order, draw, ask = jr.split(key, 3)
        # A quarter of the steps are keys, a quarter their values, the rest queries.
        pairs = jnp.maximum(length.astype(jnp.int32) // 4, 1)
        names = jr.permutation(order, jnp.arange(keys, dtype=jnp.int32))
        held = integers(draw, keys, values)
        step = jnp.arange(size, dtype=jnp.int32)
        query = step >= 2 * pairs
        pair = jnp.where(query, integers(ask, size, pairs), step // 2)
        pair = jnp.minimum(pair, keys - 1)
        is_value = ~query & (step % 2 == 1)
        inputs = jnp.where(is_value, keys + held[pair], names[pair])
        return Example(inputs, held[pair], query & within(size, length))

    return sample


def mqar(*, keys: int = 64, values: int = 64) -> Task:
    """Pairs of a key and a value, then keys, whose values have to be recalled."""
    keys = check_size("mqar", "keys", keys, 2)
    values = check_size("mqar", "values", values, 2)
    lengths, short = (
        Lengths((16, 128), (64, 128, 256)),
        Lengths((16, 64), (32, 64, 128)),
    )
    longest = 4 * keys
    if longest < lengths.test[-1]:
        raise ValueError(
            f"mqar: `keys` is {keys}, but sequences of {lengths.test[-1]} steps hold "
            f"{lengths.test[-1] // 4} different keys. Take at least that many."
        )
    return Task(
        name="mqar",
        summary="A quarter as many pairs of key and value as there are steps; then "
        "keys are asked for at random, and the answer is the value.",
        source='Arora et al., "Zoology" (2312.04927)',
        differs="Queries are uniform over the keys and fill the second half. In the "
        "source, few queries stand among fillers, and early ones are likelier.",
        vocabulary=keys + values,
        outputs=values,
        metric=Metric("accuracy", 1 / values),
        lengths=lengths,
        short=short,
        scored="all",
        train=_recall(keys, values),
    )


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
    """The sum of the two marked numbers among random ones."""
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
    """Sample sequences of one signal, which begin within `starts` steps of `start`."""

    def sample(key, size, length):
        begin = start + jr.randint(key, (), 0, starts, jnp.int32)
        time = begin + jnp.arange(size + 1, dtype=jnp.int32)
        # Whole steps, so that phases are precise in float32 at all times used here.
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
            f"oscillators: `count` is {count}; there are frequencies for at most "
            f"{len(FREQUENCIES)}."
        )
    window = 100
    return Task(
        name="oscillators",
        summary=f"The next value of a sum of {count} sines.",
        source="Multiple superimposed oscillators: Jaeger (2004); eight of them in "
        "Roeschies and Igel (2010)",
        differs="The next step is predicted, from sequences of the first "
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
