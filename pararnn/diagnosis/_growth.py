"""How perturbations grow along the solution, and with every Jacobian at `h0`."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from ..recurrence import Recurrence
from ._measure import CheckedProblem

# This many tangents are pushed from the first state on, and as many are redrawn
# wherever they have shrunk. The exact maximum over all pairs of steps is 1.1 to 5.6
# times what these find, with a median of 1.7 (32 tanh cells of width 8, T = 512,
# growth 2 to 5e8).
TANGENTS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Growth:
    """How perturbations of the state grow under a sequence of Jacobians.

    **Attributes:**

    - `exponent`: the largest Lyapunov exponent, natural logarithm per step; minus
        infinity if every perturbation vanishes.
    - `log_growth`: natural logarithm of the largest factor by which a tangent grew
        between any two states: a lower bound of $\\max \\log \\|J_t \\cdots J_s\\|$,
        at least 0.
    - `first`, `last`: the indices, from 0, of the states between which it did.
    """

    exponent: float
    log_growth: float
    first: int
    last: int

    def is_positive(self, steps: int) -> bool:
        """Return whether the exponent is above zero by more than its uncertainty.

        Over `steps` steps the sign of one below `1 / steps` depends on the tangents.
        """
        return self.exponent * steps > 1


class _GrowthState(NamedTuple):
    """The state of the pass; axes: the two kinds of Jacobians, the tangents."""

    tangents: Float[Array, "2 tangents width"]
    total: Float[Array, "2 tangents"]  # log of the growth since the first state
    rise: Float[Array, "2 tangents"]  # log of the growth since `start`
    start: Array
    best: Float[Array, "2 tangents"]  # the largest rise so far, and where it was
    first: Array
    last: Array


def measure_growth(problem: CheckedProblem) -> tuple[Growth, Growth]:
    """Return the growth along the solution, and with every Jacobian at `h0`."""

    def program(constants, fresh, inputs, h0):
        return _push_tangents(problem.recurrence, (constants, fresh), inputs, h0)

    trees = problem.fresh, problem.xs, problem.h0
    fresh, x_leaves, h0 = (tuple(jtu.tree_leaves(tree)) for tree in trees)
    inputs = (x_leaves, problem.reset)
    out = jax.jit(program)(problem.constants, fresh, inputs, h0)
    counted = problem.length - 1 - int(np.sum(problem.reset[1:]))
    total, best, first, last = (np.asarray(value) for value in out)

    def summary(kind: int) -> Growth:
        at = int(np.argmax(best[kind]))
        return Growth(
            exponent=float(total[kind].max() / counted) if counted else -math.inf,
            log_growth=float(best[kind, at]),
            first=int(first[kind, at]),
            last=int(last[kind, at]),
        )

    return summary(0), summary(1)


def _push_tangents(recurrence: Recurrence, parameters, inputs, h0_leaves):
    """Push tangents through the linearised steps, and keep only sums."""
    h0 = recurrence.ravel(h0_leaves)
    shape = (2, 2 * TANGENTS)
    zero = jnp.zeros(shape, recurrence.dtype)
    nowhere = jnp.zeros(shape, jnp.int32)
    pool = jnp.asarray(_directions((64, *shape, recurrence.width)), recurrence.dtype)

    def draw(number):
        return lax.dynamic_index_in_dim(pool, number % len(pool), keepdims=False)

    def linearised(h, tangents, x):
        def step(v):
            return recurrence.vector_step(parameters, v, x, smooth=True)

        ahead, push = jax.linearize(step, h)
        return ahead, jax.vmap(push)(tangents)

    def body(carry, at_t):
        h, growth = carry
        number, x = at_t
        states = jnp.stack([h, h0])
        ahead, pushed = jax.vmap(linearised, (0, 0, None))(states, growth.tangents, x)
        # `h0` is fixed, so there is no perturbation of it to push.
        stopped = x[1] | (number == 0)
        return (ahead[0], _update(growth, pushed, draw(number), stopped, number)), None

    start = _GrowthState(pool[-1], zero, zero, nowhere, zero, nowhere, nowhere)
    numbers = jnp.arange(inputs[1].shape[0], dtype=jnp.int32)
    (_, end), _ = lax.scan(body, (h0, start), (numbers, inputs))
    # A redrawn tangent does not show the growth since the first state.
    return end.total[:, :TANGENTS], end.best, end.first, end.last


def _directions(shape: tuple[int, ...]) -> np.ndarray:
    """Draw random unit vectors.

    A small pool is reused: drawing inside the loop would triple its compilation time
    (0.5 s).
    """
    drawn = np.random.default_rng(0).standard_normal(shape)
    return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)


def _update(growth: _GrowthState, pushed, drawn, stopped, number) -> _GrowthState:
    """Advance the tangents by one step, and update their growth.

    The largest growth between any two states is the largest rise of the summed
    logarithms above their lowest point so far. At a new lowest point, half of the
    tangents are redrawn: a direction that has shrunk until here is not necessarily the
    one that grows most from here on.
    """
    norms = jnp.linalg.norm(pushed, axis=-1)
    log_factor = jnp.where(stopped, 0, jnp.log(norms))
    rise = jnp.where(stopped, 0, jnp.maximum(growth.rise + log_factor, 0))
    lowest = rise == 0
    start = jnp.where(lowest, number, growth.start)
    higher = rise > growth.best
    redrawn_half = jnp.arange(2 * TANGENTS, dtype=jnp.int32) >= TANGENTS
    lost = stopped | ~((norms > 0) & jnp.isfinite(norms))
    redraw = lost | (lowest & redrawn_half[None])
    return _GrowthState(
        tangents=jnp.where(redraw[..., None], drawn, pushed / norms[..., None]),
        total=growth.total + log_factor,
        rise=rise,
        start=start,
        best=jnp.where(higher, rise, growth.best),
        first=jnp.where(higher, start, growth.first),
        last=jnp.where(higher, number, growth.last),
    )
