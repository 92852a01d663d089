"""`solve`: a trajectory, its certificate and its derivative."""

import copy
import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, PyTree

from ..scan import refuse_explicit, time_shards, vary
from ._adapters import as_step
from ._adjoint import (
    ADJOINTS,
    Adjoint,
    plan_adjoint,
    replace_lost,
    solve_tangents,
)
from ._auto import Auto
from ._input_part import Division, InputPart, divide
from ._inputs import check_like, check_resets, count_steps, make_recurrence
from ._recurrence import Batch, Recurrence
from ._report import as_result, hold_back, raise_on_failure, report
from ._run import Run, Solver, history_of, solver_for
from ._sequential import Sequential
from ._solution import RESULTS, Solution
from ._stepwise import must_sweep, settle
from ._structure import Structure, declared_structure, find_structure
from ._windows import Windows, check_solver
from .methods import AbstractMethod, is_count

# A trajectory, a name, or a function of (xs, h0); see `solve`.
Guess = PyTree | str | Callable[[PyTree, PyTree], PyTree] | None


def solve(
    f: Callable[[PyTree, PyTree], PyTree],
    xs: PyTree,
    h0: PyTree,
    *,
    solver: Solver = Auto(),
    reset: Bool[Array, " T"] | None = None,
    reset_state: PyTree | None = None,
    initial_guess: Guess = None,
    max_steps: int | None = None,
    structure: Structure | str | None = None,
    adjoint: Adjoint = "auto",
    throw: bool = True,
) -> Solution:
    r"""All states of $h_t = f(h_{t-1}, x_t)$, in parallel over time where that pays.

    Differentiable, in forward and reverse mode and to any order, with respect to `xs`,
    `h0`, `reset_state` and everything that `f` closes over: the derivative is taken at
    the solution with the exact Jacobian, never through the solver's iterations. `vmap`
    over any of them becomes a batch axis of one solve, in which sequences that have
    converged stay as they are. Under a mesh with an axis `"time"` (see
    [`pararnn.make_mesh`][]) each device solves its own stretch of time.

    **Arguments:**

    - `f`: the cell, `f(h, x) -> h`; any function or module. `equinox.nn.GRUCell`,
        `LSTMCell` and Flax NNX cells are recognised.
    - `xs`: inputs, a pytree with leaves `[T, ...]`, unbatched.
    - `h0`: initial state, a pytree of floating-point or complex arrays.
    - `solver`: [`pararnn.Auto`][]; a method, such as [`pararnn.Newton`][]; several, as
        a [`pararnn.Ladder`][]; one window of time after the other,
        [`pararnn.Windows`][]; or [`pararnn.Sequential`][].
    - `reset`: bool `[T]`; where true, step t starts from `reset_state` in place of the
        previous state, whatever that was. States behind a reset have the derivatives of
        their sequence alone, also where (with `throw=False`) states before it are not
        finite; a derivative of such a state is NaN.
    - `reset_state`: like `h0`; zeros if not given.
    - `initial_guess`: where a method starts from: a trajectory like the states (in
        training, the states of the step before: a warm start), a function of `(xs, h0)`
        that returns one or `None`, `"cell"` for $f(0, x_t)$, `"h0"`, `"zeros"`, or
        `None` for steps from `h0`, 3 to 64, with the inputs just before each segment.
        Only speed depends on it, and no derivative. Where it is not finite, `h0` stands
        in.
    - `max_steps`: limit on the steps of a method. `None` is the number of segments,
        after which the answer is exact but for rounding (and some more for a
        [`pararnn.Implicit`][], see there); `Auto` and `Ladder` then take
        the few steps that they can afford.
    - `structure`: a claim about `∂f/∂h`, `"diagonal"`, `"dense"` or a
        [`pararnn.Structure`][]; it is checked. Found automatically if not given.
    - `adjoint`: how derivatives are solved: `"parallel"` (all Jacobians formed at
        once), `"sweep"` (one reverse pass of the linearised steps), or `"auto"`.
        All are exact; they differ in time and memory.
    - `throw`: raise if the solve fails; otherwise `Solution.result` reports it.

    **Returns:** a [`pararnn.Solution`][].

    **Raises:** `ValueError` or `TypeError` while tracing if the cell, the shapes or the
    dtypes do not fit, or if devices share time and a solver or adjoint that only steps
    is asked for; a runtime error if the states are not finite or the solver asked
    for does not converge (with `throw=True`).
    """
    where = "solve"
    _check_options(where, solver, adjoint, max_steps)
    refine = _may_go_jointly(solver, max_steps)
    recurrence = make_recurrence(where, f, xs, h0, refine=refine)
    h0 = vary(jtu.tree_map(jnp.asarray, h0), recurrence.state_leaves)
    steps = count_steps(where, xs)
    _check_windows(where, solver, steps)
    fresh = check_resets(where, recurrence, reset, reset_state, steps)
    guess = _make_guess(where, initial_guess, f, xs, h0, recurrence, steps)
    x_leaves = tuple(jnp.asarray(leaf) for leaf in jtu.tree_leaves(xs))
    if steps:
        recurrence, x_leaves = settle(recurrence, x_leaves)
    if structure is not None:
        structure = declared_structure(structure, recurrence)
    if steps == 0:
        return _empty(recurrence, solver)
    used = solver_for(where, recurrence, solver, steps)
    config = _Config(recurrence, used, structure, adjoint, max_steps, throw)
    fresh = vary(fresh, recurrence.state_leaves)
    primals = (
        (recurrence.release_constants(), fresh),
        (x_leaves, None if reset is None else jnp.asarray(reset)),
        tuple(jtu.tree_leaves(h0)),
    )
    places = {name: jax.lax.axis_index(name) for name in recurrence.coupled_along}
    evaluate = _step_coupled if config.is_coupled_loop else _evaluate
    leaves, stats = evaluate(primals, (guess, places), config=config)
    stats.pop("checked", None)
    result = as_result(stats.pop("code"))
    states = jtu.tree_unflatten(recurrence.state_tree, leaves)
    return Solution(states, result, stats, repr(solver))


