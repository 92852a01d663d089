"""Attempts on a segmented problem, until one of them is certified."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import Array, lax

from ..scan import is_symbolic
from ._joint_segments import JOINT_STEPS, JointSegments
from ._recurrence import Batch
from ._segments import Attempt, Segments
from ._sequential import all_zero
from ._structure import Structure

if TYPE_CHECKING:
    from .methods import AbstractMethod


def solve_on_segments(
    batch: Batch,
    parameters,
    inputs,
    h0,
    guess,
    find_structure: Callable[[], Structure],
    method: "AbstractMethod",
    max_steps: int | None,
) -> tuple[tuple[Array, ...], dict[str, Any]]:
    """States `[T, *batch, ...]` by leaf, and what every method reports.

    `guess` holds the leaves of a trajectory `[T, *batch, ...]`, or is `None`.
    """
    problem = batch, parameters, inputs, h0, find_structure, method
    segments = Segments(*problem)
    limited, limit = False, segments.count
    if max_steps is not None and (is_symbolic(limit) or max_steps < limit):
        limited, limit = True, max_steps

    def stepping(attempt: Attempt):
        """Which sequences go on with the method's steps."""
        carry = attempt.carry
        return ~attempt.ended & ~carry.stalled & (carry.num_steps < limit)

    def passing(attempt: Attempt):
        """Which go on with passes of the cell alone, as the steps have done their part.

        Without a limit of the user's they may do so until they end as the loop would.
        """
        carry = attempt.carry
        if limited:
            left = carry.stalled & (carry.num_steps + carry.passes < limit)
        else:
            left = carry.passes < segments.count
        return ~attempt.ended & ~stepping(attempt) & left

    def unfinished(attempt: Attempt):
        return jnp.any(stepping(attempt) | passing(attempt))

    def attempt_again(attempt: Attempt):
        carry = segments.pass_on(attempt, passing(attempt))
        attempt = segments.finish(segments.iterate(carry, limit))
        carry = attempt.carry._replace(done=~stepping(attempt))
        return attempt._replace(carry=carry)

    # One attempt is steps until the correction predicts convergence, and a pass of the
    # cell that certifies it; seldom is a second one needed. The first is made by the
    # loop too, so that its program is compiled once.
    if segments.length == 1 and batch.recurrence.refinement is not None:
        start = JointSegments(*problem).approach(guess)
        segments = Segments(*problem, first_step=start.num_steps)
        # Joint steps make nothing exact; as many whole ones can still be needed.
        limit += JOINT_STEPS
    else:
        start = segments.start(guess, may_fail=limited)
    attempt = lax.while_loop(unfinished, attempt_again, segments.unattempted(start))
    attempt = segments.or_best(attempt)
    states = segments.states(attempt)
    return states, {
        "num_steps": attempt.carry.num_steps,
        "residual": attempt.residual,
        "certified_steps": attempt.certified_steps,
        "sequential": False,
        "nonfinite": attempt.carry.nonfinite,
        "certified": attempt.certified,
        # The loop's last pass may overflow in padding, so the states are looked at.
        "finite": all_zero(
            tuple(jnp.sum(s * 0, axis=0) for s in states), len(batch.levels)
        ),
        "residual_history": attempt.carry.history,
    }
