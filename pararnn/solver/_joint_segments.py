"""Newton steps shared between a recurrence and the iteration inside its cell."""

import jax
import jax.numpy as jnp

from ..scan import shift, spread, vary
from ._segments import Carry, Segments

# Joint steps, at most: where they converge it is quadratically, mostly in 4 to 8.
JOINT_STEPS = 16


class JointSegments(Segments):
    r"""Segments of one step each, of a cell whose step is an iteration of its own.

    The recurrence $F(h_t, h_{t-1}, x_t) = 0$ is solved as one system for all states at
    once. Its Newton step,

    $$\partial_z F\, \delta_t + \partial_h F\, \delta_{t-1} = -F,$$

    is that of $h_t = f(h_{t-1}, x_t)$ with one round of the cell's iteration, from the
    iterate of $h_t$, in place of $f$. So a step costs one round and not all of them. No
    segment becomes exact by that; where it does not converge, the solve starts
    again with whole steps. So it is for solves without a limit on their steps.
    """

    def approach(self, guess) -> Carry:
        """Starts near the solution where it gets there, else as it found them."""
        start = self.start(guess, may_fail=False)
        near = self.iterate(start, JOINT_STEPS)
        kept = near.done[None, ..., None]
        return near._replace(
            starts=jnp.where(kept, near.starts, start.starts),
            correction=jnp.where(near.done, near.correction, start.correction),
            entry_correction=jnp.where(
                near.done, near.entry_correction, start.entry_correction
            ),
            nonfinite=jnp.where(near.done, near.nonfinite, start.nonfinite),
        )

    def _step(self, h, x):
        refine = self.over.lift(self._smooth_step, extra=(0,))
        return refine(self.parameters, h, x, h)

    def _smooth_step(self, parameters, h, x, z):
        return self.recurrence.vector_refine(parameters, z, h, x)

    def _sweep(self, starts):
        seeds = vary(jnp.asarray(self.structure.seeds, starts.dtype), starts)
        first = jax.tree.map(lambda x: x[0], self.inputs)
        # The last segment's end is not corrected, so that h0 does for it.
        ends = shift(self.h0, starts, reverse=True)
        return self._push(spread(starts), first, seeds, spread(ends))

    def _count_exact(self, carry: Carry):
        return jnp.zeros_like(carry.num_steps)
