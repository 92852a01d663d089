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
    """Return `jnp.einsum(axes, a, b)`."""
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
    index = jnp.arange(n, dtype=jnp.int32)
    inverse = vary(jnp.broadcast_to(jnp.eye(n, dtype=a.dtype), a.shape), a)

    def swap(m, k, pivot):
        """Exchange row k of m and row `pivot`, `[...]`."""
        order = jnp.broadcast_to(index, (*pivot.shape, n))
        at = pivot[..., None]
        order = jnp.where(index == k, at, jnp.where(order == at, k, order))
        return jnp.take_along_axis(m, order[..., None], axis=-2)

    def eliminate(k, carry):
        a, inverse = carry
        column = lax.dynamic_index_in_dim(a, k, -1, keepdims=False)
        size = jnp.where(index < k, -1, jnp.abs(column))
        pivot = jnp.argmax(size, axis=-1).astype(jnp.int32)
        a, inverse = swap(a, k, pivot), swap(inverse, k, pivot)
        column = lax.dynamic_index_in_dim(a, k, -1, keepdims=True)
        head = lax.dynamic_index_in_dim(column, k, -2, keepdims=True)
        # The pivot's row is divided by the pivot; the others get a zero in column k.
        factor = jnp.where((index == k)[:, None], 1 - 1 / head, column / head)
        rows = [lax.dynamic_index_in_dim(m, k, -2, keepdims=True) for m in (a, inverse)]
        return a - factor * rows[0], inverse - factor * rows[1]

    return lax.fori_loop(0, n, eliminate, (a, inverse))[1]


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
