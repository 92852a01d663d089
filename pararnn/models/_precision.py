"""Mixed precision: a model in the dtype that it computes in."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike, PyTree

from .._parameters import check_dtype


def cast(module: PyTree, dtype: DTypeLike) -> PyTree:
    """The real floating-point leaves of a pytree in another dtype.

    **Arguments:** `module`, any pytree, such as a model; `dtype`, real floating point.

    **Raises:** `ValueError` on a dtype that is not.
    """
    dtype = check_dtype("cast", dtype)

    def convert(leaf):
        real = eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if real else leaf

    return jax.tree.map(convert, module)
