"""The plain loop: the oracle, and a solver like the others."""

import equinox as eqx
from jax import lax

from ._recurrence import Batch


class Sequential(eqx.Module):
    """One step after the other, by `jax.lax.scan`: always exact, never parallel."""


def solve_sequentially(batch: Batch, parameters, inputs, h0):
    """States `[T, *batch, ...]` by leaf, and what every method reports."""
    step = batch.lift(batch.recurrence.step)

    def body(h, x):
        h = step(parameters, h, x)
        return h, h

    _, states = lax.scan(body, h0, inputs)
    return states, {
        "num_steps": 0,
        "residual": 0.0,
        "sequential": True,
        "nonfinite": 0,
        "certified": True,
    }
