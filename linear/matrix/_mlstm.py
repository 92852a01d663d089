"""The matrix LSTM, with exponential gates."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from pararnn._parameters import affine, check_size, linear, rms_norm
from pararnn.scan import matrix_scan, max_plus_scan, shift

from .._arguments import Draw, head_size
from .._layer import AbstractLayer
from .._parts import (
    draw_convolution,
    empty_window,
    merge_heads,
    short_convolution,
    split_heads,
)


class MLSTM(AbstractLayer):
    r"""The matrix LSTM of xLSTM: exponential input gates, kept in range by $m$.

    $$\begin{aligned}
    m_t &= \max(\log \sigma(f_t) + m_{t-1}, i_t), \quad
    f'_t = e^{\log \sigma(f_t) + m_{t-1} - m_t}, \quad i'_t = e^{i_t - m_t} \\
    C_t &= f'_t C_{t-1} + i'_t k_t v_t^\top, \qquad
    n_t = f'_t n_{t-1} + i'_t k_t \\
    o_t &= C_t^\top q_t / (\max(|n_t \cdot q_t|, e^{-m_t}) + 10^{-6}), \qquad
    y_t = W_{out} (\sigma(W_o x_t) \odot \mathrm{RMSNorm}(o_t))
    \end{aligned}$$

    Queries, keys ($/ \sqrt{K}$) and the gates $i = W_i c + b_i$, $f = W_f c + b_f$
    come from $c$, the SiLU of the inputs after a short causal convolution if there is
    one. Values come from the inputs. $m$ is a max-plus scan. Both gates are at most 1,
    so nothing overflows.

    ??? cite "Source"

        Beck et al., "xLSTM: Extended Long Short-Term Memory" (2405.04517).
    """

    W_q: Float[Array, "features_k d_model"]
    W_k: Float[Array, "features_k d_model"]
    W_v: Float[Array, "features_v d_model"]
    conv_weight: Float[Array, "d_model 4"] | None
    conv_bias: Float[Array, " d_model"] | None
    W_i: Float[Array, "heads d_model"]
    W_f: Float[Array, "heads d_model"]
    b_i: Float[Array, " heads"]
    b_f: Float[Array, " heads"]
    W_o: Float[Array, "features_v d_model"]
    norm_weight: Float[Array, " features_v"]
    W_out: Float[Array, "d_model features_v"]
    d_model: int
    heads: int

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 1,
        d_key: int | None = None,
        d_value: int | None = None,
        convolution: bool = True,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: size of an input and of an output.
        - `heads`: number of states, each a matrix `[d_key, d_value]`.
        - `d_key`, `d_value`: sizes of a key and a value of one head.
            Both default to `d_model // heads`.
        - `convolution`: whether $c$ sees the three steps before. If not, it is
            SiLU of the input.
        - `dtype`: of the parameters. Defaults to JAX's default floating point.
        - `key`: a key of `jax.random`. Initially the gates' weights are zero, the
            forget biases are evenly spaced from 3 to 6, and the input biases have a
            standard deviation of 0.1.

        **Raises:** as [`linear.DeltaNet`][].
        """
        draw = Draw("MLSTM", dtype, key)
        self.d_model = check_size("MLSTM", "d_model", d_model)
        self.heads = check_size("MLSTM", "heads", heads)
        features_k = heads * head_size("MLSTM", "d_key", d_key, d_model, heads)
        features_v = heads * head_size("MLSTM", "d_value", d_value, d_model, heads)
        self.W_q, self.W_k = (draw.weight(features_k, d_model) for _ in range(2))
        self.W_v = draw.weight(features_v, d_model)
        self.conv_weight, self.conv_bias = draw_convolution(
            "MLSTM", draw, d_model, convolution
        )
        self.W_i, self.W_f = (
            draw.constant(jnp.zeros((heads, d_model))) for _ in range(2)
        )
        self.b_i = draw.normal((heads,), 0.1)
        self.b_f = draw.constant(jnp.linspace(3.0, 6.0, heads))
        self.W_o = draw.weight(features_v, d_model)
        self.norm_weight = draw.constant(jnp.ones(features_v))
        self.W_out = draw.weight(d_model, features_v)

    def init_state(self):
        """Return zeros: the last inputs of the convolution `[3, d_model]`, if there is
        one, the matrices `[heads, K, V]`, the normalisers `[heads, K]` and the
        stabilisers `[heads]`."""
        dtype, heads = self.precision(), self.heads
        d_key, d_value = (len(W) // heads for W in (self.W_q, self.W_v))
        shapes = (heads, d_key, d_value), (heads, d_key), (heads,)
        zeros = tuple(jnp.zeros(shape, dtype) for shape in shapes)
        return empty_window(self.conv_weight, dtype), *zeros

    def recurrent_state(self, state):
        return state[1:]

    def mix(self, xs, state, reset):
        window, matrix, normaliser, m0 = state
        c, window = short_convolution(
            xs, window, self.conv_weight, self.conv_bias, reset=reset
        )
        c = jax.nn.silu(c)
        q, k, v = (
            split_heads(linear(W, x), self.heads)
            for W, x in ((self.W_q, c), (self.W_k, c), (self.W_v, xs))
        )
        k = k * k.shape[-1] ** -0.5
        i = affine(self.W_i, c, self.b_i)
        log_f = jax.nn.log_sigmoid(affine(self.W_f, c, self.b_f))
        m = max_plus_scan(log_f, i, m0, reset=reset)
        before = shift(m0, m)
        if reset is not None:
            before = jnp.where(reset[:, None], 0, before)
        # The normaliser is an extra column of the state, whose values are ones.
        outputs, state = matrix_scan(
            q,
            jnp.exp(i - m)[..., None] * k,
            jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1),
            jnp.exp(log_f + before - m),
            initial=jnp.concatenate([matrix, normaliser[..., None]], -1),
            reset=reset,
        )
        outputs, scale = outputs[..., :-1], jnp.abs(outputs[..., -1])
        # Above exp(80) the output is zero anyway, and its derivative would be 0 / 0.
        floor = jnp.exp(jnp.minimum(-m, 80))
        outputs = outputs / (jnp.maximum(scale, floor) + 1e-6)[..., None]
        weight = self.norm_weight.reshape(self.heads, -1)
        ys = jax.nn.sigmoid(linear(self.W_o, xs)) * merge_heads(
            rms_norm(outputs, weight)
        )
        state = window, state[..., :-1], state[..., -1], m[-1]
        return linear(self.W_out, ys), state
