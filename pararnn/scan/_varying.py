"""Inside of a `shard_map`: which values differ from device to device.

JAX keeps count of the axes of the mesh that a value varies along (`check_vma=True`, the
default), and what a loop carries has to vary along the same ones before and behind a
step. Zeros that a loop starts from vary along none, until they are told to.
"""

import functools as ft

import jax
import jax.tree_util as jtu
from jax import lax
from jax.sharding import (
    ManualAxisType,
    NamedSharding,
    PartitionSpec,
    get_abstract_mesh,
)
from jaxtyping import PyTree, Shaped

Tree = PyTree[Shaped[jax.Array, "..."]]


def varying_axes(tree: PyTree) -> frozenset[str]:
    """The manual axes that any leaf, an array or the type of one, varies along."""
    return ft.reduce(frozenset.union, map(_axes, jtu.tree_leaves(tree)), frozenset())


def _axes(leaf) -> frozenset[str]:
    own = leaf if hasattr(leaf, "manual_axis_type") else jax.typeof(leaf)
    return own.manual_axis_type.varying if own.manual_axis_type else frozenset()


def struct(shape, dtype, axes: frozenset[str]) -> jax.ShapeDtypeStruct:
    """The type of an array that varies along some axes."""
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.ShapeDtypeStruct(
        shape,
        dtype,
        sharding=NamedSharding(get_abstract_mesh(), PartitionSpec()),
        manual_axis_type=ManualAxisType(varying=axes),
    )


def vary(tree: Tree, *like: PyTree) -> Tree:
    """`tree`, which varies along all axes that `like` varies along, and its own."""
    axes = varying_axes(like)

    def one(leaf):
        missing = tuple(axes - _axes(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jtu.tree_map(one, tree) if axes else tree
