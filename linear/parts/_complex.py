"""Complex arithmetic on parameters that are stored as two real arrays."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Complex, DTypeLike

from pararnn._parameters import wide_dtype, widen


def complex_zeros(shape: tuple[int, ...], dtype: DTypeLike) -> Complex[Array, "..."]:
    """A fresh complex state beside parameters of `dtype`."""
    zeros = jnp.zeros(shape, wide_dtype(dtype))
    return lax.complex(zeros, zeros)


def as_complex(re: Array, im: Array) -> Complex[Array, "..."]:
    """Both parts together, in at least complex64."""
    return lax.complex(*widen(re, im))


def full_product(matrix: Array, x: Array) -> Array:
    """`W x` over the last axis, at full float32 precision: what is lost on the way into
    a state stays in it."""
    return jnp.einsum("...i,oi->...o", x, matrix, precision=lax.Precision.HIGHEST)


def real_product(C_re: Array, C_im: Array, states: Complex[Array, "... n"]) -> Array:
    r"""$\mathrm{Re}(C h)$ over the last axis, without complex products."""
    return full_product(C_re, states.real) - full_product(C_im, states.imag)
