"""What is diagnosed: a recurrence, its inputs and its first state, checked."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import Array, Bool, PyTree

from ..solver._inputs import check_resets, count_steps, make_recurrence
from ..solver._problem import Recurrence

WHERE = "diagnose"

# Below this, a sixteenth of T is a single step.
SHORTEST = 16


class Posed(NamedTuple):
    """A checked problem; `fresh` is the state that a reset starts from."""

    f: Callable
    xs: PyTree
    h0: PyTree
    reset: Bool[Array, " T"]
    fresh: PyTree
    recurrence: Recurrence
    constants: list[Array]

    @property
    def length(self) -> int:
        return self.reset.shape[0]


def refuse_tracers(tree: PyTree) -> None:
    # Inside `jit` even what depends on no argument is traced.
    leaves = [*jtu.tree_leaves(tree), jnp.zeros(()) + 1.0]
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        raise TypeError(
            f"{WHERE}: called with traced arrays. It runs programs and reports their "
            "numbers, so it cannot be part of one: call it outside of `jax.jit`, "
            "`jax.vmap` and `jax.grad`, with concrete arrays, one sequence at a time."
        )


def pose(f, xs, h0, reset, reset_state) -> Posed:
    """The checked problem. Its resets always exist: they cut it to shorter lengths."""
    recurrence = make_recurrence(WHERE, f, xs, h0)
    steps = count_steps(WHERE, xs)
    if steps < SHORTEST:
        raise ValueError(
            f"{WHERE}: `xs` has {steps} steps; expected at least {SHORTEST}. How the "
            "number of steps grows with T cannot be seen on fewer, and the loop is "
            "the solver for them."
        )
    fresh = check_resets(WHERE, recurrence, reset, reset_state, steps)
    constants = recurrence.take_constants()
    refuse_tracers(constants)
    xs, h0 = (jtu.tree_map(jnp.asarray, tree) for tree in (xs, h0))
    if fresh is None:
        # Nothing is reset but what is cut off, for which any good state will do.
        reset, fresh = jnp.zeros(steps, bool), jtu.tree_leaves(h0)
    fresh = jtu.tree_unflatten(recurrence.state_tree, fresh)
    return Posed(f, xs, h0, jnp.asarray(reset), fresh, recurrence, constants)
