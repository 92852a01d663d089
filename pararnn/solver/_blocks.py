"""Between flat state vectors and the scan engine's layout, by Jacobian structure."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._structure import Structure


def transition_factors(structure: Structure, tangents: Float[Array, "size *n width"]):
    """The engine's kind and factors from a Jacobian's compressed columns.

    Column j of every block stands in `tangents[j]`, at the indices of that block.
    """
    if structure.kind == "diagonal":
        return "elementwise", tangents[0][..., None]
    return "matrix", jnp.moveaxis(_gather(structure, tangents), 0, -1)


def to_blocks(structure: Structure, v: Float[Array, "*n width"]):
    """A vector in the engine's layout, one column."""
    if structure.kind == "diagonal":
        return v[..., None]
    return _gather(structure, v)[..., None]


def from_blocks(structure: Structure, x: Float[Array, "*n blocks size 1"]):
    """Back to a flat vector."""
    if structure.kind == "diagonal":
        return x[..., 0]
    flat = x[..., 0].reshape(*x.shape[:-3], -1)
    if _in_order(structure):
        return flat
    # Empty places of small blocks sort last.
    order = np.argsort(structure.blocks.reshape(-1), kind="stable")
    return flat[..., order[: structure.width]]


def _gather(structure: Structure, v: Array) -> Array:
    blocks = structure.blocks
    if _in_order(structure):
        return v.reshape(*v.shape[:-1], *blocks.shape)
    # The extra column stands for the empty places of small blocks.
    padded = jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, 1)])
    return padded[..., blocks]


def _in_order(structure: Structure) -> bool:
    return np.array_equal(structure.blocks.reshape(-1), np.arange(structure.width))
