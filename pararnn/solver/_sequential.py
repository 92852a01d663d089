"""The interface of a solver, and the sequential loop, which is one of them."""

import abc
import functools as ft

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ..recurrence import Replay, shape_dtype, split_step
from ..scan import in_windows, join_time, shift, time_shards, vary
from ._problem import BoundProblem, hoist, hoisting_window
from ._solution import Stats

# Leaves `[T, *batch, ...]`.
States = tuple[Array, ...]


class AbstractSolver(eqx.Module):
    """A solver finds all states of a recurrence.

    To write your own, subclass this and implement `run`. Derivatives, `vmap`, resets
    and the search for the cause of a failure work for every solver. Fields are static:
    numbers and functions, but no arrays.
    """

    @abc.abstractmethod
    def run(
        self, problem: BoundProblem, guess: States | None, limit: int | None
    ) -> tuple[States, Stats]:
        """Solve a batch of sequences.

        **Arguments:**

        - `problem`: the recurrence with its data.
        - `guess`: states to start from, leaves `[T, *batch, ...]`, or `None`.
        - `limit`: the user's `max_steps`.

        **Returns:** the states, leaves `[T, *batch, ...]`, and their statistics. Their
        `certified` says whether the states are right. `pararnn.solver.certify` finds
        out by one evaluation of the cell. `Stats.exact` and `Stats.of` make statistics
        by hand, given the first step whose state is not finite, which
        `pararnn.solver.find_nonfinite` finds. To combine solvers, see
        [`pararnn.Ladder`][]: `keep_certified` merges two answers, and the branches of a
        `lax.cond` agree after `vary(stats, states)`.
        """

    def check(self, where: str, steps: int) -> None:
        """Refuse a sequence that the solver cannot solve, while tracing.

        **Raises:** `ValueError`.
        """

    @property
    def residuals_kept(self) -> int:
        """The length of `stats["residual_history"]`.

        A solver made of others returns the longest of theirs, and pads the statistics
        of each with `stats.padded(...)`.
        """
        return 0

    @property
    def use_joint_newton(self) -> bool:
        """Whether to share steps with the iteration inside an implicit cell."""
        return False

    def for_stepping(self) -> "AbstractSolver":
        """Return the solver to use for a cell that is better stepped through."""
        return self

    def only_steps(self, steps: int) -> bool:
        """Return whether this solver takes one step after the other, and no more."""
        return False

    def choose(self, problem: BoundProblem, channels: int) -> "AbstractSolver":
        """Return the solver that this one uses for a problem.

        `channels` is the number of entries in one step's states, including the batch.
        Where this is [`pararnn.Sequential`][], a derivative reuses the loop's products.
        """
        return self


class Sequential(AbstractSolver):
    """Take one step after the other, by `jax.lax.scan`: always exact, never parallel.

    Whatever a step computes from its input alone may be computed beforehand, for many
    steps at once. Devices that share time take turns: each steps through its own shard.
    """

    def only_steps(self, steps: int) -> bool:
        return True

    def run(self, problem, guess, limit):
        if time_shards(problem.steps) > 1:
            states = step_in_turns(hoist(problem))
            return states, Stats.exact(problem, find_nonfinite(states, problem.rank))
        results, stats = _run_loop(problem)
        return tuple(jnp.moveaxis(s, problem.rank, 0) for s in results), stats


def record(
    problem: BoundProblem, replay: Replay
) -> tuple[States, tuple[Array, ...], Stats]:
    """Return the states, the values that a derivative replays, and the statistics.

    Both have time after the batch, `[*batch, T, ...]`, as `vmap` needs them.
    """
    recorded = replay.recorded
    problem = problem.replace(recurrence=recorded, split=split_step(recorded))
    results, stats = _run_loop(problem)
    values = tuple(results[place] for place in replay.places)
    return results[: len(problem.h0)], values, stats


