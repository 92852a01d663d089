"""`matrix_scan`: recurrences of matrix states, step by step or by chunks."""

import functools as ft
from typing import Literal

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Bool, Float

from .._checks import check_floating, check_reset, is_count
from ._arithmetic import promote
from ._heuristics import FORMS, Form, MatrixPlan, plan_matrix_scan
from ._matrix_chunks import batch_in_front, chunkwise
from ._matrix_steps import Terms, stepwise
from ._mesh_axes import vary
from ._time_sharding import time_shards


def matrix_scan(
    queries: Float[Array, "Q heads K"],
    keys: Float[Array, "T heads K"],
    values: Float[Array, "T heads V"],
    decay: Float[Array, "T heads"] | Float[Array, "T heads K"] | None = None,
    *,
    read: Float[Array, "T heads K"] | None = None,
    write: Float[Array, "T heads K"] | None = None,
    initial: Float[Array, "heads K V"] | None = None,
    reset: Bool[Array, " T"] | None = None,
    emit: Literal["after", "before"] = "after",
    form: Form = "auto",
    chunk: int | None = None,
) -> tuple[Float[Array, "Q heads V"], Float[Array, "heads K V"]]:
    r"""Return the outputs $o_t = S_t^\top q_t$ of a state that is a matrix per head,

    $$S_t = (\mathrm{diag}(d_t) - w_t r_t^\top) S_{t-1} + k_t v_t^\top,$$

    without storing the states. It takes one sequence, without a batch axis: a leading
    one would be taken for time, so use `jax.vmap`. With neither `decay` nor `read` this
    is linear attention. With `decay` it is gated linear attention. With `read`
    $r_t = \hat{k}_t$ and `keys` $k_t = \beta_t \hat{k}_t$ it is the delta rule.

    The chunkwise form turns every chunk of C steps into matrix products and scans over
    the chunks; the recurrent form steps. They agree to rounding, and so do their
    gradients. The derivative stores the state before each chunk, or before each window
    of time where it takes steps, and computes the rest again. Decays may be zero or
    negative, and products of them may underflow: nothing is divided by them. On a
    single CPU device, without a mesh in context, a `vmap` takes sequences of large
    states one after the other, in the steps of `"auto"` and in derivatives by chunks.

    **Arguments:**

    - `queries`: $q_t$, `[T, heads, K]`; or `[T / n, heads, K]` to read only after
        every n-th step.
    - `keys`, `values`: $k_t$ and $v_t$, `[T, heads, K]` and `[T, heads, V]`.
    - `decay`: $d_t$, one factor for each head, or for each head and key. Defaults to
        1.
    - `read`, `write`: $r_t$ and $w_t$, `[T, heads, K]`. Nothing is erased without
        `read`. `write` defaults to `keys`, which is cheaper.
    - `initial`: $S_0$, `[heads, K, V]`. Defaults to zeros.
    - `reset`: bool `[T]`. Where true, that step starts from zeros, whatever came
        before.
    - `emit`: `"before"` reads $o_t = S_{t-1}^\top q_t$.
    - `form`: `"recurrent"`, `"chunkwise"`, or `"auto"`, which chooses by platform,
        length and size, and may take another form for the derivative than for the
        value.
    - `chunk`: steps of a chunk, a multiple of `T / Q`. Defaults to a measured choice.

    **Returns:** outputs `[Q, heads, V]` and $S_T$, in the promoted dtype of all
    arguments; 16-bit arguments are computed in float32. In the chunkwise form, an
    entry that is not finite turns everything that it reaches in its head into NaN:
    later outputs up to the next reset, and no others. Products of decays and erasures
    that overflow within a chunk (decays above 1, or reads and writes much longer than
    1) reach the whole chunk there; use `form="recurrent"` for these.

    **Raises:** `ValueError`, `TypeError` on shapes, dtypes and options that do not fit,
    while tracing; `ValueError` for the recurrent form where devices share time.

    ??? cite "Source"

        Chunkwise forms: Yang et al., "Gated Linear Attention Transformers" (2312.06635)
        and "Parallelizing Linear Transformers with the Delta Rule" (2406.06484).
    """
    given = {
        "queries": queries,
        "keys": keys,
        "values": values,
        "decay": decay,
        "read": read,
        "write": write,
        "initial": initial,
    }
    given = {name: v for name, v in given.items() if v is not None}
    steps_per_query = _check(given, reset, emit, form, chunk)
    dtype = promote(*given.values())
    precision = promote(dtype, jnp.float32)
    wide = {name: jnp.asarray(v).astype(precision) for name, v in given.items()}
    steps, heads, size = keys.shape
    start = wide.pop("initial", jnp.zeros((heads, size, values.shape[-1]), precision))
    start = vary(start, wide)
    queries = wide.pop("queries")
    terms = Terms(
        wide["keys"],
        wide["values"],
        *(wide.get(name) for name in ("decay", "read", "write")),
    )
    if steps == 0:
        return jnp.zeros((0, *values.shape[1:]), dtype), start.astype(dtype)
    plan = plan_matrix_scan(
        form,
        chunk,
        steps,
        steps_per_query,
        size * values.shape[-1],
        emit=emit,
        heads=heads,
        each_key=decay is not None and decay.ndim == keys.ndim,
        erases=read is not None,
        shards=time_shards(steps),
    )
    run = _derivable if plan.value_is_derivable else _by_steps
    outputs, last = run(plan, queries, terms, start, reset)
    return outputs.astype(dtype), last.astype(dtype)


