"""`linear_scan`: linear recurrences, with checks, batching and derivative."""

import functools as ft

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Inexact

from .._checks import check_bits, check_reset
from ._arithmetic import promote
from ._backends import Schedule, associative, chunked, sequential
from ._heuristics import BACKENDS, Backend, choose_backend
from ._mesh_axes import leave_to_xla, vary
from ._time_sharding import scan_shards, shift, time_shards
from ._transitions import AbstractTransition, Layout


def linear_scan(
    transition: AbstractTransition,
    inputs: Inexact[Array, "T *state"],
    initial: Inexact[Array, " *state"] | None = None,
    *,
    reverse: bool = False,
    reset: Bool[Array, " T"] | None = None,
    reset_state: Inexact[Array, " *state"] | None = None,
    backend: Backend = "auto",
) -> Inexact[Array, "T *state"]:
    r"""Return every state of $h_t = A_t h_{t-1} + b_t$.

    It can be differentiated to any order in the transition, the inputs and both states;
    `vmap` becomes a batch axis inside the scan. Under a mesh with an axis `"time"` (see
    [`pararnn.make_mesh`][]) each device scans its own shard of time.

    **Arguments:**

    - `transition`: $A_t$, as a [`pararnn.Diagonal`][], [`pararnn.Scalar`][],
        [`pararnn.BlockDiagonal`][] or [`pararnn.Dense`][], leaves `[T, ...]`, or
        `[1, ...]` if constant in time.
    - `inputs`: $b_t$, `[T, *state]`, real or complex.
    - `initial`: $h_0$, `[*state]`. Defaults to zeros.
    - `reverse`: run from the last step to the first,
        $h_t = A_t h_{t+1} + b_t$, where `initial` stands after the last step.
    - `reset`: bool `[T]`. Where true, step t (in the order of the scan) starts from
        `reset_state`, whatever came before, infinities and NaN too. Derivatives after a
        reset are those of these steps alone. Derivatives before it, and those in a
        constant transition, become NaN (0 * NaN) if something there is not finite, as
        in `lax.scan`.
    - `reset_state`: `[*state]`. Defaults to zeros.
    - `backend`: `"sequential"`, `"associative"`, `"chunked"`, or `"auto"`, which
        chooses by platform, structure and size; where devices share time, it does so
        within each of them.
        All except for `"sequential"` (`"auto"` on a CPU) multiply factors by each other
        before they multiply a state: `"associative"` over all of time, `"chunked"` over
        $\sqrt{T}$ steps. A product that overflows turns a state of zero into NaN and a
        small one into an infinity, where single steps give the right number; a product
        that underflows loses a large state. Products over a device's shard of time have
        an exponent of their own and do not overflow.

    **Returns:** $h_1 \dots h_T$, `[T, *state]`, in the promoted dtype of transition,
    inputs and states. 16-bit inputs are accumulated in float32 and rounded at the end.

    **Raises:** `ValueError` or `TypeError` on shapes and dtypes that do not fit, while
    tracing.
    """
    layout = _check(transition, inputs, initial, reset, reset_state, backend)
    dtype = promote(
        transition.values, inputs, *(s for s in (initial, reset_state) if s is not None)
    )
    if inputs.shape[0] == 0:
        return inputs.astype(dtype)
    # A long sum in half precision loses its digits: accumulate in 32 bits or more.
    compute = promote(dtype, jnp.float32)
    shape = inputs.shape[1:]

    def store(state):
        return jnp.asarray(state).astype(compute).reshape(layout.state_shape)

    a = transition.factors().astype(
        compute
        if jnp.issubdtype(transition.values.dtype, jnp.complexfloating)
        else jnp.finfo(compute).dtype
    )
    if layout.kind == "elementwise" and layout.state_shape[1] == 1:
        # XLA's CPU loops over [n, 1] run six times slower than over [n].
        layout, a = Layout("elementwise", layout.state_shape[:1]), a[..., 0]
    b = inputs.astype(compute).reshape(inputs.shape[0], *layout.state_shape)
    h0 = jnp.zeros(layout.state_shape, compute) if initial is None else store(initial)
    mask = None
    if reset is not None:
        mask = jnp.asarray(reset).reshape(-1, *(1,) * len(layout.state_shape))
        if reset_state is not None:
            product = Schedule(layout.kind, "after", reverse).product
            b = b + jnp.where(mask, product(a, store(reset_state)), 0)
    states = solve_recurrence(layout.kind, a, b, h0, mask, reverse, backend)
    return states.reshape(inputs.shape[0], *shape).astype(dtype)


def solve_recurrence(
    kind, a, b, h0, reset, reverse: bool = False, backend: Backend = "auto"
) -> Array:
    r"""`linear_scan` on the engine's own layout; see `_backends.py` for the shapes.

    The recurrence is the linear system $x_0 = h_0$, $x_t - A_t x_{t-1} = b_t$, which
    `lax.custom_linear_solve` is given. Its transpose is
    $\lambda_t = g_t + A_{t+1}^\top \lambda_{t+1}$: the same kernels run backwards, and
    emit before they multiply. Derivatives in $A$ come from `matvec`.
    """
    a, b, h0, reset = vary((a, b, h0, reset), (a, b, h0, reset))
    schedule = Schedule(kind, "after", reverse)
    product = schedule.product

    def matvec(unknowns):
        x0, x = unknowns
        before = shift(x0, x, reverse=reverse)
        if reset is not None:
            before = jnp.where(reset, 0, before)
        carried = product(a, before)
        if reset is not None:
            carried = jnp.where(reset, 0, carried)
        rest = x - carried
        return fake_dependency(x0, rest[0]), rest

    def solve(_, terms):
        x0, b = terms
        x, _ = run_scan_under_vmap(schedule, backend, a, b, x0, reset)
        return x0, x

    def transpose_solve(_, cotangents):
        g0, g = cotangents
        transposed = a if kind == "elementwise" else jnp.swapaxes(a, -1, -2)
        x, u = run_scan_under_vmap(
            Schedule(kind, "before", not reverse),
            backend,
            transposed,
            g,
            jnp.zeros_like(g0),
            reset,
        )
        return g0 + u, x

    terms = fake_dependency(h0, b[0]), fake_dependency(b, h0)
    x0, x = lax.custom_linear_solve(matvec, terms, solve, transpose_solve)
    # The cotangents too must be unknown together.
    return fake_dependency(x, x0)


