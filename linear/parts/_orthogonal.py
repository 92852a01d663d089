"""Orthogonal matrices as exponentials of skew-symmetric ones."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pararnn.scan import multiply_matrices

# Up to this 1-norm a Taylor polynomial of degree 15 is exact to rounding in float64:
# what it leaves out is below 0.5^16 / 16! = 1e-18.
_NORM, _DEGREE = 0.5, 15
# That many squarings carry it to 1-norms of 0.5 * 2^12 = 2048.
_SQUARINGS = 12


def skew_symmetric(
    entries: Float[Array, "*batch entries"], size: int
) -> Float[Array, "*batch size size"]:
    r"""$K - K^\top$, where K holds `size * (size - 1) / 2` entries strictly below its
    diagonal, row by row."""
    rows, columns = np.tril_indices(size, -1)
    lower = jnp.zeros((*entries.shape[:-1], size, size), entries.dtype)
    lower = lower.at[..., rows, columns].set(entries)
    return lower - jnp.swapaxes(lower, -1, -2)


def orthogonal(
    skew: Float[Array, "*batch n n"],
) -> Float[Array, "*batch n n"]:
    r"""$\exp(S)$ of skew-symmetric $S$: orthogonal to rounding, of determinant 1.

    Scaling and squaring, $\exp(S) = \exp(S / 2^s)^{2^s}$, with a Taylor polynomial and
    no linear solves: LAPACK's, on a large batch inside a loop, hang on a CPU of two
    cores (see `invert_matrices`). Each squaring would double the distance from
    orthogonality; a step of Newton and Schulz after it, $Q \leftarrow Q (3I - Q^\top
    Q) / 2$, takes it back to rounding. Angles are exact up to rounding of $S$ itself.

    Differentiable to any order. **A matrix of a 1-norm (the largest sum of absolute
    values in a column) beyond 2048 gives NaN**, as one that is not finite does: there
    float32 knows the angles to 1e-4 only, and the number of squarings must be bounded.
    """
    norm = lax.stop_gradient(jnp.max(jnp.sum(jnp.abs(skew), -2), -1))[..., None, None]
    # norm / _NORM < 2^exponent, and an exponent of 0 is that of zero.
    squarings = jnp.clip(jnp.frexp(norm / _NORM)[1], 0, _SQUARINGS).astype(jnp.int32)
    identity = jnp.eye(skew.shape[-1], dtype=skew.dtype)
    identity = identity.reshape((1,) * (skew.ndim - 2) + identity.shape)
    q = _taylor(skew * jnp.ldexp(jnp.ones_like(norm), -squarings), identity)

    def square(q):
        q = multiply_matrices(q, q)
        gram = multiply_matrices(jnp.swapaxes(q, -1, -2), q)
        return multiply_matrices(q, 1.5 * identity - 0.5 * gram)

    def step(q, done):
        missing = done < squarings
        squared = lax.cond(jnp.any(missing), square, lambda q: q, q)
        return jnp.where(missing, squared, q), None

    q, _ = lax.scan(step, q, jnp.arange(_SQUARINGS, dtype=jnp.int32))
    limit = _NORM * 2**_SQUARINGS
    return jnp.where(norm <= limit, q, jnp.nan)


def _taylor(a: Array, identity: Array) -> Array:
    """The sum of `a^k / k!` in six products (Paterson and Stockmeyer)."""
    width = math.isqrt(_DEGREE + 1)
    powers = [identity, a]
    while len(powers) <= width:
        powers.append(multiply_matrices(powers[-1], a))

    def block(first):
        terms = (powers[i] * (1 / math.factorial(first + i)) for i in range(width))
        return sum(terms, start=jnp.zeros_like(a))

    total = block(_DEGREE + 1 - width)
    for first in range(_DEGREE + 1 - 2 * width, -1, -width):
        total = block(first) + multiply_matrices(total, powers[-1])
    return total
