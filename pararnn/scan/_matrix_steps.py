"""The recurrence of matrix states, one step after the other."""

import functools as ft
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ._arithmetic import einsum
from ._heuristics import MatrixPlan
from ._windows import in_windows


class Terms(NamedTuple):
    """What steps do to the state; leaves `[T, heads, ...]` or `None`."""

    keys: Array
    values: Array
    decay: Array | None
    read: Array | None
    write: Array | None


def stepwise(
    plan: MatrixPlan, queries, terms: Terms, start, reset, *, window: int | None
) -> tuple[Array, Array]:
    """Return outputs `[Q, heads, V]` and the last state, in windows of time if any."""
    every = plan.steps_per_query
    run = ft.partial(_take_steps, plan)
    at = queries, _split_by_query((terms, reset), every)
    # Windows of a few queries would store as many states as no windows.
    if window is None or window < 4 * every:
        return run(start, at)[::-1]
    return in_windows(run, start, at, window // every)[::-1]


def _take_steps(plan: MatrixPlan, start, at):
    """Return the last state and the outputs; the state is the carry of a loop."""
    # The derivative stores nothing but the states.
    run = ft.partial(jax.checkpoint, prevent_cse=False)(_up_to_query(plan))

    def body(state, at):
        state, (output, _) = run(state, at)
        return state, output

    queries, (terms, reset) = at
    return lax.scan(body, start, (queries, (_decay_each_key(terms), reset)))


def step_and_record(plan: MatrixPlan, queries, terms: Terms, start, reset):
    """Take the steps of chunks, and record what the derivative of chunks needs.

    **Arguments:** arrays `[chunks, Q or C, ...]`.

    **Returns:** outputs `[chunks, Q, heads, V]`; the states that the chunks start from,
    `[chunks, heads, K, V]`; where something is erased, what was written in its place,
    `[chunks, C, heads, V]`; the last state.
    """
    run, every = _up_to_query(plan), plan.steps_per_query

    def over_chunk(state, chunk):
        queries, steps = chunk
        last, (outputs, written) = lax.scan(
            run, state, (queries, _split_by_query(steps, every))
        )
        if every > 1:
            written = jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), written)
        return last, (outputs, state, written)

    at = queries, (_decay_each_key(terms), reset)
    last, recorded = lax.scan(over_chunk, start, at)
    return (*recorded, last)


def _decay_each_key(terms: Terms) -> Terms:
    """Give each key its decay: a product with whole heads takes twice the time."""
    if terms.decay is None or terms.decay.ndim == terms.keys.ndim:
        return terms
    decay = jnp.broadcast_to(terms.decay[..., None], terms.keys.shape)
    return terms._replace(decay=decay)


def _up_to_query(plan: MatrixPlan):
    """Return the steps up to the next query, as the body of a loop."""
    every = plan.steps_per_query

    def run(state, at):
        query, steps = at
        recorded = []
        for i in range(every):
            terms, reset = jax.tree.map(lambda v, i=i: v if every == 1 else v[i], steps)
            if reset is not None:
                state = jnp.where(reset, jnp.zeros_like(state), state)
            earlier = state
            state, written = _step(state, terms)
            recorded.append(written)
        written = (
            recorded[0]
            if every == 1
            else jax.tree.map(lambda *v: jnp.stack(v), *recorded)
        )
        seen = earlier if plan.emit == "before" else state
        return state, (_read(query, seen), written)

    return run


def _step(state, terms: Terms):
    """Return the next state, and what was written in place of what was erased.

    Products are `dot`s. XLA's CPU runs them as sums of products 2 to 50 times slower
    (40 against 0.8 us for one head of 64 x 64, jaxlib 0.10.2), and the derivative of an
    outer product that is written by broadcasting has such a sum.
    """
    kept, written = state, terms.values
    if terms.decay is not None:
        kept = einsum("hk,hkv->hkv", terms.decay, state)
    if terms.read is None:
        return kept + einsum("hk,hv->hkv", terms.keys, written), None
    erased = _read(terms.read, state)
    if terms.write is None:
        written = written - erased
        return kept + einsum("hk,hv->hkv", terms.keys, written), written
    kept = kept - einsum("hk,hv->hkv", terms.write, erased)
    return kept + einsum("hk,hv->hkv", terms.keys, written), -erased


def _read(vectors, state):
    """Return `Sᵀ q` of every head."""
    return einsum("hk,hkv->hv", vectors, state)


def _split_by_query(tree, every: int):
    """Put the steps between two queries side by side, `[Q, every, ...]`.

    Single steps stay `[Q, ...]`: XLA would copy the arrays for an axis of length 1.
    """
    if every == 1:
        return tree
    return jax.tree.map(lambda v: v.reshape(-1, every, *v.shape[1:]), tree)
