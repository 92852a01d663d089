"""Widths at which all layers have about as many parameters."""

import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.random as jr

from ._layers import heads
from ._model import SequenceModel, count_parameters, count_state
from .tasks import Task

# Widths are multiples of it, and of the heads.
GRAIN = 8


class Size(NamedTuple):
    """Widths, the number of parameters, and of real numbers in the state."""

    d_model: int
    d_hidden: int
    parameters: int
    state: int


def fit_size(task: Task, layer: str, depth: int, parameters: int) -> Size:
    """The widths at which a model has as many parameters as it should.

    The widest model whose MLPs are twice as wide and that has no more parameters, by
    bisection; then the width of the MLPs that comes nearest to the number.

    **Arguments:** `task`; `layer`, as for `pararnn.make_mixer`; `depth`, number of
    blocks; `parameters`, the number to reach.

    **Raises:** `ValueError` if the narrowest model has more parameters.
    """

    def shapes(d_model: int, d_hidden: int) -> SequenceModel:
        return eqx.filter_eval_shape(
            lambda: SequenceModel(task, layer, d_model, d_hidden, depth, key=jr.key(0))
        )

    def count(d_model: int, d_hidden: int) -> int:
        return count_parameters(shapes(d_model, d_hidden))

    grain = math.lcm(GRAIN, heads(layer))
    least = count(grain, 2 * grain)
    if least > parameters:
        raise ValueError(
            f"fit_size: {layer!r} on {task.name!r} has {least:,} parameters at the "
            f"smallest width, {grain}, but `parameters` is {parameters:,}. Ask for at "
            "least so many, or give the layer smaller options."
        )
    width = grain * _largest(lambda n: count(n * grain, 2 * n * grain) <= parameters)
    hidden = _largest(lambda n: count(width, n) <= parameters)
    above, below = count(width, hidden + 1), count(width, hidden)
    hidden += above - parameters < parameters - below
    model = shapes(width, hidden)
    return Size(width, hidden, count_parameters(model), count_state(model))


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest n >= 1 that fits, if 1 does and fitting is monotone."""
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
