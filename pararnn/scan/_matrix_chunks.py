r"""The recurrence of matrix states by chunks, and its derivative.

A chunk is an affine map of the state that it starts from (see `_chunks.py`). What is
sequential is one linear recurrence over the chunks, whether it is of states or of their
tangents:

$$e_i = a_i - F_i S_i, \qquad S_{i+1} = \mathrm{diag}(d_i) S_i + W_i e_i + b_i.$$

The derivative takes the states before chunks and what was written within them, e, for
known. Then all that a chunk computes is products of known arrays, whose tangents need
no other chunk, except for this recurrence; and e, which solves a system of equations,
has the tangent that solves it once more. So the derivative neither stores nor computes
again what the value went through, and a value that is found step by step will do.
"""

import functools as ft
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ._choose import choose_backend
from ._chunks import Chunk, invert_unit_lower, matmul, summarise
from ._linear_scan import linear_scan
from ._matrix_steps import Terms, take_noted_steps
from ._prefix import running_max
from ._time_axis import shift, spread, time_shards
from ._transitions import BlockDiagonal, Diagonal
from ._windows import in_windows


class Way(NamedTuple):
    """How to go over the chunks."""

    every: int
    emit: str
    chunk: int
    # Chunks of a window of time; all at once if `None`.
    window: int | None
    # Whether a derivative takes the states from single steps.
    stepped: bool


