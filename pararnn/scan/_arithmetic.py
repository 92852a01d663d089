"""Products of transitions and states, with the precision that Newton needs."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

# Up to this size a product is written out as multiplications and a sum, which XLA
# fuses into the loop around it. Measured on the 2-core CPU named in
# docs/benchmarks.md: a 16 x [4, 4] recurrence takes 0.13 us a step written out and
# 0.47 us through `dot_general`; the two meet at size 32.
_WRITTEN_OUT = 16


def promote(*values):
    """The dtype that holds all of the arrays or dtypes, also in strict mode."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*values)


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
