"""Teacher forcing: how far a state is moved to what was observed, before each step."""

from typing import Protocol

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._parameters import check_number, check_size

# An exponential does not fall to nothing.
LEAST = 1e-6


class Forcing(Protocol):
    """Strengths of forcing, 0 for a free step and 1 for one from the observation."""

    def strengths(self, steps: int, progress: Float[Array, ""]) -> Float[Array, " T"]:
        """`[steps]`, in the dtype of `progress`: the part of training that is over."""
        ...


class SparseForcing(eqx.Module):
    r"""Every `interval` steps the observed part of the state is what was observed.

    Between, the network runs free, so that it has to predict, and gradients have so
    many steps at most to grow along what is observed.

    ??? cite "Source"

        Mikhaeil et al., "On the difficulty of learning chaotic dynamics with RNNs"
        (2110.07238); 16 steps for the systems here as in Brenner et al. (2410.14240).

    **Raises:** `ValueError` for an interval that is not a whole number from 1.
    """

    interval: int = eqx.field(static=True, default=16)

    def __check_init__(self):
        check_size("SparseForcing", "interval", self.interval)

    def strengths(self, steps: int, progress: Float[Array, ""]) -> Float[Array, " T"]:
        """One every `interval` steps, from the first on, and zero between."""
        forced = jnp.arange(steps, dtype=jnp.int32) % self.interval == 0
        return forced.astype(progress.dtype)


class GeneralisedForcing(eqx.Module):
    r"""Before every step the state is moved a part of the way to the observation.

    $$\tilde z_t = (1 - \alpha)\, z_t + \alpha\, \hat z_t$$

    With $\alpha \ge 1 - 1 / \sigma$, where $\sigma$ is the largest norm of a Jacobian,
    the forced recurrence does not expand, so that no gradient grows, and Newton's
    method needs few steps at any length. (As only what is observed is forced here,
    that holds where all of the state is observed.) During training $\alpha$ falls
    exponentially from `start` to `end`: first the next observation is learned, then the
    long run.

    ??? cite "Source"

        Hess et al., "Generalized Teacher Forcing for Learning Chaotic Dynamics"
        (2306.04406), with $\alpha$ annealed over training.

    **Raises:** `ValueError` for strengths outside of 1e-6 to 1.
    """

    start: float = eqx.field(static=True, default=0.5)
    end: float = eqx.field(static=True, default=0.1)

    def __check_init__(self):
        for name in ("start", "end"):
            value = check_number("GeneralisedForcing", name, getattr(self, name))
            if not LEAST <= value <= 1:
                raise ValueError(
                    f"GeneralisedForcing: `{name}` is {value!r}, expected a number "
                    f"from {LEAST:g} to 1: the part of the way to the observation."
                )

    def strengths(self, steps: int, progress: Float[Array, ""]) -> Float[Array, " T"]:
        """The same for all steps, between `start` and `end` as the training is."""
        strength = self.start * (self.end / self.start) ** progress
        return jnp.full(steps, strength, progress.dtype)
