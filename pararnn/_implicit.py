"""Implicit recurrences `F(h_t, h_{t-1}, x_t) = 0`, as cells.

A step is solved by Newton's method. Its derivative follows from the implicit function
theorem at the solution, and never passes through the iterations. The blocks of
`∂F/∂h_t` are found like those of a cell's Jacobian, and inverted one by one.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ._checks import check_bits, is_count
from ._equation import Equation, solution
from .recurrence import AbstractImplicitCell, Recurrence
from .solver._certificate import along_entries, max_abs


class Implicit(AbstractImplicitCell):
    r"""A cell whose next state is defined by an equation: $F(h_t, h_{t-1}, x_t) = 0$.

    Backward Euler, differential-algebraic equations of index 1 and implicit layers are
    recurrences of this form. `Implicit(F)` is a cell `f(h, x) -> h_new`, for
    [`pararnn.solve`][] with any solver, for [`pararnn.RNN`][], or for your own loop:

        def F(h_new, h, x):  # backward Euler of dh/dt = g(h, x)
            return h_new - h - dt * g(h_new, x)

        sol = pararnn.solve(pararnn.Implicit(F), xs, h0)

    Starting from $z_0 = h_{t-1}$, or from `guess`, Newton's method iterates

    $$z_{k+1} = z_k - (\partial_z F)^{-1} F(z_k, h_{t-1}, x_t)$$

    down to rounding. There is no damping: if there are several solutions, the one that
    this reaches is returned, and a step that is too long fails. Tangents, to any order
    and in both modes, are those of the implicit function theorem at the solution,

    $$dh_t = -(\partial_z F)^{-1}
        (\partial_h F\, dh_{t-1} + \partial_x F\, dx_t + \partial_\theta F\, d\theta),$$

    where $\theta$ is everything that `F` closes over. The blocks of $\partial_z F$ are
    found as by [`pararnn.jacobian_structure`][]. If it is diagonal, it costs a
    division; if block-diagonal, an inverse for each block; otherwise, the inverse of a
    `width x width` matrix. The cell's own Jacobian keeps this structure as far as
    $\partial_h F$ shares it.

    If every step is a segment of Newton's method, and there is no limit on its steps,
    as with `solver=pararnn.Newton()` alone, [`pararnn.solve`][] takes the equations of
    all steps as one system and iterates on all states jointly:

    $$\partial_z F\, \delta_t + \partial_h F\, \delta_{t-1}
        = -F(h_t, h_{t-1}, x_t),$$

    A step then costs one evaluation of F instead of a whole inner iteration. The result
    is checked against the cell itself. If 16 such steps do not lead to the solution,
    the solve starts again with whole steps. `stats["num_steps"]` and the residual
    history count both; for joint steps the history holds $(\partial_z F)^{-1} F$. (This
    only happens if `Implicit(F)` itself is passed, not a function that calls it.)

    **A step that fails** has NaN in its whole state, so that [`pararnn.solve`][] ends
    with `RESULTS.nonfinite_states`. Its derivative is NaN too. A step fails if there is
    no solution, if Newton's method starts too far from it, or if $\partial_z F$ is
    singular on the way or at the solution. A double root is such a solution: small
    changes of the equation move it by their square root or remove it, so it has no
    derivative. [`pararnn.Implicit.stats`][] at the state before
    `stats["first_nonfinite"]` tells more.

    **Arguments:**

    - `F`: `F(h_new, h, x) -> residual`; any function or module, differentiable in
        forward mode. `h_new` and `h` are states, real or complex, and the residual has
        their structure, shapes and dtypes. The equations may be in any order. For a
        diagonal or block-diagonal structure, entry i has to hold the equation for entry
        i. On a GPU, give matrix products `precision="highest"`: rounded to TF32, the
        default there, some steps do not get below the tolerance.
    - `guess`: `guess(h, x)`, a state to start from. Defaults to the previous state. It
        affects only the speed, and which of several solutions is found; no derivative
        depends on it.
    - `rtol`, `atol`: a step is solved when two successive corrections are at most
        `atol + rtol * |h_new|` in every entry of the state. If convergence is
        quadratic, the second brings the error down to rounding. If it is not, one more
        step tells a singular solution from a regular one. `rtol` defaults to the square
        root of the rounding of the entry's dtype, and `atol` to 0. Corrections below
        the rounding of an entry of `h_new` or `h` always suffice; so do corrections
        that no longer shrink because the equation itself rounds by as much.
    - `max_steps`: limit on Newton's steps.

    **Raises:** `TypeError` if `F` or `guess` cannot be called; `ValueError` for
    tolerances that are negative or NaN, and for a limit that is not a whole number.

    ??? cite "Source"

        Newton's method for implicit integrators: Hairer and Wanner, "Solving Ordinary
        Differential Equations II", section IV.8 (1996), and section VI.1 for
        differential-algebraic equations of index 1. Implicit layers: Bai, Kolter and
        Koltun, "Deep equilibrium models" (2019), 1909.01377.
    """

    F: Callable[[PyTree, PyTree, PyTree], PyTree]
    guess: Callable[[PyTree, PyTree], PyTree] | None
    rtol: float | None = eqx.field(static=True)
    atol: float | None = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    def __init__(
        self,
        F: Callable[[PyTree, PyTree, PyTree], PyTree],
        *,
        guess: Callable[[PyTree, PyTree], PyTree] | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        max_steps: int = 32,
    ):
        _check_functions(F, guess)
        self.F, self.guess = F, guess
        # NumPy's numbers would count as arrays, with a dtype.
        self.rtol = _as_tolerance("rtol", rtol)
        self.atol = _as_tolerance("atol", atol)
        self.max_steps = _as_limit(max_steps)

    def __call__(self, h: PyTree[Array], x: PyTree) -> PyTree[Array]:
        r"""Return the state $h_t$ that solves $F(h_t, h, x) = 0$.

        **Arguments:** `h`, the previous state, a pytree of floating-point or complex
        arrays; `x`, the input of this step, any pytree of arrays.

        **Returns:** a state like `h`: the solution, or NaN everywhere.

        **Raises:** `ValueError` or `TypeError` while tracing, if `F` or `guess` does
        not fit the state.
        """
        equation, arguments, search = _make_equation(self, h, x)
        return equation.state(solution(*arguments, equation=equation, search=search))

    def refine(self, z: PyTree[Array], h: PyTree[Array], x: PyTree) -> PyTree[Array]:
        r"""Take one step of Newton's method, from z towards the solution.

        Its derivative with respect to h is $-(\partial_z F)^{-1}\, \partial_h F$, which
        at the solution is that of a call; there is none with respect to z.
        [`pararnn.solve`][] solves for all states at once with it, if each step is a
        segment.

        **Arguments:** `z`, a state like `h`; the others as for a call.

        **Returns:** a state like `h`.

        **Raises:** as a call.
        """
        equation, (constants, inputs, _), _ = _make_equation(self, h, x)
        v = lax.stop_gradient(equation.recurrence.ravel(_leaves(z)))
        held = lax.stop_gradient((constants, inputs))
        _, inverse = equation.residual_and_inverse(held[0], v, held[1])
        value = equation.residual(constants, v, inputs)
        return equation.state(v - equation.apply(inverse, value))

    def stats(self, h: PyTree[Array], x: PyTree) -> dict[str, Any]:
        """Report how the solve of one step ends, to find out why it fails.

        **Arguments:** as for a call.

        **Returns:** a dict without derivatives: `"converged"` (bool); `"num_steps"`
        (int32), the number of Newton steps; `"correction"` (real), the max-norm of the
        last correction; `"last"`, the last iterate, a state like `h`, whether converged
        or not.

        **Raises:** as a call.
        """
        equation, arguments, search = _make_equation(self, h, x)
        end = search.run(equation, *lax.stop_gradient(arguments))
        return {
            "converged": end.converged,
            "num_steps": end.num_steps,
            "correction": end.correction,
            "last": equation.state(end.v),
        }


class _Iterate(NamedTuple):
    """The state of Newton's method."""

    v: Float[Array, " width"]
    correction: Float[Array, ""]  # the last one, in the max-norm
    relative: Float[Array, ""]  # the same, each entry relative to its size
    near: Bool[Array, ""]  # it was small relative to every entry
    close: Bool[Array, ""]  # it was within the tolerance
    crawled: Bool[Array, ""]  # a small one was followed by one of about its size
    probing: Bool[Array, ""]  # the next step starts beside v, to see if it leads back
    num_steps: Int[Array, ""]
    converged: Bool[Array, ""]
    ended: Bool[Array, ""]


