"""Where a method starts from: the ends of segments, by steps from h0 before each.

A cell forgets. From whatever state a stretch of time starts, the states at its end are
those of the trajectory as far as the cell has forgotten the start by then. Such a guess
is of the right scale, and overflows only where the cell does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .._checks import is_symbolic
from ..scan import join_time, shift, split_time

# Steps before each segment: half a segment (which takes less time than a quarter of a
# Newton step, as no Jacobian is pushed along), but not beyond the memory of most cells.
# On GRUs and Elman cells of 4 to 16 units, T = 4096 to 65536 in 64 segments, Newton's
# method then takes 1 step where it took 2 from a guess by 3 steps, and 0.55 to 0.8 of
# the time. Measured for Newton's method; the steps of Jacobi and Picard are cheaper.
FEWEST, MOST = 3, 64
# Where a segment is one step, blocks of time are stepped through twice, from h0 and
# from the ends that the blocks before have found so, which is less work than 3 steps
# for each. The same cells, T = 1024 to 16384: 1 Newton step in place of 3 or 4, 0.35 to
# 0.65 of the time. Blocks of 16: up to 2; of 64: the same, a little slower.
BLOCK = 32


def guess_ends(
    step: Callable[[Array, Array], Array], h0: Array, inputs, shards: int
) -> Array:
    """The ends of all segments, `[segments, *batch, width]`.

    **Arguments:** `step(h, x)`, of as many states `[n, *batch, width]` as there are
    inputs at once; `inputs`, leaves `[length, segments, ...]`; `shards`, how many
    devices share time.
    """
    length, count = jax.tree.leaves(inputs)[0].shape[:2]

    def ends(starts, inputs):
        # A loop: steps written out are merged by XLA, which then recomputes them often.
        return lax.scan(lambda h, x: (step(h, x), None), starts, inputs)[0]

    def from_h0(count):
        return jnp.broadcast_to(h0, (count, *h0.shape))

    if is_symbolic(length) or length > 1:
        few = FEWEST if is_symbolic(length) else max(FEWEST, min(length // 2, MOST))
        return ends(from_h0(count), jax.tree.map(lambda x: x[-few:], inputs))
    inputs = jax.tree.map(lambda x: x[0], inputs)
    # A loop of small steps costs nothing on a CPU; elsewhere it has not been measured.
    few = is_symbolic(count) or count < 2 * BLOCK
    if shards > 1 or few or jax.default_backend() != "cpu":
        h = lax.fori_loop(
            0, FEWEST - 1, lambda _, h: shift(h0, step(h, inputs)), from_h0(count)
        )
        return step(h, inputs)
    blocks = -(-count // BLOCK)
    inputs = jax.tree.map(lambda x: split_time(x, blocks), inputs)
    starts = shift(h0, ends(from_h0(blocks), inputs))

    def keep(h, x):
        h = step(h, x)
        return h, h

    return join_time(lax.scan(keep, starts, inputs)[1], count)