def _derivable(plan: MatrixPlan, queries, terms: Terms, start, reset):
    """Return the outputs and the last state in the form that is differentiated."""
    given = queries, terms, start, reset
    if plan.derivative == "recurrent":
        return batch_in_front(stepwise(plan, *given, window=plan.window))
    return batch_in_front(chunkwise(plan, *given))


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_steps(plan: MatrixPlan, queries, terms: Terms, start, reset):
    """Return the same by single steps, the fastest form without a derivative.

    The derivative is that of `_derivable`.
    """

    def run(*given):
        return batch_in_front(stepwise(plan, *given, window=None))

    run = sequential_vmap(run) if plan.sequential_vmap else run
    return run(queries, terms, start, reset)


@_by_steps.defjvp
def _(plan: MatrixPlan, primals, tangents):
    return jax.jvp(ft.partial(_derivable, plan), primals, tangents)


def _check(given: dict[str, Array], reset, emit, form, chunk) -> int:
    check_floating("matrix_scan", given)
    keys, values = given["keys"], given["values"]
    if keys.ndim != 3 or values.ndim != 3:
        raise ValueError(
            f"matrix_scan: `keys` has shape {keys.shape} and `values` {values.shape}, "
            "expected [T, heads, K] and [T, heads, V]. Likely causes: (a) a batch "
            "axis; use `jax.vmap` for it, (b) a single head; give it an axis of "
            "length 1."
        )
    (steps, heads, size), width = keys.shape, values.shape[-1]
    wanted = {
        "values": [(steps, heads, width)],
        "decay": [(steps, heads), (steps, heads, size)],
        "read": [keys.shape],
        "write": [keys.shape],
        "initial": [(heads, size, width)],
    }
    for name, shapes in wanted.items():
        if name in given and given[name].shape not in shapes:
            raise ValueError(
                f"matrix_scan: `{name}` has shape {given[name].shape}, expected "
                f"{' or '.join(map(str, shapes))}, as `keys` has shape {keys.shape}. "
                "Likely cause: the axes are in another order; time comes first, then "
                "heads."
            )
    queries = given["queries"].shape
    if queries[1:] != keys.shape[1:] or (steps % queries[0] if queries[0] else steps):
        raise ValueError(
            f"matrix_scan: `queries` has shape {queries}, expected [Q, {heads}, "
            f"{size}] where Q divides T = {steps}. Q < T reads after every (T / Q)-th "
            "step."
        )
    if "write" in given and "read" not in given:
        raise ValueError(
            "matrix_scan: `write` was given without `read`, so nothing would be "
            "erased. Pass `read` as well, or drop it."
        )
    check_reset("matrix_scan", reset, None, steps)
    steps_per_query = steps // queries[0] if steps else 1
    for name, choice, known in (
        ("emit", emit, ("after", "before")),
        ("form", form, FORMS),
    ):
        if choice not in known:
            raise ValueError(
                f"matrix_scan: unknown `{name}` {choice!r}; there are "
                f"{', '.join(known)}."
            )
    if chunk is not None and not (is_count(chunk, 1) and chunk % steps_per_query == 0):
        raise ValueError(
            "matrix_scan: `chunk` must be a positive multiple of T / Q = "
            f"{steps_per_query}, got {chunk!r}. Leave it out to have it chosen."
        )
    return steps_per_query