class _Newton(NamedTuple):
    r"""Newton's method, until it has converged to a regular solution or failed.

    At a solution of multiplicity m the Jacobian is singular. Corrections shrink only by
    the factor 1 - 1/m, down to rounding, where one of them may be small by chance. So
    if corrections have crawled, or are noise, a last step is taken from 8 tolerances
    beside the solution. It leads back to a regular solution. To a singular one it leads
    back at most half of the way, or it leads anywhere.
    """

    rtol: float | None
    atol: float
    max_steps: int

    def __call__(self, equation: Equation, constants, inputs, start: Array) -> Array:
        """Return the solution, or NaN everywhere."""
        end = self.run(equation, constants, inputs, start)
        return jnp.where(end.converged, end.v, jnp.nan)

    def run(self, equation: Equation, constants, inputs, start: Array) -> _Iterate:
        recurrence = equation.recurrence
        # The terms of the equation are as large as the previous state, even if the next
        # state is zero.
        before = recurrence.ravel(inputs[: recurrence.state_tree.num_leaves])
        eps = recurrence.entry_eps

        def step(at: _Iterate) -> _Iterate:
            reach = jnp.where(at.probing, self._probe_distance(at.v, before, eps), 0)
            beside = at.v + reach
            value, inverse = equation.residual_and_inverse(constants, beside, inputs)
            change = equation.apply(inverse, value)
            probed = at._replace(
                num_steps=at.num_steps + 1,
                converged=max_abs(change - reach) <= 0.25 * max_abs(reach),
                ended=jnp.asarray(True),
            )
            moved = self._update(at, change, before, eps)
            return jtu.tree_map(ft.partial(jnp.where, at.probing), probed, moved)

        def unfinished(at: _Iterate):
            return ~at.ended & (at.num_steps < self.max_steps)

        no, none = jnp.asarray(False), jnp.asarray(0, jnp.int32)
        first = jnp.asarray(jnp.inf, start.dtype)
        at = _Iterate(start, first, first, no, no, no, no, none, no, no)
        return lax.while_loop(unfinished, step, at)

    def _probe_distance(self, v: Array, before: Array, eps: np.ndarray) -> Array:
        """Return how far from v to probe, entry by entry."""
        rtol = along_entries(np.maximum(self.rtol or 0, eps**0.5), v)
        rounding = along_entries(64 * eps, v) * jnp.abs(before)
        return 8 * (self.atol + rtol * jnp.abs(v) + rounding)

    def _update(
        self, at: _Iterate, change: Array, before: Array, eps: np.ndarray
    ) -> _Iterate:
        """Take one step, and update what is known of the convergence."""
        v = at.v - change
        change, sizes = jnp.abs(change), jnp.maximum(jnp.abs(v), jnp.abs(before))
        correction, finite = max_abs(change), jnp.all(jnp.isfinite(v))
        # Each entry is measured against its own size, or a small one beside a large one
        # would be wrong. But an entry that is small because larger numbers cancel is
        # only as exact as these. Then its corrections stop shrinking.
        relative = max_abs(jnp.where(change == 0, 0, change / sizes))
        roundings = along_entries(64 * eps, v) * sizes
        rounding = max_abs(roundings)
        exact = finite & jnp.all(change <= roundings)
        rtol = eps**0.5 if self.rtol is None else np.full_like(eps, self.rtol)
        tolerance = self.atol + along_entries(rtol, v) * jnp.abs(v)
        close = finite & jnp.all(change <= jnp.maximum(tolerance, roundings))
        stalled = finite & (correction <= rounding) & (relative >= 0.25 * at.relative)
        slow = (correction > 0.25 * at.correction) & (correction > rounding)
        crawled = at.crawled | (at.near & slow)
        # If the equation is badly conditioned, corrections never come below the
        # rounding. They end as noise, which no longer shrinks by any measure.
        noise = correction <= float(eps.max(initial=0)) ** 0.5 * max_abs(sizes)
        noise = finite & noise & slow & (relative >= 0.25 * at.relative)
        at_rest = exact | (close & at.close) | stalled
        doubtful = crawled | (noise & ~at_rest)
        at_rest = at_rest | noise
        return _Iterate(
            v=v,
            correction=correction,
            relative=relative,
            near=jnp.all(change <= self.atol + along_entries(eps**0.25, v) * sizes),
            close=close,
            crawled=crawled,
            probing=at_rest & doubtful,
            num_steps=at.num_steps + 1,
            converged=at_rest & ~doubtful,
            ended=(at_rest & ~doubtful) | ~finite,
        )


