"""Products of transitions and states, with the precision that Newton needs."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ._varying import vary

# Up to this size a product is written out as multiplications and a sum, which XLA
# fuses into the loop around it. Measured on the 2-core CPU named in
# docs/benchmarks.md: a 16 x [4, 4] recurrence takes 0.13 us a step written out and
# 0.47 us through `dot_general`; the two meet at size 32.
_WRITTEN_OUT = 16


def promote(*values):
    """The dtype that holds all of the arrays or dtypes, also in strict mode."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*values)


def check_bits(where: str, name: str, value) -> None:
    """Refuse floating point of fewer than 16 bits, which JAX stores but does not add.

    **Raises:** `TypeError`, naming the dtype.
    """
    dtype = value.dtype if hasattr(value, "dtype") else jnp.result_type(value)
    if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 16:
        raise TypeError(
            f"{where}: `{name}` is {dtype}. A recurrence needs floating point of at "
            "least 16 bits: JAX stores narrower numbers but does not calculate with "
            f"them. Cast it, for instance `{name}.astype(jnp.bfloat16)`; inputs and "
            "weights that are stored in fewer bits can be cast inside the cell."
        )


def multiply(a: Array, x: Array) -> Array:
    """Elementwise product in the common dtype; leading axes broadcast."""
    a, x = _align(a, x)
    return a * x


def multiply_matrices(a: Array, x: Array) -> Array:
    """`a @ x` over the last two axes, at full float32 precision.

    TF32, the default on Ampere and later GPUs, spoils Newton's convergence.
    """
    a, x = _align(a, x)
    if a.shape[-1] <= _WRITTEN_OUT:
        return jnp.sum(a[..., :, :, None] * x[..., None, :, :], axis=-2)
    return jnp.matmul(a, x, precision=lax.Precision.HIGHEST)


def _align(a: Array, x: Array) -> tuple[Array, Array]:
    """Casts and leading axes written out, as JAX's strict modes want them."""
    dtype, ndim = promote(a, x), max(a.ndim, x.ndim)
    a, x = (v.reshape((1,) * (ndim - v.ndim) + v.shape).astype(dtype) for v in (a, x))
    return a, x


def invert_matrices(a: Array) -> Array:
    """Inverses of `[..., n, n]`, by Gauss-Jordan elimination with row pivoting.

    LAPACK's routines, called by XLA on large batches inside a loop, hang on a CPU of
    two cores: a [511, 8, 8] batch of `jnp.linalg.solve` never returns (jaxlib 0.10.2).
    This is n rounds of elementwise work, so it fuses and runs anywhere. A singular
    matrix gives entries that are not finite.
    """
    n = a.shape[-1]
    index = jnp.arange(n, dtype=jnp.int32)
    inverse = vary(jnp.broadcast_to(jnp.eye(n, dtype=a.dtype), a.shape), a)

    def swap(m, k, pivot):
        """Rows k and `pivot` `[...]` of m in each other's place."""
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
        # The pivot's row becomes itself over the pivot, the others lose their column.
        factor = jnp.where((index == k)[:, None], 1 - 1 / head, column / head)
        rows = [lax.dynamic_index_in_dim(m, k, -2, keepdims=True) for m in (a, inverse)]
        return a - factor * rows[0], inverse - factor * rows[1]

    return lax.fori_loop(0, n, eliminate, (a, inverse))[1]
