"""`solve`: check, bind, run, certify, differentiate."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, PyTree

from .._adapters import as_step
from .._checks import is_count
from ..recurrence import (
    MAX_RECOMPUTED,
    Recurrence,
    Replay,
    Structure,
    check_like,
    check_resets,
    count_sequences,
    count_steps,
    declared_structure,
    find_replay,
    find_structure,
    make_recurrence,
    merge_products,
    must_sweep,
    needs_loop,
    precompute_unbatchable,
    split_step,
    why_stepped,
)
from ..scan import refuse_explicit, time_shards, vary
from ._adjoint import (
    ADJOINTS,
    Adjoint,
    plan_adjoint,
    replace_nonfinite,
    solve_tangents,
)
from ._failure import Outcome, as_result, attach_check, check_batch, find_outcome
from ._problem import BoundProblem
from ._sequential import AbstractSolver, GivenStates, Sequential, record
from ._solution import RESULTS, Solution, Stats
from ._solvers import Auto, check_solver

# A trajectory, a name, or a function of (xs, h0); see `solve`.
Guess = PyTree | str | Callable[[PyTree, PyTree], PyTree] | None


def solve(
    f: Callable[[PyTree, PyTree], PyTree],
    xs: PyTree,
    h0: PyTree,
    *,
    solver: AbstractSolver = Auto(),
    reset: Bool[Array, " T"] | None = None,
    reset_state: PyTree | None = None,
    initial_guess: Guess = None,
    max_steps: int | None = None,
    structure: Structure | str | None = None,
    adjoint: Adjoint = "auto",
    throw: bool = True,
) -> Solution:
    r"""Solve $h_t = f(h_{t-1}, x_t)$ for all states, in parallel when that is faster.

    The solution is differentiable, in forward and reverse mode and to any order, with
    respect to `xs`, `h0`, `reset_state` and everything that `f` closes over. The
    derivative is taken at the solution with the exact Jacobian, never through the
    solver's iterations. `vmap` over any of them becomes a batch axis of one solve, in
    which sequences that have converged stay as they are. Under a mesh with an axis
    `"time"` (see [`pararnn.make_mesh`][]) each device solves its own shard of time.

    **Arguments:**

    - `f`: the cell, `f(h, x) -> h`; any function or module. `equinox.nn.GRUCell`,
        `LSTMCell` and Flax NNX cells are recognised.
    - `xs`: inputs, a pytree with leaves `[T, ...]`, unbatched.
    - `h0`: initial state, a pytree of floating-point or complex arrays.
    - `solver`: [`pararnn.Auto`][], the default; a method, such as
        [`pararnn.Newton`][]; a [`pararnn.Ladder`][] of several methods;
        [`pararnn.Windows`][], which solve one window of time after the other;
        [`pararnn.Sequential`][]; or an [`pararnn.AbstractSolver`][] of your own.
    - `reset`: bool `[T]`; where true, step t starts from `reset_state` instead of the
        previous state. States after a reset have the derivatives of their sequence
        alone, even if (with `throw=False`) states before it are not finite. The
        derivative of a state that is not finite is NaN.
    - `reset_state`: like `h0`. Defaults to zeros.
    - `initial_guess`: where a method starts from. It is a trajectory like the states
        (in training, those of the last training step are a warm start); a function of
        `(xs, h0)` that returns a trajectory or `None`; `"cell"` for $f(0, x_t)$;
        `"h0"`; or `"zeros"`. `None` takes 3 to 64 steps from `h0` with the inputs just
        before each segment. Only speed depends on the guess: the states and their
        derivatives do not. Entries that are not finite are replaced by those of `h0`.
    - `max_steps`: the limit on the steps of a method. Defaults to the number of
        segments, after which the answer is exact except for rounding (to some more for
        a [`pararnn.Implicit`][], see there). `Auto` and `Ladder` have limits of their
        own by default.
    - `structure`: a claim about `∂f/∂h`, `"diagonal"`, `"dense"` or a
        [`pararnn.Structure`][]; it is checked. Defaults to the structure found in the
        cell.
    - `adjoint`: how derivatives are solved: `"parallel"` (all Jacobians formed at
        once), `"sweep"` (one reverse pass of the linearised steps), or `"auto"`.
        All are exact; they differ in time and memory.
    - `throw`: whether to raise if the solve fails. `Solution.result` says how it ended.

    **Returns:** a [`pararnn.Solution`][].

    **Raises:** `ValueError` or `TypeError` while tracing if the cell, the shapes or the
    dtypes do not fit, or if devices share time and the solver or the adjoint can only
    step. With `throw=True`, a runtime error if the states are not finite or the solver
    does not converge.
    """
    _check_options(solver, adjoint, max_steps)
    joint = max_steps is None and solver.use_joint_newton
    recurrence = make_recurrence("solve", f, xs, h0, refine=joint)
    h0 = vary(jtu.tree_map(jnp.asarray, h0), recurrence.state_leaves)
    steps = count_steps("solve", xs)
    solver.check("solve", steps)
    fresh = check_resets("solve", recurrence, reset, reset_state, steps)
    guess = _make_guess(initial_guess, f, xs, h0, recurrence, steps)
    x_leaves = tuple(jnp.asarray(leaf) for leaf in jtu.tree_leaves(xs))
    if steps:
        recurrence, x_leaves = precompute_unbatchable(recurrence, x_leaves)
        recurrence = merge_products(recurrence)
    if structure is not None:
        structure = declared_structure(structure, recurrence)
    used = _solver_for(recurrence, solver, steps)

    @ft.cache
    def known_structure() -> Structure:
        return structure or find_structure(recurrence)

    fresh = vary(fresh, recurrence.state_leaves)
    problem = BoundProblem(
        recurrence,
        parameters=(recurrence.take_constants(), fresh),
        inputs=(x_leaves, None if reset is None else jnp.asarray(reset)),
        h0=tuple(jtu.tree_leaves(h0)),
        find_structure=known_structure,
        split=split_step(recurrence),
    )
    options = _Options(used, adjoint, max_steps, throw)
    if not steps:
        return _empty_solution(problem, solver)
    if _is_coupled_loop(problem, options):
        states, outcome = _step_coupled(problem, options)
    else:
        axis_indices = _axis_indices(recurrence)
        states, _, outcome = _evaluate(problem, guess, axis_indices, options=options)
    stats = outcome.stats.as_dict()
    tree = jtu.tree_unflatten(recurrence.state_tree, states)
    return Solution(tree, as_result(outcome.code), stats, repr(solver))


class _Options(NamedTuple):
    """How to solve a problem.

    With `replay`, the loop also returns the values that the derivative replays.
    """

    solver: AbstractSolver
    adjoint: Adjoint
    max_steps: int | None
    throw: bool
    replay: Replay | None = None


@eqx.filter_custom_jvp
def _evaluate(problem: BoundProblem, guess, axis_indices, *, options: _Options):
    """Return the states, by leaf, the values to replay, and how the solve ended."""
    run = _batched_run(options, problem.without_arrays())
    return run(problem.arrays, guess, axis_indices)


@_evaluate.def_jvp
def _(primals, tangents, *, options: _Options):
    """Take the derivative at the solution, not through the solver's iterations."""
    (problem, guess, axis_indices), (t_problem, _, _) = primals, tangents
    recurrence, plan, structure = problem.recurrence.for_derivative, None, None
    again = options
    try:
        if not must_sweep("solve", recurrence):
            structure = problem.find_structure()
            sequences = count_sequences(problem.arrays)
            again = _recording(problem, options, sequences)
            plan = plan_adjoint(
                options.adjoint,
                structure,
                problem.steps,
                sequences,
                replays=again.replay is not None,
            )
        states, values, outcome = _evaluate(problem, guess, axis_indices, options=again)
        known, moved = (*problem.arrays, states), t_problem.arrays
        if again.replay is not None:
            recurrence = again.replay.replayed
            known = _with_inputs(known, values)
            moved = _with_inputs(moved, (None,) * len(values))
        # With `throw`, states that are not finite raise: they need no derivative.
        lost = None
        if not options.throw:
            known, lost = replace_nonfinite(*known)
        t_states = solve_tangents(recurrence, plan, structure, known, moved, lost)
    except NameError as error:
        if recurrence.coupled_along:
            raise _axis_not_in_scope(recurrence, error) from error
        raise
    if options.replay is None:
        values, t_values = (), ()
    else:
        known, moved = (*problem.arrays, states), (*t_problem.arrays, t_states)
        t_values = options.replay.tangents(known, moved)
    none = jtu.tree_map(lambda _: None, outcome)
    return (states, values, outcome), (t_states, t_values, none)