def _run_loop(problem: BoundProblem) -> tuple[tuple[Array, ...], Stats]:
    """Take one step after the other.

    **Returns:** all that the steps return, first the states, `[*batch, T, ...]`; and
    the statistics.
    """
    count, rank = len(problem.h0), problem.rank
    given = problem.batch_first()

    def loop(carry, times):
        part = problem
        if problem.split is not None:
            part = problem.at_window(given, times[0], times.shape[0])
        left = hoist(part)

        def body(carry, at_t):
            (h, first, found), (x, t) = carry, at_t
            ends = left.step(h, x)
            h = ends[:count]
            # A pass over all states afterwards would cost 10 to 40% of the time.
            first = _note_nonfinite(first, h, t)
            # Written where `vmap` needs it: the results of a scan have time first, and
            # XLA would transpose them.
            found = tuple(
                lax.dynamic_update_index_in_dim(whole, value, t, rank)
                for whole, value in zip(found, ends, strict=True)
            )
            return (h, first, found), None

        return lax.scan(body, carry, (left.inputs, times))

    results = (shape_dtype(v.aval) for v in problem.recurrence.jaxpr.outvars)
    # Different numbers: XLA would make one array of zeros and copy it for each leaf.
    found = tuple(
        jnp.full((*problem.batch_shape, problem.steps, *s.shape), at, s.dtype)
        for at, s in enumerate(results)
    )
    first = tuple(
        jnp.full_like(problem.h0[at], problem.steps, jnp.int32)
        for at in _one_of_each_shape(problem.h0)
    )
    start = problem.h0, *vary((first, found), problem.h0)
    times = jnp.arange(problem.steps, dtype=jnp.int32)
    if problem.split is None:
        (_, first, found), _ = loop(start, times)
    else:
        # Inputs are prepared a window at a time, which stays in cache.
        window = hoisting_window(problem)
        (_, first, found), _ = in_windows(loop, start, times, window)
    first = earliest(first, rank, problem.steps)
    return found, Stats.exact(problem, first)


def _one_of_each_shape(h: States) -> list[int]:
    shapes = [leaf.shape for leaf in h]
    return [at for at, shape in enumerate(shapes) if shapes.index(shape) == at]


def _note_nonfinite(first: States, h: States, t: Array) -> States:
    """Note step t at entries that are not finite, in one array for each shape."""

    def note(first, shape):
        leaves = (leaf for leaf in h if leaf.shape == shape)
        good = ft.reduce(jnp.logical_and, map(jnp.isfinite, leaves))
        return jnp.where(good, first, jnp.minimum(first, t))

    shapes = (h[at].shape for at in _one_of_each_shape(h))
    return tuple(note(*pair) for pair in zip(first, shapes, strict=True))


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


class GivenStates(AbstractSolver):
    """Return the guess: states that a loop outside the solver has computed."""

    history: int = eqx.field(static=True, default=0)

    @property
    def residuals_kept(self) -> int:
        return self.history

    def run(self, problem, guess, limit):
        assert guess is not None
        stats = Stats.exact(problem, find_nonfinite(guess, problem.rank))
        return guess, stats.padded(self.history)


def find_nonfinite(states: States, rank: int) -> Int[Array, " *batch"]:
    """Return the first step whose state is not finite, T if there is none.

    `states` are `[T, *batch, ...]`.
    """
    steps = states[0].shape[0]
    first = []
    for leaf in states:
        times = jnp.arange(steps, dtype=jnp.int32).reshape(-1, *(1,) * (leaf.ndim - 1))
        found = jnp.where(jnp.isfinite(leaf), steps, times)
        first.append(jnp.min(found, axis=0, initial=steps))
    return earliest(first, rank, steps)


def earliest(times, rank: int, steps: int) -> Int[Array, " *batch"]:
    """Return the smallest number of all leaves, `[*batch, ...]`, for each sequence."""
    first = jnp.asarray(steps, jnp.int32)
    for leaf in times:
        own = jnp.min(leaf, axis=tuple(range(rank, leaf.ndim)), initial=steps)
        first = jnp.minimum(first, own)
    return first
