"""Differential equations, solved by fixed steps in parallel over time."""

from collections.abc import Callable
from typing import Any, Literal, get_origin

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, PyTree

from ._checks import check_bits
from ._diffrax_step import step_as_cell
from .recurrence import Structure
from .solver import RESULTS, AbstractSolver, Auto, Solution, check_solver, solve


def integrate(
    terms: PyTree,
    method: diffrax.AbstractSolver,
    ts: Float[Array, " times"],
    y0: PyTree[ArrayLike],
    args: PyTree = None,
    *,
    solver: AbstractSolver = Auto(),
    initial_guess: PyTree | str | Callable | None = "h0",
    max_steps: int | None = None,
    structure: Structure | str | None = None,
    adjoint: Literal["auto", "parallel", "sweep"] = "auto",
    throw: bool = True,
) -> Solution:
    r"""Solve a differential equation by fixed steps, in parallel when that is faster.

    One step $\Phi$ of a diffrax solver, from one of the times to the next, is a cell

    $$y_n = \Phi(y_{n-1}; t_{n-1}, t_n), \qquad n = 1 \dots T,$$

    and [`pararnn.solve`][] finds all states of the recurrence. For an explicit
    Runge-Kutta method

    $$\Phi(y; t, t + \Delta) = y + \Delta \sum_i b_i k_i, \qquad
    k_i = f\Bigl(t + c_i \Delta,\ y + \Delta \sum_{j < i} a_{ij} k_j\Bigr);$$

    The root finder of an implicit method finds the stages inside the step, and the
    implicit function theorem differentiates them. A step whose root finder fails is
    NaN, and so is its derivative. It does not raise by itself, since a solver may meet
    such a step on its way. The numbers are those of
    `diffrax.diffeqsolve(..., stepsize_controller=diffrax.StepTo(ts))`, for every
    `solver`. Derivatives and `vmap` are those of [`pararnn.solve`][]: forward and
    reverse mode, with respect to `y0`, `args`, `ts` and everything in `terms`.

    The steps are fixed in advance. An adaptive step size would depend on states that
    are not known yet, so there is no step size controller. To find good `ts` once, use
    `diffrax.diffeqsolve(..., saveat=SaveAt(steps=True))`.

    **Arguments:**

    - `terms`: a vector field `f(t, y, args)`, or what `diffrax.diffeqsolve` takes: a
        `diffrax.ODETerm`, a `ControlTerm` (of an interpolation, or of a Brownian path
        with a fixed key), a `MultiTerm`, a tuple for `SemiImplicitEuler`.
    - `method`: a one-step solver of diffrax: `Euler()`, `Tsit5()`, `Kvaerno3()`,
        `KenCarp4()`, ... An implicit one whose root finder has no tolerances gets
        Newton's method, run to the rounding of the state.
    - `ts`: floating point `[T + 1]`, strictly increasing or strictly decreasing (only
        increasing for terms other than `ODETerm`); `ts[0]` is the time of `y0`.
    - `y0`: state at `ts[0]`, a pytree; promoted to a dtype that holds that of `ts`.
    - `args`: passed to the vector field.
    - `initial_guess`: as for [`pararnn.solve`][]. Defaults to `y0` at all times, which
        is finite. Much better guesses are the solution on every sixteenth of `ts`,
        interpolated, or the states of the last training step.
    - `solver`, `max_steps`, `structure`, `adjoint`, `throw`: as for
        [`pararnn.solve`][].

    **Returns:** a [`pararnn.Solution`][], its states `[T, ...]` those at `ts[1:]`.

    **Raises:** `TypeError` or `ValueError` while tracing if terms, method and times do
    not fit together; a runtime error if the times are traced and not monotonic; with
    `throw=True`, a runtime error as from [`pararnn.solve`][], or if the root finder of
    an implicit step fails. With `throw=False` the states are NaN from such a step on.
    (If you wrote an implicit method that is neither a Runge-Kutta method nor
    `ImplicitEuler`, diffrax differentiates it, and its linear solves raise where a step
    has failed.)

    **Sources:** Kidger, *On Neural Differential Equations* (2202.02435, section 5);
    Hairer, Nørsett and Wanner, *Solving Ordinary Differential Equations I*, II.1; for
    Newton's method over the steps, Lim et al. (2309.12252, section 3).
    """
    check_solver("integrate", solver)
    terms = _as_terms(terms)
    _check_method(method, terms)
    ts = _check_times(ts, terms)
    y0 = _promote(y0, ts.dtype)
    _check_field(terms, ts.dtype, y0, args)
    _check_state(method, terms, ts.dtype, y0, args)
    implicit = isinstance(method, diffrax.AbstractImplicitSolver)
    solution = solve(
        step_as_cell(method, terms, args),
        (ts[:-1], ts[1:]),
        y0,
        solver=solver,
        initial_guess=initial_guess,
        max_steps=max_steps,
        structure=structure,
        adjoint=adjoint,
        throw=throw and not implicit,
    )
    return _raise_on_failure(solution) if throw and implicit else solution


