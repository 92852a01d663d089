"""Newton steps shared between a recurrence and the iteration inside its cell."""

import jax
import jax.numpy as jnp

from ..scan import shift, spread, vary
from ._segments import Segments


class JointSweep:
    r"""Segments of one step each, for a cell whose step is itself an iteration.

    The recurrence $F(h_t, h_{t-1}, x_t) = 0$ is solved as one system for all states.
    Its Newton step,

    $$\partial_z F\, \delta_t + \partial_h F\, \delta_{t-1} = -F,$$

    is the step for $h_t = f(h_{t-1}, x_t)$ with $f$ replaced by one round of the cell's
    iteration from the iterate of $h_t$. So a step costs one round instead of all of
    them. This makes no segment exact: if it does not converge, the solve starts again
    with whole steps. So it is only used for solves without a limit on their steps.
    """

    def __init__(self, segments: Segments):
        self.segments = segments

    def guess_starts(self, guess):
        return self.segments.guess_starts(guess, self._refine)

    def _refine(self, h, x):
        """Take one round towards the next states, from the states before them."""

        def one(parameters, h, x):
            return self.segments.recurrence.vector_refine(parameters, h, h, x)

        over = self.segments.over
        return over.lift(one)(over.parameters, h, x)

    def sweep(self, starts):
        """Take one round towards the end of each segment, and its Jacobian."""
        segments = self.segments
        seeds = vary(jnp.asarray(segments.structure.seeds, starts.dtype), starts)
        first = jax.tree.map(lambda x: x[0], segments.over.inputs)
        # The end of the last segment is not corrected, so it can be h0.
        ends = shift(segments.h0, starts, reverse=True)

        def one(parameters, h, x, tangents, end):
            def step(h):
                return segments.recurrence.vector_refine(parameters, end, h, x)

            return segments.push_one(step, h, x, tangents)

        lifted = segments.over.lift(one, extra=(None, 0), out=(0, 1))
        return lifted(
            segments.over.parameters, spread(starts), first, seeds, spread(ends)
        )
