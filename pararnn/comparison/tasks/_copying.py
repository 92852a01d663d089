"""Copying, and selective copying."""

import jax.numpy as jnp
import jax.random as jr

from ..._parameters import check_size
from ._draw import integers, within
from ._metric import Metric
from ._task import Example, Lengths, Sampler, Task


def _copying(symbols: int, items: int, selective: bool) -> Sampler:
    """Tokens `[0, symbols)` are what is to be copied, then a blank and the signal."""
    blank, signal = symbols, symbols + 1

    def sample(key, size, length):
        length = jnp.maximum(length.astype(jnp.int32), 2 * items + 1)
        draw, scatter = jr.split(key)
        copied = integers(draw, items, symbols)
        step = jnp.arange(size, dtype=jnp.int32)
        start = length - items
        places = jnp.arange(items, dtype=jnp.int32)
        if selective:
            # The places of the smallest of random numbers are a random subset.
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
        summary=f"{items} symbols {which}, blanks, a signal; then the symbols are to "
        "be said in order.",
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
    """Symbols at the beginning, to be said again at the end."""
    source = "Hochreiter and Schmidhuber (1997), as in Arjovsky et al. (1511.06464)"
    return _task("copying", symbols, items, False, source, "at the beginning")


def selective_copying(*, symbols: int = 8, items: int = 10) -> Task:
    """Symbols scattered among blanks, to be said again at the end."""
    source = 'Gu and Dao, "Mamba" (2312.00752), section 4.1'
    return _task("selective_copying", symbols, items, True, source, "among blanks")
