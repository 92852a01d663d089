import math

import jax.numpy as jnp
import jax.random as jr
from jax.nn import sigmoid
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._parameters import (
    affine,
    check_dtype,
    check_heads,
    check_input,
    check_key,
    check_sizes,
    uniform,
    widen,
    zeros,
)
from ._base import AbstractCell


class ParaLSTMCell(AbstractCell):
    r"""A coupled-gate LSTM with peepholes and diagonal recurrent weights.

    $$\begin{aligned}
    f_t &= \sigma(a_f \odot h_{t-1} + B_f x_t + p_f \odot c_{t-1} + b_f) \\
    c_t &= f_t \odot c_{t-1}
        + (1 - f_t) \odot \tanh(a_c \odot h_{t-1} + B_c x_t + b_c) \\
    o_t &= \sigma(a_o \odot h_{t-1} + B_o x_t + p_o \odot c_t + b_o) \\
    h_t &= o_t \odot \tanh(c_t)
    \end{aligned}$$

    The state is the tuple $(c, h)$, each `[d_state]`, and a layer emits $h$. The
    Jacobian consists of a $2 \times 2$ block for each channel.

    ??? cite "Source"

        Danieli et al., "ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for
        Large Language Models" (2510.21450).
    """

    a_f: Float[Array, " d_state"]
    a_c: Float[Array, " d_state"]
    a_o: Float[Array, " d_state"]
    p_f: Float[Array, " d_state"]
    p_o: Float[Array, " d_state"]
    B_f: Float[Array, "heads out in"]
    B_c: Float[Array, "heads out in"]
    B_o: Float[Array, "heads out in"]
    b_f: Float[Array, " d_state"]
    b_c: Float[Array, " d_state"]
    b_o: Float[Array, " d_state"]
    d_input: int
    d_state: int
    heads: int

    def __init__(
        self,
        d_input: int,
        d_state: int | None = None,
        *,
        heads: int = 1,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_input`: size of the input.
        - `d_state`: size of $c$ and of $h$. Defaults to `d_input`.
        - `heads`: the input matrices $B$ are block-diagonal with this many blocks; it
            must divide both sizes.
        - `dtype`: dtype of the parameters. Defaults to JAX's default floating-point
            dtype. 16-bit parameters have a float32 state.
        - `key`: a key of `jax.random`. Each group of parameters is drawn uniformly from
            $\pm 1 / \sqrt{\text{fan-in}}$: the fan-in of $B$ and $b$ is
            `d_input // heads`, that of $a_c$ is 1 and that of the gates' $a$ and $p$ is
            2 ($h$ and $c$), so that all $|a|, |p| \le 1$.

        **Raises:** `ValueError` on a size that is not a positive integer, heads that
        do not divide the sizes, an invalid key, or a dtype that is not floating
        point.
        """
        self.d_input, self.d_state = check_sizes("ParaLSTMCell", d_input, d_state)
        self.heads = check_heads(
            "ParaLSTMCell",
            heads,
            "the input",
            d_input=self.d_input,
            d_state=self.d_state,
        )
        dtype = check_dtype("ParaLSTMCell", dtype)
        check_key("ParaLSTMCell", key)
        candidate, recurrent, inputs, biases = jr.split(key, 4)
        n, fan_in = self.d_state, self.d_input // self.heads
        block, bound = (self.heads, n // self.heads, fan_in), 1 / math.sqrt(fan_in)
        (self.a_c,) = uniform(candidate, 1, (n,), 1.0, dtype)
        self.a_f, self.a_o, self.p_f, self.p_o = uniform(
            recurrent, 4, (n,), 1 / math.sqrt(2), dtype
        )
        self.B_f, self.B_c, self.B_o = uniform(inputs, 3, block, bound, dtype)
        self.b_f, self.b_c, self.b_o = uniform(biases, 3, (n,), bound, dtype)

    def gates(
        self, x: Float[Array, "*time d_input"]
    ) -> tuple[Float[Array, "*time d_state"], ...]:
        """`B x + b` for f, c and o; see [`pararnn.AbstractCell.gates`][]."""
        x = check_input("ParaLSTMCell", x, self.d_input)
        return (
            affine(self.B_f, x, self.b_f),
            affine(self.B_c, x, self.b_c),
            affine(self.B_o, x, self.b_o),
        )

    def update(
        self,
        state: tuple[Float[Array, " d_state"], Float[Array, " d_state"]],
        gates: tuple[Float[Array, " d_state"], ...],
    ) -> tuple[Float[Array, " d_state"], Float[Array, " d_state"]]:
        """The next $(c, h)$, each `[d_state]`, in the dtypes of `state`."""
        c, h, g_f, g_c, g_o, a_f, a_c, a_o, p_f, p_o = widen(
            *state, *gates, self.a_f, self.a_c, self.a_o, self.p_f, self.p_o
        )
        f = sigmoid(a_f * h + p_f * c + g_f)
        c = f * c + (1 - f) * jnp.tanh(a_c * h + g_c)
        # The peephole of the output gate sees the new c.
        o = sigmoid(a_o * h + p_o * c + g_o)
        h = o * jnp.tanh(c)
        return c.astype(state[0].dtype), h.astype(state[1].dtype)

    def init_state(self) -> tuple[Float[Array, " d_state"], Float[Array, " d_state"]]:
        """Zeros $(c, h)$, each `[d_state]`, at least float32."""
        # Two buffers, since one that appears twice could not be donated.
        return zeros(self.d_state, self.a_f.dtype), zeros(self.d_state, self.a_f.dtype)

    def output(
        self, state: tuple[Float[Array, " d_state"], Float[Array, " d_state"]]
    ) -> Float[Array, " d_state"]:
        """$h$, `[d_state]`."""
        _, h = state
        return h