# Checks of what users pass.


def _make_equation(options: Implicit, h: PyTree, x: PyTree):
    """Return the equation of one step, its arguments, and the search.

    The arguments are the equation's constants, its inputs and the start.
    """
    _check_state(h)
    # The recurrence drops a time axis, so one step needs one.
    inputs = jtu.tree_map(lambda leaf: jnp.asarray(leaf)[None], (h, x))
    try:
        recurrence = Recurrence(lambda z, hx: options.F(z, *hx), inputs, h)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"Implicit: `F(h_new, h, x)` could not be traced with the states "
            f"{_describe(h)} and the input {_describe(x)}. Likely causes: (a) `F` has "
            "other arguments, or in another order: first the new state, then the "
            "previous one, then the input; (b) the sizes of state or input do not fit; "
            f"(c) `F` branches on values: use `jnp.where`. It said: {error}"
        ) from error
    _check_residual(recurrence)
    start = h
    if options.guess is not None:
        start = options.guess(h, x)
        _check_guess(start, h)
    search = _Newton(options.rtol, options.atol or 0.0, options.max_steps)
    start = lax.stop_gradient(recurrence.ravel(_leaves(start)))
    arguments = recurrence.take_constants(), (*_leaves(h), *_leaves(x)), start
    return Equation(recurrence), arguments, search