class _Config:
    """What is known about a solve while tracing."""

    def __init__(self, recurrence, solver, structure, adjoint, max_steps, throw):
        self.recurrence: Recurrence = recurrence
        self.solver: Solver = solver
        self.adjoint: Adjoint = adjoint
        self.max_steps: int | None = max_steps
        self.throw: bool = throw
        self.differentiated = False
        self._declared = structure
        self.is_coupled_loop = isinstance(solver, Sequential) and bool(
            recurrence.coupled_along
        )

    def for_derivative(self) -> "_Config":
        """The same solve, as the primal of a derivative."""
        config = copy.copy(self)
        config.differentiated = True
        return config

    @ft.cached_property
    def structure(self) -> Structure:
        # Found when first needed: a sequential solve without gradient never is.
        return self._declared or find_structure(self.recurrence)

    @ft.cached_property
    def division(self) -> Division | None:
        return divide(self.recurrence)


@eqx.filter_custom_jvp
def _evaluate(primals, others, *, config: _Config):
    return _forward(config, Batch(config.recurrence), *primals, *others)


@_evaluate.def_jvp
def _(primals, tangents, *, config: _Config):
    try:
        return _with_tangents(config, primals, tangents)
    except NameError as error:
        axes = ", ".join(map(repr, config.recurrence.coupled_along))
        if not axes:
            raise
        raise NameError(
            f"solve: the cell communicates along the axis {axes}, and its derivative "
            "was asked for outside of the `vmap` that names it, as by "
            "`jax.grad(jax.jit(jax.vmap(...)))`, where JAX knows of the axis no more. "
            "Differentiate within the `jit`, `jax.jit(jax.grad(jax.vmap(...)))`, or "
            f"pass pararnn.Sequential() or pararnn.Auto(). JAX said: {error}"
        ) from error


def _with_tangents(config: _Config, primals, tangents):
    (arguments, others), (t_arguments, _) = primals, tangents
    states, stats = _evaluate(arguments, others, config=config.for_derivative())
    recurrence = config.recurrence
    if must_sweep("solve", recurrence):
        plan, structure = None, None
    else:
        structure = config.structure
        plan = plan_adjoint(config.adjoint, structure, states[0].shape[0])
    parameters, inputs, h0 = arguments
    known, lost = (parameters, inputs, h0, states), None
    # Where a state that is not finite raises, none has a derivative.
    if not config.throw:
        known, lost = replace_lost(parameters, inputs, h0, states)
    t_states = solve_tangents(recurrence, plan, structure, known, t_arguments, lost)
    return (states, stats), (t_states, jtu.tree_map(lambda _: None, stats))


