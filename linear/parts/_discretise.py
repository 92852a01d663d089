"""Continuous time to steps: the zero-order hold and the bilinear rule."""

import jax.numpy as jnp
from jaxtyping import Array, Complex


def _zoh(A: Array, dt: Array) -> tuple[Array, Array]:
    return jnp.exp(dt * A), dt * _mean_growth(dt * A)


def _mean_growth(z: Array) -> Array:
    """`(exp(z) - 1) / z`, which is 1 at zero, and its derivative."""
    small = jnp.abs(z) < _SMALL
    near = jnp.where(small, z, 0)
    series = jnp.ones_like(z)
    for n in range(_TERMS, 1, -1):
        series = 1 + near / n * series
    away = jnp.where(small, 1, z)
    return jnp.where(small, series, jnp.expm1(away) / away)


# What the series leaves out is 0.01^6 / 7! = 2e-16.
_SMALL, _TERMS = 0.01, 6


def _bilinear(A: Array, dt: Array) -> tuple[Array, Array]:
    half = dt * A / 2
    return (1 + half) / (1 - half), dt / (1 - half)


DISCRETISATIONS = {"zoh": _zoh, "bilinear": _bilinear}


def discretise(
    rule: str, A: Complex[Array, "..."], dt: Complex[Array, "..."]
) -> tuple[Complex[Array, "..."], Complex[Array, "..."]]:
    r"""$\bar{A}$ and the factor of $B$ in $\bar{B}$, from diagonal $A$ and $\Delta$.

    `"zoh"`: $e^{\Delta A}$ and $(e^{\Delta A} - 1) / A$; `"bilinear"`:
    $(1 + \Delta A / 2) / (1 - \Delta A / 2)$ and $\Delta / (1 - \Delta A / 2)$.
    $|\bar{A}| < 1$ where $\mathrm{Re} A < 0$.
    """
    return DISCRETISATIONS[rule](A, dt)
