"""Products at full precision, which Newton's method needs, and inverses.

TF32, the default on Ampere and later GPUs, spoils Newton's convergence.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Inexact

from ._mesh_axes import vary

# Up to this size a product is written out as multiplications and a sum, which XLA
# fuses into the loop around it. On the 2-core CPU named in docs/benchmarks.md, a
# 16 x [4, 4] recurrence takes 0.13 us a step written out and 0.47 us with
# `dot_general`; at size 32 they are equal.
_WRITTEN_OUT = 16


def promote(*values):
    """Return the dtype that holds all arrays or dtypes, also in strict mode."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*values)


def multiply(a: Array, x: Array) -> Array:
    """Return `a * x` in the common dtype; leading axes broadcast."""
    a, x = _align(a, x)
    return a * x


def multiply_matrices(a: Array, x: Array) -> Array:
    """Return `a @ x` in the common dtype; leading axes broadcast."""
    a, x = _align(a, x)
    if a.shape[-1] <= _WRITTEN_OUT:
        return jnp.sum(a[..., :, :, None] * x[..., None, :, :], axis=-2)
    return matmul(a, x)


def matmul(a: Array, b: Array) -> Array:
    """Return `a @ b` of arrays of the same dtype, always as a `dot`."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def einsum(axes: str, a: Array, b: Array) -> Array:
    """Return `jnp.einsum(axes, a, b)`, at the full precision of its dtype."""
    return jnp.einsum(axes, a, b, precision=lax.Precision.HIGHEST)


def _align(a: Array, x: Array) -> tuple[Array, Array]:
    """Cast and add leading axes explicitly, as JAX's strict modes require."""
    dtype, ndim = promote(a, x), max(a.ndim, x.ndim)
    a, x = (v.reshape((1,) * (ndim - v.ndim) + v.shape).astype(dtype) for v in (a, x))
    return a, x


def invert_matrices(a: Array) -> Array:
    """Return the inverses of `[..., n, n]`, by Gauss-Jordan elimination with pivoting.

    LAPACK's routines, which XLA calls, hang on large batches inside a loop on a CPU of
    two cores: a [511, 8, 8] batch of `jnp.linalg.solve` never returns (jaxlib 0.10.2).
    This is n rounds of elementwise work, which fuses and runs anywhere. A singular
    matrix gives entries that are not finite.
    """
    n = a.shape[-1]
    unit = vary(jnp.broadcast_to(jnp.eye(n, dtype=a.dtype), a.shape), a)
    row = lax.broadcasted_iota(jnp.int32, a.shape[:-1], a.ndim - 2)

    def eliminate(k, both):
        column = lax.dynamic_index_in_dim(both, k, -1, keepdims=False)
        best = jnp.argmax(jnp.where(row < k, -1, jnp.abs(column)), axis=-1)
        here = (row == k)[..., None]
        there = (row == best.astype(row.dtype)[..., None])[..., None]
        # By selection, as gathers are slow: the pivot's row and row k change places.
        pivots = jnp.sum(jnp.where(there, both, 0), axis=-2, keepdims=True)
        both = jnp.where(there, lax.dynamic_index_in_dim(both, k, -2), both)
        pivots = pivots / lax.dynamic_index_in_dim(pivots, k, -1)
        factors = lax.dynamic_index_in_dim(both, k, -1)
        return jnp.where(here, pivots, both - factors * pivots)

    both = lax.fori_loop(0, n, eliminate, jnp.concatenate([a, unit], axis=-1))
    return both[..., n:]


def poison(
    v: Inexact[Array, "*shape"], lost: Bool[Array, "*shape"]
) -> Inexact[Array, "*shape"]:
    """Return `v` with NaN where `lost`, for tangents too; zero cotangents stay zero.

    A sequence that was computed from finite replacements must be seen as lost, but
    whatever does not depend on it has a derivative of zero. A product with NaN would
    make that derivative NaN, and a selection would hide the loss from what does depend
    on it. So this is the identity for `lax.custom_linear_solve`, with solvers that
    write NaN.
    """

    def mark(_, v):
        return jnp.where(lost, jnp.nan, v).astype(v.dtype)

    def mark_what_is_used(_, g):
        return jnp.where(lost & (g != 0), jnp.nan, g).astype(g.dtype)

    return lax.custom_linear_solve(lambda v: v, v, mark, mark_what_is_used)
