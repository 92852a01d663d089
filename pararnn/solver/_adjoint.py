r"""The derivative of a trajectory, at the trajectory.

Differentiating $h_t = f(h_{t-1}, x_t)$ gives a linear recurrence for the tangents,

    dh_t = J_t dh_{t-1} + b_t,   b_t = ∂f/∂x dx_t + ∂f/∂θ dθ,

with the exact Jacobian $J_t$ at the states returned, however the solver found them. Its
transpose, a linear recurrence backwards in time, is the gradient. Nothing
differentiates through Newton's iterations.

The recurrence is solved one window of time after the other. Within a window, everything
that is not serial is done at once: the cell is linearised at all steps together, so
that the gradient of the weights is one matrix product. Windows are rematerialised, so
the memory beside the states is that of one window. The serial part has two schedules:

- materialised: the J_t are formed (one JVP for each column of a block) and given to the
  scan engine;
- sweep: the linearised steps are applied one after the other.
"""

import functools as ft
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax

from .._checks import is_symbolic
from ..recurrence import (
    Recurrence,
    Structure,
    from_blocks,
    split_by_tangents,
    states_before,
    to_blocks,
    transition_factors,
)
from ..scan import (
    poison,
    shift,
    solve_recurrence,
    time_shards,
    vary,
)

Adjoint = Literal["auto", "parallel", "sweep"]
ADJOINTS = ("auto", "parallel", "sweep")


class Plan(NamedTuple):
    """How to solve for the tangents: `window` steps at a time."""

    materialise: bool
    window: int