def fake_dependency(x: Array, to: Array) -> Array:
    """Return `x`, made to depend on `to` as far as differentiation can tell.

    `lax.custom_linear_solve` can only be transposed if the tangents of all its terms
    are unknown together (its transpose rule asserts this), so none may be a known zero
    while another is unknown. XLA removes the selection.
    """
    return lax.select(jnp.zeros(x.shape, bool), jnp.broadcast_to(to, x.shape), x)


def run_scan(schedule: Schedule, backend: Backend, a, b, u, reset):
    """Choose a backend by the numbers of steps and of entries, and run it.

    A `vmap` of this would transform the loops that were chosen without the batch; where
    there may be one, use `run_scan_under_vmap`.
    """
    shards = time_shards(b.shape[0])
    length = -(-b.shape[0] // shards)
    choice = choose_backend(backend, schedule.kind, length, a.shape[-1])
    method = {
        "sequential": sequential,
        "associative": associative,
        "chunked": ft.partial(chunked, chunks=choice.chunks),
    }[choice.backend]
    if shards == 1:
        return method(schedule, a, b, u, reset)
    return scan_shards(
        ft.partial(method, schedule),
        schedule,
        shards,
        1 if choice.backend == "sequential" else choice.chunks,
        (a, b, u, reset),
    )


def run_scan_under_vmap(schedule: Schedule, backend: Backend, a, b, u, reset):
    """`run_scan`, in which a `vmap` becomes an axis of the arrays after time."""
    run = custom_vmap(ft.partial(run_scan, schedule, backend))

    @run.def_vmap
    def _(size, batched, *arguments):
        def whole_batch(a, b, u, reset):
            return over_batch(size, batched, a, b, u, reset)

        batch = [x for x, b in zip(arguments, batched, strict=True) if b is True]
        return leave_to_xla(whole_batch, batch)(*arguments), (True, True)

    def over_batch(size, batched, a, b, u, reset):
        def after_time(v, has_batch):
            return jnp.moveaxis(v, 0, 1) if has_batch else v[:, None]

        a, reset = jax.tree.map(after_time, (a, reset), (batched[0], batched[3]))
        b = after_time(b, batched[1])
        u = u if batched[2] else u[None]
        b = jnp.broadcast_to(b, (b.shape[0], size, *b.shape[2:]))
        u = jnp.broadcast_to(u, (size, *u.shape[1:]))
        x, u = run_scan_under_vmap(schedule, backend, a, b, u, reset)
        return jnp.moveaxis(x, 1, 0), u

    return run(a, b, u, reset)


def _check(transition, inputs, initial, reset, reset_state, backend) -> Layout:
    if not isinstance(transition, AbstractTransition):
        raise TypeError(
            f"linear_scan: `transition` is a {type(transition).__name__}, expected one "
            "of pararnn.Diagonal, Scalar, BlockDiagonal, Dense. Likely cause: a bare "
            "array; wrap it, for instance `pararnn.Diagonal(a)` for factors [T, n]."
        )
    if backend not in BACKENDS:
        raise ValueError(
            f"linear_scan: unknown backend {backend!r}; known: {', '.join(BACKENDS)}."
        )
    if not hasattr(inputs, "shape") or inputs.ndim < 1:
        raise ValueError(
            "linear_scan: `inputs` must be an array with a leading time axis, "
            f"[T, *state], got {inputs!r}."
        )
    if not jnp.issubdtype(inputs.dtype, jnp.inexact):
        raise TypeError(
            f"linear_scan: `inputs` are {inputs.dtype}; a recurrence needs floating "
            "point or complex numbers. Cast them, for instance with "
            "`inputs.astype(jnp.float32)`."
        )
    given = {"transition": transition.values, "inputs": inputs}
    for name, value in {
        **given,
        "initial": initial,
        "reset_state": reset_state,
    }.items():
        if value is not None:
            check_bits("linear_scan", name, value)
    steps, shape = inputs.shape[0], inputs.shape[1:]
    if transition.values.shape[0] not in (1, steps):
        raise ValueError(
            f"linear_scan: the transition has {transition.values.shape[0]} steps and "
            f"the inputs have {steps}. Both have time as their leading axis; only a "
            "transition that is constant in time has a leading axis of length 1. "
            "Likely cause: a batch axis in front of time; use `jax.vmap` for it."
        )
    for name, state in (("initial", initial), ("reset_state", reset_state)):
        if state is not None and jnp.shape(state) != shape:
            raise ValueError(
                f"linear_scan: `{name}` has shape {jnp.shape(state)}, but one step of "
                f"`inputs` (shape {inputs.shape}) has shape {shape}."
            )
    check_reset("linear_scan", reset, reset_state, steps)
    return transition.layout(shape)
