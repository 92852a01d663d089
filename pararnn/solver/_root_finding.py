"""The same problem and the same steps for `optimistix.root_find`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from ._adapters import as_step
from ._inputs import check_like, check_resets, count_steps, make_recurrence
from ._recurrence import Batch
from ._segments import Carry, Segments
from ._stepwise import refuse_special
from ._structure import find_structure

if TYPE_CHECKING:
    from .methods import AbstractMethod


class Problem(eqx.Module):
    r"""A recurrence $h_t = f(h_{t-1}, x_t)$ as the `args` of `optimistix.root_find`.

    ```python
    problem = pararnn.Problem(cell, xs, h0)
    guess = jnp.zeros((len(xs), *h0.shape))
    optx.root_find(pararnn.residual, pararnn.Newton(64), guess, args=problem)
    ```

    [`pararnn.solve`][] does the same with less work (it builds the trajectory once, not
    at every step), a derivative of its own, and batches; this is for who wants
    Optimistix' loop, adjoints or statistics. Optimistix' implicit adjoint solves with
    the whole Jacobian of the trajectory as one dense matrix, `[T * width, T * width]`.

    **Arguments:** as for [`pararnn.solve`][]. What is to be differentiated must be a
    leaf of this pytree: a cell with parameters is a module, not a function that closes
    over them.
    """

    f: Callable
    xs: PyTree
    h0: PyTree
    reset: Bool[Array, " T"] | None = None
    reset_state: PyTree | None = None


def residual(states: PyTree, problem: Problem) -> PyTree:
    r"""$f(h_{t-1}, x_t) - h_t$ for all t: what a solution makes zero.

    **Arguments:** `states`, a trajectory, pytree like `problem.h0` with leaves
    `[T, ...]`; `problem`, a [`pararnn.Problem`][].

    **Returns:** a pytree like `states`.
    """
    before = jtu.tree_map(
        lambda h0, h: jnp.concatenate([jnp.asarray(h0, h.dtype)[None], h[:-1]]),
        problem.h0,
        states,
    )
    if problem.reset is not None:
        fresh = problem.reset_state
        if fresh is None:
            fresh = jtu.tree_map(jnp.zeros_like, problem.h0)
        mask = problem.reset
        before = jtu.tree_map(
            lambda h, new: jnp.where(
                mask.reshape(-1, *(1,) * (h.ndim - 1)), new[None], h
            ),
            before,
            fresh,
        )
    after = jax.vmap(as_step(problem.f))(before, problem.xs)
    return jtu.tree_map(jnp.subtract, after, states)


class RootState(NamedTuple):
    """State of a method between the steps that Optimistix asks for."""

    carry: Carry
    certified: Bool[Array, ""]
    residual: Array


def _segments(method: "AbstractMethod", problem: Any):
    """The problem cut into segments, and the structure of its state."""
    where = type(method).__name__
    if not isinstance(problem, Problem):
        raise TypeError(
            f"{where}: `args` is a {type(problem).__name__}, expected a "
            "`pararnn.Problem`. As an Optimistix root finder this method solves "
            "recurrences only: `optx.root_find(pararnn.residual, solver, guess, "
            "args=pararnn.Problem(cell, xs, h0))`."
        )
    recurrence = make_recurrence(where, problem.f, problem.xs, problem.h0)
    refuse_special(where, recurrence)
    steps = count_steps(where, problem.xs)
    fresh = check_resets(where, recurrence, problem.reset, problem.reset_state, steps)
    parameters = recurrence.release_constants(), fresh
    inputs = tuple(jnp.asarray(x) for x in jtu.tree_leaves(problem.xs)), problem.reset
    h0 = tuple(jnp.asarray(h) for h in jtu.tree_leaves(problem.h0))
    return Segments(
        Batch(recurrence),
        parameters,
        inputs,
        h0,
        lambda: find_structure(recurrence),
        method,
    )


def init_root(method: "AbstractMethod", fn, y, problem, f_struct) -> RootState:
    segments = _segments(method, problem)
    recurrence = segments.recurrence
    like = jtu.tree_unflatten(
        recurrence.state_tree,
        [
            jax.ShapeDtypeStruct((segments.steps, *s.shape), s.dtype)
            for s in recurrence.state_leaves
        ],
    )
    where = type(method).__name__
    check_like(where, "y0", y, like, "a state for each step, [T, ...]")
    check_like(
        where, "the value of `fn`", f_struct, like, "`fn` must be `pararnn.residual`"
    )
    return RootState(
        segments.start(tuple(jtu.tree_leaves(y)), may_fail=False),
        jnp.asarray(False),
        jnp.asarray(jnp.inf, recurrence.dtype),
    )


def step_root(method: "AbstractMethod", fn, y, problem, state: RootState):
    """One step; the new trajectory, and whether it is certified."""
    segments = _segments(method, problem)
    carry = segments.advance(state.carry, jnp.asarray(True))
    attempt = segments.finish(carry)
    y = jtu.tree_unflatten(jtu.tree_structure(y), segments.states(attempt))
    value, aux = fn(y, problem)
    # The function that was given has the last word: one that is not the recurrence's
    # residual must not be reported as solved. Twice, for it may round differently.
    size = method.norm(y)
    rtol = float(segments.rtol.max(initial=0))
    small = method.norm(value) <= 2 * (segments.atol + rtol * size)
    return y, RootState(carry, attempt.certified & small, attempt.residual), aux


def finish_root(method: "AbstractMethod", fn, y, aux, problem, state: RootState):
    del method, fn, problem
    return y, aux, {"residual": state.residual, "nonfinite": state.carry.nonfinite}
