"""The interface of a solver, and the sequential loop, which is one of them."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, PyTree

from ..scan import in_windows, join_time, shift, time_shards, vary
from ._hoist import hoist, hoisting_window, split_step
from ._problem import BoundProblem, _shape_dtype
from ._replay import Replay
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
        out by one evaluation of the cell; `Stats.exact` and `Stats.of` make statistics
        by hand. To combine solvers, see [`pararnn.Ladder`][]: `keep_certified` merges
        two answers, and the branches of a `lax.cond` agree after
        `vary(stats, states)`.
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
            return states, Stats.exact(problem, are_finite(states, problem.rank))
        states, _, stats = _run_loop(problem)
        return states, stats


def record(
    problem: BoundProblem, replay: Replay
) -> tuple[States, tuple[Array, ...], Stats]:
    """Return the states, the values that a derivative replays, and the statistics.

    The values have time after the batch, `[*batch, T, ...]`, as `vmap` needs them.
    """
    recorded = replay.recorded
    return _run_loop(problem.replace(recurrence=recorded, split=split_step(recorded)))


def _run_loop(problem: BoundProblem) -> tuple[States, tuple[Array, ...], Stats]:
    """Take one step after the other; return states, what else a step returns, stats."""
    count, rank = len(problem.h0), problem.rank

    def loop(carry, inputs):
        left = hoist(problem.replace(inputs=inputs))

        def body(carry, x):
            h, tainted, now, kept = carry
            ends = left.step(h, x)
            h, values = ends[:count], ends[count:]
            # 0 as long as all states are finite, NaN from then on. In the loop this
            # costs a few percent of the time; a pass over all states afterwards would
            # cost 10 to 40%.
            tainted = tuple(t + v * 0 for t, v in zip(tainted, h, strict=True))
            kept = tuple(
                lax.dynamic_update_index_in_dim(whole, value, now, rank)
                for whole, value in zip(kept, values, strict=True)
            )
            return (h, tainted, now + 1, kept), h

        return lax.scan(body, carry, left.inputs)

    kept = tuple(
        jnp.zeros((*problem.batch_shape, problem.steps, *s.shape), s.dtype)
        for s in (
            _shape_dtype(v.aval) for v in problem.recurrence.jaxpr.outvars[count:]
        )
    )
    finite = tuple(jnp.zeros_like(h) for h in problem.h0)
    now = jnp.zeros((), jnp.int32)
    start = problem.h0, finite, *vary((now, kept), problem.h0)
    if problem.split is None:
        (_, tainted, _, kept), states = loop(start, problem.inputs)
    else:
        # Inputs are prepared a window at a time, which stays in cache.
        window = hoisting_window(problem)
        (_, tainted, _, kept), states = in_windows(loop, start, problem.inputs, window)
    return states, kept, Stats.exact(problem, all_zero(tainted, rank))


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
        stats = Stats.exact(problem, are_finite(guess, problem.rank))
        return guess, stats.padded(self.history)


def are_finite(states: States, rank: int) -> Bool[Array, " *batch"]:
    """Return for each sequence whether all states `[T, *batch, ...]` are finite."""
    return all_zero(tuple(jnp.sum(s * 0, axis=0) for s in states), rank)


def all_zero(leaves: PyTree[Array], rank: int) -> Bool[Array, " *batch"]:
    """Return for each sequence whether all entries `[*batch, ...]` are zero."""
    zero = jnp.asarray(True)
    for leaf in jax.tree.leaves(leaves):
        zero = zero & jnp.all(leaf == 0, axis=tuple(range(rank, leaf.ndim)))
    return zero