def _step_coupled(primals, others, *, config: _Config):
    """The loop, of sequences that communicate along named axes, for JAX to derive.

    JAX evaluates the rule of a derivative where the axes have no names any more, as in
    `jax.grad` of `jax.jit` of `jax.vmap` (jax 0.10.2), so that there can be no rule.
    """
    (parameters, inputs, h0), (_, places) = primals, others

    def step(h, x):
        h = config.recurrence.step(parameters, h, x)
        return h, h

    states = jax.lax.scan(step, h0, inputs)[1]
    stop = jax.lax.stop_gradient
    arguments = stop(parameters), stop(inputs), stop(h0), stop(states), places
    _, stats = _forward(config, Batch(config.recurrence), *arguments)
    if config.throw:
        good = stats["checked"] == 0
        states = tuple(jnp.where(good, s, jnp.nan) for s in states)
    return states, stats


def _forward(config: _Config, batch: Batch, parameters, inputs, h0, guess, places):
    """Solve, natively batched: every `vmap` adds a level to `batch` and recurses.

    `vmap` of the solver's own loops would run the fallback always and all loops under
    per-sequence selection; as a batch axis, one loop serves all sequences. A rule is
    not told the name of its axis, along which the cell may communicate. `places` tells:
    the index along a named axis is batched by the `vmap` of this axis and by no other.
    """

    @custom_vmap
    @jax.jit  # a call outside of `jit` would otherwise run operation by operation
    def forward(parameters, inputs, h0, guess, places):
        del places
        return _solve_batch(config, batch, parameters, inputs, h0, guess)

    @forward.def_vmap
    def _(size, batched, *given):
        marks = zip(jtu.tree_leaves(given), jtu.tree_leaves(batched), strict=True)
        refuse_explicit("solve", [x for x, b in marks if b])
        parameters, inputs, h0, guess, places = given

        def axis(b):
            return 0 if b else None

        def behind_time(x, b):
            return jnp.moveaxis(x, 0, 1) if b else x

        def everywhere(x, b):
            return x if b else jnp.broadcast_to(x, (size, *x.shape))

        here = [name for name, along in batched[4].items() if along]
        places = {name: place for name, place in places.items() if name not in here}
        of_parameters, of_inputs = jtu.tree_map(axis, tuple(batched[:2]))
        name = here[0] if here else None
        deeper = batch.under(of_parameters, of_inputs, name)
        inputs = jtu.tree_map(behind_time, inputs, batched[1])
        h0 = jtu.tree_map(everywhere, h0, batched[2])
        guess = jtu.tree_map(
            lambda x, b: jnp.moveaxis(everywhere(x, b), 0, 1), guess, batched[3]
        )
        states, stats = _forward(config, deeper, parameters, inputs, h0, guess, places)
        states = tuple(jnp.moveaxis(s, 1, 0) for s in states)
        if config.throw:
            # Behind the transposition, whose result can be updated in place.
            states, checked = raise_on_failure(states, stats["code"], time_axis=1)
            if config.is_coupled_loop:
                stats["checked"] = jnp.broadcast_to(checked, (size,))
        out = states, stats
        return out, jtu.tree_map(lambda _: True, out)

    return forward(parameters, inputs, h0, guess, places)


def _solve_batch(config: _Config, batch: Batch, parameters, inputs, h0, guess):
    shape = h0[0].shape[: len(batch.levels)]
    part = None if config.division is None else InputPart(batch, config.division)
    run = Run(batch, parameters, lambda: config.structure, config.differentiated, part)
    if config.is_coupled_loop:
        states, stats = run.already_stepped(config.solver, guess)
    else:
        states, stats = run(config.solver, inputs, h0, guess, config.max_steps)
    throw = config.throw and not batch.levels
    arguments = parameters, inputs, h0
    stats, checked = report(batch, stats, states, arguments, shape, throw=throw)
    if throw:
        states = hold_back(states, checked, time_axis=0)
    if config.is_coupled_loop:
        stats["checked"] = jnp.broadcast_to(checked, shape)
    return states, stats


