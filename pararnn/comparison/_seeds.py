"""Keys that depend on names, and the same program for every seed."""

import zlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
from jax import lax
from jaxtyping import PRNGKeyArray, PyTree


def key_of(seed: int, *names: str) -> PRNGKeyArray:
    """A key for a purpose: the same whatever else is drawn, and in whatever order."""
    return jr.fold_in(jr.key(seed), zlib.crc32("\0".join(names).encode()))


def over_seeds(
    function: Callable[[Any], PyTree], stacked: PyTree, side_by_side: bool
) -> PyTree:
    """`function` of every entry along the first axis of the arrays of a pytree."""
    arrays, static = eqx.partition(stacked, eqx.is_array)

    def one(arrays):
        return function(eqx.combine(arrays, static))

    return jax.vmap(one)(arrays) if side_by_side else lax.map(one, arrays)
