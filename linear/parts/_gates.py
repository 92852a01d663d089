"""Gates and rates that lose no digits, and cost no more than their plain formulas."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def decay(
    log_a: Float[Array, "*shape"],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    r"""$a$ and $1 - a^2$, to a few roundings also where $a$ is nearly one.

    $$\tanh(-\log a) = \frac{1 - a^2}{1 + a^2}$$
    """
    a = jnp.exp(log_a)
    return a, jnp.tanh(-log_a) * (1 + a * a)


def share(
    u: Float[Array, "*shape"], w: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    r"""$f / (f + i)$ and $i / (f + i)$ of $f = \sigma(u)$, $i = \sigma(w)$.

    Also where both gates underflow: by the largest of $1, e^{-u}, e^{-w}$ divided,

    $$\frac{f}{f + i} = \frac{1 + e^{-w}}{2 + e^{-u} + e^{-w}}.$$
    """
    # A gate that is shut for good has a logit of -inf.
    u, w = (jnp.maximum(v, jnp.finfo(v.dtype).min / 2) for v in (u, w))
    # The quotient does not depend on what both are divided by.
    largest = jax.lax.stop_gradient(jnp.maximum(0, -jnp.minimum(u, w)))
    one, at_u, at_w = jnp.exp(-largest), jnp.exp(-u - largest), jnp.exp(-w - largest)
    total = 2 * one + at_u + at_w
    return (one + at_w) / total, (one + at_u) / total


def rate(log: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`exp(log)`, and the largest finite number where that overflows: a decay of such a
    rate is zero, whose derivative would be zero times infinity."""
    return jnp.exp(jnp.minimum(log, jnp.log(jnp.finfo(log.dtype).max) * (1 - 2**-20)))
