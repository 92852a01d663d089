"""Normalisations over the last axis."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def l2_norm(x: Float[Array, "... n"], epsilon: float = 1e-6) -> Float[Array, "... n"]:
    r"""$x / \sqrt{\sum x^2 + \epsilon}$."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + epsilon)


def group_norm(x: Float[Array, "... n"], epsilon: float) -> Float[Array, "... n"]:
    r"""$(x - \mathrm{mean}) / \sqrt{\mathrm{var} + \epsilon}$, without parameters."""
    centred = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(centred * centred, -1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon)
