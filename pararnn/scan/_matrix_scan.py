"""`matrix_scan`: recurrences of matrix states, step by step or by chunks."""

import functools as ft
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from ._arithmetic import promote
from ._choose import FORMS, Form, Pass, choose_backend, choose_form
from ._chunks import Chunk, ErasingChunk, summarise
from ._linear_scan import check_reset, linear_scan
from ._prefix import running_max
from ._time_axis import shift, spread, time_shards
from ._transitions import BlockDiagonal, Diagonal
from ._windows import in_windows


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
    r"""Outputs $o_t = S_t^\top q_t$ of a state that is a matrix for each head,

    $$S_t = (\mathrm{diag}(d_t) - w_t r_t^\top) S_{t-1} + k_t v_t^\top,$$

    without storing the states. With neither `decay` nor `read` this is linear
    attention, with `decay` gated linear attention, and with `read`
    $r_t = \hat{k}_t$, `keys` $k_t = \beta_t \hat{k}_t$ the delta rule.

    The chunkwise form turns every stretch of C steps into matrix products and scans
    over the stretches; the recurrent form steps. They agree to rounding, gradients too.
    On one CPU, and where steps are taken, the derivative of a long sequence stores the
    state before each window of time and computes the window again. Decays may be zero
    and negative, and products of them may underflow: nothing is divided by them.

    **Arguments:**

    - `queries`: $q_t$, `[T, heads, K]`; or `[T / n, heads, K]` to read only after
        every n-th step.
    - `keys`, `values`: $k_t$ and $v_t$, `[T, heads, K]` and `[T, heads, V]`.
    - `decay`: $d_t$, one factor for each head, or for each head and key; 1 if not
        given.
    - `read`, `write`: $r_t$ and $w_t$, `[T, heads, K]`. Nothing is erased without
        `read`; `write` is `keys` if not given, which is cheaper.
    - `initial`: $S_0$, `[heads, K, V]`; zeros if not given.
    - `reset`: bool `[T]`. Where true, that step starts from zeros, whatever came
        before.
    - `emit`: `"before"` reads $o_t = S_{t-1}^\top q_t$.
    - `form`: `"recurrent"`, `"chunkwise"`, or `"auto"`, by platform, length and size,
        where a derivative may take another form than the value.
    - `chunk`: steps of a chunk, a multiple of `T / Q`; chosen by measurement if not
        given.

    **Returns:** outputs `[Q, heads, V]` and $S_T$, in the promoted dtype of all
    arguments; 16-bit arguments are computed in float32. In the chunkwise form, an
    entry that is not finite makes NaN of all that it reaches in its head: of later
    outputs up to the next reset, and of no other ones. Products of decays and
    erasures that overflow within a chunk (decays above 1, or reads and writes much
    longer than 1) reach the whole chunk there; take `form="recurrent"` for such.

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
    every = _check(given, reset, emit, form, chunk)
    dtype = promote(*given.values())
    precision = promote(dtype, jnp.float32)
    wide = {name: jnp.asarray(v).astype(precision) for name, v in given.items()}
    steps, heads, size = keys.shape
    start = wide.pop("initial", jnp.zeros((heads, size, values.shape[-1]), precision))
    queries = wide.pop("queries")
    terms = _Terms(
        wide["keys"],
        wide["values"],
        *(wide.get(name) for name in ("decay", "read", "write")),
    )
    if steps == 0:
        return jnp.zeros((0, *values.shape[1:]), dtype), start.astype(dtype)
    entries = size * values.shape[-1]
    choice = choose_form(
        form,
        chunk,
        steps,
        every,
        entries,
        heads=heads,
        erases=read is not None,
        shards=time_shards(steps),
    )
    forms = {
        "recurrent": _recurrent,
        "chunkwise": ft.partial(_chunkwise, chunk=choice.chunk),
    }

    def by(way: Pass):
        run = ft.partial(forms[way.form], every=every, emit=emit)
        return ft.partial(_over_time, run, every, way.window)

    compute = by(choice.value)
    if choice.value != choice.derivative:
        compute = jax.custom_jvp(compute)
        compute.defjvp(ft.partial(jax.jvp, by(choice.derivative)))
    outputs, last = compute(queries, terms, start, reset)
    return outputs.astype(dtype), last.astype(dtype)


class _Terms(NamedTuple):
    """What a step does to the state; leaves `[T, heads, ...]` or `None`."""

    keys: Array
    values: Array
    decay: Array | None
    read: Array | None
    write: Array | None


def _over_time(run, every: int, window: int | None, queries, terms, start, reset):
    """`run(queries, terms, start, reset)`, in windows if any: outputs, last state."""

    def on_window(state, at):
        queries, groups = at
        terms, reset = groups if every == 1 else jax.tree.map(_join_groups, groups)
        outputs, state = run(queries, terms, state, reset)
        return state, outputs

    # Windows of a few groups would store as many states as no windows.
    if window is None or window < 4 * every:
        outputs, last = run(queries, terms, start, reset)
    else:
        at = queries, _groups((terms, reset), every)
        last, outputs = in_windows(on_window, start, at, window // every)
    # JAX takes the batch axes of a `custom_jvp` rule to be those of its function, and a
    # loop leaves the batch of a `vmap` behind time, where matrix products have it in
    # front. The rule that batches a reshape moves it to the front in both.
    return tuple(v.reshape(-1).reshape(v.shape) for v in (outputs, last))


def _recurrent(queries, terms: _Terms, start, reset, every, emit):
    """One step after the other; the state is the carry of a loop."""
    if terms.decay is not None and terms.decay.ndim < terms.keys.ndim:
        # As a product with whole heads it takes twice the time.
        decay = jnp.broadcast_to(terms.decay[..., None], terms.keys.shape)
        terms = terms._replace(decay=decay)

    def step(state, at_t):
        term, reset = at_t
        if reset is not None:
            state = jnp.where(reset, jnp.zeros_like(state), state)
        written, kept = term.values, state
        if term.decay is not None:
            kept = _product("hk,hkv->hkv", term.decay, state)
        if term.read is not None:
            erased = _read(term.read, state)
            if term.write is None:
                written = written - erased
            else:
                kept = kept - _product("hk,hv->hkv", term.write, erased)
        return kept + _product("hk,hv->hkv", term.keys, written)

    # All that the derivative stores is the states.
    @ft.partial(jax.checkpoint, prevent_cse=False)
    def steps_to_output(state, at_t):
        query, group = at_t
        for i in range(every):
            inner = group if every == 1 else jax.tree.map(lambda v: v[i], group)
            earlier, state = state, step(state, inner)
        shown = earlier if emit == "before" else state
        if emit == "before" and reset is not None:
            shown = jnp.where(inner[1], jnp.zeros_like(shown), shown)
        return state, _read(query, shown)

    at = queries, _groups((terms, reset), every)
    return lax.scan(steps_to_output, start, at)[::-1]


def _groups(tree, every: int):
    """The steps between two queries side by side, `[Q, every, ...]`.

    Single steps stay `[Q, ...]`: XLA would copy the arrays for an axis of length 1.
    """
    if every == 1:
        return tree
    return jax.tree.map(lambda v: v.reshape(-1, every, *v.shape[1:]), tree)


def _join_groups(v):
    return v.reshape(-1, *v.shape[2:])


def _read(vectors, state):
    """`Sᵀ q` of every head."""
    return _product("hk,hkv->hv", vectors, state)


def _product(axes: str, a, b):
    """A product as a `dot`. As a sum of products, XLA's CPU runs it 2 to 50 times
    slower (40 against 0.8 us for one head of 64 x 64, jaxlib 0.10.2); and an outer
    product written by broadcasting has such a sum for its derivative."""
    return jnp.einsum(axes, a, b, precision=lax.Precision.HIGHEST)


def _chunkwise(queries, terms: _Terms, start, reset, every, emit, chunk):
    """Chunks as affine maps of their first states, which a scan over them finds."""
    steps = terms.keys.shape[0]
    terms, start, poisoned, last_poisoned = _contain(terms, start, reset, emit)
    bad_query = ~jnp.all(jnp.isfinite(queries), -1)
    queries = jnp.where(bad_query[..., None], 0, queries)
    if emit == "before" and reset is not None:
        # What these steps read is fresh.
        queries = jnp.where(_behind(reset[every - 1 :: every], 3), 0, queries)
    poisoned = poisoned[every - 1 :: every] | bad_query
    shards = time_shards(steps)
    whole = -(-steps // (chunk * shards)) * shards

    def split(v, length, count=whole):
        """Time first to `[chunks, heads, length, ...]`, padded by zeros."""
        v = jnp.pad(v, [(0, count * length - v.shape[0])] + [(0, 0)] * (v.ndim - 1))
        return jnp.moveaxis(spread(v.reshape(count, length, *v.shape[1:])), 1, 2)

    decay = terms.decay
    if decay is None:
        # One head stands for all, and one chunk too where nothing is reset.
        decay = jnp.ones((chunk if reset is None else steps, 1), terms.keys.dtype)
    if reset is not None:
        decay = jnp.where(_behind(reset, decay.ndim), 0, decay)
    # A padded step decays nothing.
    decay = split(decay - 1, chunk, whole if len(decay) == steps else 1) + 1
    read = terms.read
    if read is not None and reset is not None:
        read = jnp.where(_behind(reset, read.ndim), 0, read)
    parts = [
        None if v is None else split(v, chunk)
        for v in (terms.keys, terms.values, read, terms.write)
    ]
    keys, values, read, write = parts

    @jax.checkpoint
    def summary(queries, keys, values, decay, read, write) -> Chunk | ErasingChunk:
        return summarise(
            queries, keys, values, decay, read, write, before=emit == "before"
        )

    chunks = summary(split(queries, chunk // every), keys, values, decay, read, write)
    anew = None if reset is None else jnp.any(split(reset[:, None], chunk)[:, 0], -1)
    backend = choose_backend("auto", "matrix", whole, terms.keys.shape[-1]).backend
    if isinstance(chunks, Chunk):
        outputs, last = _scan_chunks(chunks, start, anew)
    elif shards == 1 and backend == "sequential":
        outputs, last = _step_through_chunks(chunks, start, anew)
    else:
        outputs, last = _scan_chunks(chunks.multiply_out(), start, anew)
    outputs = jnp.moveaxis(outputs, 2, 1)
    outputs = outputs.reshape(-1, *outputs.shape[2:])[: queries.shape[0]]

    def spoil(v, where):
        return v + jnp.where(where, jnp.nan, 0).astype(v.dtype)

    return (
        spoil(outputs, poisoned[..., None]),
        spoil(last, last_poisoned[:, None, None]),
    )


def _scan_chunks(chunks: Chunk, start, anew) -> tuple[Array, Array]:
    """Outputs `[chunks, heads, Q, V]` and the last state, in parallel over chunks."""
    count, heads, size, width = chunks.term.shape
    flat = (heads * size, width)
    if chunks.transition.ndim == 3:
        transition = Diagonal(chunks.transition.reshape(count, -1))
    else:
        transition = BlockDiagonal(chunks.transition)
    states = linear_scan(
        transition, chunks.term.reshape(count, *flat), start.reshape(flat), reset=anew
    ).reshape(count, heads, size, width)
    return chunks.read(shift(start, states)), states[-1]


def _step_through_chunks(chunks: ErasingChunk, start, anew) -> tuple[Array, Array]:
    """The same, one chunk after the other.

    No transition `[K, K]` is formed: where chunks are stepped through anyway, that
    takes a fifth less time with a gradient.
    """

    def step(state, at):
        chunk, anew = at
        e = for_end = chunk.erase(state)
        kept = state
        if anew is not None:
            # Steps before the reset still find the state, the end does not.
            kept = jnp.where(anew, jnp.zeros_like(state), state)
            for_end = jnp.where(anew, chunk.wanted, e)
        return chunk.advance(kept, for_end), (state, e)

    last, (first, e) = lax.scan(step, start, (chunks, anew))
    return chunks.read(first, e), last


def _contain(terms: _Terms, start, reset, emit):
    """Take out what is not finite, and say which outputs it reaches.

    In a matrix product over a chunk, zero times NaN would reach earlier steps and
    other sequences, which the recurrence itself never does.

    **Returns:** finite terms and start; bool `[T, heads]` of the outputs, and
    `[heads]` of the last state, that are NaN.
    """
    steps, heads = terms.keys.shape[:2]

    def spoiled(v):
        return ~jnp.all(jnp.isfinite(v.reshape(*v.shape[:2], -1)), -1)

    bad = jnp.zeros((steps, heads), bool)
    for v in jax.tree.leaves(terms):
        bad = bad | spoiled(v)
    bad_start = spoiled(start[None])[0]

    def clean(v):
        return jnp.where(_behind(bad, v.ndim), 0, v)

    terms = jax.tree.map(clean, terms)
    start = jnp.where(bad_start[:, None, None], 0, start)
    # The newest bad step against the newest reset, counted from 1; the start is 0.
    count = jnp.arange(1, steps + 1, dtype=jnp.int32)
    newest = running_max(jnp.where(bad, count[:, None], -1))
    newest = jnp.maximum(newest, jnp.where(bad_start, 0, -1)[None])
    fresh = jnp.zeros_like(count)
    if reset is not None:
        fresh = running_max(jnp.where(reset, count, 0))
    reached = newest >= fresh[:, None]
    last = reached[-1]
    if emit == "before":
        # The state before step t, and nothing that step t itself brings.
        earlier = shift(bad_start, reached)
        reached = earlier if reset is None else earlier & ~reset[:, None]
    return terms, start, reached, last


def _behind(v: Array, ndim: int) -> Array:
    return v.reshape(v.shape + (1,) * (ndim - v.ndim))


def _check(given: dict[str, Array], reset, emit, form, chunk) -> int:
    for name, v in given.items():
        if not hasattr(v, "shape") or not jnp.issubdtype(v.dtype, jnp.floating):
            raise TypeError(
                f"matrix_scan: `{name}` must be an array of real floating point, got "
                f"{getattr(v, 'dtype', type(v).__name__)}. Cast it, for instance with "
                "`.astype(jnp.float32)`."
            )
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
    every = steps // queries[0] if steps else 1
    if emit not in ("after", "before") or form not in FORMS:
        raise ValueError(
            f"matrix_scan: unknown `emit` {emit!r} or `form` {form!r}; there are "
            f"after, before, and {', '.join(FORMS)}."
        )
    if chunk is not None and not (
        isinstance(chunk, int | np.integer)
        and not isinstance(chunk, bool)
        and chunk > 0
        and chunk % every == 0
    ):
        raise ValueError(
            f"matrix_scan: `chunk` must be a positive multiple of T / Q = {every}, got "
            f"{chunk!r}. Leave it out to have it chosen."
        )
    return every
