"""The interface of a solver, and the plain loop, a solver like the others."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, PyTree

from ..scan import in_windows, time_shards
from ._hoist import hoist, hoisting_window
from ._problem import BoundProblem
from ._sequential_sharded import step_in_turns
from ._solution import Stats

# Leaves `[T, *batch, ...]`.
States = tuple[Array, ...]


class AbstractSolver(eqx.Module):
    """What finds all states of a recurrence.

    A solver of your own is a subclass that implements `run`. Derivatives, `vmap`,
    resets and the search for the cause of a failure are not its business.
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

        **Returns:** the states, leaves `[T, *batch, ...]`, and their statistics. Of
        these, `certified` says whether the states are right; `pararnn.solver.certify`
        finds out by one evaluation of the cell.
        """

    def check(self, where: str, steps: int) -> None:
        """Refuse a sequence that the solver cannot solve, while tracing.

        **Raises:** `ValueError`.
        """

    @property
    def residuals_kept(self) -> int:
        """The length of `stats["residual_history"]`."""
        return 0

    @property
    def use_joint_newton(self) -> bool:
        """Whether a step may be shared with the iteration inside an implicit cell."""
        return False

    def for_stepping(self) -> "AbstractSolver":
        """The solver to use for a cell that is better stepped through."""
        return self

    def only_steps(self, steps: int) -> bool:
        """Whether it takes one step after the other, and nothing else."""
        return False


class Sequential(AbstractSolver):
    """One step after the other, by `jax.lax.scan`: always exact, never parallel.

    What a step computes from its input alone may be computed before, for many steps.
    Where devices share time, they take turns: each steps through its own shard.
    """

    def only_steps(self, steps: int) -> bool:
        return True

    def run(self, problem, guess, limit):
        if time_shards(problem.steps) > 1:
            states = step_in_turns(hoist(problem))
            return states, Stats.exact(problem, are_finite(states, problem.rank))

        def loop(carry, inputs):
            left = hoist(problem.replace(inputs=inputs))

            def body(carry, x):
                h, tainted = carry
                h = left.step(h, x)
                # 0 as long as all states are finite, NaN ever after. In the loop this
                # costs a few percent; a pass over all states afterwards 10 to 40%.
                tainted = tuple(t + v * 0 for t, v in zip(tainted, h, strict=True))
                return (h, tainted), h

            return lax.scan(body, carry, left.inputs)

        start = problem.h0, tuple(jnp.zeros_like(h) for h in problem.h0)
        if problem.split is None:
            (_, tainted), states = loop(start, problem.inputs)
        else:
            # Inputs are prepared a window at a time, which stays in cache.
            window = hoisting_window(problem)
            (_, tainted), states = in_windows(loop, start, problem.inputs, window)
        return states, Stats.exact(problem, all_zero(tainted, problem.rank))


class GivenStates(AbstractSolver):
    """The guess, as states that a loop outside of the solver has computed."""

    history: int = eqx.field(static=True, default=0)

    @property
    def residuals_kept(self) -> int:
        return self.history

    def run(self, problem, guess, limit):
        assert guess is not None
        return guess, Stats.exact(problem, are_finite(guess, problem.rank))


def are_finite(states: States, rank: int) -> Bool[Array, " *batch"]:
    """For each sequence whether all its states `[T, *batch, ...]` are finite."""
    return all_zero(tuple(jnp.sum(s * 0, axis=0) for s in states), rank)


def all_zero(leaves: PyTree[Array], rank: int) -> Bool[Array, " *batch"]:
    """For each sequence whether all entries of `[*batch, ...]` leaves are zero."""
    zero = jnp.asarray(True)
    for leaf in jax.tree.leaves(leaves):
        zero = zero & jnp.all(leaf == 0, axis=tuple(range(rank, leaf.ndim)))
    return zero
