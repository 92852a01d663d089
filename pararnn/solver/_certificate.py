r"""When a trajectory counts as solved: every entry of the state against its own size.

A max-norm over the state, or an absolute tolerance, lets a small entry be wholly wrong
beside a large one. So entry j of the state at step t has to satisfy

    |f(h_{t-1}, x_t) - h_t|_j <= atol + rtol_j * size_{t,j},

where `rtol_j` is by default 64 roundings of that entry's own dtype, `atol` is 0, and
`size_{t,j}` is the largest absolute value of entry j at this step and at the starts of
segments in about 32 steps before it, or at the one start before if segments are longer,
but not at any from before a reset.
So a value that happens to pass through zero is not held to that zero, one that was
large long ago excuses nothing, and neither does one that will be.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._checks import is_symbolic
from ..scan import join_time, shift, split_time, time_shards

ROUNDINGS = 64
# Sizes are looked for in about so many steps before, in blocks of so many.
REACH, BLOCK = 32, 8


def largest(values: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """The largest size along the axes; infinite where one of them is NaN.

    `jnp.max` alone loses NaN: of 70000 ones and a NaN it returns 1, jitted on a CPU
    (jaxlib 0.10.2).
    """
    sizes = jnp.where(jnp.isnan(values), jnp.inf, jnp.abs(values))
    return jnp.max(sizes, axis, initial=0)


def entry_sizes(
    starts: Float[Array, "S *batch width"],
    length: int,
    cuts: Bool[Array, "S *batch"] | None = None,
) -> Float[Array, "S *batch width"]:
    """The size of every entry at every start of a segment of `length` steps.

    What is not finite has no size, so that it excuses nothing behind it; and neither
    does anything before a reset: `cuts` are the segments that hold one.
    """
    count, shards = starts.shape[0], time_shards(starts.shape[0])
    if is_symbolic(count) or is_symbolic(length):
        blocks, back = count, 1
    else:
        together = max(1, BLOCK // length)
        blocks = shards * -(-count // (together * shards))
        back = -(-REACH // (length * -(-count // blocks)))
    finite = jnp.where(jnp.isfinite(starts), jnp.abs(starts), 0)
    sizes = split_time(finite, blocks)
    earlier = jnp.max(sizes, axis=0)
    before = jnp.zeros_like(earlier)
    # Whether there has been a reset since.
    cut = jnp.zeros((*earlier.shape[:-1], 1), bool)
    if cuts is not None:
        cut = jnp.any(split_time(cuts, blocks), axis=0)[..., None]
    reached = cut
    for _ in range(back):
        earlier, cut = _one_later(earlier), _one_later(cut)
        before = jnp.maximum(before, jnp.where(reached, 0, earlier))
        reached = reached | cut
    return join_time(jnp.maximum(sizes, before[None]), count)


def _one_later(x: Array) -> Array:
    return shift(jnp.zeros_like(x[0]), x)


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
