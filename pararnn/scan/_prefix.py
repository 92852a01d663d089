"""Prefixes under any associative operation, sequential or in parallel."""

import functools as ft
from collections.abc import Callable
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from .._checks import check_reset, is_symbolic, refuse_symbolic
from ._mesh_axes import vary
from ._time_sharding import join_time, on_each_device, split_time, time_shards

Element = TypeVar("Element")


def prefix(
    combine: Callable[[Element, Element], Element],
    elements: Element,
    backend: Literal["auto", "sequential", "associative"] = "auto",
) -> Element:
    """Return all prefixes `e_1`, `e_1 * e_2`, ... of elements `[T, ...]`, a pytree.

    `combine(earlier, later)` acts on leaves `[n, ...]`, n pairs at once, and must be
    associative. `auto` is sequential on a CPU, as for `linear_scan` (see
    `_heuristics.py`), and associative elsewhere. Where devices share time, this is the
    schedule within each device.
    """
    steps = jax.tree.leaves(elements)[0].shape[0]
    elements = vary(elements, elements)
    shards = time_shards(steps)
    on_one_device = ft.partial(_prefix, combine, backend)
    if shards > 1:
        return _over_shards(combine, on_one_device, elements, steps, shards)
    return on_one_device(elements)


def _prefix(combine, backend, elements):
    steps = jax.tree.leaves(elements)[0].shape[0]
    if is_symbolic(steps):
        remedy = "Pass 'sequential', or leave it out"
        if backend == "associative":
            refuse_symbolic("prefix", f"`backend` {backend!r}", remedy, steps)
        return _from_the_first(combine, elements, steps)
    if backend == "auto":
        on_cpu = jax.default_backend() == "cpu"
        backend = "sequential" if on_cpu else "associative"
    if backend == "associative":
        return lax.associative_scan(combine, elements)

    def step(before, element):
        after = combine(before, jax.tree.map(lambda e: e[None], element))
        return after, jax.tree.map(lambda e: e[0], after)

    first = jax.tree.map(lambda e: e[:1], elements)
    _, later = lax.scan(step, first, jax.tree.map(lambda e: e[1:], elements))
    return jax.tree.map(lambda a, b: lax.concatenate([a, b], 0), first, later)


def _from_the_first(combine, elements, steps):
    """Loop over a symbolic number of steps, where no first element can be cut off."""

    def step(before, at):
        number, element = at
        element = jax.tree.map(lambda e: e[None], element)
        after = lax.cond(
            number == 0, lambda _, e: e, lambda b, e: combine(b, e), before, element
        )
        return after, jax.tree.map(lambda e: e[0], after)

    first = jax.tree.map(lambda e: e[:1], elements)
    return lax.scan(step, first, (jnp.arange(steps), elements))[1]


def _over_shards(combine, on_one_device, elements, steps: int, shards: int):
    """Find the prefixes within each shard, and combine them with what came before."""
    split = jax.tree.map(lambda e: split_time(e, shards), elements)
    own = jax.vmap(on_one_device, in_axes=1, out_axes=1)(split)

    def before_own(at, totals):
        at = jnp.maximum(at - 1, 0)
        before = on_one_device(totals)
        return jax.tree.map(lambda t: lax.dynamic_slice_in_dim(t, at, 1), before)

    def prepend(before, own):
        before = jax.tree.map(lambda b, o: jnp.broadcast_to(b, o.shape), before, own)
        return combine(before, own)

    exchange = on_each_device(before_own, shards)
    before = exchange(jax.tree.map(lambda e: e[-1], own))
    whole = jax.vmap(prepend, in_axes=(0, 1), out_axes=1)(before, own)

    def choose(own, whole):
        first = jnp.arange(shards, dtype=jnp.int32) == 0
        first = first.reshape(1, -1, *(1,) * (own.ndim - 2))
        return join_time(jnp.where(first, own, whole), steps)

    return jax.tree.map(choose, own, whole)


def running_max(x: Shaped[Array, "T ..."]) -> Shaped[Array, "T ..."]:
    """Return the largest entry so far, along time."""
    if time_shards(x.shape[0]) == 1:
        return lax.cummax(x)
    return prefix(jnp.maximum, x)


def max_plus_scan(
    decay: Float[Array, "T *state"],
    inputs: Float[Array, "T *state"],
    initial: Float[Array, " *state"],
    *,
    reset: Bool[Array, " T"] | None = None,
    reset_state: Float[Array, " *state"] | None = None,
) -> Float[Array, "T *state"]:
    r"""Return every state of $m_t = \max(a_t + m_{t-1}, b_t)$.

    This is a linear recurrence in the max-plus algebra, where + is max and the product
    is +. The stabiliser of exponential gates has this form: it is the logarithm of the
    largest term of a sum of products.

    **Arguments:** `decay`, $a_t$; `inputs`, $b_t$; `initial`, $m_0$; `reset`, bool
    `[T]`, where true step t starts from `reset_state`, or zeros.

    **Returns:** $m_1 \dots m_T$, `[T, *state]`.

    **Raises:** `ValueError`, `TypeError` on a reset that does not fit.
    """
    check_reset("max_plus_scan", reset, reset_state, inputs.shape[0])
    if inputs.shape[0] == 0:
        return inputs
    terms = inputs.at[0].max(decay[0] + initial)
    if reset is not None:
        fresh = jnp.zeros_like(initial) if reset_state is None else reset_state
        restarts = reset.reshape(-1, *(1,) * initial.ndim)
        terms = jnp.where(restarts, jnp.maximum(inputs, decay + fresh[None]), terms)

    def combine(earlier, later):
        (a1, b1, r1), (a2, b2, r2) = earlier, later
        carried = jnp.maximum(a2 + b1, b2)
        if r2 is None:
            return a1 + a2, carried, None
        return jnp.where(r2, a2, a1 + a2), jnp.where(r2, b2, carried), r1 | r2

    elements = decay, terms, None if reset is None else restarts
    return prefix(combine, elements)[1]
