"""Widths at which all layers have about the same number of parameters."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax.random as jr

from .._registry import parse_spec
from ._model import (
    SequenceModel,
    count_layer_state,
    count_parameters,
    count_state,
    heads,
    make_shapes,
)
from ._protocol import Protocol
from .tasks import Task

# Widths are multiples of this, and of the number of heads.
WIDTH_MULTIPLE = 8
# Options that set the size of a layer's state independently of its width: both sides
# of a head's matrix, or the length of a vector.
STATE_OPTIONS = (("d_key", "d_value"), ("d_state",))


class Size(NamedTuple):
    """The layer with all options, widths, the number of parameters, and the number of
    real numbers that its recurrence carries, without the last inputs for
    convolutions."""

    layer: str
    d_model: int
    d_hidden: int
    parameters: int
    state: int


def fit_size(task: Task, layer: str, protocol: Protocol) -> Size:
    """Find the widths at which a model has the wanted number of parameters.

    First, bisection finds the widest model that has no more parameters with MLPs of
    twice its width; then the width of the MLPs that comes nearest to the number. If the
    protocol has a `state`, the layer gets the largest one up to it, at every width.

    **Arguments:** `task`; `layer`, as from `expand_layer`; `protocol`, for its
    `depth`, `parameters` and `state`.

    **Raises:** `ValueError` if the narrowest model has more parameters, or the layer
    cannot have such a state.
    """
    depth, parameters, state = protocol.depth, protocol.parameters, protocol.state

    @functools.cache
    def spec(d_model: int) -> str:
        return layer if state is None else _with_state(layer, d_model, state)

    def shapes(d_model: int, d_hidden: int) -> SequenceModel:
        return eqx.filter_eval_shape(
            lambda: SequenceModel(
                task, spec(d_model), d_model, d_hidden, depth, key=jr.key(0)
            )
        )

    def count(d_model: int, d_hidden: int) -> int:
        return count_parameters(shapes(d_model, d_hidden))

    multiple = math.lcm(WIDTH_MULTIPLE, heads(layer))
    least = count(multiple, 2 * multiple)
    if least > parameters:
        raise ValueError(
            f"fit_size: {spec(multiple)!r} on {task.name!r} has {least:,} parameters "
            f"at the smallest width, {multiple}, but `parameters` is {parameters:,}. "
            "Ask for at least that many, give the layer smaller options, or ask for a "
            "smaller `state`, if there is one."
        )

    def fits(n: int) -> bool:
        try:
            return count(n * multiple, 2 * n * multiple) <= parameters
        except ValueError:
            # The least possible state of some layers grows with the width.
            return False

    width = multiple * _largest(fits)
    hidden = _largest(lambda n: count(width, n) <= parameters)
    above, below = count(width, hidden + 1), count(width, hidden)
    hidden += above - parameters < parameters - below
    model = shapes(width, hidden)
    return Size(spec(width), width, hidden, count_parameters(model), count_state(model))


def _with_state(layer: str, d_model: int, state: int) -> str:
    """Add the options that make the layer's state the largest up to `state`."""
    options = next((o for o in STATE_OPTIONS if _takes(layer, d_model, o)), None)
    if options is None:
        raise ValueError(
            f"fit_size: a `state` of {state} numbers was asked for, but the state of "
            f"{layer!r} cannot be set independently of its width. It must take `d_key` "
            "and `d_value`, or `d_state`, and not be given them already. Leave out "
            "`state` or the layer."
        )
    multiple = _state_multiple(layer, options)

    def count(n: int) -> int:
        spec = _join(layer, options, n * multiple)
        return count_layer_state(make_shapes(spec, d_model))

    if (least := count(1)) > state or count(2) <= least:
        raise ValueError(
            f"fit_size: {layer!r} has a state of at least {least} numbers at a width "
            f"of {d_model}, but `state` is {state}. Ask for a larger one, or leave out "
            "the layer (one on images has no state)."
        )
    # A state has at least as many numbers as its option says.
    n = _largest(lambda n: count(n) <= state, max(1, state // multiple))
    return _join(layer, options, multiple * n)


def _takes(layer: str, d_model: int, options: tuple[str, ...]) -> bool:
    if any(f"{option}=" in layer for option in options):
        return False
    try:
        make_shapes(_join(layer, options, _state_multiple(layer, options)), d_model)
    except ValueError:
        return False
    return True


def _state_multiple(layer: str, options: tuple[str, ...]) -> int:
    """Return what the options must be a multiple of: a matrix belongs to one head; a
    vector is divided into heads or blocks, and those into pairs."""
    if len(options) == 2:
        return 1
    blocks = parse_spec("fit_size", layer)[1].get("blocks", 1)
    return math.lcm(heads(layer), 2 * (blocks if isinstance(blocks, int) else 1))


def _join(layer: str, options: tuple[str, ...], value: int) -> str:
    return ":".join([layer, *(f"{option}={value}" for option in options)])


def _largest(fits: Callable[[int], bool], most: int | None = None) -> int:
    """Return the largest n up to `most` that fits, if 1 does and `fits` is monotone."""
    low, high = 1, 2
    while (most is None or high <= most) and fits(high):
        low, high = high, 2 * high
    if most is not None:
        high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
