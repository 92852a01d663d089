"""Time cut into segments that are stepped side by side.

Each of S segments starts from a guess `s_i` of its state. Stepping all segments to
their ends `φ_i(s_i)`, and pushing a transition along, gives exactly or approximately
their Jacobians `P_i`; see `_iteration.py` for how the guesses are corrected. Once they
no longer change, the same segments are stepped once more, every state is kept, and the
residuals where one segment meets the next certify the trajectory.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from .._checks import is_symbolic
from ..scan import join_time, shift, split_time, spread, time_shards, vary
from ._certificate import ROUNDINGS, along_entries, entry_sizes, is_small, largest
from ._initial_guess import guess_ends
from ._problem import BoundProblem
from ._sequential import States, are_finite
from ._solution import Stats
from ._structure import Structure

if TYPE_CHECKING:
    from ._methods import AbstractMethod

# One step of the cell and of the transition that is pushed along.
Push = Callable[[Callable[[Array], Array], Array, Array], tuple[Array, Array]]


class Linearization(NamedTuple):
    """What a method pushes along a segment in place of the Jacobian.

    `push(step, h, tangents)` returns `step(h)` and the tangents `[size, width]` one
    step further; `structure` says which matrix they stand for.
    """

    structure: Structure
    push: Push


class Trajectory(NamedTuple):
    """All states, stepped from the segments' starts, and their certificate."""

    parts: tuple[Array, ...]  # by leaf, [length, S, *batch, ...], ends included
    residual: Array  # [*batch]
    certified: Bool[Array, "*batch"]
    ended: Bool[Array, "*batch"]  # certified, or known not to stay finite
    certified_steps: Array  # int [*batch]


