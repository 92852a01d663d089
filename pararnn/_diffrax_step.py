"""One fixed step of a diffrax solver, explicit or implicit, as a cell."""

import functools as ft
from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, PyTree

from ._equation import attach_derivative

# Maps a state, any pytree, to the next one, given the times (t0, t1).
Step = Callable[[PyTree, tuple[Array, Array]], PyTree]


def step_as_cell(method, terms, args) -> Step:
    """Return one step of the method as a function of the state and (t0, t1)."""
    if _is_plain_explicit(method):
        return _unrolled_step(method.tableau, terms, args)
    if isinstance(method, diffrax.AbstractImplicitSolver):
        return _as_implicit_cell(method, terms, args)
    # Equinox's other kinds of loop lack forward or reverse mode.
    method = _with_loop(method, "bounded")
    return lambda y, times: _step(method, terms, args, y, *times)[0]


def _step(method, terms, args, y, t0, t1):
    """Take one step by diffrax; return the state, its details, and the result."""
    # Initialised at each step: reusing the last stage would only save an evaluation.
    state = method.init(terms, t0, t1, y, args)
    y, _, details, _, result = method.step(terms, t0, t1, y, args, state, False)
    return y, details, result


def _with_loop(method, kind: str):
    """Return the method with this kind of loop over its stages, unless it has one."""
    if getattr(method, "scan_kind", "") is not None:
        return method
    return eqx.tree_at(lambda m: m.scan_kind, method, kind, is_leaf=lambda x: x is None)


def _is_plain_explicit(method) -> bool:
    """Return whether the step is the plain explicit Runge-Kutta formula."""
    return (
        isinstance(method, diffrax.AbstractERK)
        and isinstance(method.tableau, diffrax.ButcherTableau)
        and type(method).step is diffrax.AbstractERK.step
    )