def plan_adjoint(
    adjoint: Adjoint,
    structure: Structure,
    steps: int,
    sequences: int = 1,
    *,
    replays: bool = False,
) -> Plan:
    """Choose the schedule for a batch of sequences.

    The temporaries of a window should fit in cache and be few, so that the gradient
    needs about the memory of the states. On a CPU, windows of 2**10 to 2**14 numbers
    are equally fast, and 2**16 takes 20% more time. But each window adds to the
    gradient of all weights, which is cheap beside a product of at least 64 rows. Where
    wide products are replayed, windows of 512 rows are faster. Materialised Jacobians
    of one sequence are faster for blocks of up to 4, and slower from 32 on; for several
    sequences, only diagonal ones are faster (docs/devdocs/solver.md).

    **Raises:** `ValueError` for a sweep over time that is sharded across devices.
    """
    if time_shards(steps) > 1:
        if adjoint == "sweep":
            raise _cannot_sweep(
                "`adjoint` is 'sweep'", "Leave it out, or pass 'parallel'"
            )
        return Plan(True, steps)
    if adjoint == "parallel":
        return Plan(True, steps)
    if adjoint == "auto" and not is_symbolic(steps) and jax.default_backend() != "cpu":
        # Not measured yet. A serial step costs kernel launches there, so windows are
        # long, and Jacobians are formed unless they are large.
        return Plan(structure.size <= 64, _divisor(steps, max(16, steps // 8)))
    if is_symbolic(steps):
        return Plan(structure.size <= 4 and adjoint != "sweep", steps)
    numbers = max(1, structure.width * sequences)
    rows, least, parts = (512, 4, 8) if replays else (64, 8, 16)
    wanted = max(2**12 // numbers, rows // sequences)
    target = max(least, min(wanted, steps // parts))
    largest = 4 if sequences == 1 else 1
    formed = adjoint != "sweep" and structure.size <= largest
    return Plan(formed, _divisor(steps, target))


def _cannot_sweep(what: str, remedy: str) -> ValueError:
    return ValueError(
        f"solve: {what}, so the derivative is taken one step after the other, but time "
        'is sharded across devices (the mesh in context has an axis "time"), each of '
        f"which would wait for the one before. {remedy}, or differentiate under a mesh "
        'without an axis "time".'
    )


def _divisor(steps: int, target: int) -> int:
    """Return the largest divisor of `steps` near the target, or else the target."""
    target = min(steps, target)
    for candidate in range(target, target // 3, -1):
        if steps % candidate == 0:
            return candidate
    return target


def replace_nonfinite(parameters, inputs, h0, states):
    """Linearise elsewhere at steps that are lost.

    A step is lost if it starts from or leads to a state that is not finite. With
    resets, other states may not depend on it. Then its Jacobian is multiplied by zero,
    and the product has to be zero. So a lost step becomes the first step of a sequence,
    with the inputs of a step that is not lost. `poison` marks whatever depends on it.

    **Returns:** (parameters, inputs, h0, states), and which steps are lost, bool `[T]`,
    or `None` without resets.
    """
    leaves, reset = inputs
    if reset is None:
        return (parameters, inputs, h0, states), None
    before, after = (
        ft.reduce(jnp.logical_or, map(_has_nonfinite, group))
        for group in (jtu.tree_map(lambda h: h[None], h0), states)
    )
    lost = after | (shift(before[0], after) & ~reset)
    found = jnp.argmin(lost)

    def replace(x):
        here = lost.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(here, lax.dynamic_index_in_dim(x, found), x)

    inputs = jtu.tree_map(replace, leaves), reset | lost
    return (parameters, inputs, h0, states), lost


def _has_nonfinite(states):
    return ~jnp.all(jnp.isfinite(states.reshape(len(states), -1)), axis=1)


def solve_tangents(
    recurrence: Recurrence, plan: Plan | None, structure, primals, tangents, lost=None
):
    """Solve for the tangents of the states, leaves `[T, ...]`.

    `primals` are (parameters, inputs, h0, states). `tangents` are those of the first
    three, `None` where there is none. Whatever depends on steps that are `lost` is NaN.
    """
    parameters, inputs, h0, states = primals
    t_parameters, t_inputs, t_h0 = tangents
    if plan is None:
        return _step_by_step(recurrence, primals, tangents, lost)
    start = recurrence.ravel(
        [jnp.zeros_like(h) if t is None else t for h, t in zip(h0, t_h0, strict=True)]
    )
    steps, length = states[0].shape[0], plan.window
    count = steps // length

    def solve_window(d, before, parameters, inputs, tangents, lost):
        terms = _driving_terms(recurrence, before, (parameters, inputs), tangents)
        if lost is not None:
            terms = poison(terms, jnp.broadcast_to(lost[:, None], terms.shape))
        serial = _materialised if plan.materialise else _swept
        vectors = serial(recurrence, structure, parameters, before, inputs, d, terms)
        return vectors[-1], jax.vmap(recurrence.unravel)(vectors)

    if length == steps:

        @jax.checkpoint
        def whole_sequence(d, known, tangents):
            parameters, inputs, h0, states, lost = known
            before = states_before(h0, states)
            return solve_window(d, before, parameters, inputs, tangents, lost)[1]

        known = (parameters, inputs, h0, states, lost)
        return whole_sequence(start, known, (t_parameters, t_inputs))

    def window(d, index, length, t_inputs, known, t_parameters):
        parameters, inputs, h0, states, lost = known
        first = index * plan.window
        at = ft.partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=length)
        before = _states_before_window(h0, states, first, length)
        inputs, lost = jtu.tree_map(at, (inputs, lost))
        return solve_window(
            d, before, parameters, inputs, (t_parameters, t_inputs), lost
        )

    # The window slices `known` itself. If `known` were scanned over, `vmap` would copy
    # all of it, as it puts the batch between the windows and their steps.
    known = (parameters, inputs, h0, states, lost)

    def body(d, at_window):
        index, t_inputs = at_window
        run = jax.checkpoint(window, prevent_cse=False, static_argnums=(2,))
        return run(d, index, length, t_inputs, known, t_parameters)

    def whole(x):
        return x[: count * length].reshape(count, length, *x.shape[1:])

    d, out = lax.scan(body, start, (jnp.arange(count), jtu.tree_map(whole, t_inputs)))
    out = tuple(o.reshape(count * length, *o.shape[2:]) for o in out)
    rest = steps - count * length
    if rest:
        t_rest = jtu.tree_map(lambda x: x[count * length :], t_inputs)
        run = jax.checkpoint(window, static_argnums=(2,))
        _, tail = run(d, jnp.asarray(count), rest, t_rest, known, t_parameters)
        out = tuple(jnp.concatenate(pair) for pair in zip(out, tail, strict=True))
    return out


def _states_before_window(h0, states, first, length: int):
    """Return the states before the steps `first, ..., first + length - 1`."""

    def one(h0, states):
        previous = lax.dynamic_index_in_dim(
            states, jnp.maximum(first - 1, 0), keepdims=False
        )
        previous = jnp.where(first == 0, h0, previous)
        rest = lax.dynamic_slice_in_dim(states, first, length - 1)
        return jnp.concatenate([previous[None], rest])

    return tuple(one(*pair) for pair in zip(h0, states, strict=True))


def _driving_terms(recurrence: Recurrence, before, primals, tangents):
    """Compute `b_t` at all steps of the window at once, `[steps, width]`."""
    moved, held = split_by_tangents(primals, tangents)
    if not jtu.tree_leaves(moved):
        none = jnp.zeros((before[0].shape[0], recurrence.width), recurrence.dtype)
        return vary(none, before)

    def at_all_steps(moved):
        parameters, inputs = eqx.combine(held, moved)
        step = jax.vmap(recurrence.step, in_axes=(None, 0, 0))
        return jax.vmap(recurrence.ravel)(step(parameters, before, inputs))

    return jax.jvp(at_all_steps, (moved,), (tangents,))[1]


def _materialised(recurrence, structure, parameters, before, inputs, d, terms):
    seeds = vary(jnp.asarray(structure.seeds, recurrence.dtype), before)

    def columns(h, x):
        def step(v):
            return recurrence.vector_step(parameters, v, x)

        _, push = jax.linearize(step, recurrence.ravel(h))
        return jax.vmap(push)(seeds)

    tangents = jax.vmap(columns, out_axes=1)(before, inputs)
    reset = inputs[1]
    kind, factors = transition_factors(structure, tangents)
    if reset is not None:
        reset = reset.reshape(-1, *(1,) * (factors.ndim - 1))
        factors = jnp.where(reset, 0, factors)
    x = solve_recurrence(
        kind,
        factors,
        to_blocks(structure, terms),
        to_blocks(structure, d),
        reset,
    )
    return from_blocks(structure, x)


def _swept(recurrence, structure, parameters, before, inputs, d, terms):
    del structure

    def residuals(h, x):
        """Return the residuals of the linearised step, as leaves."""

        def step(v):
            return recurrence.vector_step(parameters, v, x)

        _, push = jax.linearize(step, recurrence.ravel(h))
        leaves, tree = jtu.tree_flatten(push)
        residuals.tree = tree
        return leaves

    # A weight matrix is a residual too. Only residuals that change get a time axis.
    varies = _depends_on_arguments(
        residuals, jtu.tree_map(lambda v: v[0], (before, inputs))
    )
    stacked = jax.vmap(residuals, out_axes=[0 if v else None for v in varies])(
        before, inputs
    )
    fixed = [None if v else leaf for v, leaf in zip(varies, stacked, strict=True)]
    moving = [leaf if v else None for v, leaf in zip(varies, stacked, strict=True)]
    reset = inputs[1]

    def step(d, at_t):
        moving, term, reset_t = at_t
        push = jtu.tree_unflatten(residuals.tree, eqx.combine(moving, fixed))
        ahead = push(d)
        if reset_t is not None:
            ahead = jnp.where(reset_t, 0, ahead)
        d = ahead + term
        return d, d

    return lax.scan(step, d, (moving, terms, reset))[1]


def _depends_on_arguments(fn, args) -> list[bool]:
    """Return which outputs depend on the arguments, not only on the closure."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    dependent = set(jaxpr.invars)
    for eqn in jaxpr.eqns:
        if any(v in dependent for v in eqn.invars if isinstance(v, jex.core.Var)):
            dependent.update(eqn.outvars)
    return [
        v in dependent if isinstance(v, jex.core.Var) else False for v in jaxpr.outvars
    ]


def _step_by_step(recurrence: Recurrence, primals, tangents, lost):
    """Solve the recurrence of the tangents by one JVP of the cell at each step.

    Transposed, this is one reverse sweep of per-step VJPs. It is the only schedule for
    a cell with a `custom_vjp` function, whose step can be transposed but not batched
    over columns of a Jacobian; and for cells that must be evaluated one step at a time.
    """
    parameters, inputs, h0, states = primals
    t_parameters, t_inputs, t_h0 = tangents
    if time_shards(states[0].shape[0]) > 1:
        raise _cannot_sweep(
            "the cell contains a function with `custom_vjp`, which has no JVP",
            "Write the function without it, or with `custom_jvp`",
        )
    start = tuple(
        jnp.zeros_like(h) if t is None else t for h, t in zip(h0, t_h0, strict=True)
    )

    def step(d, at_t):
        h, x, t_x, lost = at_t
        primals, tangents = (parameters, h, x), (t_parameters, d, t_x)
        moved, held = split_by_tangents(primals, tangents)

        def moved_step(moved):
            return recurrence.step(*eqx.combine(held, moved))

        _, d = jax.jvp(moved_step, (moved,), (tangents,))
        if lost is not None:
            d = tuple(poison(t, jnp.broadcast_to(lost, t.shape)) for t in d)
        return d, d

    rematerialised = jax.checkpoint(step, prevent_cse=False)
    xs = states_before(h0, states), inputs, t_inputs, lost
    return lax.scan(rematerialised, start, xs)[1]
