"""Run a layer over a sequence from its last step to its first."""

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
    """Call `run(xs, state, reset=reset)` backwards in time; return outputs in order.

    `reset` marks the first step of each sequence. So the backward run starts again at
    the step before each mark.
    """

    def flip(tree):
        return jax.tree.map(lambda v: jnp.flip(v, 0), tree)

    if reset is not None:
        reset = flip(jnp.concatenate([reset[1:], jnp.zeros_like(reset[:1])]))
    ys, state = run(flip(xs), state, reset=reset)
    return flip(ys), state
