"""Cells of other libraries as cells of this one."""

import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


class EquinoxCell(eqx.Module):
    """`eqx.nn.GRUCell` or `eqx.nn.LSTMCell`, which take `(input, state)`."""

    cell: eqx.nn.GRUCell | eqx.nn.LSTMCell

    def __call__(self, state: PyTree[Array], x: Array) -> PyTree[Array]:
        return self.cell(x, state)

    def init_state(self) -> PyTree[Array]:
        def zeros():
            return jnp.zeros(self.cell.hidden_size, self.cell.weight_hh.dtype)

        if isinstance(self.cell, eqx.nn.LSTMCell):
            return zeros(), zeros()
        return zeros()

    def output(self, state: PyTree[Array]) -> Array:
        return state[0] if isinstance(self.cell, eqx.nn.LSTMCell) else state


class FlaxCell(eqx.Module):
    """A Flax NNX cell, `cell(carry, x) -> (carry, y)`, its parameters as a pytree."""

    parameters: PyTree[Array]
    fresh: PyTree[Array]
    graph: Any = eqx.field(static=True)

    def __init__(self, cell: Any):
        nnx = sys.modules["flax.nnx"]
        # Flax draws the first carry (zeros, unless `carry_init` says otherwise) from a
        # generator; drawn once here, it is the same at every call.
        self.fresh = cell.initialize_carry((cell.in_features,), nnx.Rngs(0))
        self.graph, self.parameters = nnx.split(cell)

    def _merged(self) -> Any:
        return sys.modules["flax.nnx"].merge(self.graph, self.parameters)

    def __call__(self, state: PyTree[Array], x: Array) -> PyTree[Array]:
        return self._merged()(state, x)[0]

    def init_state(self) -> PyTree[Array]:
        return jax.lax.stop_gradient(self.fresh)

    def output(self, state: PyTree[Array]) -> Array:
        # Flax's LSTM carries (c, h) and emits h; the others carry what they emit.
        return state[1] if isinstance(state, tuple) else state


class FunctionCell(eqx.Module):
    """Any callable `f(h, x) -> h`, with a fresh state or an output of one's own."""

    function: Callable[[PyTree, PyTree], PyTree]
    fresh: PyTree[Array] | None
    emit: Callable[[PyTree], Any] | None

    def __call__(self, state: PyTree[Array], x: PyTree[Array]) -> PyTree[Array]:
        return self.function(state, x)

    def init_state(self) -> PyTree[Array]:
        if self.fresh is None:
            return self.function.init_state()  # pyright: ignore[reportFunctionMemberAccess]
        return self.fresh

    def output(self, state: PyTree[Array]) -> Any:
        if self.emit is not None:
            return self.emit(state)
        if hasattr(self.function, "output"):
            return self.function.output(state)  # pyright: ignore[reportFunctionMemberAccess]
        return state


def as_cell(
    cell: Any, init_state: PyTree[Array] | None, output: Callable | None
) -> Any:
    """A module with `__call__(state, x)`, `init_state()` and `output(state)`.

    **Raises:** `TypeError` for something that cannot be called; `ValueError` if the
    fresh state of a plain function is not given.
    """
    if not callable(cell):
        raise TypeError(
            f"RNN: the cell is a {type(cell).__name__}, which cannot be called; "
            "expected a cell module or a function `f(h, x) -> h`."
        )
    nnx = sys.modules.get("flax.nnx")
    if isinstance(cell, eqx.nn.GRUCell | eqx.nn.LSTMCell):
        adapted = EquinoxCell(cell)
    elif nnx is not None and isinstance(cell, nnx.Module):
        adapted = FlaxCell(cell)
    elif hasattr(cell, "init_state") or init_state is not None:
        adapted = cell
    else:
        raise ValueError(
            f"RNN: the cell {cell!r:.60} does not say what its fresh state is. Pass "
            "`init_state=`, a pytree of arrays, for instance "
            "`init_state=jnp.zeros(width)`; or give the cell a method `init_state()`."
        )
    complete = hasattr(adapted, "init_state") and hasattr(adapted, "output")
    if complete and init_state is None and output is None:
        return adapted
    return FunctionCell(adapted, init_state, output)