def _with_inputs(arrays: tuple, more: tuple) -> tuple:
    """Return a problem's arrays, or their tangents, with more leaves of its inputs."""
    parameters, (leaves, reset), *rest = arrays
    return parameters, ((*leaves, *more), reset), *rest


def _batched_run(options: _Options, unbound: BoundProblem) -> Callable:
    """Return the solve of a problem's arrays, as a function with its own `vmap` rule.

    Each `vmap` adds a batch axis to the problem, so that one loop serves all sequences.
    Under JAX's own rules a `cond` would always run the fallback too, and every loop
    would select for each sequence.
    """

    @custom_vmap
    @jax.jit  # outside of `jit`, a call would otherwise run operation by operation
    def run(arrays, guess, axis_indices):
        # The rest of the problem is not an argument: JAX keeps the trees of those.
        problem = unbound.with_arrays(arrays)
        if options.replay is None:
            values = ()
            states, stats = options.solver.run(problem, guess, options.max_steps)
            states = tuple(jnp.moveaxis(s, 0, problem.rank) for s in states)
        else:
            states, values, stats = record(problem, options.replay)
        throw = options.throw and not problem.axes
        outcome, checked = find_outcome(problem, stats, throw=throw)
        if throw:
            states = attach_check(states, checked, time_axis=0)
        return states, values, _with_check(outcome, checked, problem.batch_shape)

    @run.def_vmap
    def _(size, batched, *given):
        marks = zip(jtu.tree_leaves(given), jtu.tree_leaves(batched), strict=True)
        refuse_explicit("solve", [x for x, b in marks if b])
        deeper, arguments = _with_axis(size, batched, unbound, *given)
        states, values, outcome = _batched_run(options, deeper)(*arguments)
        if options.throw:  # one check for the whole batch
            checked = check_batch(states, outcome.code)
            states = attach_check(states, checked, time_axis=deeper.rank)
            outcome = _with_check(outcome, checked, (size,))
        out = states, values, outcome
        return out, jtu.tree_map(lambda _: True, out)

    def _with_check(outcome: Outcome, checked, shape):
        # Only `_step_coupled`, which computes the states itself, needs the check.
        kept = isinstance(options.solver, GivenStates)
        checked = jnp.broadcast_to(checked, shape) if kept else None
        return outcome._replace(checked=checked)

    return run


