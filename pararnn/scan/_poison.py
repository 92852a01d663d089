"""What is not finite, kept from derivatives that have nothing to do with it."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Inexact


def poison(
    v: Inexact[Array, "*shape"], lost: Bool[Array, "*shape"]
) -> Inexact[Array, "*shape"]:
    """`v`, and NaN where `lost`, for tangents too; cotangents of zero stay zero there.

    A sequence computed from replacements of what is not finite is to be seen as lost,
    but what does not depend on it has a derivative of zero. A product with NaN would
    make it NaN, and a selection would hide a loss that does depend on it. So this is
    the identity to `lax.custom_linear_solve`, with solvers that lose what is lost.
    """

    def mark(_, v):
        return jnp.where(lost, jnp.nan, v).astype(v.dtype)

    def mark_what_is_used(_, g):
        return jnp.where(lost & (g != 0), jnp.nan, g).astype(g.dtype)

    return lax.custom_linear_solve(lambda v: v, v, mark, mark_what_is_used)
