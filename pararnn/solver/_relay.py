"""The plain loop over a time axis that lies across devices."""

import jax
import jax.numpy as jnp
from jax import lax

from ..scan import join_time, shift, split_time, vary
from ._recurrence import Batch
from ._sequential import stats_of_loop


def solve_in_turns(batch: Batch, parameters, inputs, h0, shards: int):
    """`solve_sequentially`, each device stepping through its own stretch of time.

    In round k all devices step, and what the k-th of them finds is kept: it alone has
    started from a state that is known. The rounds take the time of the loop on one
    device, whereas the loop itself would first gather the whole sequence on each. One
    program computes every state once, so that they follow one from the other even
    where a chaotic cell amplifies roundings.
    """
    steps = jax.tree.leaves(inputs)[0].shape[0]
    over = batch.segmented(parameters, inputs)
    step = over.lift(batch.recurrence.step)
    inputs = jax.tree.map(lambda x: split_time(x, shards), inputs)
    place = jnp.arange(shards, dtype=jnp.int32)

    def where(turn, new, old):
        return jnp.where(turn.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    def play(number, carry):
        starts, kept = carry

        def body(h, at_t):
            x, kept = at_t
            h = step(parameters, h, x)
            mine = (where(place == number, *pair) for pair in zip(h, kept, strict=True))
            return h, tuple(mine)

        ends, kept = lax.scan(body, starts, (inputs, kept))
        entering = (shift(h, e) for h, e in zip(h0, ends, strict=True))
        starts = tuple(
            where(place == number + 1, *pair)
            for pair in zip(entering, starts, strict=True)
        )
        return starts, kept

    length = -(-steps // shards)
    starts = tuple(jnp.broadcast_to(h, (shards, *h.shape)) for h in h0)
    empty = tuple(vary(jnp.zeros((length, *s.shape), s.dtype), s) for s in starts)
    _, kept = lax.fori_loop(0, shards, play, (starts, empty))
    states = tuple(join_time(s, steps) for s in kept)
    tainted = tuple(jnp.sum(s * 0, axis=0) for s in states)
    return states, stats_of_loop(tainted, len(batch.levels))
