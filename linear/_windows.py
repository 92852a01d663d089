"""Long sequences run in windows, and inputs that are not finite contained."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from pararnn._checks import is_symbolic
from pararnn.scan import in_windows, poison, running_max, time_shards

Mix = Callable[
    [Float[Array, "T d_model"], PyTree[Array], Bool[Array, " T"] | None],
    tuple[Float[Array, "T d_model"], PyTree[Array]],
]

# Ratios of windows of 2048 steps to the whole sequence at once, at T = 65536 and
# d_model = 64: time of the value, time of value and gradient, memory of the gradient.
# Computing twice is cheaper than what does not fit into the caches. Shorter sequences,
# the machine and GPUs: docs/devdocs/linear.md. `python -m benchmarks layers` measures
# the middle ratio again.
#
# | min_gru          | rg_lru           | lru              | s5               |
# |------------------|------------------|------------------|------------------|
# | 0.77, 0.96, 0.23 | 0.81, 0.96, 0.19 | 0.60, 0.75, 0.16 | 0.68, 0.93, 0.34 |
_WINDOW = 2048
_WINDOWED_FROM = 32 * _WINDOW
# Layers that state how much they store for each step run in windows at any length, of
# this many numbers each. The same ratios at T = 4096:
#
# | unitary          | block_lrnn       | lssl             | commutative_monoid |
# |------------------|------------------|------------------|--------------------|
# | 0.44, 0.46, 0.01 | 0.71, 1.03, 0.16 | 0.46, 1.17, 0.14 | 1.11, 0.97, 0.25   |
_NUMBERS_PER_WINDOW = 2**23
# Shorter windows do not make products of matrices faster.
_MIN_WINDOW = 16


def mix_in_windows(
    mix: Mix,
    xs: Float[Array, "T d_model"],
    state: PyTree[Array],
    reset: Bool[Array, " T"] | None,
    numbers: int | None,
    init_state: Callable[[], PyTree[Array]],
) -> tuple[Float[Array, "T d_model"], PyTree[Array]]:
    """Call `mix(xs, state, reset)` in windows, if the sequence is long or the
    derivative stores many `numbers` for each step.

    Beyond inputs and outputs, a gradient then needs the memory of one window.
    """

    def window(state, at):
        ys, last = mix_contained(mix, at[0], state, at[1], init_state)
        return jax.tree.map(lambda new, old: new.astype(old.dtype), last, state), ys

    length = _choose_window(xs.shape[0], numbers)
    state, ys = in_windows(window, state, (xs, reset), length)
    return ys, state


def _choose_window(steps: int, numbers: int | None) -> int:
    """Return the steps of a window: all of them off the CPU or if time is sharded."""
    if jax.default_backend() != "cpu" or time_shards(steps) > 1:
        return steps
    if numbers is not None:
        return max(_MIN_WINDOW, _NUMBERS_PER_WINDOW // numbers)
    return steps if is_symbolic(steps) or steps < _WINDOWED_FROM else _WINDOW


def mix_contained(
    mix: Mix,
    xs: Float[Array, "T d_model"],
    state: PyTree[Array],
    reset: Bool[Array, " T"] | None,
    init_state: Callable[[], PyTree[Array]],
) -> tuple[Float[Array, "T d_model"], PyTree[Array]]:
    """Call `mix(xs, state, reset)`, and keep values that are not finite out of the
    derivatives of other sequences.

    Resets separate values, but derivatives multiply: a weight's derivative is the sum
    over all steps of cotangents times inputs, and zero times NaN is NaN. So a step with
    an input that is not finite is computed with the inputs of another step (a layer may
    be singular at zero), or with the fresh state. All that it would reach, up to the
    next reset, is set to NaN, and so are its derivatives. Without resets there are no
    other sequences.
    """
    if reset is None:
        return mix(xs, state, reset)
    bad = ~jnp.all(jnp.isfinite(xs), -1)
    bad_state = jnp.zeros((), bool)
    for leaf in jax.tree.leaves(state):
        bad_state = bad_state | ~jnp.all(jnp.isfinite(leaf))
    # Compare the newest bad step with the newest reset. Steps count from 1; the initial
    # state counts as 0.
    count = jnp.arange(1, xs.shape[0] + 1, dtype=jnp.int32)
    newest = jnp.maximum(
        running_max(jnp.where(bad, count, -1)), jnp.where(bad_state, 0, -1)
    )
    lost = newest >= running_max(jnp.where(reset, count, 0))

    def poison_if_lost(leaf):
        # An integer, such as a count, cannot be NaN.
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        return poison(leaf, jnp.broadcast_to(lost[-1], leaf.shape))

    xs = jnp.where(bad[:, None], lax.dynamic_index_in_dim(xs, jnp.argmin(bad)), xs)
    state = jax.tree.map(lambda f, s: jnp.where(bad_state, f, s), init_state(), state)
    ys, last = mix(xs, state, reset)
    ys = poison(ys, jnp.broadcast_to(lost[:, None], ys.shape))
    return ys, jax.tree.map(poison_if_lost, last)
