"""Continuous time to steps: the zero-order hold and the bilinear rule."""

import jax.numpy as jnp
from jaxtyping import Array, Complex


def _zoh(A: Array, dt: Array) -> tuple[Array, Array]:
    return jnp.exp(dt * A), jnp.expm1(dt * A) / A


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
