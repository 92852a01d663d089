"""The recurrence of matrix states one step after the other."""

import functools as ft
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ._windows import in_windows


class Terms(NamedTuple):
    """What steps do to the state; leaves `[T, heads, ...]` or `None`."""

    keys: Array
    values: Array
    decay: Array | None
    read: Array | None
    write: Array | None


def stepwise(queries, terms: Terms, start, reset, *, every, emit, window: int | None):
    """Outputs `[Q, heads, V]` and the last state, in windows of time if any."""
    run = ft.partial(_take_steps, every, emit)
    # Windows of a few groups would store as many states as no windows.
    if window is None or window < 4 * every:
        return run(start, (queries, _groups((terms, reset), every)))[::-1]
    at = queries, _groups((terms, reset), every)
    return in_windows(run, start, at, window // every)[::-1]


def _take_steps(every: int, emit: str, start, at):
    """The last state and the outputs; the state is the carry of a loop."""
    # All that the derivative stores is the states.
    run = ft.partial(jax.checkpoint, prevent_cse=False)(_up_to_query(every, emit))

    def body(state, at):
        state, (output, _) = run(state, at)
        return state, output

    queries, (terms, reset) = at
    return lax.scan(body, start, (queries, (_each_key(terms), reset)))


def step_and_record(queries, terms: Terms, start, reset, *, every: int, emit: str):
    """The same of chunks, `[chunks, Q or C, ...]`, and what their derivative needs.

    **Returns:** outputs `[chunks, Q, heads, V]`; the states that the chunks start from,
    `[chunks, heads, K, V]`; where something is erased, what was written in its place,
    `[chunks, C, heads, V]`; the last state.
    """
    run = _up_to_query(every, emit)

    def over_chunk(state, chunk):
        queries, steps = chunk
        last, (outputs, written) = lax.scan(
            run, state, (queries, _groups(steps, every))
        )
        if every > 1:
            written = jax.tree.map(_join_groups, written)
        return last, (outputs, state, written)

    last, noted = lax.scan(over_chunk, start, (queries, (_each_key(terms), reset)))
    return (*noted, last)


def _each_key(terms: Terms) -> Terms:
    """With a decay for each key: as a product with whole heads a step takes twice the
    time."""
    if terms.decay is None or terms.decay.ndim == terms.keys.ndim:
        return terms
    decay = jnp.broadcast_to(terms.decay[..., None], terms.keys.shape)
    return terms._replace(decay=decay)


def _up_to_query(every: int, emit: str):
    """The steps up to the next query, as the body of a loop."""

    def run(state, at):
        query, group = at
        noted = []
        for i in range(every):
            terms, reset = jax.tree.map(lambda v, i=i: v if every == 1 else v[i], group)
            if reset is not None:
                state = jnp.where(reset, jnp.zeros_like(state), state)
            earlier = state
            state, written = _step(state, terms)
            noted.append(written)
        written = (
            noted[0] if every == 1 else jax.tree.map(lambda *v: jnp.stack(v), *noted)
        )
        return state, (_read(query, earlier if emit == "before" else state), written)

    return run


def _step(state, terms: Terms):
    """The next state, and what was written in place of what was erased."""
    kept, written = state, terms.values
    if terms.decay is not None:
        kept = _product("hk,hkv->hkv", terms.decay, state)
    if terms.read is None:
        return kept + _product("hk,hv->hkv", terms.keys, written), None
    erased = _read(terms.read, state)
    if terms.write is None:
        written = written - erased
        return kept + _product("hk,hv->hkv", terms.keys, written), written
    kept = kept - _product("hk,hv->hkv", terms.write, erased)
    return kept + _product("hk,hv->hkv", terms.keys, written), -erased


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