def _raise_on_failure(solution: Solution) -> Solution:
    """Raise for an implicit method, with a message that names its root finder."""
    result = solution.result
    lost = result == RESULTS.nonfinite_states
    states = eqx.error_if(
        solution.states,
        lost,
        "integrate: a step of the implicit method has no finite result. Likely causes: "
        "(a) its root finder did not converge: make the steps `ts` shorter there, or "
        "raise `root_find_max_steps`, or leave out `root_finder`, so that one with "
        "suitable tolerances is chosen; (b) the solution itself grows without bound; "
        "(c) the vector field was evaluated outside its domain (log, sqrt, a "
        "division). With `throw=False` `stats['first_nonfinite']` is the first such "
        "step.",
    )
    other = ~lost & (result != RESULTS.successful)
    states = result.error_if(states, other)
    return eqx.tree_at(lambda s: s.states, solution, states)


# Checks of what a user passes ---------------------------------------------------------


def _is_term(x) -> bool:
    return isinstance(x, diffrax.AbstractTerm)


def _as_terms(terms):
    """Wrap every plain function in an `ODETerm`."""

    def one(term):
        if _is_term(term):
            return term
        if callable(term):
            return diffrax.ODETerm(term)
        swapped = isinstance(term, diffrax.AbstractSolver)
        raise TypeError(
            f"integrate: `terms` holds a {type(term).__name__}; expected a vector "
            "field `f(t, y, args)` or a term of diffrax. Likely cause: "
            + (
                "terms and method are swapped: terms come first."
                if swapped
                else "the result of the vector field was passed, not the function."
            )
        )

    def is_leaf(x):
        return _is_term(x) or callable(x) or isinstance(x, diffrax.AbstractSolver)

    return jtu.tree_map(one, terms, is_leaf=is_leaf)


def _single_terms(terms) -> list[diffrax.AbstractTerm]:
    found = []
    for term in jtu.tree_leaves(terms, is_leaf=_is_term):
        inner = isinstance(term, diffrax.MultiTerm)
        found += _single_terms(term.terms) if inner else [term]
    return found


def _check_method(method: Any, terms) -> None:
    if not isinstance(method, diffrax.AbstractSolver):
        raise TypeError(
            f"integrate: `method` is {method!r:.80}; expected a solver of diffrax, for "
            "instance diffrax.Tsit5()."
            + (
                " Did you forget to call the class?"
                if isinstance(method, type)
                else " A solver of pararnn goes into `solver`."
            )
        )
    if isinstance(method, diffrax.AbstractWrappedSolver):
        raise ValueError(
            f"integrate: `method` is a {type(method).__name__}, which wraps a solver "
            "to estimate its error. Fixed steps do not need the estimate: pass the "
            "solver itself, with twice as many `ts` for the same accuracy."
        )
    wanted, given = method.term_structure, _class_names(terms)
    if _has_structure(wanted, terms):
        return
    raise ValueError(
        f"integrate: {type(method).__name__} takes terms of the form "
        f"{_class_names(wanted)}, but `terms` is {given}. Likely causes: (a) an "
        "implicit-explicit method takes diffrax.MultiTerm(explicit, implicit), a "
        "symplectic one a tuple of two terms (or functions); (b) several terms were "
        "given to a method for one: join them as diffrax.MultiTerm(...)."
    )


def _has_structure(wanted, terms) -> bool:
    if isinstance(wanted, tuple):
        return (
            isinstance(terms, tuple)
            and len(terms) == len(wanted)
            and all(_has_structure(w, t) for w, t in zip(wanted, terms, strict=True))
        )
    return isinstance(terms, get_origin(wanted) or wanted)


def _class_names(terms) -> str:
    """Return terms by the names of their classes."""
    if isinstance(terms, tuple):
        return f"({', '.join(map(_class_names, terms))})"
    cls = get_origin(terms) or (terms if isinstance(terms, type) else type(terms))
    return cls.__name__


