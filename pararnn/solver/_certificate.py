r"""When a trajectory counts as solved: each entry of the state against its own size.

With a max-norm over the state, or an absolute tolerance, a small entry beside a large
one could be entirely wrong. So entry j of the state at step t has to satisfy

    |f(h_{t-1}, x_t) - h_t|_j <= atol + rtol_j * size_{t,j},

where `rtol_j` defaults to 64 roundings of that entry's own dtype, and `atol` to 0.
`size_{t,j}` is the largest absolute value of entry j at this step and at the starts of
segments in about 32 steps before it; if segments are longer, at the one start before
it. Values before a reset do not count. So an entry that passes through zero does not
get a tolerance of zero, and neither values of long ago nor later ones loosen it.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from .._checks import is_symbolic
from ..scan import join_time, shift, split_time, time_shards

ROUNDINGS = 64
# Sizes are looked for in about REACH steps before, in bins of BIN steps.
REACH, BIN = 32, 8


def max_abs(values: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Return the largest absolute value along the axes; infinity if one is NaN.

    `jnp.max` alone loses NaN: for 70000 ones and a NaN it returns 1, jitted on a CPU
    (jaxlib 0.10.2).
    """
    sizes = jnp.where(jnp.isnan(values), jnp.inf, jnp.abs(values))
    return jnp.max(sizes, axis, initial=0)


def entry_sizes(
    starts: Float[Array, "S *batch width"],
    length: int,
    cuts: Bool[Array, "S *batch"] | None = None,
) -> Float[Array, "S *batch width"]:
    """Return the size of every entry at every start of a segment of `length` steps.

    Values that are not finite, or before a reset, do not loosen the tolerance after
    them. `cuts` are the segments that contain a reset.
    """
    count, shards = starts.shape[0], time_shards(starts.shape[0])
    if is_symbolic(count) or is_symbolic(length):
        bins, back = count, 1
    else:
        together = max(1, BIN // length)
        bins = shards * -(-count // (together * shards))
        back = -(-REACH // (length * -(-count // bins)))
    finite = jnp.where(jnp.isfinite(starts), jnp.abs(starts), 0)
    sizes = split_time(finite, bins)
    earlier = jnp.max(sizes, axis=0)
    before = jnp.zeros_like(earlier)
    # Whether there has been a reset since.
    cut = jnp.zeros((*earlier.shape[:-1], 1), bool)
    if cuts is not None:
        cut = jnp.any(split_time(cuts, bins), axis=0)[..., None]
    after_reset = cut
    for _ in range(back):
        earlier, cut = _one_later(earlier), _one_later(cut)
        before = jnp.maximum(before, jnp.where(after_reset, 0, earlier))
        after_reset = after_reset | cut
    return join_time(jnp.maximum(sizes, before[None]), count)


def _one_later(x: Array) -> Array:
    return shift(jnp.zeros_like(x[0]), x)


def along_entries(values: Float[np.ndarray, " width"], like: Array) -> Array:
    """Reshape one number for each entry to broadcast with `like`, `[..., width]`."""
    if np.all(values == values[:1]):
        values = values[:1]
    return jnp.asarray(values.reshape(*(1,) * (like.ndim - 1), -1), like.dtype)


def is_within_tolerance(
    residuals: Float[Array, "S *batch width"],
    sizes: Float[Array, "S *batch width"],
    rtol: Float[np.ndarray, " width"],
    atol: float,
) -> Bool[Array, "S *batch"]:
    """Return whether all entries of a residual are within their tolerances.

    It divides by the tolerance, since the product of a tolerance and a small size would
    be flushed to zero.
    """
    excess = jnp.maximum(residuals - atol, 0) if atol else residuals
    allowed = (excess / along_entries(rtol, excess) <= sizes) | (excess == 0)
    return jnp.all(allowed, axis=-1)
