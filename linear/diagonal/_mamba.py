"""Mamba: a diagonal state space whose step size, B and C depend on the input."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from pararnn._parameters import affine, check_choice, check_size, leading, linear, widen
from pararnn.scan import einsum, fused_scan

from .._arguments import Draw, check_range
from .._layer import AbstractLayer
from .._parts import (
    clamped_exp,
    complex_zeros,
    draw_convolution,
    empty_window,
    short_convolution,
    signed,
)

Eigenvalues = Literal["positive", "signed", "complex"]


class Mamba(AbstractLayer):
    r"""The selective state space layer, S6.

    $$\begin{aligned}
    (u_t, z_t) &= W_{in} x_t, \quad
    u_t \leftarrow \mathrm{SiLU}(\mathrm{conv}_4(u)_t), \quad
    (\delta_t, B_t, C_t) = W_x u_t \\
    \Delta_t &= \mathrm{softplus}(W_{dt} \delta_t + b_{dt}), \quad
    A = -\exp(A^{\log}) \\
    h_t &= \exp(\Delta_t A) \odot h_{t-1} + (\Delta_t u_t) B_t^\top \\
    y_t &= W_{out} ((h_t C_t + D \odot u_t) \odot \mathrm{SiLU}(z_t))
    \end{aligned}$$

    with a state of `d_state` entries for each of the `expand * d_model` channels.
    With `"signed"` eigenvalues, the factor is $2 \exp(\Delta A) - 1$, in (-1, 1). With
    `"complex"` ones, $A = -\exp(A^{\log}) + i A_{imag}$, the two halves of $B_t$ and
    $C_t$ are the real and imaginary parts of `d_state // 2` entries, and
    $2 \, \mathrm{Re}(h_t C_t)$ replaces $h_t C_t$.

    ??? cite "Source"

        Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
        (2312.00752); signed: Grazzi et al. (2411.12537).
    """

    W_in: Float[Array, "2*inner d_model"]
    conv_weight: Float[Array, "inner 4"] | None
    conv_bias: Float[Array, " inner"] | None
    W_x: Float[Array, "rank+2*d_state inner"]
    W_dt: Float[Array, "inner rank"]
    b_dt: Float[Array, " inner"]
    A_log: Float[Array, "inner modes"]
    A_imag: Float[Array, "inner modes"] | None
    D: Float[Array, " inner"]
    W_out: Float[Array, "d_model inner"]
    d_model: int
    d_state: int
    eigenvalues: Eigenvalues

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        *,
        expand: int = 2,
        dt_rank: int | None = None,
        eigenvalues: Eigenvalues = "positive",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        convolution: bool = True,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: size of an input and of an output.
        - `d_state`: real entries of the state of each channel; even if complex.
        - `expand`: channels for each entry of an input.
        - `dt_rank`: rank of the map to $\Delta$. Defaults to `d_model / 16`, rounded
            up.
        - `eigenvalues`: `"positive"`, `"signed"` or `"complex"`.
        - `dt_min`, `dt_max`: the initial $\mathrm{softplus}(b_{dt})$ is log-uniform
            between them, and at least 1e-4.
        - `convolution`: whether each channel of $u$ sees the three steps before. If
            not, $u$ is $\mathrm{SiLU}(u)$.
        - `dtype`: of the parameters. Defaults to JAX's default floating point.
        - `key`: a key of `jax.random`. Initially $A = -(1, 2, \dots)$, or
            $A = -1/2 + i \pi (0, 1, \dots)$ if complex, and $D = 1$.

        **Raises:** `ValueError` on a size that is not a positive integer, unknown
        eigenvalues, steps out of range, an invalid key, or a dtype that is not
        floating point.
        """
        draw = Draw("Mamba", dtype, key)
        self.d_model = check_size("Mamba", "d_model", d_model)
        self.d_state = check_size("Mamba", "d_state", d_state)
        inner = d_model * check_size("Mamba", "expand", expand)
        rank = check_size(
            "Mamba", "dt_rank", math.ceil(d_model / 16) if dt_rank is None else dt_rank
        )
        check_choice(
            "Mamba", "eigenvalues", eigenvalues, ("positive", "signed", "complex")
        )
        check_range("Mamba", "dt_min", "dt_max", (dt_min, dt_max))
        is_complex = eigenvalues == "complex"
        if is_complex and d_state % 2:
            raise ValueError(
                f"Mamba: `d_state` must be even with complex eigenvalues, got "
                f"{d_state}: each takes a real and an imaginary part."
            )
        self.eigenvalues = eigenvalues
        self.W_in = draw.weight(2 * inner, d_model)
        self.conv_weight, self.conv_bias = draw_convolution(
            "Mamba", draw, inner, convolution
        )
        self.W_x = draw.weight(rank + 2 * d_state, inner)
        self.W_dt = draw.weight(inner, rank)
        self.b_dt = draw.step_bias((inner,), dt_min, dt_max)
        self.D = draw.constant(np.ones(inner))
        self.W_out = draw.weight(d_model, inner)
        modes = np.arange(d_state // 2 if is_complex else d_state)
        A = np.full(len(modes), 0.5) if is_complex else modes + 1.0
        self.A_log = draw.constant(np.tile(np.log(A), (inner, 1)))
        self.A_imag = None
        if is_complex:
            self.A_imag = draw.constant(np.tile(np.pi * modes, (inner, 1)))

    def init_state(self):
        """Return zeros: the last inputs of the convolution `[3, inner]`, if there is
        one, and the state `[inner, d_state]`, or complex `[inner, d_state // 2]`."""
        shape, dtype = self.A_log.shape, self.precision()
        is_complex = self.A_imag is not None
        state = complex_zeros(shape, dtype) if is_complex else jnp.zeros(shape, dtype)
        return empty_window(self.conv_weight, dtype), state

    def recurrent_state(self, state):
        return state[1]

    def mix(self, xs, state, reset):
        window, state = state
        u, z = jnp.split(linear(self.W_in, xs), 2, axis=-1)
        u, window = short_convolution(
            u, window, self.conv_weight, self.conv_bias, reset=reset
        )
        u = jax.nn.silu(u)
        rank = self.W_dt.shape[1]
        delta, B, C = jnp.split(
            linear(self.W_x, u), [rank, rank + self.d_state], axis=-1
        )
        dt = jax.nn.softplus(affine(self.W_dt, delta, self.b_dt))
        A_log, D = widen(self.A_log, self.D)
        A, dt = -clamped_exp(A_log), dt.astype(A_log.dtype)
        if self.A_imag is not None:
            A = lax.complex(A, self.A_imag.astype(A.dtype))
            B, C = (lax.complex(*jnp.split(v, 2, axis=-1)) for v in (B, C))
        # Channels come last, as XLA vectorises over them. A single mode gets no axis:
        # XLA would sum over an axis of length 1 several times slower.
        modes, A, last = A.shape[1:], A.T, state.T
        mode = "n"
        if modes == (1,):
            mode = ""
            A, last, B, C = A[0], last[0], B[:, 0], C[:, 0]

        def terms(at_t):
            dt, u, B, _ = at_t
            exponent = jnp.broadcast_to(dt.astype(A.dtype), A.shape) * A
            decay = signed(jnp.exp(exponent), self.eigenvalues)
            drive = (dt * u).astype(B.dtype)
            return decay, einsum(f"{mode},c->{mode}c", B, drive)

        def read(state, at_t):
            *_, C = at_t
            return einsum(f"{mode},{mode}c->c", C, state)

        ys, last = fused_scan(terms, read, (dt, u, B, C), last, reset=reset)
        ys = ys if self.A_imag is None else 2 * ys.real
        ys = (ys + leading(D, 2) * u) * jax.nn.silu(z)
        return linear(self.W_out, ys), (window, last.reshape(*modes, -1).T)
