"""Cells of other libraries: Equinox's, Flax's, and plain functions.

The solver takes any of them as a function `f(h, x) -> h`. A layer takes them as a cell
with a fresh state and an output.
"""

import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from .jaxprs import (
    backward_slice,
    consts_to_args,
    evaluate,
    inline_jit,
    jit_has_consts,
)


def as_step(cell: Callable) -> Callable:
    """Return any supported cell as a function `f(h, x) -> h`.

    Equinox's `GRUCell` and `LSTMCell` take `(input, state)`, so the arguments are
    swapped. A Flax NNX cell returns a carry and an output; the carry is kept.
    Everything else is returned unchanged.
    """
    if isinstance(cell, eqx.nn.GRUCell | eqx.nn.LSTMCell):
        return lambda h, x: cell(x, h)
    nnx = loaded_nnx()
    if nnx is not None and isinstance(cell, nnx.Module):
        graph, parameters = nnx.split(cell)
        return lambda h, x: call_nnx(graph, parameters, h, x)[0]
    return cell


def loaded_nnx() -> Any:
    """Return `flax.nnx` if it has been imported; otherwise no cell can be of Flax."""
    return sys.modules.get("flax.nnx")


def call_nnx(
    graph: Any, parameters: PyTree[Array], state: PyTree, x: PyTree
) -> tuple[PyTree[Array], PyTree]:
    """Return carry and output of one step of a Flax NNX cell, split by `nnx.split`.

    A cell that only returns its carry emits the carry.

    **Raises:** `NotImplementedError` if the call changes a variable of the cell;
    `ValueError` if it returns neither `(carry, y)` nor a carry.
    """
    nnx = loaded_nnx()
    # Flax's variables can only be changed under the trace that created them.
    parameters = jtu.tree_map(lambda leaf: leaf, parameters)
    before = dict(jtu.tree_leaves_with_path(parameters))
    cell = nnx.merge(graph, parameters)
    returned = cell(state, x)
    same_graph, after = nnx.split(cell)
    changed = _changed(before, after)
    if changed or same_graph != graph:
        raise _refusal(type(cell).__name__, changed)
    like = jtu.tree_structure(state)
    if isinstance(returned, tuple) and len(returned) == 2:
        if jtu.tree_structure(returned[0]) == like:
            return returned
    if jtu.tree_structure(returned) == like:
        return returned, returned
    raise ValueError(
        f"the Flax cell {type(cell).__name__} returned "
        f"{jtu.tree_structure(returned)}; expected `(carry, y)` or a carry, "
        f"which is {like}. Likely causes: (a) the state that was given belongs to "
        "another cell; (b) the cell changes the structure of its carry"
    )


def _changed(before: dict, after: PyTree) -> list[str]:
    """Return the variables whose value has changed, with their kinds."""
    paths = [
        tuple(key.key for key in path if isinstance(key, jtu.DictKey))
        for path, leaf in jtu.tree_leaves_with_path(after)
        if before.get(path) is not leaf
    ]
    kinds = {path: type(v).__name__ for path, v in loaded_nnx().to_flat_state(after)}
    names = {path: ".".join(map(str, path)) for path in paths}
    return [f"`{name}` ({kinds.get(path)})" for path, name in names.items()]


def _refusal(name: str, changed: list[str]) -> NotImplementedError:
    what = ", ".join(changed) or "an attribute of the cell"
    return NotImplementedError(
        f"A step of the Flax cell {name} changes {what}, but all steps are solved "
        "together, so a step can only pass its carry on to the next one. "
        "Likely causes: (a) Dropout or another use of random numbers: call "
        "`cell.eval()`, or pass the masks as inputs; (b) BatchNorm or other running "
        "statistics: call `cell.eval()`, or normalise outside the cell; (c) a cache "
        "or `sow`: make it part of the carry, or an output."
    )


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
    """A Flax NNX cell, `cell(carry, x) -> (carry, y)`, with parameters as a pytree."""

    parameters: PyTree[Array]
    fresh: PyTree[Array] | None
    graph: Any = eqx.field(static=True)

    def __init__(self, cell: Any, *, own_carry: bool):
        """`own_carry` is whether the cell provides the fresh state."""
        self.fresh = _first_carry(cell) if own_carry else None
        self.graph, self.parameters = loaded_nnx().split(cell)

    def __call__(self, state: PyTree[Array], x: PyTree[Array]) -> PyTree[Array]:
        return self.step(state, x)[0]

    def step(
        self, state: PyTree[Array], x: PyTree[Array]
    ) -> tuple[PyTree[Array], PyTree]:
        """The next carry, and the cell's output."""
        return call_nnx(self.graph, self.parameters, state, x)

    def init_state(self) -> PyTree[Array]:
        return jax.lax.stop_gradient(self.fresh)

    def outputs(
        self, before: Callable[[], PyTree[Array]], xs: PyTree, after: PyTree[Array]
    ) -> PyTree:
        """Return the outputs of all steps, given the carries after them.

        This computes only what a step computes for its output alone: nothing if the
        output is part of the carry, the head if there is one. `before()` returns the
        carries before the steps, and is called if they are needed.
        """
        h, x = (jtu.tree_map(_one_step, tree) for tree in (after, xs))
        closed, shapes = jax.make_jaxpr(self.step, return_shape=True)(h, x)
        if jit_has_consts(closed.jaxpr):
            closed = inline_jit(closed)
        old, inputs = _split(closed.jaxpr.invars, h)
        new, emitted = _split(closed.jaxpr.outvars, h)
        part = backward_slice(consts_to_args(closed), emitted, new)
        moving = _named(inputs, xs) | _named(new, after)
        if not moving.keys() >= set(old).intersection(part.invars):
            moving = _named(old, before()) | moving
        fixed = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        names = [v for v in part.invars if v in moving]

        def emit(_, leaves):
            values = fixed | dict(zip(names, leaves, strict=True))
            return evaluate(part, *(values[v] for v in part.invars))

        steps = jtu.tree_leaves(after)[0].shape[0]
        leaves = jax.vmap(emit)(np.arange(steps), [moving[v] for v in names])
        return jtu.tree_unflatten(jtu.tree_structure(shapes[1]), leaves)


