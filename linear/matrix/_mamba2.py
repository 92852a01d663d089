"""Mamba-2: a state space with a single decay for each head."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from pararnn._parameters import check_choice, check_size, linear, rms_norm, widen
from pararnn.scan import matrix_scan

from .._arguments import Draw, check_range
from .._layer import AbstractLayer
from .._parts import (
    draw_convolution,
    empty_window,
    log_decay,
    merge_heads,
    short_convolution,
    signed,
    split_heads,
)


class Mamba2(AbstractLayer):
    r"""The state space dual layer, SSD.

    $$\begin{aligned}
    (z_t, (u_t, B_t, C_t), \delta_t) &= W_{in} x_t, \quad
    (u, B, C) \leftarrow \mathrm{SiLU}(\mathrm{conv}_4(u, B, C)) \\
    \Delta_t &= \mathrm{softplus}(\delta_t + b_{dt}), \quad
    a_t = \exp(-\exp(A^{\log}) \Delta_t) \\
    S_t &= a_t S_{t-1} + \Delta_t B_t u_t^\top, \qquad
    o_t = S_t^\top C_t + D u_t \\
    y_t &= W_{out} \, \mathrm{RMSNorm}(o_t \odot \mathrm{SiLU}(z_t))
    \end{aligned}$$

    with one $a$, $\Delta$ and $D$ for each head; the heads share $B$ and $C$. With
    `"signed"` eigenvalues, the factor is $2 a_t - 1$.

    ??? cite "Source"

        Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms
        Through Structured State Space Duality" (2405.21060).
    """

    W_in: Float[Array, "2*inner+2*d_state+heads d_model"]
    conv_weight: Float[Array, "inner+2*d_state 4"] | None
    conv_bias: Float[Array, " inner+2*d_state"] | None
    dt_bias: Float[Array, " heads"]
    A_log: Float[Array, " heads"]
    D: Float[Array, " heads"]
    norm_weight: Float[Array, " inner"]
    W_out: Float[Array, "d_model inner"]
    d_model: int
    d_state: int
    heads: int
    eigenvalues: Literal["positive", "signed"]

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        heads: int | None = None,
        expand: int = 2,
        eigenvalues: Literal["positive", "signed"] = "positive",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        convolution: bool = True,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: size of an input and of an output.
        - `d_state`: N, the rows of each head's state. The paper uses up to 128.
        - `heads`: divides `expand * d_model`. By default a head has 64 channels, or
            there is one head if that is not a multiple of 64.
        - `expand`: channels for each entry of an input.
        - `eigenvalues`: `"positive"` or `"signed"`, for decays in (0, 1) or (-1, 1).
        - `dt_min`, `dt_max`: the initial $\mathrm{softplus}(b_{dt})$ is log-uniform
            between them, and at least 1e-4.
        - `convolution`: whether each channel of $(u, B, C)$ sees the three steps
            before. If not, only SiLU is applied.
        - `dtype`: of the parameters. Defaults to JAX's default floating point.
        - `key`: a key of `jax.random`. $\exp(A^{\log})$ is uniform in [1, 16]; $D = 1$.

        **Raises:** `ValueError` on a size that is not a positive integer, `heads` that
        do not divide, unknown eigenvalues, steps out of range, an invalid key, or a
        dtype that is not floating point.
        """
        draw = Draw("Mamba2", dtype, key)
        self.d_model = check_size("Mamba2", "d_model", d_model)
        self.d_state = check_size("Mamba2", "d_state", d_state)
        inner = d_model * check_size("Mamba2", "expand", expand)
        heads = (1 if inner % 64 else inner // 64) if heads is None else heads
        self.heads = check_size("Mamba2", "heads", heads)
        if inner % heads:
            raise ValueError(
                f"Mamba2: `expand` * `d_model` = {inner} is not divisible by `heads` = "
                f"{heads}. Choose a divisor of {inner}."
            )
        check_choice("Mamba2", "eigenvalues", eigenvalues, ("positive", "signed"))
        check_range("Mamba2", "dt_min", "dt_max", (dt_min, dt_max))
        self.eigenvalues = eigenvalues
        convolved = inner + 2 * d_state
        self.W_in = draw.weight(inner + convolved + heads, d_model)
        self.conv_weight, self.conv_bias = draw_convolution(
            "Mamba2", draw, convolved, convolution
        )
        self.dt_bias = draw.step_bias((heads,), dt_min, dt_max)
        self.A_log = draw.log_of_uniform((heads,), 1, 16)
        self.D = draw.constant(jnp.ones(heads))
        self.norm_weight = draw.constant(jnp.ones(inner))
        self.W_out = draw.weight(d_model, inner)

    def init_state(self):
        """Return zeros: the last inputs of the convolution `[3, inner + 2 * d_state]`,
        if there is one, and the matrices `[heads, d_state, inner // heads]`."""
        dtype, inner = self.precision(), len(self.norm_weight)
        return (
            empty_window(self.conv_weight, dtype),
            jnp.zeros((self.heads, self.d_state, inner // self.heads), dtype),
        )

    def recurrent_state(self, state):
        return state[1]

    def mix(self, xs, state, reset):
        window, state = state
        inner = len(self.norm_weight)
        z, u, dt = jnp.split(
            linear(self.W_in, xs), [inner, 2 * (inner + self.d_state)], axis=-1
        )
        u, window = short_convolution(
            u, window, self.conv_weight, self.conv_bias, reset=reset
        )
        u, B, C = jnp.split(jax.nn.silu(u), [inner, inner + self.d_state], axis=-1)
        u = split_heads(u, self.heads)
        log_a, dt = log_decay(self.A_log, self.dt_bias, dt)

        def each_head(v):
            return jnp.broadcast_to(v[:, None], (v.shape[0], self.heads, v.shape[1]))

        outputs, state = matrix_scan(
            each_head(C),
            each_head(B),
            dt[..., None] * u,
            signed(jnp.exp(log_a), self.eigenvalues),
            initial=state,
            reset=reset,
        )
        (D,) = widen(self.D)
        ys = merge_heads(outputs + D[None, :, None] * u) * jax.nn.silu(z)
        return linear(self.W_out, rms_norm(ys, self.norm_weight)), (window, state)
