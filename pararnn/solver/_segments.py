"""Time cut into segments that are stepped side by side.

Each of S segments starts from a guess `s_i` of its state. All segments are stepped to
their ends `φ_i(s_i)`, and a transition is pushed along, which gives exactly or
approximately their Jacobians `P_i`. `_iteration.py` corrects the guesses. Once they no
longer change, the segments are stepped once more and every state is kept. The residuals
where one segment meets the next certify the trajectory.
"""

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from .._checks import is_symbolic
from ..recurrence import Structure
from ..scan import (
    join_time,
    shift,
    split_time,
    spread,
    time_shards,
    vary,
)
from ._certificate import (
    ROUNDINGS,
    along_entries,
    entry_sizes,
    is_within_tolerance,
    max_abs,
)
from ._problem import BoundProblem
from ._sequential import States, find_nonfinite
from ._solution import Stats

# Steps before the start of each segment: half a segment, within these limits. Newton's
# method on 64 segments then takes 1 step instead of 2 from a guess by 3 steps, and 20%
# to 45% less time (GRU and Elman cells; docs/devdocs/solver.md).
MIN_STEPS, MAX_STEPS = 3, 64
# If each segment is one step, longer ones of this many steps are stepped through twice:
# first from h0, then from the ends of the ones before. This is less work than 3 steps
# for each. Newton's method then takes 1 step instead of 3 or 4, and 35% to 65% less
# time (the same cells; docs/devdocs/solver.md).
COARSE_SEGMENT = 32

# Takes one step of the cell, and of the transition that is pushed along.
Push = Callable[[Callable[[Array], Array], Array, Array], tuple[Array, Array]]


class Linearization(NamedTuple):
    """What a method pushes along a segment in place of the Jacobian.

    `push(step, h, tangents)` returns `step(h)` and the tangents `[size, width]` after
    this step. `structure` says which matrix they represent.
    """

    structure: Structure
    push: Push


class Method(Protocol):
    """What the segments and the iteration ask of a method; see `AbstractMethod`."""

    segments: int | None
    rtol: float | None
    atol: float | None
    history: int
    quadratic: ClassVar[bool]

    def linearize(
        self, width: int, find_structure: Callable[[], Structure]
    ) -> Linearization: ...

    def correct(
        self,
        structure: Structure,
        tangents: Array,
        defects: Array,
        length: int,
        progress: Array,
    ) -> Array: ...


class Trajectory(NamedTuple):
    """All states, stepped from the segments' starts, and their certificate."""

    parts: tuple[Array, ...]  # by leaf, [length, S, *batch, ...], ends included
    residual: Array  # [*batch]
    certified: Bool[Array, "*batch"]
    ended: Bool[Array, "*batch"]  # certified, or known to become not finite
    certified_steps: Array  # int [*batch]


