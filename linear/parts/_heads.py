"""Heads: features cut into groups that have a state each."""

import jax
from jaxtyping import Array, Float

from pararnn._parameters import leading, linear, rms_norm, widen

from ._gates import rate


def split_heads(x: Float[Array, "T features"], heads: int) -> Float[Array, "T heads n"]:
    """Features as `heads` groups of neighbours."""
    return x.reshape(x.shape[0], heads, -1)


def merge_heads(x: Float[Array, "T heads n"]) -> Float[Array, "T features"]:
    """The inverse of `split_heads`."""
    return x.reshape(x.shape[0], -1)


def log_decay(
    A_log: Float[Array, " heads"],
    dt_bias: Float[Array, " heads"],
    dt: Float[Array, "T heads"],
) -> tuple[Float[Array, "T heads"], Float[Array, "T heads"]]:
    r"""$-\exp(A^{\log}) \, \Delta$ and $\Delta = \mathrm{softplus}(dt + b)$."""
    A_log, dt_bias, dt = widen(A_log, dt_bias, dt)
    steps = jax.nn.softplus(dt + leading(dt_bias, 2))
    return -rate(leading(A_log, 2)) * steps, steps


def signed(decay: Array, eigenvalues: str) -> Array:
    """A factor in [0, 1] as it is, or stretched to [-1, 1] where that is `"signed"`."""
    return 2 * decay - 1 if eigenvalues == "signed" else decay


def read_out(
    outputs: Float[Array, "T heads V"],
    norm_weight: Float[Array, " V"],
    W_out: Float[Array, "d_model features"],
    gate: Float[Array, "T features"] | None = None,
) -> Float[Array, "T d_model"]:
    """Each head normalised, gated by SiLU if there is a gate, and projected."""
    ys = merge_heads(rms_norm(outputs, norm_weight))
    return linear(W_out, ys if gate is None else ys * jax.nn.silu(gate))
