"""The symbolic code of a trajectory: which linear map each of its steps is."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from ..cells import ALRNNCell


class Symbols(NamedTuple):
    """A trajectory of an AL-RNN as a path between linear regions.

    **Attributes:**

    - `code`: `[T]`, for each state the place of its region in the lists below.
    - `regions`: bool `[symbols, rectified]`, the regions that were visited, the most
        visited first: which of the rectified units are positive there.
    - `transitions`: `[symbols, symbols]`, from row to column, the part of the steps
        from a region that lead to another, or to itself.
    """

    code: Int[np.ndarray, " T"]
    regions: Bool[np.ndarray, "symbols rectified"]
    transitions: Float[np.ndarray, "symbols symbols"]


def find_symbols(cell: ALRNNCell, states: Float[np.ndarray, "T d_state"]) -> Symbols:
    """The symbolic code of a trajectory of a cell.

    ??? cite "Source"

        Brenner et al. (2410.14240): the graph of the symbols' transitions.

    **Arguments:** `cell`, a [`pararnn.ALRNNCell`][]; `states`, `[T, d_state]`.

    **Raises:** `TypeError` for another cell; `ValueError` for states that do not fit.
    """
    if not isinstance(cell, ALRNNCell):
        raise TypeError(
            f"find_symbols: the cell is a {type(cell).__name__}, expected an "
            "ALRNNCell: its few rectified units are what makes few regions."
        )
    if np.ndim(states) != 2 or len(states) < 2:
        raise ValueError(
            f"find_symbols: `states` has shape {np.shape(states)}, expected "
            "[T, d_state] with at least two states."
        )
    regions = np.asarray(cell.region(jnp.asarray(states)))
    visited, code, counts = np.unique(
        regions, axis=0, return_inverse=True, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")
    code = np.argsort(order)[code.reshape(-1)]
    pairs = np.zeros((len(visited), len(visited)))
    np.add.at(pairs, (code[:-1], code[1:]), 1)
    left = pairs.sum(1, keepdims=True)
    return Symbols(code, visited[order], pairs / np.where(left > 0, left, 1))