def _leaves(tree: PyTree) -> tuple[Array, ...]:
    return tuple(jnp.asarray(leaf) for leaf in jtu.tree_leaves(tree))


def _check_functions(F: Any, guess: Any) -> None:
    if not callable(F):
        raise TypeError(
            f"Implicit: `F` is a {type(F).__name__}, which cannot be called; "
            "expected a function `F(h_new, h, x)` that returns the residual of the "
            "equation. Likely cause: `F` was called, `Implicit(F(...))`: pass the "
            "function itself."
        )
    if guess is not None and not callable(guess):
        raise TypeError(
            f"Implicit: `guess` is a {type(guess).__name__}, which cannot be "
            "called; expected a function `guess(h, x)` that returns a state. For a "
            "fixed one pass `lambda h, x: value`."
        )


def _as_tolerance(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not (isinstance(value, int | float | np.number) and value >= 0):
        raise ValueError(
            f"Implicit: `{name}` is {value!r:.80}; expected a number >= 0, not an "
            "array, or None for what the state's dtype can resolve."
        )
    return float(value)


def _as_limit(value: Any) -> int:
    if not is_count(value, 1):
        raise ValueError(
            f"Implicit: `max_steps` is {value!r:.80}; expected a whole number >= 1. "
            "Newton's method seldom needs more than ten. If it starts too far from the "
            "solution, more steps do not help, but a `guess` or a shorter step does."
        )
    return int(value)


def _check_state(h: PyTree) -> None:
    for path, leaf in jtu.tree_leaves_with_path(h):
        numbers = eqx.is_array_like(leaf)
        if not numbers or not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"Implicit: the state's leaf `h{jtu.keystr(path)}` is {leaf!r:.80}; "
                "every leaf must be a floating-point or complex array, since the "
                "equation is solved for it. Cast it, or move it to the inputs."
            )
        check_bits("Implicit", f"h{jtu.keystr(path)}", leaf)


def _check_residual(recurrence: Recurrence) -> None:
    if recurrence.has_custom_vjp:
        raise TypeError(
            "Implicit: `F` contains a function with a `jax.custom_vjp` rule, which has "
            "no forward-mode derivative; Newton's method and the derivative of the "
            "solution need one. Define the rule by `jax.custom_jvp` instead: it gives "
            "reverse mode too."
        )
    state = jtu.tree_unflatten(recurrence.state_tree, recurrence.state_leaves)
    if not _same(recurrence.output, state):
        raise ValueError(
            f"Implicit: `F(h_new, h, x)` returns {_describe(recurrence.output)}, but "
            f"the state is {_describe(state)}; there must be one equation for each "
            "number of the state, in the same structure, shapes and dtypes. Likely "
            "causes: (a) an equation is missing, or joined with another: return the "
            "residuals in the structure of the state; (b) the input broadcasts against "
            "the state, for instance because it has a batch axis; (c) state and "
            "parameters differ in dtype: create `h0` in the dtype that `F` returns."
        )


def _check_guess(guess: PyTree, h: PyTree) -> None:
    if not _same(guess, h):
        raise ValueError(
            f"Implicit: `guess(h, x)` returns {_describe(guess)}, but the state is "
            f"{_describe(h)}; Newton's method starts from a state. Likely cause: the "
            "guess is only a part of the state, or has another dtype: return all of "
            "it, with the rest taken from `h`."
        )


def _same(got: PyTree, state: PyTree) -> bool:
    if jtu.tree_structure(got) != jtu.tree_structure(state):
        return False
    pairs = zip(jtu.tree_leaves(got), jtu.tree_leaves(state), strict=True)
    return all(_shape_dtype(a) == _shape_dtype(b) for a, b in pairs)


def _shape_dtype(leaf):
    """Return shape and dtype of an array, a number, or an abstract array."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.shape, leaf.dtype
    return jnp.shape(leaf), jnp.result_type(leaf)


def _describe(tree: PyTree) -> str:
    def one(leaf):
        shape, dtype = _shape_dtype(leaf)
        return f"{dtype}{list(shape)}"

    return str(jtu.tree_map(one, tree)).replace("'", "")