def _check_options(where: str, solver: Any, adjoint: Any, max_steps: Any) -> None:
    check_solver(where, solver)
    if adjoint not in ADJOINTS:
        raise ValueError(
            f"{where}: unknown adjoint {adjoint!r}; there are {', '.join(ADJOINTS)}."
        )
    if max_steps is not None and not (is_count(max_steps) and max_steps >= 1):
        raise ValueError(
            f"{where}: `max_steps` is {max_steps!r}; expected a whole number >= 1, or "
            "None for as many as can ever be needed."
        )


def _may_go_jointly(solver: Solver, max_steps: int | None) -> bool:
    """Whether a solve of an implicit cell has use for a round of the cell's iteration.

    Not one with a limit, which whole steps are to use, and no method that takes many
    steps: it takes still more of them jointly.
    """
    method = solver.solver if isinstance(solver, Windows) else solver
    quadratic = isinstance(method, AbstractMethod) and method.quadratic
    return max_steps is None and quadratic


def _check_windows(where: str, solver: Solver, steps: int) -> None:
    if isinstance(solver, Windows) and time_shards(steps) > 1:
        raise ValueError(
            f"{where}: `solver` is a `Windows`, which solves one stretch of time after "
            "the other, but time lies across devices (the mesh in context has an axis "
            '"time"), so that one of them would work at a time. Pass the solver of the '
            'windows itself, or use a mesh without an axis "time".'
        )


def _make_guess(
    where: str,
    guess: Guess,
    f: Callable,
    xs: PyTree,
    h0: PyTree,
    recurrence: Recurrence,
    steps: int,
):
    """The leaves of a trajectory to start from, or `None` for the methods' own."""
    like = jtu.tree_unflatten(
        recurrence.state_tree,
        [
            jax.ShapeDtypeStruct((steps, *s.shape), s.dtype)
            for s in recurrence.state_leaves
        ],
    )
    if guess is None:
        return None
    if isinstance(guess, str):
        guess = _guess_by_name(where, guess, f, xs, h0, like)
    elif callable(guess):
        guess = guess(xs, h0)
        if guess is None:
            return None
    check_like(where, "initial_guess", guess, like, "a state for each step, [T, ...]")
    # The answer does not depend on where a method started.
    return tuple(jax.lax.stop_gradient(leaf) for leaf in jtu.tree_leaves(guess))


def _guess_by_name(where: str, name: str, f: Callable, xs, h0, like) -> PyTree:
    if name == "zeros":
        return jtu.tree_map(lambda s: jnp.zeros(s.shape, s.dtype), like)
    if name == "h0":
        return jtu.tree_map(lambda h, s: jnp.broadcast_to(h, s.shape), h0, like)
    if name == "cell":
        zero = jtu.tree_map(jnp.zeros_like, h0)
        return jax.vmap(as_step(f), in_axes=(None, 0))(zero, xs)
    raise ValueError(
        f"{where}: unknown `initial_guess` {name!r}; there are 'cell', which is "
        "f(0, x) at each step, 'h0', 'zeros', a trajectory like the states, a function "
        "of (xs, h0) that returns one or None, and None."
    )


def _empty(recurrence: Recurrence, solver: Solver) -> Solution:
    states = [jnp.zeros((0, *s.shape), s.dtype) for s in recurrence.state_leaves]
    stats = {
        "num_steps": jnp.asarray(0, jnp.int32),
        "residual": jnp.asarray(0, recurrence.dtype),
        "certified_steps": jnp.asarray(0, jnp.int32),
        "sequential": jnp.asarray(True),
        "rung": jnp.asarray(0, jnp.int32),
        "nonfinite": jnp.asarray(0, jnp.int32),
        "first_nonfinite": jnp.asarray(0, jnp.int32),
    }
    if history := history_of(solver):
        stats["residual_history"] = jnp.full(history, jnp.nan, recurrence.dtype)
    tree = jtu.tree_unflatten(recurrence.state_tree, states)
    return Solution(tree, RESULTS.successful, stats, repr(solver))
