r"""The recurrence of matrix states by chunks, and its derivative.

A chunk is an affine map of the state that it starts from (see `_chunks.py`). Only one
linear recurrence over the chunks is sequential, for states and for their tangents:

$$e_i = a_i - F_i S_i, \qquad S_{i+1} = \mathrm{diag}(d_i) S_i + W_i e_i + b_i.$$

The derivative takes as known the states before the chunks and what was written within
them, e. Then everything that a chunk computes is a product of known arrays, whose
tangents need no other chunk, except for this recurrence. And e, which solves a system
of equations, has a tangent that solves the same system. So the derivative neither
stores nor repeats the computation of the value, which may as well be found step by
step.
"""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, PyTree

from ._arithmetic import matmul, multiply
from ._chunks import AffineMap, invert_unit_lower, summarise
from ._heuristics import MatrixPlan, choose_backend
from ._linear_scan import fake_dependency, linear_scan
from ._matrix_steps import Terms, step_and_record
from ._prefix import running_max
from ._time_sharding import shift, spread, time_shards
from ._transitions import BlockDiagonal, Diagonal
from ._windows import in_windows

# Windows between two states that are stored, where the value is by chunks too.
_WINDOWS_PER_STATE = 8


class ChunkOutputs(NamedTuple):
    """The outputs of chunks, and what their derivative takes as known."""

    # `[chunks, Q, heads, V]`
    outputs: Any
    # Before each chunk, `[chunks, heads, K, V]`.
    states: Any
    # What was written in place of what was erased, `[chunks, C, heads, V]`, or `None`.
    written: Any
    # `[heads, K, V]`
    last: Any


