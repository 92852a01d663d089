"""Newton's method and its relatives on segments of time (multiple shooting).

Time is cut into S segments. From a guess `s_i` of the state that each segment starts
from, step all segments side by side and push a transition along: this gives the end
states `φ_i(s_i)` and, exactly or not, their Jacobians `P_i`. The correction of the
guesses solves, or nearly solves,

    δ_{i+1} = P_i δ_i + (φ_i(s_i) - s_{i+1}),   δ_0 = 0,

a linear recurrence of length S for the scan engine. Solving for the correction, not
for the new state, keeps the rounding of `P s` out of the answer. After k steps the
first k segments are exact whatever `P` is, so S steps always suffice. What `P` is and
how the correction is solved for is the method's (`methods/`); the rest stands here.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from ..scan import is_symbolic, join_time, shift, split_time, spread, time_shards, vary
from ._certificate import ROUNDINGS, along_entries, entry_sizes, is_small, largest
from ._recurrence import Batch
from ._structure import Structure
from ._warm_up import warm_up

if TYPE_CHECKING:
    from .methods import AbstractMethod

# One step of the cell and of the transition that is pushed along.
Push = Callable[[Callable[[Array], Array], Array, Array], tuple[Array, Array]]


class Linearization(NamedTuple):
    """What a method pushes along a segment in place of the Jacobian.

    `push(step, h, tangents)` returns `step(h)` and the tangents `[size, width]` one
    step further; `structure` says which matrix they stand for.
    """

    structure: Structure
    push: Push


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
    stalled: Bool[Array, "*batch"]  # at the rounding of the state, not of each entry
    passes: Array  # int [*batch], of the plain steps alone
    nonfinite: Array  # int [*batch]
    history: Array  # [history, *batch]
    best: Best | None


class Attempt(NamedTuple):
    """A trajectory made from the segments' starts, and its certificate."""

    parts: tuple[Array, ...]  # by leaf, [length, S, *batch, ...], ends included
    residual: Array  # [*batch]
    certified: Bool[Array, "*batch"]
    ended: Bool[Array, "*batch"]  # certified, or known not to stay finite
    certified_steps: Array  # int [*batch]
    carry: Carry


