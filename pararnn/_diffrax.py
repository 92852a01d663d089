"""Differential equations: one fixed step of a diffrax solver is a cell."""

import functools as ft
from collections.abc import Callable
from typing import Any, Literal, get_origin

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, PyTree

from ._checks import check_bits
from ._equation import with_derivative
from .solver import (
    RESULTS,
    AbstractSolver,
    Auto,
    Solution,
    Structure,
    check_solver,
    solve,
)

# Any pytree of states; a step maps one to the next, given the times (t0, t1).
Step = Callable[[PyTree, tuple[Array, Array]], PyTree]


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
    r"""Solve a differential equation by fixed steps, in parallel where that pays.

    One step $\Phi$ of a solver of diffrax, from one of the times to the next, is a cell

    $$y_n = \Phi(y_{n-1}; t_{n-1}, t_n), \qquad n = 1 \dots T,$$

    and [`pararnn.solve`][] finds all states of the recurrence. For an explicit
    Runge-Kutta method

    $$\Phi(y; t, t + \Delta) = y + \Delta \sum_i b_i k_i, \qquad
    k_i = f\Bigl(t + c_i \Delta,\ y + \Delta \sum_{j < i} a_{ij} k_j\Bigr);$$

    the stages of an implicit one are found inside the step by its own root finder, and
    differentiated by the implicit function theorem. A step whose root finder fails is
    NaN, and so is its derivative; it raises nothing by itself, so that a solver may
    come by such a step on its way. The numbers are those of
    `diffrax.diffeqsolve(..., stepsize_controller=diffrax.StepTo(ts))`, whatever
    `solver` is. Derivatives and `vmap` are those of [`pararnn.solve`][]: forward and
    reverse mode, with respect to `y0`, `args`, `ts` and everything in `terms`.

    The steps are fixed beforehand. An adaptive step size would be decided by the states
    that are only being solved for, so there is no place for a step size controller; to
    find good `ts` once, use `diffrax.diffeqsolve(..., saveat=SaveAt(steps=True))`.

    **Arguments:**

    - `terms`: a vector field `f(t, y, args)`, or what `diffrax.diffeqsolve` takes: a
        `diffrax.ODETerm`, a `ControlTerm` (of an interpolation, or of a Brownian path
        with a fixed key), a `MultiTerm`, a tuple for `SemiImplicitEuler`.
    - `method`: a solver of diffrax that carries nothing from step to step that changes
        its numbers: `Euler()`, `Tsit5()`, `Kvaerno3()`, `KenCarp4()`, ... An implicit
        one whose root finder has no tolerances gets Newton's method, run to the
        rounding of the state.
    - `ts`: floating point `[T + 1]`, strictly increasing or strictly decreasing (only
        increasing for terms other than `ODETerm`); `ts[0]` is the time of `y0`.
    - `y0`: state at `ts[0]`, a pytree; promoted to a dtype that holds that of `ts`.
    - `args`: passed to the vector field.
    - `initial_guess`: as for [`pararnn.solve`][]; `y0` at all times if not given, which
        is finite. The solution on every sixteenth of `ts`, interpolated, is a far
        better one where it can be had; so are the states of the last training step.
    - `solver`, `max_steps`, `structure`, `adjoint`, `throw`: as for
        [`pararnn.solve`][].

    **Returns:** a [`pararnn.Solution`][], its states `[T, ...]` those at `ts[1:]`.

    **Raises:** `TypeError` or `ValueError` while tracing if terms, method and times do
    not fit together; a runtime error if the times are not monotonic and only known when
    the program runs; with `throw=True`, a runtime error as from [`pararnn.solve`][], or
    if the root finder of an implicit step failed. With `throw=False` the states are
    NaN from such a step on. (An implicit method of one's own that is neither a
    Runge-Kutta method nor `ImplicitEuler` is differentiated by diffrax, whose linear
    solves raise where a step has failed.)

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
        _as_cell(method, terms, args),
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


# The step -----------------------------------------------------------------------------


def _as_cell(method, terms, args) -> Step:
    """One step of the method, as a function of the state and of (t0, t1)."""
    if _is_plain_explicit(method):
        return _write_out(method.tableau, terms, args)
    if isinstance(method, diffrax.AbstractImplicitSolver):
        return _as_implicit_cell(method, terms, args)
    # The other kinds of equinox's loop lack one of the two modes of derivative.
    method = _with_loop(method, "bounded")
    return lambda y, times: _step(method, terms, args, y, *times)[0]


def _step(method, terms, args, y, t0, t1):
    """One step by diffrax: the state, what it knows of the step, and the result."""
    # Initialised at each step: a stage kept from the last one is only a saving.
    state = method.init(terms, t0, t1, y, args)
    y, _, details, _, result = method.step(terms, t0, t1, y, args, state, False)
    return y, details, result


def _with_loop(method, kind: str):
    """The method with that kind of loop over its stages, unless it has one already."""
    if getattr(method, "scan_kind", "") is not None:
        return method
    return eqx.tree_at(lambda m: m.scan_kind, method, kind, is_leaf=lambda x: x is None)


def _is_plain_explicit(method) -> bool:
    """Whether the step is the one formula of all explicit Runge-Kutta methods."""
    return (
        isinstance(method, diffrax.AbstractERK)
        and isinstance(method.tableau, diffrax.ButcherTableau)
        and type(method).step is diffrax.AbstractERK.step
    )


def _write_out(tableau: diffrax.ButcherTableau, terms, args) -> Step:
    """An explicit Runge-Kutta step, stage by stage.

    diffrax loops over the stages, with all of them in one buffer. Written out, a step
    of Tsit5 on two numbers is 25 times faster inside `lax.scan` on a CPU (0.18 against
    4.4 ms for 2048 steps), a stage that only a next step or an error estimate would
    need is left out, and the program still shows which states are independent.
    """
    rows = ((), *tableau.a_lower)
    nodes = (tableau.c1, *tableau.c)

    def is_needed(stage):
        later = (row[stage] for row in rows[stage + 1 :])
        return tableau.b_sol[stage] != 0 or any(weight != 0 for weight in later)

    def step(y, times):
        t0, t1 = times
        control = terms.contr(t0, t1)
        stages = []
        for stage, (row, node) in enumerate(zip(rows, nodes, strict=True)):
            if not is_needed(stage):
                stages.append(None)
                continue
            # `t0 + (t1 - t0)` need not be `t1` in floating point.
            t = t1 if node == 1 else t0 + float(node) * (t1 - t0)
            at = _advance(y, row, stages)
            stages.append(terms.vf_prod(t, at, args, control))
        return _advance(y, tableau.b_sol, stages)

    return step


def _advance(y, weights, stages):
    """`y + Σ w_j k_j`, over the nonzero weights."""
    used = [
        (float(weight), stage)
        for weight, stage in zip(weights, stages, strict=True)
        if weight != 0
    ]
    if not used:
        return y

    def advance(leaf, *increments):
        weighted = [w * k for (w, _), k in zip(used, increments, strict=True)]
        return leaf + sum(weighted[1:], start=weighted[0])

    return jtu.tree_map(advance, y, *(stage for _, stage in used))


# Implicit steps -----------------------------------------------------------------------


def _as_implicit_cell(method, terms, args) -> Step:
    """A step whose stages diffrax finds, and whose derivative is that of the stages.

    Differentiated by diffrax, a step solves linear systems that raise on a number that
    is not finite, and nothing can stop them. Newton's method over the steps meets such
    numbers on its way, and so does the derivative of a solution that has failed. So
    diffrax sees no derivative here. A failed step is NaN, and so is its derivative.
    """
    stepped = type(method).step
    if stepped is diffrax.ImplicitEuler.step:
        restore = ft.partial(_through_euler, terms, args)
    elif stepped is diffrax.AbstractRungeKutta.step:
        restore = ft.partial(_through_stages, method.tableau, terms, args)
    else:
        restore = None  # its stages are not known
    exact = not eqx.is_array_like(method.root_finder.rtol)
    method = _with_loop(method, "lax" if restore else "bounded")

    def find(y, t0, t1):
        stepper = _with_root_finder(method, y, t1 - t0) if exact else method
        y, details, result = _step(stepper, terms, args, y, t0, t1)
        return y, details.get("k"), diffrax.is_successful(result)

    def step(y, times):
        point = y, *times
        if restore is None:
            y, _, found = find(*point)
        else:
            # As data, whose arrays are seen, also those that functions close over.
            constant = eqx.filter_closure_convert(find, *point)
            constant, held = _without_derivative((constant, point))
            y, slopes, found = constant(*held)
            y = restore(point, y, slopes)

        def mark(leaf):
            # A factor, not a choice, which would leave the derivative as it is.
            return leaf * jnp.where(found, jnp.ones((), leaf.dtype), jnp.nan)

        return jtu.tree_map(mark, y)

    return step


def _without_derivative(tree):
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.lax.stop_gradient(arrays), rest)


def _through_euler(terms, args, point, after, slopes):
    """The state after a step of the implicit Euler method, with its derivative."""
    del slopes

    def residual(after, point):
        y, t0, t1 = point
        change = terms.vf_prod(t1, after, args, terms.contr(t0, t1))
        return jtu.tree_map(lambda z, y, k: z - y - k, after, y, change)

    return with_derivative(residual, after, point)(after, point)


def _through_stages(tableau, terms, args, point, after, slopes):
    """The state after a Runge-Kutta step with known slopes, with its derivative.

    Each slope is the solution of an equation that has those before it for inputs. With
    several tableaus, an implicit one and explicit ones, each has a slope of its own at
    a stage, and all are of the same state.
    """
    del after
    if not isinstance(tableau, diffrax.MultiButcherTableau):
        tableaus, terms, slopes = (tableau,), (terms,), (slopes,)
    else:
        tableaus, terms = tableau.tableaus, terms.terms
    y = point[0]
    stages = [
        _Stages(*part, args, point)
        for part in zip(tableaus, terms, slopes, strict=True)
    ]
    for number in range(tableaus[0].num_stages):
        at = y
        for stage in stages:
            at = _advance(at, stage.lower(number), stage.found)
        # The explicit ones start from what the implicit one has found.
        for stage in sorted(stages, key=lambda s: not s.tableau.implicit):
            at = stage.find(number, at)
    for stage in stages:
        y = _advance(y, stage.tableau.b_sol, stage.found)
    return y


class _Stages:
    """The slopes of one tableau and its term, found one after the other."""

    def __init__(self, tableau: diffrax.ButcherTableau, term, slopes, args, point):
        self.tableau, self.term, self.args, self.slopes = tableau, term, args, slopes
        _, self.t0, self.t1 = point
        self.found: list[PyTree] = []
        # By the weight of a slope in its own equation, of which there are one or two.
        self.known: dict[float, Callable[[PyTree, PyTree], PyTree]] = {}

    def lower(self, number: int):
        return () if number == 0 else self.tableau.a_lower[number - 1]

    def find(self, number: int, at):
        """Find the slope at a stage; where the stage is then, so far."""
        tableau = self.tableau
        node = tableau.c1 if number == 0 else tableau.c[number - 1]
        diagonal = tableau.a_diagonal
        weight = 0.0 if diagonal is None else float(diagonal[number])
        t = self.t1 if node == 1 else self.t0 + float(node) * (self.t1 - self.t0)
        slope = jtu.tree_map(lambda leaf: leaf[number], self.slopes)
        inputs = at, t, self.t0, self.t1
        if weight not in self.known:
            self.known[weight] = self._with_derivative(weight, slope, inputs)
        self.found.append(self.known[weight](slope, inputs))
        return _advance(at, [weight], self.found[-1:])

    def _with_derivative(self, weight: float, slope, inputs):
        def residual(slope, inputs):
            at, t, t0, t1 = inputs
            at = _advance(at, [weight], [slope])
            control = self.term.contr(t0, t1)
            return jtu.tree_map(
                jnp.subtract, slope, self.term.vf_prod(t, at, self.args, control)
            )

        return with_derivative(residual, slope, inputs)


class _UntilStill(optx.Newton):
    """Newton's method until its correction is small.

    `optimistix.Newton` also wants a small residual. In a stiff step that is the state
    times a large number, and its rounding alone may be above any tolerance.
    (`cauchy_termination=False`, as in `diffrax.VeryChord`, takes two corrections of the
    size of rounding for divergence, if the second happens to be the larger.)
    """

    def terminate(self, fn, y, args, options, state, tags):
        del fn, args, options, tags
        still = self.norm(state.diff) <= self.atol + self.rtol * self.norm(y)
        return still | (state.result != optx.RESULTS.successful), state.result


def _with_root_finder(method, y, dt):
    """The method with a root finder that goes as far as the state's dtype.

    The unknown of a stage is an increment of the state, or that divided by the length
    of the step. Close to an equilibrium it is as small as the rounding of the state, so
    the tolerance has to be relative to the state. Newton's method converges
    quadratically: a correction of eps**(2/3) leaves an error below eps.
    """
    y, dt = jax.lax.stop_gradient((y, dt))
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jtu.tree_leaves(y))
    tolerance = eps ** (2 / 3)
    size = optx.max_norm(y)
    size = size + float(jnp.finfo(size.dtype).tiny) ** 0.5
    if _solves_for_slopes(method):
        size = size / jnp.abs(dt).astype(size.dtype)
    return eqx.tree_at(
        lambda m: (m.root_finder, m.root_find_max_steps),
        method,
        # A fixed step cannot be rejected and tried again, so there is more patience.
        (_UntilStill(tolerance, tolerance * size), max(method.root_find_max_steps, 50)),
    )


def _solves_for_slopes(method) -> bool:
    """Whether the unknowns are values of the vector field, not increments."""
    if not isinstance(method, diffrax.AbstractRungeKutta):
        return False
    tableau = method.tableau
    several = isinstance(tableau, diffrax.MultiButcherTableau)
    return all(one.fsal for one in (tableau.tableaus if several else (tableau,)))


def _raise_on_failure(solution: Solution) -> Solution:
    """Raise for an implicit method, by the message that names its root finder."""
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


# What a user passes, checked ----------------------------------------------------------


def _is_term(x) -> bool:
    return isinstance(x, diffrax.AbstractTerm)


def _as_terms(terms):
    """Every plain function as an `ODETerm`."""

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
            "to estimate its error. Fixed steps have no use for the estimate: pass the "
            "solver itself, with twice as many `ts` for the same accuracy."
        )
    wanted, given = method.term_structure, _outline(terms)
    if _fits(wanted, terms):
        return
    raise ValueError(
        f"integrate: {type(method).__name__} takes terms of the form "
        f"{_outline(wanted)}, but `terms` is {given}. Likely causes: (a) an "
        "implicit-explicit method wants diffrax.MultiTerm(explicit, implicit), a "
        "symplectic one a tuple of two terms (or functions); (b) several terms were "
        "given to a method for one: join them as diffrax.MultiTerm(...)."
    )


def _fits(wanted, terms) -> bool:
    if isinstance(wanted, tuple):
        return (
            isinstance(terms, tuple)
            and len(terms) == len(wanted)
            and all(_fits(w, t) for w, t in zip(wanted, terms, strict=True))
        )
    return isinstance(terms, get_origin(wanted) or wanted)


def _outline(terms) -> str:
    """Terms by the names of their classes."""
    if isinstance(terms, tuple):
        return f"({', '.join(map(_outline, terms))})"
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
    # In the dtype that JAX will compute with, where they may be equal only then.
    ts = ts.astype(jnp.asarray(ts[:0]).dtype)
    if not _is_monotonic(np, ts, backwards):
        raise ValueError(f"{message} Given: {np.array2string(ts, threshold=8)}.")
    return jnp.asarray(ts)


def _is_monotonic(xp, ts, backwards: bool):
    monotonic = xp.all(ts[1:] > ts[:-1])
    return monotonic | xp.all(ts[1:] < ts[:-1]) if backwards else monotonic


def _promote(y0, time_dtype):
    """`y0` in the dtypes that `diffrax.diffeqsolve` would compute in."""
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
    """Evaluate the vector field once in the abstract, for a message that names it."""
    if not _is_term(terms):
        return  # each of several terms sees only a part of the state

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
        return  # the last stage, if that is the next one's first
    t = jax.ShapeDtypeStruct((), time_dtype)
    state = eqx.filter_eval_shape(
        lambda t0, t1, y: method.init(terms, t0, t1, y, args), t, t, y0
    )
    if jtu.tree_leaves(state):
        raise ValueError(
            f"integrate: {type(method).__name__} carries a state of its own from step "
            "to step, which its numbers depend on, so that a step is not a function of "
            "`y` alone. Use a one-step method: any Runge-Kutta method of diffrax, for "
            "instance diffrax.Heun() or diffrax.Tsit5(); or diffrax.diffeqsolve, which "
            "steps in sequence."
        )