def _check_times(ts: Any, terms) -> Array:
    if not isinstance(ts, Tracer):
        ts = np.asarray(ts)
    if ts.ndim != 1 or ts.shape[0] == 0:
        raise ValueError(
            f"integrate: `ts` has shape {list(ts.shape)}; expected [T + 1]: the time "
            "of `y0`, then that of each state. Likely causes: (a) the length of one "
            "step, or only the final time, was passed; (b) a batch of times, which "
            "belongs under `jax.vmap`."
        )
    if not jnp.issubdtype(ts.dtype, jnp.floating):
        raise TypeError(
            f"integrate: `ts` is {ts.dtype}; times must be floating point. Likely "
            "cause: it comes from `jnp.arange(T + 1)`: write `jnp.arange(T + 1.0)`, or "
            "multiply by the length of a step."
        )
    check_bits("integrate", "ts", ts)
    backwards = all(type(term) is diffrax.ODETerm for term in _single_terms(terms))
    order = "strictly increasing" + (" or strictly decreasing" if backwards else "")
    message = (
        f"integrate: `ts` must be {order}. Likely causes: (a) times that are equal, "
        "from data with duplicates, or in float32, where small steps at large times "
        "vanish; (b) a NaN; (c) times that were not sorted"
        + ("." if backwards else "; (d) a control run backwards, which is not defined.")
    )
    if isinstance(ts, Tracer):
        return eqx.error_if(ts, ~_is_monotonic(jnp, ts, backwards), message)
    # In the dtype that JAX computes in, rounding may make times equal.
    ts = ts.astype(jnp.asarray(ts[:0]).dtype)
    if not _is_monotonic(np, ts, backwards):
        raise ValueError(f"{message} Given: {np.array2string(ts, threshold=8)}.")
    return jnp.asarray(ts)


def _is_monotonic(xp, ts, backwards: bool):
    monotonic = xp.all(ts[1:] > ts[:-1])
    return monotonic | xp.all(ts[1:] < ts[:-1]) if backwards else monotonic


def _promote(y0, time_dtype):
    """Return `y0` in the dtypes that `diffrax.diffeqsolve` would compute in."""
    for path, leaf in jtu.tree_leaves_with_path(y0):
        if not eqx.is_array_like(leaf):
            raise TypeError(
                f"integrate: `y0{jtu.keystr(path)}` is not an array but {leaf!r:.80}."
            )
        check_bits("integrate", f"y0{jtu.keystr(path)}", leaf)
    if not jtu.tree_leaves(y0):
        raise ValueError("integrate: `y0` holds no arrays: there is nothing to solve.")

    def promote(leaf):
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(leaf, time_dtype)
        return jnp.asarray(leaf, dtype)

    return jtu.tree_map(promote, y0)


def _check_field(terms, time_dtype, y0, args) -> None:
    """Evaluate the vector field once on shapes, for a message that names it."""
    if not _is_term(terms):
        return  # each of several terms gets only a part of the state

    def evaluate(t0, t1, y):
        return terms.vf_prod(t0, y, args, terms.contr(t0, t1))

    t = jax.ShapeDtypeStruct((), time_dtype)
    try:
        eqx.filter_eval_shape(evaluate, t, t, y0)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        shapes = jtu.tree_map(lambda s: f"{s.dtype}{list(s.shape)}", y0)
        raise kind(
            "integrate: the vector field could not be evaluated at one state, "
            f"{str(shapes).replace(chr(39), '')}. Likely causes: (a) its arguments are "
            "not (t, y, args) in this order; (b) `args` was not passed; (c) it does "
            "not return one number for each of the state's, or not in the state's "
            "dtype; (d) `y0` has a batch axis, which belongs under `jax.vmap`. It "
            f"said: {error}"
        ) from error


def _check_state(method, terms, time_dtype, y0, args) -> None:
    """Refuse a method whose next step depends on more than the state."""
    if isinstance(method, diffrax.AbstractRungeKutta):
        return  # it carries at most its last stage, which the next step can recompute
    t = jax.ShapeDtypeStruct((), time_dtype)
    state = eqx.filter_eval_shape(
        lambda t0, t1, y: method.init(terms, t0, t1, y, args), t, t, y0
    )
    if jtu.tree_leaves(state):
        raise ValueError(
            f"integrate: {type(method).__name__} carries a state of its own from step "
            "to step, and its results depend on it, so a step is not a function of `y` "
            "alone. Use a one-step method: any Runge-Kutta method of diffrax, for "
            "instance diffrax.Heun() or diffrax.Tsit5(); or diffrax.diffeqsolve, which "
            "steps in sequence."
        )