def _split(atoms, state: PyTree) -> tuple[list, list]:
    """Split off the variables of the state."""
    count = len(jtu.tree_leaves(state))
    return atoms[:count], atoms[count:]


def _named(atoms, tree: PyTree) -> dict[jex.core.Var, Array]:
    pairs = zip(atoms, jtu.tree_leaves(tree), strict=True)
    return {v: leaf for v, leaf in pairs if isinstance(v, jex.core.Var)}


def _one_step(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], jnp.result_type(leaf))


def _first_carry(cell: Any) -> PyTree[Array]:
    """Return the carry that Flax would start from, for inputs `[in_features]`.

    Flax draws the first carry from a generator (zeros, unless `carry_init` says
    otherwise). It is drawn once here, so that it is the same at every call.
    """
    missing = [
        name for name in ("initialize_carry", "in_features") if not hasattr(cell, name)
    ]
    if not missing:
        try:
            return cell.initialize_carry((cell.in_features,), loaded_nnx().Rngs(0))
        except NotImplementedError:
            missing = ["initialize_carry"]
    raise ValueError(
        f"RNN: the Flax cell {type(cell).__name__} does not say what its fresh state "
        f"is: it has no `{'` and no `'.join(missing)}`. Pass `init_state=`, a pytree "
        "of arrays like its carry, for instance `init_state=jnp.zeros(width)`."
    )


def _check_flax(cell: Any) -> None:
    """Refuse Flax modules that run over whole sequences themselves."""
    nnx = loaded_nnx()
    if isinstance(cell, nnx.RNN | nnx.Bidirectional):
        raise TypeError(
            f"RNN: the cell is a flax.nnx.{type(cell).__name__}, which runs over whole "
            "sequences itself. Pass the cell within it, `layer.cell`; for both "
            "directions, put two `pararnn.RNN` into a `pararnn.Bidirectional`."
        )


class FunctionCell(eqx.Module):
    """Any callable `f(h, x) -> h`, with a user's fresh state or output function."""

    function: Any
    fresh: PyTree[Array] | None
    emit: Callable[[PyTree], Any] | None

    def __call__(self, state: PyTree[Array], x: PyTree[Array]) -> PyTree[Array]:
        return self.function(state, x)

    def init_state(self) -> PyTree[Array]:
        if self.fresh is None:
            return self.function.init_state()
        return self.fresh

    def output(self, state: PyTree[Array]) -> Any:
        if self.emit is not None:
            return self.emit(state)
        if hasattr(self.function, "output"):
            return self.function.output(state)
        return state


def as_cell(
    cell: Any, init_state: PyTree[Array] | None, output: Callable | None
) -> Any:
    """Return a module with `__call__(state, x)`, `init_state()` and `output(state)`.

    Only a `FlaxCell` has no `output`: its output is not a function of the state alone.

    **Raises:** `TypeError` for something that cannot be called; `ValueError` if the
    fresh state of a plain function is not given.
    """
    if not callable(cell):
        raise TypeError(
            f"RNN: the cell is a {type(cell).__name__}, which cannot be called; "
            "expected a cell module or a function `f(h, x) -> h`."
        )
    nnx = loaded_nnx()
    if isinstance(cell, eqx.nn.GRUCell | eqx.nn.LSTMCell):
        adapted = EquinoxCell(cell)
    elif nnx is not None and isinstance(cell, nnx.Module):
        _check_flax(cell)
        adapted = FlaxCell(cell, own_carry=init_state is None)
    elif hasattr(cell, "init_state") or init_state is not None:
        adapted = cell
    else:
        raise ValueError(
            f"RNN: the cell {cell!r:.60} does not say what its fresh state is. Pass "
            "`init_state=`, a pytree of arrays, for instance "
            "`init_state=jnp.zeros(width)`; or give the cell a method `init_state()`."
        )
    complete = isinstance(adapted, FlaxCell) or (
        hasattr(adapted, "init_state") and hasattr(adapted, "output")
    )
    if complete and init_state is None and output is None:
        return adapted
    return FunctionCell(adapted, init_state, output)


def emitting_cell(cell: Any) -> FlaxCell | None:
    """Return the Flax cell within an adapted one, if its own outputs are emitted."""
    if isinstance(cell, FunctionCell) and cell.emit is None:
        cell = cell.function
    return cell if isinstance(cell, FlaxCell) else None
