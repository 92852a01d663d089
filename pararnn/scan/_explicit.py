"""Axes of a mesh that are of the explicit kind, beneath a `vmap`.

There the type of every array says how it is divided, and every operation has to say
what comes of it. A scan of a whole batch is left to XLA instead, as on axes of the kind
`Auto`; its results are divided along the batch as the arguments were.
"""

from collections.abc import Callable

import jax
import jax.tree_util as jtu
from jax.sharding import AxisType, PartitionSpec, auto_axes, get_abstract_mesh


def automatic(run: Callable, batched) -> Callable:
    """`run`, with explicit axes left to XLA.

    **Arguments:** `batched`, arrays with the batch in front, as all results have it.
    """
    axes = _explicit_axes()
    if not axes:
        return run
    out = PartitionSpec(_axis_of_batch(batched))
    return auto_axes(run, axes=axes, out_sharding=out)


def refuse_explicit(where: str, batched) -> None:
    """Refuse a batch that is divided along an explicit axis.

    A cell is traced before its batch is known, and its program cannot be evaluated
    where the axes are of other kinds; and JAX does not batch `lax.cond` over an
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
