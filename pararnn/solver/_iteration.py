"""Newton's method and its relatives: corrections of the segments' starts.

From starts `s_i` with ends `φ_i(s_i)` and transitions `P_i`, a method solves, or nearly
solves,

    δ_{i+1} = P_i δ_i + (φ_i(s_i) - s_{i+1}),   δ_0 = 0,

a linear recurrence of length S for the scan engine, and adds δ to the starts. Solving
for the correction instead of the new state keeps the rounding of `P s` out of the
answer. After k steps the first k segments are exact, whatever `P` is, so S steps always
suffice. The method defines `P`, and how the correction is solved for.

An attempt takes steps until the correction forecasts convergence, and then one pass of
the cell, which certifies the trajectory. A second attempt is seldom needed.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from .._checks import is_symbolic
from ..scan import (
    shift,
    spread,
    vary,
)
from ._certificate import max_abs
from ._problem import BoundProblem
from ._segments import Method, Segments, Trajectory, relative
from ._sequential import States
from ._solution import Stats

# Corrections of so many roundings cannot improve anything further.
FEW_ROUNDINGS = 4
# The limit on joint steps. If they converge, it is quadratically, mostly in 4 to 8.
JOINT_STEPS = 16


class Best(NamedTuple):
    """The starts with the smallest defects so far, for a solve that may fail."""

    starts: Array
    residual: Array


class Carry(NamedTuple):
    """The loop's state; `*batch` are the sequences solved together."""

    starts: Array  # [S, *batch, width]
    num_steps: Array  # int [*batch]
    done: Bool[Array, "*batch"]
    correction: Array  # [*batch], the last one, relative to the state
    entry_correction: Array  # [*batch], relative to each entry
    stalled: Bool[Array, "*batch"]  # more steps would not improve it
    passes: Array  # int [*batch], passes of the cell alone
    nonfinite: Array  # int [*batch]
    history: Array  # [*batch, history]
    best: Best | None


class Attempt(NamedTuple):
    """The starts of the segments, and the trajectory from them."""

    carry: Carry
    trajectory: Trajectory


def iterate_on_segments(
    problem: BoundProblem, method: Method, guess, max_steps: int | None
) -> tuple[States, Stats]:
    """Return states `[T, *batch, ...]` by leaf, and the statistics of the solve."""
    segments = Segments(problem, method)
    limited, limit = False, segments.count
    if max_steps is not None and (is_symbolic(limit) or max_steps < limit):
        limited, limit = True, max_steps
    if segments.length == 1 and problem.recurrence.refinement is not None:
        carry = approach_jointly(segments, method, guess)
        # Joint steps make no segment exact, so all whole steps may still be needed.
        limit += JOINT_STEPS
        iteration = Iteration(segments, method, limit, carry.num_steps)
    else:
        iteration = Iteration(segments, method, limit)
        carry = iteration.start(segments.guess_starts(guess), may_fail=limited)

    def stepping(attempt: Attempt):
        """Return which sequences continue with the method's steps."""
        carry = attempt.carry
        going = ~attempt.trajectory.ended & ~carry.stalled
        return going & (carry.num_steps < limit)

    def passing(attempt: Attempt):
        """Return which sequences continue with passes of the cell alone.

        These are sequences that more steps would not improve. A pass steps by the
        program that certifies, which may round otherwise than that of a step. Unless
        the user has set a limit, the passes may go on until the result is that of the
        loop.
        """
        carry = attempt.carry
        if limited:
            left = carry.stalled & (carry.num_steps + carry.passes < limit)
        else:
            left = carry.passes < segments.count
        return ~attempt.trajectory.ended & ~stepping(attempt) & left

    def unfinished(attempt: Attempt):
        return jnp.any(stepping(attempt) | passing(attempt))

    def attempt_again(attempt: Attempt):
        carry = pass_on(segments, attempt, passing(attempt))
        carry = lax.while_loop(iteration.continues, iteration.advance, carry)
        attempt = Attempt(carry, segments.trajectory(carry.starts))
        return attempt._replace(carry=carry._replace(done=~stepping(attempt)))

    # The loop makes the first attempt too, so that its program is compiled once.
    attempt = Attempt(carry, segments.no_trajectory(carry.starts))
    attempt = lax.while_loop(unfinished, attempt_again, attempt)
    carry, trajectory = choose_best(segments, attempt)
    states, stats = segments.join(trajectory, carry.starts)
    stats = stats._replace(
        num_steps=carry.num_steps, nonfinite=carry.nonfinite, history=carry.history
    )
    coupled = problem.recurrence.coupled_along
    return states, stats.shared() if coupled else stats


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


def approach_jointly(segments: Segments, method: Method, guess) -> Carry:
    """Take joint steps; return the starts near the solution, or the first ones.

    The first ones are returned for sequences whose joint steps do not converge.
    """
    joint = JointSweep(segments)
    iteration = Iteration(segments, method, JOINT_STEPS, sweep=joint.sweep)
    start = iteration.start(joint.guess_starts(guess), may_fail=False)
    near = lax.while_loop(iteration.continues, iteration.advance, start)
    kept = near.done

    def choose(near, start):
        return jnp.where(kept, near, start)

    return near._replace(
        starts=jnp.where(kept[None, ..., None], near.starts, start.starts),
        correction=choose(near.correction, start.correction),
        entry_correction=choose(near.entry_correction, start.entry_correction),
        nonfinite=choose(near.nonfinite, start.nonfinite),
    )


