r"""When a trajectory counts as solved: every entry of the state against its own size.

A max-norm over the state, or an absolute tolerance, lets a small entry be wholly wrong
beside a large one. So entry j of the state at step t has to satisfy

    |f(h_{t-1}, x_t) - h_t|_j <= atol + rtol_j * size_{t,j},

where `rtol_j` is by default 64 roundings of that entry's own dtype, `atol` is 0, and
`size_{t,j}` is the largest absolute value that entry j has at the starts of segments
about so many steps around step t: a value that happens to pass through zero is not held
to itself alone, and one that was large long ago excuses nothing.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..scan import join_time, shift, split_time, time_shards

ROUNDINGS = 64
# Sizes are looked for in stretches of so many steps, and in both of their neighbours.
STRETCH = 32


def largest(values: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """The largest size along the axes; infinite where one of them is NaN.

    `jnp.max` alone loses NaN: of 70000 ones and a NaN it returns 1, jitted on a CPU
    (jaxlib 0.10.2).
    """
    sizes = jnp.where(jnp.isnan(values), jnp.inf, jnp.abs(values))
    return jnp.max(sizes, axis, initial=0)


def entry_sizes(
    starts: Float[Array, "S *batch width"], length: int
) -> Float[Array, "S *batch width"]:
    """The size of every entry around every start of a segment of `length` steps.

    What is not finite has no size, so that it excuses nothing around it.
    """
    count, shards = starts.shape[0], time_shards(starts.shape[0])
    stretches = shards * -(-count * length // (STRETCH * shards))
    values = split_time(jnp.abs(starts), min(stretches, shards * -(-count // shards)))
    own = jnp.max(jnp.where(jnp.isfinite(values), values, 0), axis=0)
    none = jnp.zeros_like(own[0])
    before, behind = shift(none, own), shift(none, own, reverse=True)
    around = jnp.maximum(own, jnp.maximum(before, behind))
    return join_time(jnp.broadcast_to(around, values.shape), count)


def along_entries(values: Float[np.ndarray, " width"], like: Array) -> Array:
    """One number for each entry, to stand beside `like`, `[..., width]`."""
    if np.all(values == values[:1]):
        values = values[:1]
    return jnp.asarray(values.reshape(*(1,) * (like.ndim - 1), -1), like.dtype)


def is_small(
    residuals: Float[Array, "S *batch width"],
    sizes: Float[Array, "S *batch width"],
    rtol: Float[np.ndarray, " width"],
    atol: float,
) -> Bool[Array, "S *batch"]:
    """Whether all entries of a residual are within the tolerance of the entry.

    Divided, as the product of a tolerance and a small size would be flushed to zero.
    """
    excess = jnp.maximum(residuals - atol, 0) if atol else residuals
    allowed = (excess / along_entries(rtol, excess) <= sizes) | (excess == 0)
    return jnp.all(allowed, axis=-1)
