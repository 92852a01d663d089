"""The sLSTM with given gates: everything of it that needs no loop over time."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..scan import Diagonal, linear_scan, max_plus_scan

# The stabiliser of a state that holds nothing: below any other, and finite.
NOTHING = -1e30
# An exponential up to here, and its product with another, are finite in float32.
LARGEST = 80.0


def decay_of(
    log_f: Float[Array, "*time d_state"],
    before: Float[Array, "*time d_state"],
    m: Float[Array, "*time d_state"],
) -> Float[Array, "*time d_state"]:
    """The stabilised forget gate, from the stabilisers before and after the step.

    At most 1, except where the state held nothing: there it multiplies zeros, and must
    not be infinite.
    """
    return jnp.exp(jnp.minimum(log_f + before - m, LARGEST))


def scan_gates(
    i: Float[Array, "T d_state"],
    log_f: Float[Array, "T d_state"],
    z: Float[Array, "T d_state"],
    initial: tuple[
        Float[Array, " d_state"], Float[Array, " d_state"], Float[Array, " d_state"]
    ],
    reset: Bool[Array, " T"] | None,
) -> tuple[
    Float[Array, "T d_state"], Float[Array, "T d_state"], Float[Array, "T d_state"]
]:
    """All $(c, n, m)$ from all gates: $m$ is a max-plus recurrence, and once it is
    known $c$ and $n$ are linear ones. A reset starts from zeros."""
    c0, n0, m0 = initial
    m = max_plus_scan(
        log_f,
        i,
        jnp.where(n0 == 0, NOTHING, m0),
        reset=reset,
        reset_state=None if reset is None else jnp.full_like(m0, NOTHING),
    )
    before = jnp.concatenate([m0[None], m[:-1]])
    if reset is not None:
        before = jnp.where(reset[:, None], 0, before)
    transition = Diagonal(decay_of(log_f, before, m))
    added = jnp.exp(i - m)
    c = linear_scan(transition, added * z, c0, reset=reset)
    n = linear_scan(transition, added, n0, reset=reset)
    return c, n, m