def pass_on(segments: Segments, attempt: Attempt, chosen: Bool[Array, " *batch"]):
    """For the chosen sequences, take the end of each segment as the next start."""
    carry = attempt.carry
    starts = segments.pass_on(attempt.trajectory)
    return carry._replace(
        starts=jnp.where(chosen[None, ..., None], starts, carry.starts),
        passes=carry.passes + chosen.astype(jnp.int32),
    )


def choose_best(segments: Segments, attempt: Attempt) -> Attempt:
    """Return to the best iterate where the attempt failed and the last is worse."""
    carry, trajectory = attempt
    best = carry.best
    if best is None:
        return attempt
    worse = ~trajectory.certified & (trajectory.residual > best.residual)

    def step_again():
        starts = jnp.where(worse[None, ..., None], best.starts, carry.starts)
        return Attempt(carry._replace(starts=starts), segments.trajectory(starts))

    return lax.cond(jnp.any(worse), step_again, lambda: attempt)


class Iteration:
    """The loop of a method's steps.

    **Arguments:** `limit` on the number of steps; `first_step`, the number of earlier
    steps, which made no segment exact; `sweep`, of joint steps, which make none exact
    either. It defaults to that of the segments: each step makes one more exact.
    """

    def __init__(
        self,
        segments: Segments,
        method: Method,
        limit: int,
        first_step: int | Array = 0,
        *,
        sweep: Callable[[Array], tuple[Array, Array]] | None = None,
    ):
        self.segments, self.method, self.limit = segments, method, limit
        self.sweep = sweep or segments.sweep
        self.first_step, self.makes_exact = first_step, sweep is None
        self.h0, self.recurrence = segments.h0, segments.recurrence
        self.rank = segments.problem.rank

    def start(self, starts: Array, *, may_fail: bool) -> Carry:
        """Return the first state of the loop, with a best iterate if it may fail."""
        shape, real = self.segments.problem.batch_shape, self.recurrence.dtype
        best = Best(starts, jnp.full(shape, jnp.inf, real)) if may_fail else None
        carry = Carry(
            starts=starts,
            num_steps=jnp.zeros(shape, jnp.int32),
            done=jnp.zeros(shape, bool),
            correction=jnp.ones(shape, real),
            entry_correction=jnp.ones(shape, real),
            stalled=jnp.zeros(shape, bool),
            passes=jnp.zeros(shape, jnp.int32),
            nonfinite=jnp.zeros(shape, jnp.int32),
            history=jnp.full((*shape, self.method.history), jnp.nan, real),
            best=best,
        )
        return vary(carry, starts)

    def continues(self, carry: Carry) -> Bool[Array, ""]:
        return jnp.any(self._moving(carry))

    def _moving(self, carry: Carry) -> Bool[Array, "*batch"]:
        """Return which sequences take another step."""
        moving = ~carry.done & (carry.num_steps < self.limit)
        # Coupled sequences all move as long as one of them moves.
        coupled = self.recurrence.coupled_along
        return jnp.full_like(moving, jnp.any(moving)) if coupled else moving

    def advance(self, carry: Carry) -> Carry:
        """Take one step of all sequences that move."""
        moving = self._moving(carry)
        ends, tangents = self.sweep(carry.starts)
        entering = shift(self.h0, ends)
        starts, defects = self._correct(carry, entering, tangents)
        starts, correction, overflowed = self._measure(carry, starts, entering)
        own = self.segments.change_of_entries(carry.starts, starts)
        own = jnp.where(jnp.isfinite(correction), own, jnp.inf)
        settled = self._foresees_convergence(own, carry.entry_correction)
        stalled = self._has_stalled(carry, correction, own, settled)
        best = self._keep_best(carry, defects)
        if self.rank:  # a single sequence moves as long as the loop runs
            starts = jnp.where(moving[None, ..., None], starts, carry.starts)
        counted = moving.astype(jnp.int32)
        return Carry(
            starts=starts,
            num_steps=carry.num_steps + counted,
            done=carry.done | (moving & (settled | stalled)),
            correction=jnp.where(moving, correction, carry.correction),
            entry_correction=jnp.where(moving, own, carry.entry_correction),
            stalled=jnp.where(moving, stalled, carry.stalled),
            passes=carry.passes,
            nonfinite=carry.nonfinite + counted * overflowed,
            history=self._record(carry, moving, defects),
            best=best,
        )

    def _correct(self, carry: Carry, entering, tangents):
        """Return the starts after one correction, and the defects that it corrects.

        After k steps the first k starts are exact and stay as they are. Rounded again
        as `old + (end - old)` they would keep moving by an ulp, which a chaotic cell
        amplifies. The next start is the end of the segment before it.
        """
        old, place = carry.starts, self.segments.segment_index(carry.starts.ndim)
        exact = carry.num_steps - self.first_step
        exact = (exact if self.makes_exact else exact * 0)[None, ..., None]
        defects = jnp.where(place <= exact, 0, entering - old)
        # Tangents now belong to starts instead of segments. The first start is never
        # corrected, so nothing is carried on from it.
        tangents = jax.vmap(lambda v: shift(jnp.zeros_like(v[0]), v))(tangents)
        tangents = jnp.where(place[None] <= 1, 0, tangents)
        structure, length = self.segments.structure, self.segments.length
        new = old + self.method.correct(
            structure, tangents, defects, length, carry.correction
        )
        new = jnp.where(place == exact + 1, entering, new)
        return jnp.where(place <= exact, old, new), defects

    def _measure(self, carry: Carry, starts, entering):
        """Return finite starts, the correction `[*batch]`, and the number of overflows.

        Each start is measured against its own size: a start that diverges must not hide
        the others. (h0 is never changed, and need not be finite.)
        """
        change = relative(max_abs(starts - carry.starts, -1), max_abs(starts, -1))
        change = jnp.where(self.segments.segment_index(change.ndim) == 0, 0, change)
        starts, change, overflowed = lax.cond(
            jnp.all(jnp.isfinite(change)),
            lambda starts, change, entering: (starts, change, carry.nonfinite * 0),
            self._repair,
            starts,
            change,
            entering,
        )
        return starts, jnp.max(change, axis=0, initial=0), overflowed

    def _repair(self, starts, change, entering):
        """Replace starts that overflowed by finite ones, and count them.

        An overflowed Jacobian gives no information, but the end of the segment before
        does. If that segment is exact, so is its end: each step still gains a segment.
        """
        broken = ~jnp.isfinite(starts) & (self.segments.segment_index(starts.ndim) > 0)
        restart = jnp.where(jnp.isfinite(entering), entering, self.segments.restart)
        starts = jnp.where(broken, restart, starts)
        # If the start of a segment has converged but its end is not finite, then the
        # trajectory itself is not finite there, and more steps do not change that. The
        # rest is solved as if the state had been restarted. That is right after a
        # reset, and the result reports the failure.
        lost = ~jnp.all(jnp.isfinite(entering), axis=-1)
        change = jnp.where(jnp.isfinite(change), change, jnp.where(lost, 0, jnp.inf))
        overflowed = jnp.sum(broken, (0, starts.ndim - 1), dtype=jnp.int32)
        return starts, change, overflowed

    def _has_stalled(self, carry: Carry, correction, own, settled):
        """Return which sequences more steps would not improve.

        Their corrections are roundings: of an entry itself, or of larger ones of which
        it is the difference. If the certificate fails nevertheless, passes of the cell
        alone do the rest.
        """
        level = own >= 0.5 * carry.entry_correction
        level = level & self._foresees_convergence(correction, carry.correction)
        if not self.method.quadratic:
            level = level & ~settled
        return level | self._at_rounding(own)

    def _at_rounding(self, correction: Array) -> Bool[Array, " *batch"]:
        finest = float(self.recurrence.entry_eps.min(initial=1))
        return correction <= FEW_ROUNDINGS * finest

    def _foresees_convergence(self, correction, before) -> Bool[Array, " *batch"]:
        """Forecast whether the remaining error is below the tolerance.

        This is only a forecast: the certificate decides. If convergence is quadratic, a
        correction below the square root of the tolerance leaves an error below the
        tolerance. So does a correction whose successor would be below the tolerance if
        it shrank at the rate of the last two. If convergence is linear with rate ρ, a
        correction c leaves an error of up to c ρ / (1 - ρ), which may be much larger
        than c. Corrections of a few roundings cannot improve anything further: the
        sequential loop makes errors of this size at each step, too.
        """
        rtol = float(self.segments.rtol.min(initial=1))
        # A step that overflowed does not measure the rate.
        rate = jnp.where(jnp.isfinite(before), correction / before, jnp.inf)
        if self.method.quadratic:
            ahead = correction * rate**2
            settled = correction <= 0.1 * math.sqrt(rtol)
        else:
            ahead = jnp.where(rate < 1, correction * rate / (1 - rate), jnp.inf)
            settled = self._at_rounding(correction)
        return settled | (ahead <= 0.1 * rtol)

    def _keep_best(self, carry: Carry, defects) -> Best | None:
        if carry.best is None:
            return None
        residual = max_abs(defects, (0, defects.ndim - 1))
        better = residual < carry.best.residual
        return Best(
            jnp.where(better[None, ..., None], carry.starts, carry.best.starts),
            jnp.where(better, residual, carry.best.residual),
        )

    def _record(self, carry: Carry, moving, defects) -> Array:
        """Write the largest defect of each moving sequence into the history."""
        if not self.method.history:
            return carry.history
        size = max_abs(defects, (0, defects.ndim - 1))
        entry = jnp.arange(self.method.history, dtype=jnp.int32)
        entry = entry.reshape(*(1,) * self.rank, -1)
        here = (entry == carry.num_steps[..., None]) & moving[..., None]
        return jnp.where(here, size[..., None], carry.history)
