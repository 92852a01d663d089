"""Each kind of solver on the native batch axes of a problem."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax

from ..scan import is_symbolic, time_shards, vary
from ._auto import Auto, choose_ladder
from ._input_part import InputPart
from ._ladder import Ladder
from ._multiple_shooting import solve_on_segments
from ._recurrence import Batch, Recurrence
from ._relay import solve_in_turns
from ._sequential import Sequential, solve_sequentially, stats_of_loop
from ._stepwise import must_only_step, why_stepped
from ._structure import Structure
from ._windows import WholeSolver, Windows, solve_windows
from .methods import AbstractMethod

Solver = WholeSolver | Windows


def history_of(solver: Solver) -> int:
    """The length of the residual history in the statistics."""
    if isinstance(solver, Windows):
        return history_of(solver.solver)
    if isinstance(solver, Ladder):
        return max((method.history for method in solver.methods), default=0)
    return solver.history if isinstance(solver, AbstractMethod) else 0


def solver_for(where: str, recurrence: Recurrence, solver: Solver, steps: int):
    """The solver, or the loop in place of `Auto` for a cell that is better stepped.

    **Raises:** `ValueError` where something else is asked for and only the loop can be
    used, or devices share time.
    """
    reason = why_stepped(recurrence)
    if reason is None:
        return solver
    if time_shards(steps) > 1:
        raise ValueError(
            f"{where}: {reason}. So it is stepped through, but time lies across "
            'devices (the mesh in context has an axis "time"), each of which would '
            'wait for the one before. Use a mesh without an axis "time".'
        )
    if isinstance(solver, Auto):
        return Sequential()
    if isinstance(solver, Windows):
        within = solver_for(where, recurrence, solver.solver, steps)
        return Windows(within, solver.length)
    if must_only_step(recurrence) and _cuts_time(solver, steps):
        raise ValueError(
            f"{where}: `solver` is {solver!r:.80}, which takes many steps at once, "
            f"but {reason}. Or pass pararnn.Sequential() or pararnn.Auto(), which then "
            "step."
        )
    return solver


def _cuts_time(solver: Solver, steps: int) -> bool:
    if isinstance(solver, AbstractMethod):
        return solver.segments != 1 and (is_symbolic(steps) or steps > 1)
    return isinstance(solver, Ladder) and bool(solver.methods)


class Run(NamedTuple):
    """A problem but for its inputs and initial state; `*batch` sequences at once."""

    batch: Batch
    parameters: Any
    find_structure: Callable[[], Structure]
    differentiated: bool
    input_part: InputPart | None = None

    def __call__(self, solver: Solver, inputs, h0, guess, max_steps: int | None):
        """States `[T, *batch, ...]` by leaf, and the statistics of the solve."""
        steps = jtu.tree_leaves(inputs)[0].shape[0]
        shape = h0[0].shape[: len(self.batch.levels)]
        if isinstance(solver, Auto):
            channels = self.batch.recurrence.width * math.prod(shape)
            solver = choose_ladder(
                solver,
                steps,
                channels,
                self.differentiated,
                self.find_structure,
                max_steps,
                time_shards(steps),
            )
            max_steps = None
        if isinstance(solver, Windows):

            def window(inputs, h0, guess):
                return self(solver.solver, inputs, h0, guess, max_steps)

            return solve_windows(window, steps, solver.length, inputs, h0, guess)
        if isinstance(solver, AbstractMethod):
            run, inputs = self._prepare(inputs)
            states, stats = run._iterate(solver, inputs, h0, guess, max_steps)
        elif isinstance(solver, Ladder) and solver.methods:
            run, inputs = self._prepare(inputs)
            states, stats = run._climb(solver, inputs, h0, guess, max_steps)
        else:
            states, stats = self._step(inputs, h0)
        return states, self._complete(stats, steps, shape, history_of(solver))

    def already_stepped(self, solver: Solver, states):
        """The same for states that a loop has found."""
        shape = states[0].shape[1 : 1 + len(self.batch.levels)]
        tainted = tuple(jnp.sum(s * 0, axis=0) for s in states)
        stats = stats_of_loop(tainted, len(shape))
        steps = states[0].shape[0]
        return states, self._complete(stats, steps, shape, history_of(solver))

    def _prepare(self, inputs):
        """What is left to run, and its inputs, once their own part is computed."""
        if self.input_part is None:
            return self, inputs
        inputs = self.input_part.prepare(self.parameters, inputs)
        return self._replace(batch=self.input_part.batch, input_part=None), inputs

    def _step(self, inputs, h0):
        shards = time_shards(jtu.tree_leaves(inputs)[0].shape[0])
        if shards > 1:
            run, inputs = self._prepare(inputs)
            return solve_in_turns(run.batch, self.parameters, inputs, h0, shards)
        return solve_sequentially(
            self.batch, self.parameters, inputs, h0, self.input_part
        )

    def _iterate(self, method: AbstractMethod, inputs, h0, guess, max_steps):
        steps = jtu.tree_leaves(inputs)[0].shape[0]
        if _cuts_time(method, steps):
            states, stats = solve_on_segments(
                self.batch,
                self.parameters,
                inputs,
                h0,
                guess,
                self.find_structure,
                method,
                max_steps,
            )
            if self.batch.recurrence.coupled_along:
                stats |= _of_all(stats)
            return states, stats
        return self._step(inputs, h0)

    def _climb(self, ladder: Ladder, inputs, h0, guess, max_steps):
        """One rung after the other, as long as any sequence is not certified."""
        steps = jtu.tree_leaves(inputs)[0].shape[0]
        shape = h0[0].shape[: len(self.batch.levels)]

        def on_rung(number, states, stats):
            stats = self._complete(
                stats | {"rung": number}, steps, shape, history_of(ladder)
            )
            return states, vary(stats, states)

        def attempt(number, guess):
            limit = max_steps or ladder.steps[number]
            method = ladder.methods[number]
            return on_rung(number, *self._iterate(method, inputs, h0, guess, limit))

        def last():
            return on_rung(len(ladder.methods), *self._step(inputs, h0))

        found = attempt(0, guess)
        for number in range(1, len(ladder.methods) + 1):

            def climb(found, number=number):
                if number == len(ladder.methods):
                    return _keep_certified(found, last())
                return _keep_certified(found, attempt(number, found[0]))

            found = lax.cond(
                jnp.all(found[1]["certified"]), lambda found: found, climb, found
            )
        return found

    def _complete(self, stats, steps: int, shape, history: int):
        """Every statistic as an array over the batch, whatever the solver.

        The residual history is NaN where the solver has none to tell of.
        """
        dtypes = {
            "num_steps": jnp.int32,
            "residual": self.batch.recurrence.dtype,
            "sequential": jnp.bool_,
            "nonfinite": jnp.int32,
            "certified": jnp.bool_,
            "certified_steps": jnp.int32,
            "finite": jnp.bool_,
            "rung": jnp.int32,
        }
        defaults = {"rung": 0, "certified_steps": steps}
        complete = {
            name: jnp.broadcast_to(
                jnp.asarray(stats.get(name, defaults.get(name)), dtype), shape
            )
            for name, dtype in dtypes.items()
        }
        if history:
            empty = jnp.full((history, *shape), jnp.nan, dtypes["residual"])
            kept = stats.get("residual_history", empty[:0])
            complete["residual_history"] = empty.at[: len(kept)].set(kept)
        return complete


def _of_all(stats):
    """Of sequences that are coupled none is certified beside one that is not."""
    certified, steps = stats["certified"], stats["certified_steps"]
    return {
        "certified": jnp.full_like(certified, jnp.all(certified)),
        "certified_steps": jnp.full_like(steps, jnp.min(steps)),
    }


def _keep_certified(before, after):
    """The later answer, but for sequences whose earlier one was certified."""
    (states, stats), (new_states, new_stats) = before, after
    kept = stats["certified"]

    def choose(old, new, axis):
        behind = (1,) * (old.ndim - axis - kept.ndim)
        return jnp.where(kept.reshape((1,) * axis + kept.shape + behind), old, new)

    merged = {}
    for name, old in stats.items():
        if name == "residual_history":
            merged[name] = choose(old, new_stats[name], 1)
        elif name in ("num_steps", "nonfinite"):
            # The steps that were tried remain part of the story.
            merged[name] = old + jnp.where(kept, 0, new_stats[name])
        else:
            merged[name] = choose(old, new_stats[name], 0)
    states = jax.tree.map(lambda old, new: choose(old, new, 1), states, new_states)
    return states, merged
