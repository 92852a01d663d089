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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array

from ._arithmetic import multiply
from ._choose import choose_backend
from ._chunks import Chunk, invert_unit_lower, matmul, summarise
from ._in_turn import linear_map
from ._linear_scan import linear_scan
from ._matrix_steps import Terms, step_and_record
from ._prefix import running_max
from ._time_axis import shift, spread, time_shards
from ._transitions import BlockDiagonal, Diagonal
from ._windows import in_windows

# Windows between two states that are stored where the value is by chunks too.
_STORED = 8


class Way(NamedTuple):
    """How to go over the chunks."""

    every: int
    emit: str
    chunk: int
    # Chunks that a derivative takes together; all at once if `None`.
    window: int | None
    # Whether a derivative takes the states from single steps.
    stepped: bool
    # Whether to go over a batch one sequence after the other.
    in_turn: bool


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
        pads = [(0, whole * length - v.shape[0])] + [(0, 0)] * (v.ndim - 1)
        v = jnp.pad(v, pads, constant_values=fill)
        return spread(v.reshape(whole, length, *v.shape[1:]))

    queries = in_chunks(queries, way.chunk // way.every)
    # A step that is filled in decays nothing.
    decay = _if_any(terms.decay, lambda v: in_chunks(v, way.chunk, 1))
    terms = jax.tree.map(lambda v: in_chunks(v, way.chunk), terms._replace(decay=None))
    terms = terms._replace(decay=decay)
    reset = _if_any(reset, lambda v: in_chunks(v, way.chunk, False))
    outputs, last = _run(way)(queries, terms, start, reset)
    outputs = outputs.reshape(-1, *outputs.shape[2:])[:count]
    if poisoned is None:
        return outputs, last

    def spoil(v, where):
        return v + jnp.where(where[..., None], jnp.nan, 0).astype(v.dtype)

    reached, last_reached = poisoned
    return spoil(outputs, reached), spoil(last, last_reached[:, None])


class _Course(NamedTuple):
    """What chunks went through."""

    # `[chunks, Q, heads, V]`
    outputs: Any
    # Before each chunk, `[chunks, heads, K, V]`.
    states: Any
    # In place of what each step erased, `[chunks, C, heads, V]`, if anything is.
    written: Any
    # `[heads, K, V]`
    last: Any


def _run(way: Way):
    """`(queries, terms, start, reset) -> (outputs, last)` over chunks."""
    follow = _follow(way)
    if way.stepped or way.window is None:

        def at_once(*given):
            course = follow(*given)
            return course.outputs, course.last

        return at_once

    length = _STORED * way.window

    def on_window(state, given):
        queries, terms, reset = given
        course = follow(queries, terms, state, reset)
        return course.last, course.outputs

    # What these windows need of their value, the derivative computes again, in smaller
    # ones: of states, only those between these are stored.
    def windows(queries, terms, start, reset):
        return in_windows(on_window, start, (queries, terms, reset), length)[::-1]

    return windows


def _follow(way: Way):
    """`(queries, terms, start, reset) -> _Course` over chunks, with its derivative."""

    def by_steps(*given):
        return _Course(*step_and_record(*given, every=way.every, emit=way.emit))

    value = by_steps if way.stepped else ft.partial(_by_chunks, way)
    if way.in_turn:
        value = sequential_vmap(value)
    follow = jax.custom_jvp(batch_in_front(value))
    respond = batch_in_front(ft.partial(_tangents, way))
    if way.in_turn:
        respond = jax.jit(respond)

    @follow.defjvp
    def _(primals, tangents):
        course = follow(*primals)
        queries, terms, _, reset = primals
        known = (queries, terms, reset), (course.states, course.written)
        # Of booleans, there are none.
        given = tangents[:3]
        if not way.in_turn:
            return course, respond(known, given)

        def some(*names: str):
            def of(known, given):
                found = respond(known, given)
                return tuple(getattr(found, name) for name in names)

            return linear_map(of, known, given)

        # Two maps, as XLA drops the other one where only what is returned is derived.
        outputs, last = some("outputs", "last")
        states, written = some("states", "written")
        return course, _Course(outputs, states, written, last)

    return follow


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
    given = _factors(way, queries, terms, reset)
    chunk = summarise(*given, before=way.emit == "before")
    values, anew, steps = given.values, _anew(reset), way.chunk
    if given.read is None:
        term = matmul(chunk.written, values)
        states, last = _through_decays(chunk, term, start, anew)
        return _Course(_turn(chunk.found(states, values)), states, None, last)
    asked = given.queries.shape[-2]
    if given.write is None:
        first, term = values, None
    else:
        # What is written along the keys is known, and so is what is found of it.
        first = -matmul(chunk.scores[..., asked:, :steps], values)
        term = matmul(chunk.written[..., :steps], values)
    states, written, last = _through_erasures(chunk, first, term, start, anew)
    outputs = matmul(chunk.reach[..., :asked, :], states)
    writes = _writes(given, written)
    outputs = outputs + matmul(chunk.scores[..., :asked, :], writes)
    return _Course(_turn(outputs), states, _turn(written), last)


def _tangents(way: Way, known, given) -> _Course:
    """Of a course, for tangents `given` of queries, terms and start.

    `known` are the queries, terms and resets, and the states and writes of the course.
    """
    dqueries, dterms, dstart = given

    def on_window(dstate, at):
        known, dqueries, dterms = at
        dcourse = _tangents_of_chunks(way, known, (dqueries, dterms, dstate))
        return dcourse.last, dcourse._replace(last=None)

    at = known, dqueries, dterms
    if way.window is None:
        last, dcourse = jax.checkpoint(on_window)(dstart, at)
    else:
        last, dcourse = in_windows(on_window, dstart, at, way.window)
    return dcourse._replace(last=last)


def _tangents_of_chunks(way: Way, known, given) -> _Course:
    (queries, terms, reset), (states, written) = known
    dqueries, dterms, dstart = given
    states, written = _finite((states, _if_any(written, _turn)))

    def respond(queries, terms):
        """What known states and writes would lead to."""
        given = _factors(way, _finite(queries), _finite(terms), reset)
        chunk = summarise(*given, before=way.emit == "before")
        writes = _writes(given, written)
        return (chunk.found(states, writes), chunk.end(states, writes)), chunk

    _, (dfound, dend), chunk = jax.jvp(
        respond, (queries, terms), (dqueries, dterms), has_aux=True
    )
    anew = _anew(reset)
    if terms.read is None:
        dstates, dlast = _through_decays(chunk, dend, dstart, anew)
        doutputs = dfound + matmul(chunk.reach, dstates)
        return _Course(_turn(doutputs), dstates, None, dlast)
    asked, steps = queries.shape[1], way.chunk
    doutputs, dfirst = dfound[..., :asked, :], -dfound[..., asked:, :]
    if terms.write is None:
        dfirst = dfirst + _turn(dterms.values)
    dstates, dwritten, dlast = _through_erasures(chunk, dfirst, dend, dstart, anew)
    doutputs = doutputs + matmul(chunk.reach[..., :asked, :], dstates)
    doutputs = doutputs + matmul(chunk.scores[..., :asked, -steps:], dwritten)
    return _Course(_turn(doutputs), dstates, _turn(dwritten), dlast)


class _Factors(NamedTuple):
    """What `summarise` is given, `[chunks, heads, C, ...]`."""

    queries: Array
    keys: Array
    values: Array
    decay: Array
    read: Array | None
    write: Array | None


def _factors(way: Way, queries, terms: Terms, reset) -> _Factors:
    """A reset is a decay by zero, and nothing to erase."""
    queries, terms = jax.tree.map(_turn, (queries, terms))
    keys, decay, read = terms.keys, terms.decay, terms.read
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
    return _Factors(queries, keys, terms.values, decay, read, terms.write)


def _finite(tree):
    """Zeros for what is not: it is in the value, and must not reach, in a product of
    matrices, the derivative of what is before it or begins after it."""
    return jax.tree.map(lambda v: jnp.where(jnp.isfinite(v), v, 0), tree)


def _writes(given: _Factors, written) -> Array:
    """The rows u of `Chunk`."""
    if given.read is None:
        return given.values
    if given.write is None:
        return written
    return jnp.concatenate([given.values, written], -2)


def _anew(reset):
    return _if_any(reset, lambda v: jnp.any(v, -1))


def _if_any(v, fn):
    return None if v is None else fn(v)


def _turn(v: Array) -> Array:
    """`[chunks, C, heads, ...]` to `[chunks, heads, C, ...]`, or back."""
    return jnp.moveaxis(v, 1, 2)


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


def _through_erasures(chunk: Chunk, first, term, start, anew):
    """States before the chunks, what each writes, `[chunks, heads, C, V]`, the last.

    What is written, e, is `first`, less what the steps find of the state and of e
    before them; `term` is what else is at the end of a chunk.
    """
    count, _, steps, _ = first.shape
    size = start.shape[-2]
    inverse = invert_unit_lower(chunk.scores[..., -steps:, -steps:])
    found = matmul(inverse, chunk.reach[..., -steps:, :])
    first, written = matmul(inverse, first), chunk.written[..., -steps:]
    shards = time_shards(count)
    backend = choose_backend("auto", "matrix", count, size).backend
    if shards == 1 and backend == "sequential":
        return _step_through(chunk.kept, found, written, first, term, start, anew)
    transition = multiply(chunk.kept[..., None], jnp.eye(size, dtype=start.dtype))
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