class Segments:
    """The segmented problem: everything that stays the same from step to step."""

    def __init__(
        self,
        batch: Batch,
        parameters,
        inputs,
        h0,
        find_structure: Callable[[], Structure],
        method: "AbstractMethod",
        first_step: int | Array = 0,
    ):
        self.batch, self.parameters, self.method = batch, parameters, method
        self.recurrence = recurrence = batch.recurrence
        linearization = method.linearize(recurrence.width, find_structure)
        self.structure, self.push = linearization
        self.steps: int = jax.tree.leaves(inputs)[0].shape[0]
        self.shards = time_shards(self.steps)
        self.count, self.length = self._divide(method.segments)
        self.inputs = jax.tree.map(self._split, inputs)
        self.over = batch.segmented(parameters, inputs)
        self.h0 = batch.lift_state(recurrence.ravel)(h0)
        # Where an iterate has overflowed. A reset may drop an h0 that is not finite.
        self.restart = jnp.where(jnp.isfinite(self.h0), self.h0, 0)
        self.rank = len(batch.levels)
        # Those before it were joint steps, which make no segment exact.
        self.first_step = first_step
        own = ROUNDINGS * recurrence.entry_eps
        self.rtol = own if method.rtol is None else np.full_like(own, method.rtol)
        self.atol = method.atol or 0.0
        self.cuts = self._find_cuts()

    def _find_cuts(self) -> Bool[Array, "S *batch"] | None:
        """The segments within which a reset is."""
        leaves, reset = self.inputs
        if reset is None:
            return None
        first = jax.tree.map(lambda x: x[0], leaves), jnp.any(reset, axis=0)
        over = self.over.lift(lambda parameters, h, x: x[1])
        starts = jnp.broadcast_to(self.h0, (self.count, *self.h0.shape))
        return over(self.parameters, starts, first)

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

    def _split(self, x):
        """`[T, ...]` to `[length, segments, ...]`; the last segment repeats its end."""
        return split_time(x, self.count)

    def start(self, guess, *, may_fail: bool) -> Carry:
        """The first guess of the segments' starts; the best is kept if it may fail."""
        recurrence = self.recurrence
        if guess is not None:
            ends = self._ravel(tuple(self._split(leaf)[-1] for leaf in guess))
        else:
            ends = warm_up(self._step, self.h0, self.inputs, self.shards)
        ends = jnp.where(jnp.isfinite(ends), ends, self.restart)
        batch_shape = self.h0.shape[:-1]
        starts = shift(self.h0, ends)
        best = Best(starts, jnp.full(batch_shape, jnp.inf, recurrence.dtype))
        carry = Carry(
            starts=starts,
            num_steps=jnp.zeros(batch_shape, jnp.int32),
            done=jnp.zeros(batch_shape, bool),
            correction=jnp.ones(batch_shape, recurrence.dtype),
            entry_correction=jnp.ones(batch_shape, recurrence.dtype),
            stalled=jnp.zeros(batch_shape, bool),
            passes=jnp.zeros(batch_shape, jnp.int32),
            nonfinite=jnp.zeros(batch_shape, jnp.int32),
            history=jnp.full(
                (self.method.history, *batch_shape), jnp.nan, recurrence.dtype
            ),
            best=best if may_fail else None,
        )
        return vary(carry, starts)

    def _ravel(self, leaves):
        return self.over.lift_state(self.recurrence.ravel)(leaves)

    def _unravel(self, starts):
        return self.over.lift_state(self.recurrence.unravel)(spread(starts))

    def _step(self, h, x):
        """One step of vectors `[segments, *batch, width]`."""

        return self.over.lift(self.recurrence.vector_step)(self.parameters, h, x)

    def _smooth_step(self, parameters, h, x):
        """The step that is linearised, on one vector."""
        return self.recurrence.vector_step(parameters, h, x, smooth=True)

    def _push(self, h, x, tangents, *others):
        """One step of states, and of tangents `[size, segments, *batch, width]`.

        Tangents `[size, width]` are the same for all segments. `others` are what else
        `_smooth_step` takes, like `h`.
        """

        def one(parameters, h, x, tangents, *others):
            def step(h):
                return self._smooth_step(parameters, h, x, *others)

            ahead, tangents = self.push(step, h, tangents)
            reset = x[1]
            if reset is not None:
                # Selected once more: the cell's Jacobian may be infinite there.
                tangents = jnp.where(reset, 0, tangents)
            return ahead, tangents

        axis = 1 if tangents.ndim > 2 else None
        extra = (axis, *(0 for _ in others))
        lifted = self.over.lift(one, extra=extra, out=(0, 1))
        return lifted(self.parameters, h, x, tangents, *others)

    def _sweep(self, starts):
        """Ends of the segments and their Jacobians, compressed by the structure."""
        starts = spread(starts)
        seeds = vary(jnp.asarray(self.structure.seeds, starts.dtype), starts)
        if self.length == 1:
            # Seeds that are shared by all steps meet each weight matrix once.
            first = jax.tree.map(lambda x: x[0], self.inputs)
            return self._push(starts, first, seeds)
        seeds = seeds.reshape(seeds.shape[0], *(1,) * (self.rank + 1), seeds.shape[1])
        tangents = jnp.broadcast_to(seeds, (seeds.shape[0], *starts.shape))

        def body(carry, x):
            return self._push(carry[0], x, carry[1]), None

        (ends, tangents), _ = lax.scan(body, (starts, tangents), self.inputs)
        return ends, tangents

    def iterate(self, carry: Carry, limit: int) -> Carry:
        """Steps until every correction is small, or the limit is reached."""

        def active(carry: Carry):
            moving = ~carry.done & (carry.num_steps < limit)
            # Of sequences that are coupled none can stay while another moves.
            coupled = self.recurrence.coupled_along
            return jnp.full_like(moving, jnp.any(moving)) if coupled else moving

        return lax.while_loop(
            lambda carry: jnp.any(active(carry)),
            lambda carry: self.advance(carry, active(carry)),
            carry,
        )

    def advance(self, carry: Carry, moving: Bool[Array, " *batch"]) -> Carry:
        """One step of all sequences that are `moving`."""
        ends, tangents = self._sweep(carry.starts)
        entering = shift(self.h0, ends)
        starts, defects = self._corrected(carry, entering, tangents)
        # Each start against its own size: one that runs away must not excuse the
        # others. (h0 stays, and need not be finite.)
        change = _relative(largest(starts - carry.starts, -1), largest(starts, -1))
        change = jnp.where(self._place(change.ndim) == 0, 0, change)
        starts, change, overflowed = lax.cond(
            jnp.all(jnp.isfinite(change)),
            lambda starts, change, entering: (starts, change, carry.nonfinite * 0),
            self._repair,
            starts,
            change,
            entering,
        )
        correction = jnp.max(change, axis=0, initial=0)
        own = self._largest_of_entries(carry.starts, starts)
        own = jnp.where(jnp.isfinite(correction), own, jnp.inf)
        settled = self._foresees_convergence(own, carry.entry_correction)
        # Entries that come from the cancelling of larger ones have been as exact as
        # steps can make them: what is left is for passes of the plain steps.
        stalled = self._foresees_convergence(correction, carry.correction)
        stalled = stalled & ~settled & (own >= 0.5 * carry.entry_correction)
        best = self._keep_best(carry, defects)
        if self.rank:  # one sequence alone moves as long as the loop runs
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

    def _largest_of_entries(self, before, after) -> Array:
        """The largest change of a start, `[*batch]`, each entry against its size.

        Entries of a coarser dtype change by more of their roundings.
        """
        either = jnp.maximum(jnp.abs(before), jnp.abs(after))
        sizes = entry_sizes(either, self.length, self.cuts)
        change = _relative(jnp.abs(after - before), sizes)
        eps = self.recurrence.entry_eps
        change = change * along_entries(eps.min(initial=1) / eps, change)
        change = jnp.where(self._place(change.ndim) == 0, 0, change)
        return jnp.max(change, axis=(0, -1), initial=0)

    def _foresees_convergence(self, correction, before) -> Bool[Array, " *batch"]:
        """Whether the error that remains is forecast to be below the tolerance.

        Only a forecast: the certificate decides. Where convergence is quadratic, a
        correction below the square root of the tolerance leaves an error below the
        tolerance. So does one that, shrinking at the rate of the last two, would be
        followed by one below the tolerance. Where it is linear at rate ρ, a correction
        c leaves an error up to c ρ / (1 - ρ), which may be far larger than c; nothing
        more can be had of corrections of a few roundings, which is what the loop itself
        makes at each step and passes on in the same way.
        """
        rtol = float(self.rtol.min(initial=1))
        rate = correction / before
        # A step that overflowed was no measure of a rate.
        rate = jnp.where(jnp.isfinite(before), rate, jnp.inf)
        if self.method.quadratic:
            ahead = correction * rate**2
            settled = correction <= 0.1 * math.sqrt(rtol)
        else:
            ahead = jnp.where(rate < 1, correction * rate / (1 - rate), jnp.inf)
            finest = float(self.recurrence.entry_eps.min(initial=1))
            settled = correction <= 4 * finest
        return settled | (ahead <= 0.1 * rtol)

    def _corrected(self, carry: Carry, entering, tangents):
        """The starts behind one Newton correction, and the defects it corrects.

        After k steps the first k starts are exact, and are held: rounded again as
        `old + (end - old)` they would keep moving by an ulp, which a chaotic cell
        amplifies. Behind them, the next start is the end of its segment.
        """
        old, place = carry.starts, self._place(carry.starts.ndim)
        exact = self._count_exact(carry)[None, ..., None]
        defects = jnp.where(place <= exact, 0, entering - old)
        # From segment to start. The first start is never corrected, so that nothing is
        # carried from it.
        tangents = jax.vmap(lambda v: shift(jnp.zeros_like(v[0]), v))(tangents)
        tangents = jnp.where(place[None] <= 1, 0, tangents)
        new = old + self.method.correct(
            self.structure, tangents, defects, self.length, carry.correction
        )
        new = jnp.where(place == exact + 1, entering, new)
        return jnp.where(place <= exact, old, new), defects

    def _count_exact(self, carry: Carry) -> Array:
        """How many segments behind the first start from where they should."""
        return carry.num_steps - self.first_step

    def _place(self, ndim: int) -> Array:
        """The number of each segment, to stand beside `[segments, ...]`."""
        place = jnp.arange(self.count, dtype=jnp.int32)
        return place.reshape(-1, *(1,) * (ndim - 1))

    def _repair(self, starts, change, entering):
        """Finite starts in place of those that overflowed, and how many did.

        An overflowed Jacobian says nothing. The segment's own end does: behind an exact
        segment it is exact, so every step still gains one segment.
        """
        broken = ~jnp.isfinite(starts) & (self._place(starts.ndim) > 0)
        restart = jnp.where(jnp.isfinite(entering), entering, self.restart)
        starts = jnp.where(broken, restart, starts)
        moved = jnp.where(_overflowed(entering), 0, jnp.inf)
        change = jnp.where(jnp.isfinite(change), change, moved)
        overflowed = jnp.sum(broken, (0, starts.ndim - 1), dtype=jnp.int32)
        return starts, change, overflowed

    def _keep_best(self, carry: Carry, defects) -> Best | None:
        if carry.best is None:
            return None
        residual = largest(defects, (0, defects.ndim - 1))
        better = residual < carry.best.residual
        return Best(
            jnp.where(better[None, ..., None], carry.starts, carry.best.starts),
            jnp.where(better, residual, carry.best.residual),
        )

    def or_best(self, attempt: Attempt) -> Attempt:
        """The attempt, with its best iterate where it failed and the last is worse."""
        best = attempt.carry.best
        if best is None:
            return attempt
        worse = ~attempt.certified & (attempt.residual > best.residual)

        def step_again():
            starts = jnp.where(
                worse[None, ..., None], best.starts, attempt.carry.starts
            )
            return self.finish(attempt.carry._replace(starts=starts))

        return lax.cond(jnp.any(worse), step_again, lambda: attempt)

    def _record(self, carry: Carry, moving, defects) -> Array:
        """The history with the largest defect of each sequence that moves."""
        if not self.method.history:
            return carry.history
        size = largest(defects, (0, defects.ndim - 1))
        row = jnp.arange(self.method.history, dtype=jnp.int32)
        row = row.reshape(-1, *(1,) * self.rank)
        here = (row == carry.num_steps[None]) & moving[None]
        return jnp.where(here, size[None], carry.history)

    def unattempted(self, carry: Carry) -> Attempt:
        """What stands in for an attempt before the first: states that stay as they are.

        (Zeros would do, but XLA sets them up before the inputs, and needs more memory.)
        """
        starts = self._unravel(carry.starts)
        attempt = Attempt(
            parts=tuple(jnp.broadcast_to(s, (self.length, *s.shape)) for s in starts),
            residual=jnp.full_like(carry.correction, jnp.inf),
            certified=jnp.zeros_like(carry.done),
            ended=jnp.zeros_like(carry.done),
            certified_steps=jnp.zeros_like(carry.num_steps),
            carry=carry,
        )
        return vary(attempt, starts)

    def finish(self, carry: Carry) -> Attempt:
        """Step through the segments once more, keep every state, and certify them.

        Inside a segment the states follow one from the other, so the residual can only
        be at its last step, which has the next segment's start for its state.
        """

        def body(h, x):
            h = self.over.lift(self.recurrence.step)(self.parameters, h, x)
            return h, h

        starts = self._unravel(carry.starts)
        ends, states = lax.scan(
            body, starts, self.inputs, unroll=True if self.length == 1 else 1
        )
        ends, following = self._ravel(ends), self._following(self._ravel(starts))
        residuals = jnp.where(self._followed(ends.ndim), jnp.abs(ends - following), 0)
        sizes = entry_sizes(following, self.length, self.cuts)
        lost = ~jnp.all(jnp.isfinite(residuals), axis=-1)
        small = is_small(residuals, sizes, self.rtol, self.atol) & ~lost
        # The last state of a segment is the next start; it is as good as its residual.
        first = jnp.min(jnp.where(small, self.count, self._place(small.ndim)), axis=0)
        failed = (first + 1) * self.length - 1
        return Attempt(
            parts=states,
            residual=largest(residuals, (0, -1)),
            certified_steps=jnp.where(jnp.all(small, axis=0), self.steps, failed),
            certified=jnp.all(small, axis=0),
            ended=jnp.all(small | lost, axis=0),
            carry=carry,
        )

    def _followed(self, ndim: int) -> Bool[Array, " S *ones"]:
        """Which segments another one follows, within the sequence."""
        return (self._place(ndim) + 1) * self.length < self.steps

    def _following(self, starts) -> Array:
        """The start of the next segment, zeros where there is none."""
        following = shift(self.h0, starts, reverse=True)
        return jnp.where(self._followed(following.ndim), following, 0)

    def pass_on(self, attempt: Attempt, chosen: Bool[Array, " *batch"]) -> Carry:
        """For the chosen sequences, each segment's end as the start of the next.

        The ends are those of the program that certifies: after k such passes the first
        k segments follow one from the other to the last bit.
        """
        carry = attempt.carry
        ends = self._ravel(tuple(leaf[-1] for leaf in attempt.parts))
        ends = jnp.where(jnp.isfinite(ends), ends, self.restart)
        chosen_starts = jnp.where(
            chosen[None, ..., None], shift(self.h0, ends), carry.starts
        )
        return carry._replace(
            starts=chosen_starts, passes=carry.passes + chosen.astype(jnp.int32)
        )

    def states(self, attempt: Attempt) -> tuple[Array, ...]:
        """The trajectory, `[T, *batch, ...]` by leaf.

        Each segment ends where the next one starts, unless it has no finite end.
        """
        starts = self._unravel(attempt.carry.starts)
        ends = self._ravel(tuple(leaf[-1] for leaf in attempt.parts))
        finite = jnp.all(jnp.isfinite(ends - self._following(self._ravel(starts))), -1)
        joined = self._followed(finite.ndim) & finite

        def join(s, h):
            mask = joined.reshape(joined.shape + (1,) * (h.ndim - joined.ndim))
            return s.at[-1].set(jnp.where(mask, shift(h[0], h, reverse=True), s[-1]))

        states = map(join, attempt.parts, starts)
        return tuple(join_time(leaf, self.steps) for leaf in states)


def _relative(change: Array, size: Array) -> Array:
    """`change / size`, 0 where nothing changed."""
    return jnp.where(change == 0, 0, change / size)


def _overflowed(ends: Array) -> Bool[Array, " segments *batch"]:
    """Which segments have an end that is not finite.

    If its start has converged, the trajectory itself is not finite there, and no
    further step changes that. What follows is solved for as if the state had been
    restarted; a reset behind it makes that right, and the result says what happened.
    """
    return ~jnp.all(jnp.isfinite(ends), axis=-1)
