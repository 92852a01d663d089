"""Inputs that are not finite, kept within the sequence that they belong to."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from pararnn.scan import poison, running_max

Mix = Callable[
    [Float[Array, "T d_model"], PyTree[Array], Bool[Array, " T"] | None],
    tuple[Float[Array, "T d_model"], PyTree[Array]],
]


def mix_contained(
    mix: Mix,
    xs: Float[Array, "T d_model"],
    state: PyTree[Array],
    reset: Bool[Array, " T"] | None,
    init_state: Callable[[], PyTree[Array]],
) -> tuple[Float[Array, "T d_model"], PyTree[Array]]:
    """`mix(xs, state, reset)`, whose derivatives keep what is not finite from other
    sequences.

    Values are kept apart by resets, but derivatives multiply: a weight's is the sum
    over all steps of cotangents times inputs, and zero times NaN is NaN. So a step that
    is not finite is computed with the inputs of one that is (a layer may be singular at
    zero), or with the fresh state. What it would reach, up to the next reset, is NaN,
    and so are derivatives of it. Without resets there are no other sequences.
    """
    if reset is None:
        return mix(xs, state, reset)
    bad = ~jnp.all(jnp.isfinite(xs), -1)
    bad_state = jnp.zeros((), bool)
    for leaf in jax.tree.leaves(state):
        bad_state = bad_state | ~jnp.all(jnp.isfinite(leaf))
    # The newest bad step against the newest reset, counted from 1; the state is 0.
    count = jnp.arange(1, xs.shape[0] + 1, dtype=jnp.int32)
    newest = jnp.maximum(
        running_max(jnp.where(bad, count, -1)), jnp.where(bad_state, 0, -1)
    )
    lost = newest >= running_max(jnp.where(reset, count, 0))

    def spoil(leaf):
        # A count has no NaN; what it counts has.
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return poison(leaf, jnp.broadcast_to(lost[-1], leaf.shape))

    xs = jnp.where(bad[:, None], lax.dynamic_index_in_dim(xs, jnp.argmin(bad)), xs)
    state = jax.tree.map(lambda f, s: jnp.where(bad_state, f, s), init_state(), state)
    ys, last = mix(xs, state, reset)
    ys = poison(ys, jnp.broadcast_to(lost[:, None], ys.shape))
    return ys, jax.tree.map(spoil, last)
