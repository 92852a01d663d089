"""A residual block: a mixer over time, then a gated MLP over features."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, DTypeLike, Float, PRNGKeyArray, PyTree

from .._parameters import rms_norm, uniform

# The statistics of a solve that every block keeps.
STATISTICS = ("num_steps", "residual", "sequential")


def project(weight: Float[Array, "out in"], x: Float[Array, "... in"]) -> Array:
    """Compute `W x` in the precision of the activations `x`."""
    # At the platform's default precision, unlike the products inside a solve: no
    # iteration amplifies a rounding error here.
    return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))


def normalise(x: Float[Array, "... d"], weight: Float[Array, " d"]) -> Array:
    """Apply RMSNorm in at least float32, and cast to the dtype of `x`."""
    return rms_norm(x, weight).astype(x.dtype)


class GatedMLP(eqx.Module):
    r"""$W_\mathrm{down} (\mathrm{silu}(W_\mathrm{gate} x) \odot W_\mathrm{up} x)$.

    ??? cite "Source"

        Shazeer, "GLU Variants Improve Transformer" (2002.05202): SwiGLU.
    """

    W_gate: Float[Array, "hidden d_model"]
    W_up: Float[Array, "hidden d_model"]
    W_down: Float[Array, "d_model hidden"]

    def __init__(
        self, d_model: int, hidden: int, *, dtype: DTypeLike, key: PRNGKeyArray
    ):
        inwards, outwards = jr.split(key)
        self.W_gate, self.W_up = uniform(
            inwards, 2, (hidden, d_model), d_model**-0.5, dtype
        )
        (self.W_down,) = uniform(outwards, 1, (d_model, hidden), hidden**-0.5, dtype)

    def __call__(self, xs: Float[Array, "... d_model"]) -> Float[Array, "... d_model"]:
        gate = jax.nn.silu(project(self.W_gate, xs))
        return project(self.W_down, gate * project(self.W_up, xs))


class Block(eqx.Module):
    r"""A mixer and an MLP, each after a norm and added to its input.

    $$u = x + \mathrm{mixer}(\mathrm{norm}(x)), \qquad
      y = u + \mathrm{MLP}(\mathrm{norm}(u))$$

    The state is that of the mixer. Without an `mlp`, $y = u$.
    """

    mixer: Any
    mlp: GatedMLP | None
    mixer_norm: Float[Array, " d_model"]
    mlp_norm: Float[Array, " d_model"] | None

    def __init__(
        self,
        mixer: Any,
        d_model: int,
        hidden: int,
        *,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ):
        self.mixer = mixer
        self.mixer_norm = jnp.ones(d_model, dtype)
        self.mlp = GatedMLP(d_model, hidden, dtype=dtype, key=key) if hidden else None
        self.mlp_norm = jnp.ones(d_model, dtype) if hidden else None

    def run(
        self,
        xs: Float[Array, "T d_model"],
        state: PyTree[Array],
        reset: Bool[Array, " T"] | None,
    ) -> tuple[Float[Array, "T d_model"], PyTree[Array], dict[str, Array]]:
        """Return outputs, the last state, and the statistics of a solve, if any."""
        inputs = normalise(xs, self.mixer_norm)
        if hasattr(self.mixer, "run"):
            mixed, state, stats = self.mixer.run(inputs, state, reset=reset)
        else:
            mixed, state = self.mixer(inputs, state, reset=reset)
            stats = {}
        stats = {name: stats[name] for name in STATISTICS if name in stats}
        return self._transform(xs + mixed), state, stats

    def step(
        self, x: Float[Array, " d_model"], state: PyTree[Array]
    ) -> tuple[Float[Array, " d_model"], PyTree[Array]]:
        """One step, for decoding."""
        mixed, state = self.mixer.step(normalise(x, self.mixer_norm), state)
        return self._transform(x + mixed), state

    def _transform(self, xs: Float[Array, "... d_model"]) -> Array:
        if self.mlp is None or self.mlp_norm is None:
            return xs
        return xs + self.mlp(normalise(xs, self.mlp_norm))
