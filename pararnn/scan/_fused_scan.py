"""`fused_scan`: recurrences whose factors and states are never stored."""

import functools as ft
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Inexact, PyTree

from .._checks import check_bits, check_reset
from ._arithmetic import multiply, promote
from ._heuristics import FusedForm, choose_fused, choose_window
from ._linear_scan import linear_scan
from ._mesh_axes import vary
from ._time_sharding import time_shards
from ._transitions import Diagonal
from ._windows import in_windows


def fused_scan(
    terms: Callable[[PyTree], tuple[Array, Array]],
    read: Callable[[Array, PyTree], PyTree],
    inputs: PyTree[Array],
    initial: Inexact[Array, " *state"],
    *,
    reset: Bool[Array, " T"] | None = None,
    form: FusedForm = "auto",
) -> tuple[PyTree[Array], Inexact[Array, " *state"]]:
    r"""Run an elementwise recurrence that is larger than its inputs and outputs,

    $$(a_t, b_t) = \mathrm{terms}(x_t), \qquad h_t = a_t \odot h_{t-1} + b_t, \qquad
    y_t = \mathrm{read}(h_t, x_t),$$

    as in selective state spaces, where a few numbers of each channel become 16 states.
    The fused form makes factors and terms one step at a time, and reads each state at
    once. Its derivative stores only the states (of a long sequence, one for each window
    of time) and makes the rest again. The stored form makes all factors, runs
    [`pararnn.linear_scan`][] in parallel over time, and reads all states. They agree to
    rounding, and so do their derivatives of any order.

    **Arguments:**

    - `terms`: maps the inputs of one step to $a_t$ and $b_t$, which broadcast to
        `[*state]`. It may close over arrays, and derivatives go through it.
    - `read`: maps $h_t$, `[*state]`, and the inputs of that step to its output.
    - `inputs`: arrays `[T, ...]`.
    - `initial`: $h_0$, `[*state]`, real or complex.
    - `reset`: bool `[T]`. Where true, that step starts from zeros, whatever came
        before, infinities and NaN too.
    - `form`: `"fused"`, `"stored"`, or `"auto"`: fused on a CPU where states are larger
        than outputs, stored otherwise and where devices share time.

    **Returns:** outputs `[T, ...]`, and $h_T$ in the promoted dtype of $h_0$, $a_t$ and
    $b_t$, at least 32 bits wide, in which all states are computed.

    **Raises:** `ValueError` on inputs without a common leading axis, terms that do not
    fit the state, an unknown form, or the fused form where devices share time;
    `ValueError`, `TypeError` on resets of another length or dtype. While tracing.

    ??? cite "Source"

        Gu and Dao, "Mamba" (2312.00752), section 3.3.2, for its GPU kernel, which
        makes the states again in the same way.
    """
    steps = _length(inputs)
    check_reset("fused_scan", reset, None, steps)
    first = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(jnp.shape(v)[1:], jnp.result_type(v)), inputs
    )
    initial = vary(_start(terms, first, jnp.asarray(initial)), inputs)
    output = sum(v.size for v in jax.tree.leaves(jax.eval_shape(read, initial, first)))

    def whole(at_t):
        return tuple(jnp.broadcast_to(v, initial.shape) for v in terms(at_t))

    fused = choose_fused(form, time_shards(steps), initial.size, output)
    run = _fused if fused else _stored
    return run(whole, read, inputs, initial, reset)


def _fused(whole, read, inputs, initial, reset):
    # The derivative stores nothing but the states.
    @ft.partial(jax.checkpoint, prevent_cse=False)
    def step(state, at_t):
        inputs, reset = at_t
        a, b = whole(inputs)
        # Before the product for the derivative in the factor, which is a multiple of
        # the state; after it for a factor that is not finite.
        kept = drop(reset, multiply(a, drop(reset, state)))
        state = (kept + b.astype(initial.dtype)).astype(initial.dtype)
        return state, read(state, inputs)

    def drop(reset, v):
        return v if reset is None else jnp.where(reset, jnp.zeros_like(v), v)

    def loop(state, at):
        return lax.scan(step, state, at)

    steps = _length(inputs)
    window = choose_window(steps) or steps
    last, outputs = in_windows(loop, initial, (inputs, reset), window)
    return outputs, last


def _stored(whole, read, inputs, initial, reset):
    a, b = jax.vmap(whole)(inputs)
    if b.shape[0] == 0:
        return jax.vmap(read)(b.astype(initial.dtype), inputs), initial
    states = linear_scan(
        Diagonal(a), b.astype(initial.dtype), initial, reset=reset
    ).astype(initial.dtype)
    return jax.vmap(read)(states, inputs), states[-1]


def _length(inputs: PyTree[Array]) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs)]
    lengths = {shape[:1] for shape in shapes}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            f"fused_scan: `inputs` have the shapes {shapes}, expected arrays whose "
            "leading axis is time, of the same length. Likely causes: (a) a scalar or "
            "a parameter among them; `terms` may close over those instead, (b) a batch "
            "axis in front of time; use `jax.vmap` for it."
        )
    return lengths.pop()[0]


def _start(terms, first, initial: Array) -> Array:
    """Check the terms, and return the first state in the dtype of all states."""
    made = jax.eval_shape(terms, first)
    pair = isinstance(made, tuple) and len(made) == 2
    if not pair or not all(isinstance(v, jax.ShapeDtypeStruct) for v in made):
        raise ValueError(
            f"fused_scan: `terms` returned {made!r}, expected a pair of arrays, the "
            "factor and the term of one step."
        )
    check_bits("fused_scan", "initial", initial)
    for name, v in zip(("factor", "term"), made, strict=True):
        check_bits("fused_scan", name, v)
        if not _broadcasts(v.shape, initial.shape):
            raise ValueError(
                f"fused_scan: `terms` makes a {name} of shape {v.shape}, which does "
                f"not broadcast to that of `initial`, {initial.shape}."
            )
    return initial.astype(promote(initial, *made, jnp.float32))


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    tail = to[len(to) - len(shape) :]
    return len(shape) <= len(to) and all(
        n in (1, m) for n, m in zip(shape, tail, strict=True)
    )