def _recording(problem: BoundProblem, options: _Options, sequences: int) -> _Options:
    """Let the loop return what the derivative replays, where the loop is what runs."""
    if options.replay is not None or problem.recurrence.coupled_along:
        return options
    channels = problem.recurrence.width * sequences
    if channels <= MAX_RECOMPUTED or time_shards(problem.steps) > 1:
        return options
    solver = options.solver.choose(problem, channels)
    if not isinstance(solver, Sequential):
        return options
    return options._replace(replay=find_replay(problem.recurrence))


def _with_axis(size: int, batched, unbound: BoundProblem, arrays, guess, axis_indices):
    """Return the problem of a batch, with one more axis, and its arguments.

    The cell may communicate along the axis, but a `vmap` rule is not told its name.
    `axis_indices` tells it: the index along a named axis is batched by the `vmap` of
    that axis, and by no other.
    """

    def everywhere(x, b):
        return x if b else jnp.broadcast_to(x, (size, *x.shape))

    def after_time(x, b):
        return jnp.moveaxis(x, 0, 1) if b else x

    in_arrays, in_guess, in_indices = batched
    here = [name for name, along in in_indices.items() if along]
    axes = jtu.tree_map(lambda b: 0 if b else None, tuple(in_arrays[:2]))
    deeper = unbound.under(axes[0], axes[1], here[0] if here else None)
    parameters, inputs, h0 = arrays
    inputs = jtu.tree_map(after_time, inputs, in_arrays[1])
    h0 = jtu.tree_map(everywhere, h0, in_arrays[2])
    guess = jtu.tree_map(
        lambda x, b: after_time(everywhere(x, b), True), guess, in_guess
    )
    outer = {name: at for name, at in axis_indices.items() if name not in here}
    return deeper, ((parameters, inputs, h0), guess, outer)


def _axis_indices(recurrence: Recurrence) -> dict[Any, Array]:
    """Return this sequence's index along each axis that the cell communicates along."""
    return {name: jax.lax.axis_index(name) for name in recurrence.coupled_along}


def _is_coupled_loop(problem: BoundProblem, options: _Options) -> bool:
    coupled = bool(problem.recurrence.coupled_along)
    return coupled and options.solver.only_steps(problem.steps)


def _step_coupled(problem: BoundProblem, options: _Options):
    """Run the loop for sequences that communicate, and let JAX differentiate it.

    A derivative rule does not work here: JAX may evaluate it where the axes no longer
    have names, as in `jax.grad` of `jax.jit` of `jax.vmap` (jax 0.10.2).
    """

    def step(h, x):
        h = problem.step(h, x)
        return h, h

    states = jax.lax.scan(step, problem.h0, problem.inputs)[1]
    fixed, found = jax.lax.stop_gradient((problem, states))
    given = options._replace(solver=GivenStates(options.solver.residuals_kept))
    axis_indices = _axis_indices(problem.recurrence)
    _, _, outcome = _evaluate(fixed, found, axis_indices, options=given)
    if options.throw:
        good = outcome.checked == 0
        states = tuple(jnp.where(good, s, jnp.nan) for s in states)
    return states, outcome