def _unrolled_step(tableau: diffrax.ButcherTableau, terms, args) -> Step:
    """Return an explicit Runge-Kutta step with its stages unrolled.

    diffrax loops over the stages, with all of them in one buffer. Unrolled, a step of
    Tsit5 on two numbers is 25 times faster inside `lax.scan` on a CPU (0.18 instead of
    4.4 ms for 2048 steps). A stage that only the next step or an error estimate needs
    is left out, and the program still shows which states are independent.
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
            at = _add_increments(y, row, stages)
            stages.append(terms.vf_prod(t, at, args, control))
        return _add_increments(y, tableau.b_sol, stages)

    return step


def _add_increments(y, weights, stages):
    """Return `y + Σ w_j k_j`, over the nonzero weights."""
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
    """Return a step whose stages diffrax finds, but does not differentiate.

    diffrax's derivative of a step solves linear systems, which raise on numbers that
    are not finite. This cannot be turned off. Newton's method over the steps meets such
    numbers on its way, and so does the derivative of a failed solution. So the
    derivative of the stages is taken here. A failed step is NaN, and so is its
    derivative.
    """
    stepped = type(method).step
    if stepped is diffrax.ImplicitEuler.step:
        restore = ft.partial(_attach_euler_derivative, terms, args)
    elif stepped is diffrax.AbstractRungeKutta.step:
        restore = ft.partial(_attach_stage_derivatives, method.tableau, terms, args)
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
            # Converted to data, to reach the arrays that functions close over.
            constant = eqx.filter_closure_convert(find, *point)
            constant, held = _without_derivative((constant, point))
            y, slopes, found = constant(*held)
            y = restore(point, y, slopes)

        def mark(leaf):
            # A factor, since `jnp.where` would leave the derivative finite.
            return leaf * jnp.where(found, jnp.ones((), leaf.dtype), jnp.nan)

        return jtu.tree_map(mark, y)

    return step


def _without_derivative(tree):
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.lax.stop_gradient(arrays), rest)


def _attach_euler_derivative(terms, args, point, after, slopes):
    """Return the state after an implicit Euler step, with its derivative."""
    del slopes

    def residual(after, point):
        y, t0, t1 = point
        change = terms.vf_prod(t1, after, args, terms.contr(t0, t1))
        return jtu.tree_map(lambda z, y, k: z - y - k, after, y, change)

    return attach_derivative(residual, after, point)(after, point)


def _attach_stage_derivatives(tableau, terms, args, point, after, slopes):
    """Return the state after a Runge-Kutta step, with its derivative.

    The slopes are known. Each is the solution of an equation whose inputs are the
    slopes before it. With several tableaus, an implicit one and explicit ones, each has
    its own slope at a stage, at the same state.
    """
    del after
    if not isinstance(tableau, diffrax.MultiButcherTableau):
        tableaus, terms, slopes = (tableau,), (terms,), (slopes,)
    else:
        tableaus, terms = tableau.tableaus, terms.terms
    y = point[0]
    stages = [
        _StageSlopes(*part, args, point)
        for part in zip(tableaus, terms, slopes, strict=True)
    ]
    for number in range(tableaus[0].num_stages):
        at = y
        for stage in stages:
            at = _add_increments(at, stage.lower(number), stage.found)
        # The explicit tableaus start from the state that the implicit one has found.
        for stage in sorted(stages, key=lambda s: not s.tableau.implicit):
            at = stage.find(number, at)
    for stage in stages:
        y = _add_increments(y, stage.tableau.b_sol, stage.found)
    return y


class _StageSlopes:
    """The slopes of one tableau and its term, found one after the other."""

    def __init__(self, tableau: diffrax.ButcherTableau, term, slopes, args, point):
        self.tableau, self.term, self.args, self.slopes = tableau, term, args, slopes
        _, self.t0, self.t1 = point
        self.found: list[PyTree] = []
        # Keyed by the weight of a slope in its own equation; there are one or two.
        self.known: dict[float, Callable[[PyTree, PyTree], PyTree]] = {}

    def lower(self, number: int):
        return () if number == 0 else self.tableau.a_lower[number - 1]

    def find(self, number: int, at):
        """Find the slope at a stage; return the state of the stage with it."""
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
        return _add_increments(at, [weight], self.found[-1:])

    def _with_derivative(self, weight: float, slope, inputs):
        def residual(slope, inputs):
            at, t, t0, t1 = inputs
            at = _add_increments(at, [weight], [slope])
            control = self.term.contr(t0, t1)
            return jtu.tree_map(
                jnp.subtract, slope, self.term.vf_prod(t, at, self.args, control)
            )

        return attach_derivative(residual, slope, inputs)


class _NewtonByCorrection(optx.Newton):
    """Newton's method until its correction is small.

    `optimistix.Newton` also requires a small residual. In a stiff step the residual is
    the state times a large number, so its rounding alone may exceed any tolerance.
    (`cauchy_termination=False`, as in `diffrax.VeryChord`, may take two corrections of
    the size of rounding for divergence, if the second happens to be larger.)
    """

    def terminate(self, fn, y, args, options, state, tags):
        del fn, args, options, tags
        still = self.norm(state.diff) <= self.atol + self.rtol * self.norm(y)
        return still | (state.result != optx.RESULTS.successful), state.result


def _with_root_finder(method, y, dt):
    """Return the method with a root finder that converges to the state's rounding.

    The unknown of a stage is an increment of the state, or this divided by the length
    of the step. Near an equilibrium it is as small as the rounding of the state, so the
    tolerance has to be relative to the state. Newton's method converges quadratically:
    a correction of eps**(2/3) leaves an error below eps.
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
        # A fixed step cannot be rejected and tried again, so it gets more iterations.
        (
            _NewtonByCorrection(tolerance, tolerance * size),
            max(method.root_find_max_steps, 50),
        ),
    )


def _solves_for_slopes(method) -> bool:
    """Return whether the unknowns are values of the vector field, not increments."""
    if not isinstance(method, diffrax.AbstractRungeKutta):
        return False
    tableau = method.tableau
    several = isinstance(tableau, diffrax.MultiButcherTableau)
    return all(one.fsal for one in (tableau.tableaus if several else (tableau,)))