class Segments:
    """A problem cut into segments: everything that stays the same from step to step.

    **Attributes:** `count` segments of `length` steps each, the last one filled up.
    """

    def __init__(self, problem: BoundProblem, method: "AbstractMethod"):
        self.problem = problem
        self.recurrence = recurrence = problem.recurrence
        linearization = method.linearize(recurrence.width, problem.find_structure)
        self.structure, self.push = linearization
        self.steps = problem.steps
        self.shards = time_shards(self.steps)
        self.count, self.length = self._divide(method.segments)
        self.over = problem.segmented(self.count)
        self.h0 = problem.ravel(problem.h0)
        # Where an iterate has overflowed. A reset may drop an h0 that is not finite.
        self.restart = jnp.where(jnp.isfinite(self.h0), self.h0, 0)
        own = ROUNDINGS * recurrence.entry_eps
        self.rtol = own if method.rtol is None else np.full_like(own, method.rtol)
        self.atol = method.atol or 0.0
        self.cuts = self._find_cuts()

    def _find_cuts(self) -> Bool[Array, "S *batch"] | None:
        """The segments that contain a reset."""
        leaves, reset = self.over.inputs
        if reset is None:
            return None
        first = jax.tree.map(lambda x: x[0], leaves), jnp.any(reset, axis=0)
        over = self.over.lift(lambda parameters, h, x: x[1])
        starts = jnp.broadcast_to(self.h0, (self.count, *self.h0.shape))
        return over(self.over.parameters, starts, first)

    def _divide(self, segments: int | None) -> tuple[int, int]:
        """How many segments, and of how many steps each."""
        if is_symbolic(self.steps):
            # The last ones are all padding if there are fewer steps.
            count = segments or self.steps
            return count, -(-self.steps // count)
        wanted = min(segments or self.steps, self.steps)
        if self.shards > 1:
            # As many segments on every device, even if the last ones are all padding.
            count = math.ceil(wanted / self.shards) * self.shards
            return count, math.ceil(self.steps / count)
        length = math.ceil(self.steps / wanted)
        return math.ceil(self.steps / length), length

    def place(self, ndim: int) -> Array:
        """The number of each segment, to stand beside `[S, ...]`."""
        place = jnp.arange(self.count, dtype=jnp.int32)
        return place.reshape(-1, *(1,) * (ndim - 1))

    def guess_starts(self, guess, step: Callable | None = None) -> Array:
        """The starts `[S, *batch, width]` to begin with.

        **Arguments:** `guess`, leaves `[T, *batch, ...]`, or `None` for steps from h0
        before each segment, by `step(h, x)` on vectors.
        """
        if guess is None:
            step = step or self._step
            ends = guess_ends(step, self.h0, self.over.inputs, self.shards)
        else:
            last = (split_time(leaf, self.count)[-1] for leaf in guess)
            ends = self.over.ravel(tuple(last))
        return shift(self.h0, jnp.where(jnp.isfinite(ends), ends, self.restart))

    def _step(self, h, x):
        """One step of vectors `[S, *batch, width]`."""
        step = self.over.lift(self.recurrence.vector_step)
        return step(self.over.parameters, h, x)

    def sweep(self, starts: Array) -> tuple[Array, Array]:
        """Ends of the segments and their Jacobians, compressed by the structure."""
        starts = spread(starts)
        seeds = vary(jnp.asarray(self.structure.seeds, starts.dtype), starts)
        if self.length == 1:
            # Seeds that are shared by all steps meet each weight matrix once.
            first = jax.tree.map(lambda x: x[0], self.over.inputs)
            return self.push_tangents(starts, first, seeds)
        ones = (1,) * (starts.ndim - 1)
        seeds = seeds.reshape(seeds.shape[0], *ones, seeds.shape[1])
        tangents = jnp.broadcast_to(seeds, (seeds.shape[0], *starts.shape))

        def body(carry, x):
            return self.push_tangents(carry[0], x, carry[1]), None

        carry = (starts, tangents)
        (ends, tangents), _ = lax.scan(body, carry, self.over.inputs)
        return ends, tangents

    def push_tangents(self, h, x, tangents):
        """One step of vectors, and of tangents `[size, S, *batch, width]`.

        Tangents `[size, width]` are the same for all segments.
        """

        def one(parameters, h, x, tangents):
            def step(h):
                return self.recurrence.vector_step(parameters, h, x, smooth=True)

            return self.push_one(step, h, x, tangents)

        axis = 1 if tangents.ndim > 2 else None
        lifted = self.over.lift(one, extra=(axis,), out=(0, 1))
        return lifted(self.over.parameters, h, x, tangents)

    def push_one(self, step: Callable, h, x, tangents):
        ahead, tangents = self.push(step, h, tangents)
        reset = x[1]
        if reset is not None:
            # Selected again: the cell's Jacobian may be infinite there.
            tangents = jnp.where(reset, 0, tangents)
        return ahead, tangents

    def change_of_entries(self, before: Array, after: Array) -> Array:
        """The largest change of a start, `[*batch]`, each entry against its own size.

        Entries of a coarser dtype may change by more of their roundings.
        """
        either = jnp.maximum(jnp.abs(before), jnp.abs(after))
        sizes = entry_sizes(either, self.length, self.cuts)
        change = relative(jnp.abs(after - before), sizes)
        eps = self.recurrence.entry_eps
        change = change * along_entries(eps.min(initial=1) / eps, change)
        change = jnp.where(self.place(change.ndim) == 0, 0, change)
        return jnp.max(change, axis=(0, -1), initial=0)

    def trajectory(self, starts: Array) -> Trajectory:
        """Step through the segments again, keep every state, and certify them.

        Inside a segment each state follows from the one before, so only its last step
        can have a residual: its state is the start of the next segment.
        """

        def body(h, x):
            h = self.over.step(h, x)
            return h, h

        leaves = self.over.unravel(spread(starts))
        ends, states = lax.scan(
            body, leaves, self.over.inputs, unroll=True if self.length == 1 else 1
        )
        ends, following = self.over.ravel(ends), self._following(starts)
        residuals = jnp.where(self._followed(ends.ndim), jnp.abs(ends - following), 0)
        sizes = entry_sizes(following, self.length, self.cuts)
        lost = ~jnp.all(jnp.isfinite(residuals), axis=-1)
        small = is_small(residuals, sizes, self.rtol, self.atol) & ~lost
        # The last state of a segment is the next start; it is as good as its residual.
        first = jnp.min(jnp.where(small, self.count, self.place(small.ndim)), axis=0)
        failed = (first + 1) * self.length - 1
        return Trajectory(
            parts=states,
            residual=largest(residuals, (0, -1)),
            certified=jnp.all(small, axis=0),
            ended=jnp.all(small | lost, axis=0),
            certified_steps=jnp.where(jnp.all(small, axis=0), self.steps, failed),
        )

    def no_trajectory(self, starts: Array) -> Trajectory:
        """What stands for a trajectory before the first: states that do not change.

        (Zeros would do, but XLA sets them up before the inputs, and needs more memory.)
        """
        leaves, shape = self.over.unravel(spread(starts)), self.problem.batch_shape
        trajectory = Trajectory(
            parts=tuple(jnp.broadcast_to(s, (self.length, *s.shape)) for s in leaves),
            residual=jnp.full(shape, jnp.inf, self.recurrence.dtype),
            certified=jnp.zeros(shape, bool),
            ended=jnp.zeros(shape, bool),
            certified_steps=jnp.zeros(shape, jnp.int32),
        )
        return vary(trajectory, leaves)

    def pass_on(self, trajectory: Trajectory) -> Array:
        """The end of each segment as the start of the next.

        These ends were computed by the program that certifies: after k such passes the
        first k segments follow from each other to the last bit.
        """
        ends = self.over.ravel(tuple(leaf[-1] for leaf in trajectory.parts))
        return shift(self.h0, jnp.where(jnp.isfinite(ends), ends, self.restart))

    def join(self, trajectory: Trajectory, starts: Array) -> tuple[States, Stats]:
        """The states `[T, *batch, ...]` by leaf, and whether they are right.

        Each segment ends where the next one starts, unless it has no finite end.
        """
        ends = self.over.ravel(tuple(leaf[-1] for leaf in trajectory.parts))
        finite = jnp.all(jnp.isfinite(ends - self._following(starts)), -1)
        joined = self._followed(finite.ndim) & finite

        def join(s, h):
            mask = joined.reshape(joined.shape + (1,) * (h.ndim - joined.ndim))
            return s.at[-1].set(jnp.where(mask, shift(h[0], h, reverse=True), s[-1]))

        parts = map(join, trajectory.parts, self.over.unravel(spread(starts)))
        states = tuple(join_time(leaf, self.steps) for leaf in parts)
        stats = Stats.of(
            self.problem,
            residual=trajectory.residual,
            certified=trajectory.certified,
            certified_steps=trajectory.certified_steps,
            # The last segment may overflow in its padding, so states are looked at.
            finite=are_finite(states, self.problem.rank),
        )
        return states, stats

    def _followed(self, ndim: int) -> Bool[Array, " S *ones"]:
        """Which segments another one follows, within the sequence."""
        return (self.place(ndim) + 1) * self.length < self.steps

    def _following(self, starts: Array) -> Array:
        """The start of the next segment as the cell reads it, 0 where there is none."""
        starts = self.over.ravel(self.over.unravel(spread(starts)))
        following = shift(self.h0, starts, reverse=True)
        return jnp.where(self._followed(following.ndim), following, 0)


def relative(change: Array, size: Array) -> Array:
    """`change / size`, 0 where nothing changed."""
    return jnp.where(change == 0, 0, change / size)
