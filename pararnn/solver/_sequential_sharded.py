"""The sequential loop over a time axis that is sharded across devices."""

import jax.numpy as jnp
from jax import Array, lax

from ..scan import join_time, shift, time_shards, vary
from ._problem import BoundProblem


def step_in_turns(problem: BoundProblem) -> tuple[Array, ...]:
    """Return states `[T, *batch, ...]` by leaf; each device steps through its shard.

    In round k all devices step, and the states of device k are kept: only it started
    from the right state. The rounds together take the time of the loop on one device.
    The loop itself would first gather the whole sequence on every device. The same
    program computes every state, so each follows from the one before exactly, even if a
    chaotic cell amplifies roundings.
    """
    shards = time_shards(problem.steps)
    over = problem.segmented(shards)
    place = jnp.arange(shards, dtype=jnp.int32)

    def where(turn, new, old):
        return jnp.where(turn.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    def play(number, carry):
        starts, kept = carry

        def body(h, at_t):
            x, kept = at_t
            h = over.step(h, x)
            mine = (where(place == number, *pair) for pair in zip(h, kept, strict=True))
            return h, tuple(mine)

        ends, kept = lax.scan(body, starts, (over.inputs, kept))
        entering = (shift(h, e) for h, e in zip(problem.h0, ends, strict=True))
        starts = tuple(
            where(place == number + 1, *pair)
            for pair in zip(entering, starts, strict=True)
        )
        return starts, kept

    length = -(-problem.steps // shards)
    starts = tuple(jnp.broadcast_to(h, (shards, *h.shape)) for h in problem.h0)
    empty = tuple(vary(jnp.zeros((length, *s.shape), s.dtype), s) for s in starts)
    _, kept = lax.fori_loop(0, shards, play, (starts, empty))
    return tuple(join_time(s, problem.steps) for s in kept)
