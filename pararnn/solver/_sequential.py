"""The plain loop: the oracle, and a solver like the others."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from ._recurrence import Batch


class Sequential(eqx.Module):
    """One step after the other, by `jax.lax.scan`: always exact, never parallel.

    Where devices share time, they step through their stretches in turns.
    """


def solve_sequentially(batch: Batch, parameters, inputs, h0):
    """States `[T, *batch, ...]` by leaf, and what every method reports."""
    step = batch.lift(batch.recurrence.step)

    def body(carry, x):
        h, tainted = carry
        h = step(parameters, h, x)
        # Zero as long as all states are finite, NaN ever after. Kept in the loop it
        # costs a few percent; a pass over all states afterwards costs 10 to 40%.
        tainted = tuple(t + v * 0 for t, v in zip(tainted, h, strict=True))
        return (h, tainted), h

    (_, tainted), states = lax.scan(
        body, (h0, tuple(jnp.zeros_like(h) for h in h0)), inputs
    )
    return states, {
        "num_steps": 0,
        "residual": 0.0,
        "sequential": True,
        "nonfinite": 0,
        "certified": True,
        "finite": all_zero(tainted, len(batch.levels)),
    }


def all_zero(leaves, rank: int) -> Bool[Array, " *batch"]:
    """For each sequence whether all entries of `[*batch, ...]` leaves are zero."""
    zero = jnp.asarray(True)
    for leaf in leaves:
        zero = zero & jnp.all(leaf == 0, axis=tuple(range(rank, leaf.ndim)))
    return zero
