"""Axes of a mesh that JAX's types know of: manual ones, in a `shard_map`, and explicit.

In a `shard_map`, JAX records the manual axes along which a value varies
(`check_vma=True`, the default). The carry of a loop has to vary along the same axes
before and after a step. Zeros that a loop starts from vary along none, unless `vary`
makes them.

On explicit axes the type of every array says how it is divided, and every operation has
to say how its result is. A scan of a whole batch is left to XLA instead, as on axes of
type `Auto`; its results are divided along the batch as the arguments were.
"""

import functools as ft
from collections.abc import Callable

import jax
import jax.tree_util as jtu
from jax import lax
from jax.sharding import (
    AxisType,
    ManualAxisType,
    NamedSharding,
    PartitionSpec,
    auto_axes,
    get_abstract_mesh,
)
from jaxtyping import PyTree, Shaped

Tree = PyTree[Shaped[jax.Array, "..."]]


def varying_axes(tree: PyTree) -> frozenset[str]:
    """The manual axes along which any leaf, an array or the type of one, varies."""
    return ft.reduce(frozenset.union, map(_axes, jtu.tree_leaves(tree)), frozenset())


def _axes(leaf) -> frozenset[str]:
    kind = leaf if hasattr(leaf, "manual_axis_type") else jax.typeof(leaf)
    return kind.manual_axis_type.varying if kind.manual_axis_type else frozenset()


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
    """Return `tree`, made to vary along all axes that `like` varies along."""
    axes = varying_axes(like)

    def one(leaf):
        missing = tuple(axes - _axes(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jtu.tree_map(one, tree) if axes else tree


def leave_to_xla(run: Callable, batched) -> Callable:
    """Return `run` with explicit axes left to XLA.

    **Arguments:** `batched`, arrays with the batch in front, where all results have it.
    """
    axes = _explicit_axes()
    if not axes:
        return run
    out = PartitionSpec(_axis_of_batch(batched))
    return auto_axes(run, axes=axes, out_sharding=out)


def refuse_explicit(where: str, batched) -> None:
    """Refuse a batch that is divided along an explicit axis.

    A cell is traced before its batch is known, and its program cannot be evaluated
    where the axes are of other types; and JAX does not batch `lax.cond` over an
    explicit axis (jax 0.10.2).

    **Raises:** `ValueError`.
    """
    along = _axis_of_batch(batched) if _explicit_axes() else None
    if along is not None:
        raise ValueError(
            f"{where}: the batch is divided along the axis {along!r} of the mesh in "
            "context, which is of type Explicit; a solve leaves it to XLA how a batch "
            "is divided, for which axes are of type Auto. Likely cause: "
            "`jax.make_mesh` makes explicit axes unless told otherwise. Use "
            "`pararnn.make_mesh(data=...)`, pass "
            "`axis_types=(jax.sharding.AxisType.Auto, ...)`, or solve within "
            "`jax.sharding.auto_axes`."
        )


def _axis_of_batch(batched):
    specs = (jax.typeof(x).sharding.spec for x in jtu.tree_leaves(batched))
    return next((spec[0] for spec in specs if len(spec) and spec[0] is not None), None)


def _explicit_axes() -> tuple[str, ...]:
    mesh = get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)
