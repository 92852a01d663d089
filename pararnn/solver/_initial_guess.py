"""Where a method starts from: the ends of segments, reached by a few steps from h0.

A cell forgets. After some steps from any state, the states are those of the trajectory
as far as the cell has forgotten where it started. Such a guess has the right scale, and
overflows only where the cell does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._checks import is_symbolic
from ..scan import join_time, shift, split_time

# Steps before the start of each segment: half a segment, within these limits. Newton's
# method on 64 segments then takes 1 step instead of 2 from a guess by 3 steps, and 20%
# to 45% less time (GRU and Elman cells; docs/devdocs/solver.md).
MIN_STEPS, MAX_STEPS = 3, 64
# If each segment is one step, longer ones of this many steps are stepped through twice:
# first from h0, then from the ends of the ones before. This is less work than 3 steps
# for each. Newton's method then takes 1 step instead of 3 or 4, and 35% to 65% less
# time (the same cells; docs/devdocs/solver.md).
COARSE_SEGMENT = 32


def guess_ends(
    step: Callable[[Array, Array], Array], h0: Array, inputs, shards: int
) -> Array:
    """Guess the ends of all segments, `[segments, *batch, width]`.

    **Arguments:** `step(h, x)`, of states `[n, *batch, width]` and as many inputs at
    once; `inputs`, leaves `[length, segments, ...]`; `shards`, the number of devices
    that share time.
    """
    length, count = jax.tree.leaves(inputs)[0].shape[:2]

    def ends(starts, inputs):
        # A loop: XLA would fuse unrolled steps, and recompute them often.
        return lax.scan(lambda h, x: (step(h, x), None), starts, inputs)[0]

    def from_h0(count):
        return jnp.broadcast_to(h0, (count, *h0.shape))

    if is_symbolic(length) or length > 1:
        few = (
            MIN_STEPS
            if is_symbolic(length)
            else max(MIN_STEPS, min(length // 2, MAX_STEPS))
        )
        return ends(from_h0(count), jax.tree.map(lambda x: x[-few:], inputs))
    inputs = jax.tree.map(lambda x: x[0], inputs)
    # A loop of small steps costs nothing on a CPU; elsewhere it has not been measured.
    few = is_symbolic(count) or count < 2 * COARSE_SEGMENT
    if shards > 1 or few or jax.default_backend() != "cpu":
        h = lax.fori_loop(
            0, MIN_STEPS - 1, lambda _, h: shift(h0, step(h, inputs)), from_h0(count)
        )
        return step(h, inputs)
    coarse = -(-count // COARSE_SEGMENT)
    inputs = jax.tree.map(lambda x: split_time(x, coarse), inputs)
    starts = shift(h0, ends(from_h0(coarse), inputs))

    def keep(h, x):
        h = step(h, x)
        return h, h

    return join_time(lax.scan(keep, starts, inputs)[1], count)
