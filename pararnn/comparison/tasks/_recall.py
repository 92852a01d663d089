"""Multi-query associative recall."""

import jax.numpy as jnp
import jax.random as jr

from ..._parameters import check_size
from ._draw import integers, within
from ._metric import Metric
from ._task import Example, Lengths, Sampler, Task


def _recall(keys: int, values: int) -> Sampler:
    """Tokens `[0, keys)` are keys, those behind them values."""

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
    """Pairs of a key and a value, then keys, to which the values are to be said."""
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
            f"{lengths.test[-1] // 4} different keys. Take at least so many."
        )
    return Task(
        name="mqar",
        summary="A quarter as many pairs of key and value as there are steps; then "
        "keys are asked for at random, and the answer is the value.",
        source='Arora et al., "Zoology" (2312.04927)',
        differs="Queries are uniform over the keys and fill the second half, where the "
        "source spreads few of them, the sooner the likelier, among fillers.",
        vocabulary=keys + values,
        outputs=values,
        metric=Metric("accuracy", 1 / values),
        lengths=lengths,
        short=short,
        scored="all",
        train=_recall(keys, values),
    )