def chunkwise(plan: MatrixPlan, queries, terms: Terms, start, reset):
    """Return outputs `[Q, heads, V]` and the last state, from chunks of time."""
    steps, count = len(terms.keys), len(queries)
    poisoned = None
    if not plan.stepped:
        queries, terms, start, *poisoned = _contain(plan, queries, terms, start, reset)
    shards = time_shards(steps)
    chunks = -(-steps // (plan.chunk * shards)) * shards

    def in_chunks(v, length: int, fill: float = 0):
        """Time first to `[chunks, C, ...]`."""
        pads = [(0, chunks * length - v.shape[0])] + [(0, 0)] * (v.ndim - 1)
        v = jnp.pad(v, pads, constant_values=fill)
        return spread(v.reshape(chunks, length, *v.shape[1:]))

    queries = in_chunks(queries, plan.chunk // plan.steps_per_query)
    # The decay of a step that is filled in is 1.
    decay = _map_optional(terms.decay, lambda v: in_chunks(v, plan.chunk, 1))
    terms = jax.tree.map(lambda v: in_chunks(v, plan.chunk), terms._replace(decay=None))
    terms = terms._replace(decay=decay)
    reset = _map_optional(reset, lambda v: in_chunks(v, plan.chunk, False))
    outputs, last = _in_windows(plan, queries, terms, start, reset)
    outputs = outputs.reshape(-1, *outputs.shape[2:])[:count]
    if poisoned is None:
        return outputs, last

    def spoil(v, where):
        return v + jnp.where(where[..., None], jnp.nan, 0).astype(v.dtype)

    reached, last_reached = poisoned
    return spoil(outputs, reached), spoil(last, last_reached[:, None])


def _in_windows(plan: MatrixPlan, queries, terms: Terms, start, reset):
    """Return the outputs of chunks and the last state.

    Where the value is by chunks too, a derivative computes again what it needs of the
    value, and only a few states are stored.
    """
    window = plan.chunks_per_window
    if plan.stepped or window is None:
        found = run_chunks(plan, queries, terms, start, reset)
        return found.outputs, found.last

    def on_window(state, at):
        queries, terms, reset = at
        found = run_chunks(plan, queries, terms, state, reset)
        return found.last, found.outputs

    at = queries, terms, reset
    return in_windows(on_window, start, at, _WINDOWS_PER_STATE * window)[::-1]


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def run_chunks(plan: MatrixPlan, queries, terms: Terms, start, reset) -> ChunkOutputs:
    """Run the chunks `[chunks, Q or C, ...]`, one step after the other or as products.

    The derivative is by products of matrices in both cases.
    """
    run = ft.partial(_by_steps if plan.stepped else _by_products, plan)
    if plan.sequential_vmap:
        run = sequential_vmap(run)
    return batch_in_front(run(queries, terms, start, reset))


@run_chunks.defjvp
def _(plan: MatrixPlan, primals, tangents):
    found = run_chunks(plan, *primals)
    queries, terms, _, reset = primals
    known = (queries, terms, reset), (found.states, found.written)
    # The resets, booleans, have no tangents.
    given = tangents[:3]
    if not plan.sequential_vmap:
        return found, _tangents(plan, known, given)

    def some(*names: str):
        def of(known, given):
            response = _tangents_traced_once(plan, known, given)
            return tuple(getattr(response, name) for name in names)

        return sequential_linear_call(of, known, given)

    # Two calls, as XLA drops the second one where only what is returned is derived.
    outputs, last = some("outputs", "last")
    states, written = some("states", "written")
    return found, ChunkOutputs(outputs, states, written, last)


def batch_in_front(tree):
    """Return `tree` with a batch of a `vmap` in front of all arrays.

    JAX takes the batch axes of a `custom_jvp` rule to be those of its function. A loop
    leaves them after time, and matrix products have them in front. The rule that
    batches a reshape moves them to the front in both.
    """
    return jax.tree.map(lambda v: v.reshape(-1).reshape(v.shape), tree)


def _by_steps(plan: MatrixPlan, queries, terms: Terms, start, reset) -> ChunkOutputs:
    return ChunkOutputs(*step_and_record(plan, queries, terms, start, reset))


def _by_products(plan: MatrixPlan, queries, terms: Terms, start, reset) -> ChunkOutputs:
    queries, terms = _per_head(plan, queries, terms, reset)
    chunk = summarise(queries, *terms, before=plan.emit == "before")
    values, reset_in_chunk, steps = terms.values, _any_reset(reset), plan.chunk
    if terms.read is None:
        term = matmul(chunk.written, values)
        states, last = _through_decays(chunk, term, start, reset_in_chunk)
        return ChunkOutputs(_swap(chunk.found(states, values)), states, None, last)
    asked = queries.shape[-2]
    if terms.write is None:
        first, term = values, None
    else:
        # What is written along the keys is known, and so is what is found of it.
        first = -matmul(chunk.scores[..., asked:, :steps], values)
        term = matmul(chunk.written[..., :steps], values)
    states, written, last = _through_erasures(chunk, first, term, start, reset_in_chunk)
    outputs = matmul(chunk.reach[..., :asked, :], states)
    writes = _writes(terms, written)
    outputs = outputs + matmul(chunk.scores[..., :asked, :], writes)
    return ChunkOutputs(_swap(outputs), states, _swap(written), last)


def _tangents(plan: MatrixPlan, known, given) -> ChunkOutputs:
    """Return the tangents of chunks, for tangents `given` of queries, terms and start.

    `known` are the queries, terms and resets, and the chunks' states and writes.
    """
    dqueries, dterms, dstart = given

    def on_window(dstate, at):
        known, dqueries, dterms = at
        found = _tangents_of_window(plan, known, (dqueries, dterms, dstate))
        return found.last, found._replace(last=None)

    at, window = (known, dqueries, dterms), plan.chunks_per_window
    if window is None:
        last, found = jax.checkpoint(on_window)(dstart, at)
    else:
        last, found = in_windows(on_window, dstart, at, window)
    return batch_in_front(found._replace(last=last))


# For `sequential_linear_call`, which uses it several times.
_tangents_traced_once = jax.jit(_tangents, static_argnums=0)


def _tangents_of_window(plan: MatrixPlan, known, given) -> ChunkOutputs:
    (queries, terms, reset), (states, written) = known
    dqueries, dterms, dstart = given
    states, written = _finite((states, _map_optional(written, _swap)))

    def respond(queries, terms):
        """What chunks make of known states and writes."""
        queries, terms = _per_head(plan, _finite(queries), _finite(terms), reset)
        chunk = summarise(queries, *terms, before=plan.emit == "before")
        writes = _writes(terms, written)
        return (chunk.found(states, writes), chunk.end(states, writes)), chunk

    _, (dfound, dend), chunk = jax.jvp(
        respond, (queries, terms), (dqueries, dterms), has_aux=True
    )
    reset_in_chunk = _any_reset(reset)
    if terms.read is None:
        dstates, dlast = _through_decays(chunk, dend, dstart, reset_in_chunk)
        doutputs = dfound + matmul(chunk.reach, dstates)
        return ChunkOutputs(_swap(doutputs), dstates, None, dlast)
    asked, steps = queries.shape[1], plan.chunk
    doutputs, dfirst = dfound[..., :asked, :], -dfound[..., asked:, :]
    if terms.write is None:
        dfirst = dfirst + _swap(dterms.values)
    dstates, dwritten, dlast = _through_erasures(
        chunk, dfirst, dend, dstart, reset_in_chunk
    )
    doutputs = doutputs + matmul(chunk.reach[..., :asked, :], dstates)
    doutputs = doutputs + matmul(chunk.scores[..., :asked, -steps:], dwritten)
    return ChunkOutputs(_swap(doutputs), dstates, _swap(dwritten), dlast)


def _per_head(plan: MatrixPlan, queries, terms: Terms, reset) -> tuple[Array, Terms]:
    """Return queries and terms `[chunks, heads, C, ...]`, with a decay and no resets.

    A reset is a decay of zero, with nothing to erase.
    """
    queries, terms = jax.tree.map(_swap, (queries, terms))
    keys, decay, read = terms.keys, terms.decay, terms.read
    if decay is None:
        # One head stands for all, and one chunk too where nothing is reset.
        shape = (1, 1, plan.chunk) if reset is None else (len(keys), 1, plan.chunk)
        decay = jnp.ones(shape, keys.dtype)
    if reset is not None:
        reset = reset[:, None]
        decay = jnp.where(
            reset.reshape(reset.shape + (1,) * (decay.ndim - 3)), 0, decay
        )
        if read is not None:
            read = jnp.where(reset[..., None], 0, read)
        if plan.emit == "before":
            every = plan.steps_per_query
            asked = reset[..., every - 1 :: every, None]
            queries = jnp.where(asked, 0, queries)
    return queries, terms._replace(decay=decay, read=read)


def _finite(tree):
    """Replace what is not finite by zeros.

    The value has it. In a product of matrices it would reach derivatives at steps
    before it, and at steps after a reset.
    """
    return jax.tree.map(lambda v: jnp.where(jnp.isfinite(v), v, 0), tree)


def _writes(terms: Terms, written) -> Array:
    """Return the rows u of `AffineMap`."""
    if terms.read is None:
        return terms.values
    if terms.write is None:
        return written
    return jnp.concatenate([terms.values, written], -2)


def _any_reset(reset):
    return _map_optional(reset, lambda v: jnp.any(v, -1))


def _map_optional(v, fn):
    return None if v is None else fn(v)


def _swap(v: Array) -> Array:
    """`[chunks, C, heads, ...]` to `[chunks, heads, C, ...]`, or back."""
    return jnp.moveaxis(v, 1, 2)


def _through_decays(chunk: AffineMap, term, start, reset_in_chunk):
    """Return the states before the chunks, and the last, where nothing is erased."""
    count, heads, size, width = term.shape
    flat = (heads * size, width)
    states = linear_scan(
        Diagonal(chunk.kept.reshape(count, -1)),
        term.reshape(count, *flat),
        start.reshape(flat),
        reset=reset_in_chunk,
    ).reshape(count, heads, size, width)
    return shift(start, states), states[-1]


def _through_erasures(chunk: AffineMap, first, term, start, reset_in_chunk):
    """Return the states before the chunks, what each chunk writes, and the last state.

    What is written, e, `[chunks, heads, C, V]`, is `first` less what the steps find of
    the state and of earlier e. `term` is what else is added to the state at the end.
    """
    count, _, steps, _ = first.shape
    size = start.shape[-2]
    inverse = invert_unit_lower(chunk.scores[..., -steps:, -steps:])
    found = matmul(inverse, chunk.reach[..., -steps:, :])
    first, written = matmul(inverse, first), chunk.written[..., -steps:]
    shards = time_shards(count)
    backend = choose_backend("auto", "matrix", count, size).backend
    if shards == 1 and backend == "sequential":
        at = chunk.kept, found, written, first, term, reset_in_chunk
        return _step_through(start, at)
    transition = multiply(chunk.kept[..., None], jnp.eye(size, dtype=start.dtype))
    whole = matmul(written, first)
    states = linear_scan(
        BlockDiagonal(transition - matmul(written, found)),
        (whole if term is None else whole + term).reshape(count, -1, start.shape[-1]),
        start.reshape(-1, start.shape[-1]),
        reset=reset_in_chunk,
    ).reshape(count, *start.shape)
    states, last = shift(start, states), states[-1]
    return states, first - matmul(found, states), last


def _step_through(start, at):
    """`_through_erasures`, one chunk after the other.

    It forms no transition `[K, K]`, which takes 20% less time with a gradient where
    chunks are stepped through anyway.
    """

    def step(state, at):
        kept, found, written, first, term, reset_in_chunk = at
        e = for_end = first - matmul(found, state)
        entering = state
        if reset_in_chunk is not None:
            # Steps before the reset still find the state, the end does not.
            entering = jnp.where(reset_in_chunk, jnp.zeros_like(state), state)
            for_end = jnp.where(reset_in_chunk, first, e)
        end = kept[..., None] * entering + matmul(written, for_end)
        return (end if term is None else end + term), (state, e)

    last, (states, e) = lax.scan(step, start, at)
    return states, e, last


def _contain(plan: MatrixPlan, queries, terms: Terms, start, reset):
    """Take out what is not finite, and say which outputs it reaches.

    In a matrix product over a chunk, zero times NaN would reach earlier steps and
    other sequences, which the recurrence itself never does.

    **Returns:** finite queries, terms and start; bool `[Q, heads]` of the outputs, and
    `[heads]` of the last state, that are NaN.
    """
    steps, heads = terms.keys.shape[:2]

    def spoiled(v):
        return ~jnp.all(jnp.isfinite(v.reshape(*v.shape[:2], -1)), -1)

    bad = jnp.zeros((steps, heads), bool)
    for v in jax.tree.leaves(terms):
        bad = bad | spoiled(v)
    bad_start, bad_query = spoiled(start[None])[0], spoiled(queries)

    def clean(v):
        return jnp.where(bad.reshape(bad.shape + (1,) * (v.ndim - 2)), 0, v)

    terms = jax.tree.map(clean, terms)
    start = jnp.where(bad_start[:, None, None], 0, start)
    queries = jnp.where(bad_query[..., None], 0, queries)
    # The newest bad step against the newest reset, counted from 1; the start is 0.
    count = jnp.arange(1, steps + 1, dtype=jnp.int32)
    newest = running_max(jnp.where(bad, count[:, None], -1))
    newest = jnp.maximum(newest, jnp.where(bad_start, 0, -1)[None])
    fresh = jnp.zeros_like(count)
    if reset is not None:
        fresh = running_max(jnp.where(reset, count, 0))
    reached = newest >= fresh[:, None]
    last = reached[-1]
    if plan.emit == "before":
        # The state before step t, without what step t itself brings.
        earlier = shift(bad_start, reached)
        reached = earlier if reset is None else earlier & ~reset[:, None]
    every = plan.steps_per_query
    reached = reached[every - 1 :: every] | bad_query
    return queries, terms, start, reached, last


def sequential_linear_call(
    apply: Callable[[PyTree[Array], PyTree[Array]], PyTree[Array]],
    known: PyTree[Array],
    given: PyTree[Array],
) -> PyTree[Array]:
    r"""Return `apply(known, given)`, which is linear in `given`.

    It takes a batch one sequence at a time, and so does its transpose. Writing T for
    `apply`, it is y in the linear system

    $$\begin{pmatrix} 1 & 0 \\ -T & 1 \end{pmatrix}
    \begin{pmatrix} x \\ y \end{pmatrix} = \begin{pmatrix} x \\ 0 \end{pmatrix},$$

    because `lax.custom_linear_solve` is given the solvers of a system and of its
    transpose, whereas JAX cannot transpose a loop of `sequential_vmap`. Derivatives in
    `known` are those of the matrix, that is, of `apply` as it is written.

    `apply` is used by all three; wrap it in `jax.jit`, so that it is traced only once.
    """
    out = jax.eval_shape(apply, known, given)
    nothing = jtu.tree_map(lambda v: jnp.zeros(v.shape, v.dtype), out)
    example = jtu.tree_map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), given)

    def matrix(both):
        given, out = both
        return given, jtu.tree_map(jnp.subtract, out, apply(known, given))

    def solve(_, both):
        given, out = both
        more = sequential_vmap(apply)(known, given)
        return given, jtu.tree_map(jnp.add, out, more)

    @sequential_vmap
    def transposed(known, out):
        (given,) = jax.linear_transpose(lambda x: apply(known, x), example)(out)
        return given

    def transpose_solve(_, both):
        given, out = both
        return jtu.tree_map(jnp.add, given, transposed(known, out)), out

    terms = _depend_on_all((given, nothing))
    _, out = lax.custom_linear_solve(matrix, terms, solve, transpose_solve)
    return _depend_on_all(out)


def _depend_on_all(tree: PyTree[Array]) -> PyTree[Array]:
    """Make all tangents unknown if one of them is; see `fake_dependency`."""
    every = jnp.stack([jnp.sum(v) for v in jtu.tree_leaves(tree)])
    return jtu.tree_map(lambda v: fake_dependency(v, jnp.sum(every)), tree)
