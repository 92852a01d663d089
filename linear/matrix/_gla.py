"""Gated linear attention."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from pararnn._parameters import affine, check_choice, check_size, linear
from pararnn.scan import matrix_scan

from .._arguments import Draw, head_size
from .._layer import AbstractLayer
from .._parts import read_out, split_heads

_RANK, _TEMPERATURE = 16, 16


class GLA(AbstractLayer):
    r"""Gated linear attention: a decay for each key that depends on the input.

    $$S_t = \mathrm{diag}(\alpha_t) S_{t-1} + k_t v_t^\top, \quad
    \alpha_t = \sigma(W_{a2} W_{a1} x_t + b_a)^{1/16}, \quad
    o_t = S_t^\top q_t / \sqrt{K}$$

    $y_t = W_{out} (\mathrm{RMSNorm}(o_t) \odot \mathrm{SiLU}(W_g x_t))$. With
    `"signed"` eigenvalues, $\alpha_t = 2 \sigma(W_{a2} W_{a1} x_t + b_a) - 1$: with the
    root, hardly any input could make it negative.

    ??? cite "Source"

        Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient
        Training" (2312.06635); the signed form is ours, after Grazzi et al.
        (2411.12537).
    """

    W_q: Float[Array, "features_k d_model"]
    W_k: Float[Array, "features_k d_model"]
    W_v: Float[Array, "features_v d_model"]
    W_a1: Float[Array, "16 d_model"]
    W_a2: Float[Array, "features_k 16"]
    b_a: Float[Array, " features_k"]
    W_g: Float[Array, "features_v d_model"]
    norm_weight: Float[Array, " V"]
    W_out: Float[Array, "d_model features_v"]
    d_model: int
    heads: int
    eigenvalues: Literal["positive", "signed"]

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 1,
        d_key: int | None = None,
        d_value: int | None = None,
        eigenvalues: Literal["positive", "signed"] = "positive",
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: size of an input and of an output.
        - `heads`: number of states, each a matrix `[d_key, d_value]`.
        - `d_key`: size of a key of one head. Defaults to half of `d_model // heads`.
        - `d_value`: size of a value of one head. Defaults to `d_model // heads`.
        - `eigenvalues`: `"positive"` or `"signed"`, for decays in (0, 1) or (-1, 1).
        - `dtype`: of the parameters. Defaults to JAX's default floating point.
        - `key`: a key of `jax.random`. The signed decays start near 0.9.

        **Raises:** as [`linear.DeltaNet`][].
        """
        draw = Draw("GLA", dtype, key)
        self.d_model = check_size("GLA", "d_model", d_model)
        self.heads = check_size("GLA", "heads", heads)
        check_choice("GLA", "eigenvalues", eigenvalues, ("positive", "signed"))
        self.eigenvalues = eigenvalues
        if d_key is None:
            d_key = max(1, head_size("GLA", "d_key", None, d_model, heads) // 2)
        features_k = heads * check_size("GLA", "d_key", d_key)
        d_value = head_size("GLA", "d_value", d_value, d_model, heads)
        features_v = heads * d_value
        self.W_q = draw.weight(features_k, d_model)
        self.W_k = draw.weight(features_k, d_model)
        self.W_v = draw.weight(features_v, d_model)
        self.W_a1 = draw.weight(_RANK, d_model)
        self.W_a2 = draw.weight(features_k, _RANK)
        start = 3.0 if eigenvalues == "signed" else 0.0
        self.b_a = draw.constant(jnp.full((features_k,), start))
        self.W_g = draw.weight(features_v, d_model)
        self.norm_weight = draw.constant(jnp.ones(d_value))
        self.W_out = draw.weight(d_model, features_v)

    def init_state(self) -> Float[Array, "heads K V"]:
        """Return zeros `[heads, d_key, d_value]`, at least float32."""
        shape = self.heads, len(self.W_q) // self.heads, len(self.norm_weight)
        return jnp.zeros(shape, self.precision())

    def mix(self, xs, state, reset):
        q, k, v = (
            split_heads(linear(W, xs), self.heads)
            for W in (self.W_q, self.W_k, self.W_v)
        )
        logits = affine(self.W_a2, linear(self.W_a1, xs), self.b_a)
        if self.eigenvalues == "signed":
            decay = 2 * jax.nn.sigmoid(logits) - 1
        else:
            decay = jnp.exp(jax.nn.log_sigmoid(logits) / _TEMPERATURE)
        outputs, state = matrix_scan(
            q * q.shape[-1] ** -0.5,
            k,
            v,
            split_heads(decay, self.heads),
            initial=state,
            reset=reset,
        )
        gate = linear(self.W_g, xs)
        return read_out(outputs, self.norm_weight, self.W_out, gate), state