def chunkwise(queries, terms: Terms, start, reset, *, way: Way):
    """Outputs and the last state, in chunks of time."""
    steps, count = len(terms.keys), len(queries)
    poisoned = None
    if not way.stepped:
        queries, terms, start, *poisoned = _contain(queries, terms, start, reset, way)
    shards = time_shards(steps)
    whole = -(-steps // (way.chunk * shards)) * shards

    def in_chunks(v, length: int, fill: float = 0):
        """Time first to `[chunks, C, ...]`."""
        if v is None:
            return None
        pads = [(0, whole * length - v.shape[0])] + [(0, 0)] * (v.ndim - 1)
        v = jnp.pad(v, pads, constant_values=fill)
        return spread(v.reshape(whole, length, *v.shape[1:]))

    queries = in_chunks(queries, way.chunk // way.every)
    keys, values, decay, *erasure = terms
    # A step that is filled in decays nothing.
    decay = in_chunks(decay, way.chunk, 1)
    terms = Terms(
        *(in_chunks(v, way.chunk) for v in (keys, values)),
        decay,
        *(in_chunks(v, way.chunk) for v in erasure),
    )
    reset = in_chunks(reset, way.chunk, False)
    course = _follow(way)(queries, terms, start, reset)
    outputs = course.outputs.reshape(-1, *course.outputs.shape[2:])[:count]
    if poisoned is None:
        return outputs, course.last

    def spoil(v, where):
        return v + jnp.where(where[..., None], jnp.nan, 0).astype(v.dtype)

    reached, last_reached = poisoned
    return spoil(outputs, reached), spoil(course.last, last_reached[:, None])


class _Course(NamedTuple):
    """What chunks went through."""

    outputs: Array
    # Before each chunk, `[chunks, heads, K, V]`.
    states: Array
    # In place of what each step erased, `[chunks, C, heads, V]`, if anything is.
    written: Array | None
    last: Array


def _follow(way: Way):
    """`(queries, terms, start, reset) -> _Course` over chunks, with its derivative."""
    by_chunks = _windowed(ft.partial(_by_chunks, way), way)

    def by_steps(*given):
        steps = take_noted_steps(*given, every=way.every, emit=way.emit)
        return _Course(*steps)

    follow = jax.custom_jvp(batch_in_front(by_steps if way.stepped else by_chunks))

    @follow.defjvp
    def _(primals, tangents):
        course = follow(*primals)
        return course, batch_in_front(_tangents)(way, primals, course, tangents)

    return follow


def _windowed(run, way: Way):
    """`run(queries, terms, start, reset) -> _Course`, a window of chunks at a time."""
    if way.window is None:
        return run

    def on_window(state, given):
        queries, terms, reset = given
        course = run(queries, terms, state, reset)
        return course.last, course[:-1]

    def windows(queries, terms, start, reset):
        last, rest = in_windows(on_window, start, (queries, terms, reset), way.window)
        return _Course(*rest, last)

    return windows


def batch_in_front(run):
    """`run`, with a batch of a `vmap` in front of all that it returns.

    JAX takes the batch axes of a `custom_jvp` rule to be those of its function, and a
    loop leaves them behind time, where matrix products have them in front. The rule
    that batches a reshape moves them to the front in both.
    """

    def at_front(*given):
        return jax.tree.map(lambda v: v.reshape(-1).reshape(v.shape), run(*given))

    return at_front


def _by_chunks(way: Way, queries, terms: Terms, start, reset) -> _Course:
    """By products of matrices alone."""
    factors = _factors(way, queries, terms, reset)
    chunk = summarise(*factors, before=way.emit == "before")
    values, anew = factors[2], _anew(reset)
    if terms.read is None:
        term = matmul(chunk.written, values)
        states, last = _through_decays(chunk, term, start, anew)
        return _Course(_forth(chunk.found(states, values)), states, None, last)
    asked, steps = queries.shape[1], way.chunk
    inverse = invert_unit_lower(chunk.scores[..., asked:, -steps:])
    if terms.write is None:
        first, term = values, None
    else:
        # What is written along the keys is known, and so is what is found of it.
        first = -matmul(chunk.scores[..., asked:, :steps], values)
        term = matmul(chunk.written[..., :steps], values)
    found = matmul(inverse, chunk.reach[..., asked:, :])
    states, written, last = _through_erasures(
        chunk.kept,
        found,
        chunk.written[..., -steps:],
        matmul(inverse, first),
        term,
        start,
        anew,
    )
    writes = _writes(terms, values, written)
    outputs = matmul(chunk.reach[..., :asked, :], states)
    outputs = outputs + matmul(chunk.scores[..., :asked, :], writes)
    return _Course(_forth(outputs), states, _forth(written), last)


def _tangents(way: Way, primals, course: _Course, tangents) -> _Course:
    """Of `course`, with its states and writes for known."""
    queries, terms, _, reset = primals
    # Of booleans, there are none.
    dqueries, dterms, dstart, _ = tangents

    def on_window(dstate, at):
        given, known, dgiven = at
        return _chunk_tangents(way, *given, *known, *dgiven, dstate)

    at = (
        (queries, terms, reset),
        (course.states, course.written),
        (dqueries, dterms),
    )
    if way.window is None:
        last, rest = jax.checkpoint(on_window)(dstart, at)
    else:
        last, rest = in_windows(on_window, dstart, at, way.window)
    return _Course(*rest, last)


def _chunk_tangents(
    way: Way, queries, terms, reset, states, written, dqueries, dterms, dstart
):
    states, written = _finite((states, _back(written)))

    def respond(queries, terms):
        """What known states and writes would lead to."""
        queries, terms = _finite((queries, terms))
        factors = _factors(way, queries, terms, reset)
        chunk = summarise(*factors, before=way.emit == "before")
        writes = _writes(terms, factors[2], written)
        return (chunk.found(states, writes), chunk.end(states, writes)), chunk

    _, (dfound, dend), chunk = jax.jvp(
        respond, (queries, terms), (dqueries, dterms), has_aux=True
    )
    anew = _anew(reset)
    if terms.read is None:
        dstates, dlast = _through_decays(chunk, dend, dstart, anew)
        doutputs = dfound + matmul(chunk.reach, dstates)
        return dlast, (_forth(doutputs), dstates, None)
    asked, steps = queries.shape[1], way.chunk
    doutputs, dfirst = dfound[..., :asked, :], -dfound[..., asked:, :]
    if terms.write is None:
        dfirst = dfirst + _back(dterms.values)
    inverse = invert_unit_lower(chunk.scores[..., asked:, -steps:])
    dstates, dwritten, dlast = _through_erasures(
        chunk.kept,
        matmul(inverse, chunk.reach[..., asked:, :]),
        chunk.written[..., -steps:],
        matmul(inverse, dfirst),
        dend,
        dstart,
        anew,
    )
    doutputs = doutputs + matmul(chunk.reach[..., :asked, :], dstates)
    doutputs = doutputs + matmul(chunk.scores[..., :asked, -steps:], dwritten)
    return dlast, (_forth(doutputs), dstates, _forth(dwritten))


def _factors(way: Way, queries, terms: Terms, reset):
    """What `summarise` is given, `[chunks, heads, C, ...]`; a reset decays by zero."""
    queries, keys, values, decay, read, write = (_back(v) for v in (queries, *terms))
    if decay is None:
        # One head stands for all, and one chunk too where nothing is reset.
        shape = (1, 1, way.chunk) if reset is None else (len(keys), 1, way.chunk)
        decay = jnp.ones(shape, keys.dtype)
    if reset is not None:
        anew = reset[:, None]
        decay = jnp.where(anew.reshape(anew.shape + (1,) * (decay.ndim - 3)), 0, decay)
        if read is not None:
            read = jnp.where(anew[..., None], 0, read)
        if way.emit == "before":
            asked = anew[..., way.every - 1 :: way.every, None]
            queries = jnp.where(asked, 0, queries)
    return queries, keys, values, decay, read, write


def _finite(tree):
    """Zeros for what is not: it is in the value, and must not reach, in a product of
    matrices, the derivative of what is before it or begins after it."""
    return jax.tree.map(lambda v: jnp.where(jnp.isfinite(v), v, 0), tree)


def _writes(terms: Terms, values, written):
    if terms.read is None:
        return values
    if terms.write is None:
        return written
    return jnp.concatenate([values, written], -2)


def _anew(reset):
    return None if reset is None else jnp.any(reset, -1)


def _back(v):
    """`[chunks, C, heads, ...]` to `[chunks, heads, C, ...]`."""
    return None if v is None else jnp.moveaxis(v, 1, 2)


_forth = _back


def _through_decays(chunk: Chunk, term, start, anew):
    """The states before the chunks, and the last, where nothing is erased."""
    count, heads, size, width = term.shape
    flat = (heads * size, width)
    states = linear_scan(
        Diagonal(chunk.kept.reshape(count, -1)),
        term.reshape(count, *flat),
        start.reshape(flat),
        reset=anew,
    ).reshape(count, heads, size, width)
    return shift(start, states), states[-1]


def _through_erasures(kept, found, written, first, term, start, anew):
    """States before the chunks, what each writes, `[chunks, heads, C, V]`, the last."""
    count, _, size = kept.shape
    shards = time_shards(count)
    backend = choose_backend("auto", "matrix", count, size).backend
    if shards == 1 and backend == "sequential":
        return _step_through(kept, found, written, first, term, start, anew)
    transition = kept[..., None] * jnp.eye(size, dtype=kept.dtype)
    whole = matmul(written, first)
    states = linear_scan(
        BlockDiagonal(transition - matmul(written, found)),
        (whole if term is None else whole + term).reshape(count, -1, start.shape[-1]),
        start.reshape(-1, start.shape[-1]),
        reset=anew,
    ).reshape(count, *start.shape)
    states, last = shift(start, states), states[-1]
    return states, first - matmul(found, states), last


def _step_through(kept, found, written, first, term, start, anew):
    """The same, one chunk after the other.

    No transition `[K, K]` is formed: where chunks are stepped through anyway, that
    takes a fifth less time with a gradient.
    """

    def step(state, at):
        kept, found, written, first, term, anew = at
        e = for_end = first - matmul(found, state)
        entering = state
        if anew is not None:
            # Steps before the reset still find the state, the end does not.
            entering = jnp.where(anew, jnp.zeros_like(state), state)
            for_end = jnp.where(anew, first, e)
        end = kept[..., None] * entering + matmul(written, for_end)
        return (end if term is None else end + term), (state, e)

    at = kept, found, written, first, term, anew
    last, (states, e) = lax.scan(step, start, at)
    return states, e, last


def _contain(queries, terms: Terms, start, reset, way: Way):
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
    if way.emit == "before":
        # The state before step t, and nothing that step t itself brings.
        earlier = shift(bad_start, reached)
        reached = earlier if reset is None else earlier & ~reset[:, None]
    reached = reached[way.every - 1 :: way.every] | bad_query
    return queries, terms, start, reached, last
