"""Long sequences, one window of time after the other."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from pararnn.scan import (
    in_windows,
    is_symbolic,
    poison,
    running_max,
    time_shards,
)

Mix = Callable[
    [Float[Array, "T d_model"], PyTree[Array], Bool[Array, " T"] | None],
    tuple[Float[Array, "T d_model"], PyTree[Array]],
]

# In windows over at once (2 cores of an Intel Xeon, jax 0.10.2, d_model = 64, windows
# of 2048 steps): time of the value, of value and gradient, and memory of the latter.
# The column in the middle is measured again by `python -m benchmarks layers`.
#
# | layer    | T = 32768         | T = 65536         | T = 131072        |
# |----------|-------------------|-------------------|-------------------|
# | min_gru  | 1.02, 0.89, 0.23  | 0.77, 0.96, 0.23  | 0.75, 0.85, 0.22  |
# | rg_lru   | 0.98, 0.73, 0.19  | 0.81, 0.96, 0.19  | 0.93, 0.75, 0.18  |
# | lru      | 0.52, 0.66, 0.16  | 0.60, 0.75, 0.16  | 0.64, 0.73, 0.16  |
# | s5       | 1.29, 0.83, 0.34  | 0.68, 0.93, 0.34  | 0.80, 0.88, 0.34  |
# | gla      |                   | 0.76, 0.93, 0.15  |                   |
# | deltanet |                   | 0.69, 0.84, 0.08  |                   |
# | mamba    |                   | 0.66, 1.13, 0.08  |                   |
#
# (The lower three, at once, have windows in their own recurrences.)
#
# What is computed twice is cheaper than what does not fit into the caches. For fewer
# steps it depends on the batch, which nothing inside of a `vmap` knows: of 16 sequences
# of T = 8192, in windows of 1024, gradients take 0.7 to 0.85 of the time, of a single
# one up to 1.6. On a GPU (not measured) windows would take away what runs in parallel.
_WINDOW = 2048
_LONG = 32 * _WINDOW
# Layers that store much of each step, and say how much, go in windows at any length,
# of so many numbers each: time and memory as above, T = 4096, d_model = 64, on 2 cores
# of an AMD EPYC without AVX-512.
#
# | layer              | steps of a window | in windows over at once | at once, MB |
# |--------------------|-------------------|-------------------------|-------------|
# | unitary            | 29                | 0.44, 0.46, 0.01        | 4596        |
# | block_lrnn         | 512               | 0.71, 1.03, 0.16        | 277         |
# | lssl               | 512               | 0.46, 1.17, 0.14        | 272         |
# | commutative_monoid | 780               | 1.11, 0.97, 0.25        | 687         |
_NUMBERS = 2**23
# Fewer steps make products of matrices no faster.
_FEWEST = 16


def mix_in_windows(
    mix: Mix,
    xs: Float[Array, "T d_model"],
    state: PyTree[Array],
    reset: Bool[Array, " T"] | None,
    numbers: int | None,
    init_state: Callable[[], PyTree[Array]],
) -> tuple[Float[Array, "T d_model"], PyTree[Array]]:
    """`mix(xs, state, reset)`, in windows where the sequence is long, or where the
    derivative stores many `numbers` for each step: beyond inputs and outputs, the
    memory of a gradient is then that of one window."""

    def window(state, at):
        ys, last = mix_contained(mix, at[0], state, at[1], init_state)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), last, state), ys

    length = _choose_window(xs.shape[0], numbers)
    state, ys = in_windows(window, state, (xs, reset), length)
    return ys, state


def _choose_window(steps: int, numbers: int | None) -> int:
    """Steps of a window: on a CPU, unless devices share time; otherwise all."""
    if jax.default_backend() != "cpu" or time_shards(steps) > 1:
        return steps
    if numbers is not None:
        return max(_FEWEST, _NUMBERS // numbers)
    return steps if is_symbolic(steps) or steps < _LONG else _WINDOW


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
