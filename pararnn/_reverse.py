"""Sequences from their last step to their first."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, Shaped


def backwards(
    run: Callable[..., tuple[PyTree[Array], Any]],
    xs: PyTree[Shaped[Array, "T ..."]],
    state: Any,
    reset: Bool[Array, " T"] | None,
) -> tuple[PyTree[Array], Any]:
    """`run(xs, state, reset=reset)`, backwards in time; outputs in the order of `xs`.

    `reset` marks the first step of each sequence, so a run that comes from behind
    starts anew at the step before.
    """

    def flip(tree):
        return jax.tree.map(lambda v: jnp.flip(v, 0), tree)

    if reset is not None:
        reset = flip(jnp.concatenate([reset[1:], jnp.zeros_like(reset[:1])]))
    ys, state = run(flip(xs), state, reset=reset)
    return flip(ys), state