class Segments:
    """A problem cut into segments: everything that no step of a method changes.

    **Attributes:** `count` segments of `length` steps each; the last one is padded.
    """

    def __init__(self, problem: BoundProblem, method: Method):
        self.problem = problem
        self.recurrence = recurrence = problem.recurrence
        linearization = method.linearize(recurrence.width, problem.find_structure)
        self.structure, self.push = linearization
        self.steps = problem.steps
        self.shards = time_shards(self.steps)
        self.count, self.length = self._divide(method.segments)
        self.over = problem.segmented(self.count)
        self.h0 = problem.ravel(problem.h0)
        # Replaces iterates that overflowed. A reset may drop an h0 that is not finite.
        self.restart = jnp.where(jnp.isfinite(self.h0), self.h0, 0)
        own = ROUNDINGS * recurrence.entry_eps
        self.rtol = own if method.rtol is None else np.full_like(own, method.rtol)
        self.atol = method.atol or 0.0
        self.cuts = self._find_cuts()

    def _find_cuts(self) -> Bool[Array, "S *batch"] | None:
        """Find the segments that contain a reset."""
        leaves, reset = self.over.inputs
        if reset is None:
            return None
        first = jax.tree.map(lambda x: x[0], leaves), jnp.any(reset, axis=0)
        over = self.over.lift(lambda parameters, h, x: x[1])
        starts = jnp.broadcast_to(self.h0, (self.count, *self.h0.shape))
        return over(self.over.parameters, starts, first)

    def _divide(self, segments: int | None) -> tuple[int, int]:
        """Return the number of segments, and the number of steps in each."""
        if is_symbolic(self.steps):
            # With fewer steps than segments, the last segments are all padding.
            count = segments or self.steps
            return count, -(-self.steps // count)
        wanted = min(segments or self.steps, self.steps)
        if self.shards > 1:
            # Every device has the same number of segments, even if the last ones are
            # all padding.
            count = math.ceil(wanted / self.shards) * self.shards
            return count, math.ceil(self.steps / count)
        length = math.ceil(self.steps / wanted)
        return math.ceil(self.steps / length), length

    def segment_index(self, ndim: int) -> Array:
        """Return the index of each segment, shaped to broadcast with `[S, ...]`."""
        place = jnp.arange(self.count, dtype=jnp.int32)
        return place.reshape(-1, *(1,) * (ndim - 1))

    def guess_starts(self, guess, step: Callable | None = None) -> Array:
        """Return the first guess of the starts, `[S, *batch, width]`.

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
        """Take one step of vectors `[S, *batch, width]`."""
        step = self.over.lift(self.recurrence.vector_step)
        return step(self.over.parameters, h, x)

    def sweep(self, starts: Array) -> tuple[Array, Array]:
        """Return the segments' ends, and the compressed columns of their Jacobians."""
        starts = spread(starts)
        seeds = vary(jnp.asarray(self.structure.seeds, starts.dtype), starts)
        if self.length == 1:
            # All steps share the seeds, so each weight matrix is applied to them once.
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
        """Take one step of vectors, and of tangents `[size, S, *batch, width]`.

        Tangents `[size, width]` are shared by all segments.
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
            # Set to zero here too, since the cell's Jacobian may be infinite.
            tangents = jnp.where(reset, 0, tangents)
        return ahead, tangents

    def change_of_entries(self, before: Array, after: Array) -> Array:
        """Return the largest relative change of an entry of a start, `[*batch]`.

        Each entry is measured against its own size, and those of a coarser dtype may
        change by more.
        """
        either = jnp.maximum(jnp.abs(before), jnp.abs(after))
        sizes = entry_sizes(either, self.length, self.cuts)
        change = relative(jnp.abs(after - before), sizes)
        eps = self.recurrence.entry_eps
        change = change * along_entries(eps.min(initial=1) / eps, change)
        change = jnp.where(self.segment_index(change.ndim) == 0, 0, change)
        return jnp.max(change, axis=(0, -1), initial=0)

    def trajectory(self, starts: Array) -> Trajectory:
        """Step through the segments again, keep every state, and certify them.

        Inside a segment each state is computed from the one before. So only the last
        step can have a residual: its state is the start of the next segment.
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
        small = is_within_tolerance(residuals, sizes, self.rtol, self.atol) & ~lost
        # The last state of a segment is the next start, and may have a residual.
        first = jnp.min(
            jnp.where(small, self.count, self.segment_index(small.ndim)), axis=0
        )
        failed = (first + 1) * self.length - 1
        return Trajectory(
            parts=states,
            residual=max_abs(residuals, (0, -1)),
            certified=jnp.all(small, axis=0),
            ended=jnp.all(small | lost, axis=0),
            certified_steps=jnp.where(jnp.all(small, axis=0), self.steps, failed),
        )

    def no_trajectory(self, starts: Array) -> Trajectory:
        """Return a placeholder before the first trajectory: states that do not change.

        (Zeros would do, but XLA allocates them before the inputs, and needs more
        memory.)
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
        """Take the end of each segment as the start of the next.

        The program that certifies has computed these ends. So after k such passes the
        first k segments follow from each other to the last bit.
        """
        ends = self.over.ravel(tuple(leaf[-1] for leaf in trajectory.parts))
        return shift(self.h0, jnp.where(jnp.isfinite(ends), ends, self.restart))

    def join(self, trajectory: Trajectory, starts: Array) -> tuple[States, Stats]:
        """Return the states `[T, *batch, ...]` by leaf, and their statistics.

        The last state of a segment is the start of the next, unless its end is not
        finite.
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
            # Not read off the residuals: the last segment may overflow in its padding.
            first_nonfinite=find_nonfinite(states, self.problem.rank),
        )
        return states, stats

    def _followed(self, ndim: int) -> Bool[Array, " S *ones"]:
        """Return which segments are followed by another one within the sequence."""
        return (self.segment_index(ndim) + 1) * self.length < self.steps

    def _following(self, starts: Array) -> Array:
        """Return the next segment's start as the cell reads it, 0 if there is none."""
        starts = self.over.ravel(self.over.unravel(spread(starts)))
        following = shift(self.h0, starts, reverse=True)
        return jnp.where(self._followed(following.ndim), following, 0)


def relative(change: Array, size: Array) -> Array:
    """Return `change / size`, 0 where nothing changed."""
    return jnp.where(change == 0, 0, change / size)


def guess_ends(
    step: Callable[[Array, Array], Array], h0: Array, inputs, shards: int
) -> Array:
    """Guess the ends of all segments, `[segments, *batch, width]`.

    A cell forgets. After some steps from any state, the states are those of the
    trajectory as far as the cell has forgotten where it started. Such a guess has the
    right scale, and overflows only where the cell does.

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
