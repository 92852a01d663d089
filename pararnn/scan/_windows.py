"""Long sequences in windows of time, to save memory; sequences run backwards."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, PyTree, Shaped

from .._checks import is_symbolic
from ._mesh_axes import vary


def in_windows(
    run: Callable[[PyTree[Array], PyTree[Array]], tuple[PyTree[Array], PyTree[Array]]],
    carry: PyTree[Array],
    xs: PyTree[Shaped[Array, "T ..."]],
    length: int,
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Return `run(carry, xs)`, computed on windows of about `length` steps.

    `run` returns the next carry and arrays with the time axis of `xs`. The carry is
    handed from window to window, and a derivative computes each window again. So a
    gradient stores the carry before each window, and everything else for one window
    only. A sequence of symbolic length is one window.
    """
    steps, carry = jax.tree.leaves(xs)[0].shape[0], vary(carry, xs)
    if is_symbolic(steps):
        return run(carry, xs)
    count, size = _divide(steps, max(1, length))
    if count < 2:
        return run(carry, xs)

    def whole(x):
        return x[: count * size].reshape(count, size, *x.shape[1:])

    # A loop keeps the two passes apart without the barriers of `prevent_cse`.
    again = jax.checkpoint(run, prevent_cse=False)
    carry, ys = lax.scan(again, carry, jax.tree.map(whole, xs))
    ys = jax.tree.map(lambda y: y.reshape(count * size, *y.shape[2:]), ys)
    if count * size < steps:
        rest = jax.tree.map(lambda x: x[count * size :], xs)
        carry, tail = jax.checkpoint(run)(carry, rest)
        ys = jax.tree.map(lambda *parts: jnp.concatenate(parts), ys, tail)
    return carry, ys


def _divide(steps: int, length: int) -> tuple[int, int]:
    """Return how many windows there are, and how many steps each has.

    All have the same size if one of `length / 2` to `2 length` steps divides the
    sequence: a remainder is another program to compile.
    """
    near = steps // length
    if near < 2:
        return 1, steps
    several = range(max(2, -(-steps // (2 * length))), 2 * near + 1)
    for count in sorted(several, key=lambda n: abs(n - near)):
        if steps % count == 0:
            return count, steps // count
    return near, steps // near


def backwards(
    run: Callable[..., tuple[PyTree[Array], Any]],
    xs: PyTree[Shaped[Array, "T ..."]],
    state: Any,
    reset: Bool[Array, " T"] | None,
) -> tuple[PyTree[Array], Any]:
    """Return `run(xs, state, reset=reset)`, backwards in time.

    Outputs are in the order of `xs`. `reset` marks the first step of each sequence, so
    a run from the end starts again at the step before.
    """

    def flip(tree):
        return jax.tree.map(lambda v: jnp.flip(v, 0), tree)

    if reset is not None:
        reset = flip(jnp.concatenate([reset[1:], jnp.zeros_like(reset[:1])]))
    ys, state = run(flip(xs), state, reset=reset)
    return flip(ys), state
