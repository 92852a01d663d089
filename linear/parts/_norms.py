"""Normalisations over the last axis."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pararnn._parameters import widen


def rms_norm(
    x: Float[Array, "... n"], weight: Float[Array, "*heads n"], epsilon: float = 1e-5
) -> Float[Array, "... n"]:
    r"""$x / \sqrt{\mathrm{mean}(x^2) + \epsilon} \odot w$."""
    x, weight = widen(x, weight)
    scale = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon)
    return x * scale * leading(weight, x.ndim)


def l2_norm(x: Float[Array, "... n"], epsilon: float = 1e-6) -> Float[Array, "... n"]:
    r"""$x / \sqrt{\sum x^2 + \epsilon}$."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + epsilon)


def group_norm(x: Float[Array, "... n"], epsilon: float) -> Float[Array, "... n"]:
    r"""$(x - \mathrm{mean}) / \sqrt{\mathrm{var} + \epsilon}$, without parameters."""
    centred = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(centred * centred, -1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon)


def leading(values: Array, rank: int) -> Array:
    """`values` with leading axes up to `rank`, as rank promotion may be an error."""
    return values.reshape((1,) * (rank - values.ndim) + values.shape)
