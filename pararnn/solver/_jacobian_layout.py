"""Convert between flat state vectors and the layout of the scan engine."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._structure import Structure


def transition_factors(structure: Structure, tangents: Float[Array, "size *n width"]):
    """Return the engine's kind and factors for a Jacobian's compressed columns.

    `tangents[j]` holds column j of every block, at the indices of that block.
    """
    if structure.kind == "diagonal":
        return "elementwise", tangents[0]
    return "matrix", jnp.moveaxis(_gather(structure, tangents), 0, -1)


def to_blocks(structure: Structure, v: Float[Array, "*n width"]):
    """Return a vector in the engine's layout, with one column."""
    if structure.kind == "diagonal":
        return v
    return _gather(structure, v)[..., None]


def from_blocks(structure: Structure, x: Float[Array, "*n blocks size 1"]):
    """Return a flat vector, the inverse of `to_blocks`."""
    if structure.kind == "diagonal":
        return x
    x = x[..., 0]
    order = _order(structure)
    if order == "leaves":
        x = x.swapaxes(-1, -2)
    flat = x.reshape(*x.shape[:-2], structure.blocks.size)
    if order != "any":
        return flat
    # Empty places of small blocks sort last.
    places = np.argsort(structure.blocks.reshape(-1), kind="stable")
    return flat[..., places[: structure.width]]


def _gather(structure: Structure, v: Array) -> Array:
    blocks = structure.blocks
    order = _order(structure)
    if order == "blocks":
        return v.reshape(*v.shape[:-1], *blocks.shape)
    if order == "leaves":
        return v.reshape(*v.shape[:-1], *blocks.shape[::-1]).swapaxes(-1, -2)
    # The extra column fills the empty places of small blocks.
    padded = jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, 1)])
    return padded[..., blocks]


def _order(structure: Structure) -> Literal["blocks", "leaves", "any"]:
    """Return whether blocks are contiguous, or run across leaves of equal size.

    The latter need only a transposition. A gather works for all, but is ten times
    slower on a CPU.
    """
    blocks = structure.blocks
    if np.array_equal(blocks.reshape(-1), np.arange(structure.width)):
        return "blocks"
    if np.array_equal(blocks.T.reshape(-1), np.arange(structure.width)):
        return "leaves"
    return "any"
