"""Cells of other libraries as functions `f(h, x) -> h`."""

import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import Array, PyTree


def as_step(cell: Callable) -> Callable:
    """Any supported cell as a function `f(h, x) -> h`.

    Equinox's `GRUCell` and `LSTMCell` take `(input, state)` and are turned round. Of
    what a Flax NNX cell returns the carry is kept. Everything else is called as it is.
    """
    if isinstance(cell, eqx.nn.GRUCell | eqx.nn.LSTMCell):
        return lambda h, x: cell(x, h)
    nnx = loaded_nnx()
    if nnx is not None and isinstance(cell, nnx.Module):
        graph, parameters = nnx.split(cell)
        return lambda h, x: call_nnx(graph, parameters, h, x)[0]
    return cell


def loaded_nnx() -> Any:
    """`flax.nnx` if it has been imported; without it there are no cells of it."""
    return sys.modules.get("flax.nnx")


def call_nnx(
    graph: Any, parameters: PyTree[Array], state: PyTree, x: PyTree
) -> tuple[PyTree[Array], PyTree]:
    """The carry and the output of one step of a Flax NNX cell, taken apart by `split`.

    A cell that returns its carry alone also emits it.

    **Raises:** `NotImplementedError` if the call changes a variable of the cell;
    `ValueError` if it returns neither `(carry, y)` nor a carry.
    """
    nnx = loaded_nnx()
    # Flax's variables can be changed only under the trace that they were made in.
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
        f"which is {like}. Likely causes: (a) the state that was given is not one of "
        "this cell's; (b) the cell changes the structure of its carry"
    )


def _changed(before: dict, after: PyTree) -> list[str]:
    """The variables that hold another value, with their kinds."""
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
        f"A step of the Flax cell {name} changes {what}, but all steps are solved for "
        "together, so that none can leave anything to the next one but its carry. "
        "Likely causes: (a) Dropout or another use of random numbers: call "
        "`cell.eval()`, or pass the masks as inputs; (b) BatchNorm or other running "
        "statistics: call `cell.eval()`, or normalise outside of the cell; (c) a cache "
        "or `sow`: make it part of the carry, or an output."
    )