def _axis_not_in_scope(recurrence: Recurrence, error: NameError) -> NameError:
    axes = ", ".join(map(repr, recurrence.coupled_along))
    return NameError(
        f"solve: the cell communicates along the axis {axes}, but is differentiated "
        "outside the `vmap` that names it, as by `jax.grad(jax.jit(jax.vmap(...)))`, "
        "where JAX no longer knows the axis. "
        "Differentiate within the `jit`, `jax.jit(jax.grad(jax.vmap(...)))`, or "
        f"pass pararnn.Sequential() or pararnn.Auto(). JAX said: {error}"
    )


def _check_options(solver: Any, adjoint: Any, max_steps: Any) -> None:
    check_solver("solve", solver)
    if adjoint not in ADJOINTS:
        raise ValueError(
            f"solve: unknown adjoint {adjoint!r}; there are {', '.join(ADJOINTS)}."
        )
    if max_steps is not None and not is_count(max_steps, 1):
        raise ValueError(
            f"solve: `max_steps` is {max_steps!r}; expected a whole number >= 1, or "
            "None for the number that always suffices."
        )


def _solver_for(
    recurrence: Recurrence, solver: AbstractSolver, steps: int
) -> AbstractSolver:
    """Return the solver, or the loop instead of `Auto` for a cell better stepped.

    **Raises:** `ValueError` if only the loop works for the cell and another solver is
    asked for, or if devices share time.
    """
    reason = why_stepped(recurrence)
    if reason is None:
        return solver
    if time_shards(steps) > 1:
        raise ValueError(
            f"solve: {reason}. So it is solved by the sequential loop, but time is "
            'sharded across devices (the mesh in context has an axis "time"), each of '
            'which would wait for the one before. Use a mesh without an axis "time".'
        )
    solver = solver.for_stepping()
    if needs_loop(recurrence) and not solver.only_steps(steps):
        raise ValueError(
            f"solve: `solver` is {solver!r:.80}, which takes many steps at once, but "
            f"{reason}. Or pass pararnn.Sequential() or pararnn.Auto(), which step "
            "through such a cell."
        )
    return solver


def _make_guess(
    guess: Guess,
    f: Callable,
    xs: PyTree,
    h0: PyTree,
    recurrence: Recurrence,
    steps: int,
):
    """Return the leaves of the initial guess, or `None` for that of the method."""
    leaves = [
        jax.ShapeDtypeStruct((steps, *s.shape), s.dtype)
        for s in recurrence.state_leaves
    ]
    like = jtu.tree_unflatten(recurrence.state_tree, leaves)
    if isinstance(guess, str):
        guess = _guess_by_name(guess, f, xs, h0, like)
    elif callable(guess):
        guess = guess(xs, h0)
    if guess is None:
        return None
    check_like("solve", "initial_guess", guess, like, "a state for each step, [T, ...]")
    # The answer does not depend on where a method started.
    return tuple(jax.lax.stop_gradient(leaf) for leaf in jtu.tree_leaves(guess))


def _guess_by_name(name: str, f: Callable, xs, h0, like) -> PyTree:
    if name == "zeros":
        return jtu.tree_map(lambda s: jnp.zeros(s.shape, s.dtype), like)
    if name == "h0":
        return jtu.tree_map(lambda h, s: jnp.broadcast_to(h, s.shape), h0, like)
    if name == "cell":
        zero = jtu.tree_map(jnp.zeros_like, h0)
        return jax.vmap(as_step(f), in_axes=(None, 0))(zero, xs)
    raise ValueError(
        f"solve: unknown `initial_guess` {name!r}; there are 'cell', which is "
        "f(0, x) at each step, 'h0', 'zeros', a trajectory like the states, a function "
        "of (xs, h0) that returns one or None, and None."
    )


def _empty_solution(problem: BoundProblem, solver: AbstractSolver) -> Solution:
    leaves = [
        jnp.zeros((0, *s.shape), s.dtype) for s in problem.recurrence.state_leaves
    ]
    states = jtu.tree_unflatten(problem.recurrence.state_tree, leaves)
    stats = Stats.exact(problem, 0).padded(solver.residuals_kept).as_dict()
    return Solution(states, RESULTS.successful, stats, repr(solver))
