"""What the generated tasks share."""

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Int, PRNGKeyArray


def integers(
    key: PRNGKeyArray, size: int, limit: int | Int[Array, ""]
) -> Int[Array, " size"]:
    """`size` integers, uniform from 0 up to, but without, `limit`."""
    return jr.randint(key, (size,), 0, limit, jnp.int32)


def within(size: int, length: Int[Array, ""]) -> Bool[Array, " size"]:
    """Which of `size` steps are among the first `length`."""
    return jnp.arange(size, dtype=jnp.int32) < length.astype(jnp.int32)
