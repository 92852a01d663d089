"""Methods as root finders of Optimistix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Bool, PyTree

from ._adapters import as_step
from .recurrence import (
    check_like,
    check_resets,
    count_steps,
    find_structure,
    make_recurrence,
    refuse_unbatchable,
    states_before,
)
from .solver import AbstractMethod
from .solver._certificate import max_abs
from .solver._iteration import Carry, Iteration
from .solver._problem import BoundProblem
from .solver._segments import Segments


class Problem(eqx.Module):
    r"""A recurrence $h_t = f(h_{t-1}, x_t)$ as the `args` of `optimistix.root_find`.

    ```python
    problem = pararnn.Problem(cell, xs, h0)
    guess = jnp.zeros((len(xs), *h0.shape))
    finder = pararnn.RootFinder(pararnn.Newton(64))
    optx.root_find(pararnn.residual, finder, guess, args=problem)
    ```

    [`pararnn.solve`][] does the same with less work (it builds the trajectory once, not
    at every step), and adds its own derivative and batching. Use this if you want
    Optimistix's loop, adjoints or statistics. Its implicit adjoint solves with the
    whole Jacobian of the trajectory as one dense matrix, `[T * width, T * width]`.

    **Arguments:** as for [`pararnn.solve`][]. To be differentiated, an array has to be
    a leaf of this pytree. So a cell with parameters has to be a module, not a function
    that closes over them.
    """

    f: Callable
    xs: PyTree
    h0: PyTree
    reset: Bool[Array, " T"] | None = None
    reset_state: PyTree | None = None


def residual(states: PyTree, problem: Problem) -> PyTree:
    r"""Return $f(h_{t-1}, x_t) - h_t$ for all t, which is zero at the solution.

    **Arguments:** `states`, a trajectory, pytree like `problem.h0` with leaves
    `[T, ...]`; `problem`, a [`pararnn.Problem`][].

    **Returns:** a pytree like `states`.
    """
    fresh = problem.reset_state
    if fresh is None:
        fresh = jtu.tree_map(jnp.zeros_like, problem.h0)
    before = states_before(problem.h0, states, problem.reset, fresh)
    after = jax.vmap(as_step(problem.f))(before, problem.xs)
    return jtu.tree_map(jnp.subtract, after, states)


class RootState(NamedTuple):
    """The state of a method between two steps of Optimistix's loop."""

    carry: Carry
    certified: Bool[Array, ""]
    residual: Array


class RootFinder(optx.AbstractRootFinder):
    """A method as an `optimistix.AbstractRootFinder` of [`pararnn.residual`][].

    **Arguments:** `method`, an [`pararnn.AbstractMethod`][], such as
    [`pararnn.Newton`][].

    **Raises:** `TypeError` for anything else, and while tracing if `args` is not a
    [`pararnn.Problem`][]; `ValueError` if shapes do not fit.
    """

    method: AbstractMethod

    def __check_init__(self):
        if not isinstance(self.method, AbstractMethod):
            raise TypeError(
                f"RootFinder: `method` is {self.method!r:.80}; expected a method, for "
                "instance pararnn.Newton(segments=64). Auto, Ladder, Windows and "
                "Sequential are not iterations: use them with `pararnn.solve`."
                + " Did you forget to call the class?"
                * isinstance(self.method, type)
            )

    @property
    def rtol(self) -> float | None:
        return self.method.rtol

    @property
    def atol(self) -> float | None:
        return self.method.atol

    @property
    def norm(self) -> Callable[[PyTree], Array]:
        return max_norm

    def init(self, fn, y, args, options, f_struct, aux_struct, tags) -> RootState:
        where, segments = type(self).__name__, self._segments(args)
        recurrence = segments.recurrence
        leaves = [
            jax.ShapeDtypeStruct((segments.steps, *s.shape), s.dtype)
            for s in recurrence.state_leaves
        ]
        like = jtu.tree_unflatten(recurrence.state_tree, leaves)
        what = "a state for each step, [T, ...]"
        check_like(where, "y0", y, like, what)
        what = "`fn` must be `pararnn.residual`"
        check_like(where, "the value of `fn`", f_struct, like, what)
        starts = segments.guess_starts(tuple(jtu.tree_leaves(y)))
        carry = self._iteration(segments).start(starts, may_fail=False)
        none = jnp.asarray(jnp.inf, recurrence.dtype)
        return RootState(carry, jnp.asarray(False), none)

    def step(self, fn, y, args, options, state: RootState, tags):
        """Take one step; return the new trajectory, and whether it is certified."""
        segments = self._segments(args)
        carry = state.carry._replace(done=jnp.asarray(False))
        carry = self._iteration(segments).advance(carry)
        trajectory = segments.trajectory(carry.starts)
        states, _ = segments.join(trajectory, carry.starts)
        y = jtu.tree_unflatten(jtu.tree_structure(y), states)
        value, aux = fn(y, args)
        # The given function must be small too: if it is not the residual of the
        # recurrence, it must not be reported as solved. The tolerance is doubled, since
        # the function may round differently.
        rtol = float(segments.rtol.max(initial=0))
        small = max_norm(value) <= 2 * (segments.atol + rtol * max_norm(y))
        state = RootState(carry, trajectory.certified & small, trajectory.residual)
        return y, state, aux

    def terminate(self, fn, y, args, options, state: RootState, tags):
        return state.certified, optx.RESULTS.successful

    def postprocess(
        self, fn, y, aux, args, options, state: RootState, tags, result
    ) -> tuple[PyTree, Any, dict[str, Any]]:
        stats = {"residual": state.residual, "nonfinite": state.carry.nonfinite}
        return y, aux, stats

    def _iteration(self, segments: Segments) -> Iteration:
        # Optimistix counts the steps.
        return Iteration(segments, self.method, limit=2**31 - 1)

    def _segments(self, problem: Any) -> Segments:
        """Cut the problem into segments."""
        where = type(self).__name__
        if not isinstance(problem, Problem):
            raise TypeError(
                f"{where}: `args` is a {type(problem).__name__}, expected a "
                "`pararnn.Problem`. This root finder solves recurrences only: "
                "`optx.root_find(pararnn.residual, "
                "pararnn.RootFinder(pararnn.Newton(64)), guess, "
                "args=pararnn.Problem(cell, xs, h0))`."
            )
        recurrence = make_recurrence(where, problem.f, problem.xs, problem.h0)
        refuse_unbatchable(where, recurrence)
        steps = count_steps(where, problem.xs)
        reset, fresh = problem.reset, problem.reset_state
        fresh = check_resets(where, recurrence, reset, fresh, steps)
        leaves = tuple(jnp.asarray(x) for x in jtu.tree_leaves(problem.xs))
        bound = BoundProblem(
            recurrence,
            parameters=(recurrence.take_constants(), fresh),
            inputs=(leaves, reset),
            h0=tuple(jnp.asarray(h) for h in jtu.tree_leaves(problem.h0)),
            find_structure=lambda: find_structure(recurrence),
        )
        return Segments(bound, self.method)


def max_norm(tree: PyTree) -> Array:
    """Return the largest absolute value in a pytree; infinity if one is NaN."""
    sizes = [max_abs(leaf) for leaf in jax.tree.leaves(tree)]
    return jnp.max(jnp.stack(sizes))
