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
    linear,
    recurrent,
    uniform,
    widen,
    zeros,
)
from ._base import AbstractCell


class LSTMCell(AbstractCell):
    r"""The long short-term memory in the form of cuDNN and `torch.nn.LSTM`.

    $$\begin{aligned}
    i_t &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
    f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
    g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
    o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
    c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
    h_t &= o_t \odot \tanh(c_t)
    \end{aligned}$$

    The state is the tuple $(c, h)$, each `[d_state]` (torch and Equinox order it
    $(h, c)$), and a layer emits $h$. The Jacobian is dense, or has one block for each
    head if there are several. With one head, the parameters are the row blocks of
    torch's `weight_ih_l0`, `weight_hh_l0`, `bias_ih_l0` and `bias_hh_l0`, in the order
    i, f, g, o.

    ??? cite "Source"

        Hochreiter & Schmidhuber, "Long short-term memory", Neural Computation 9 (1997);
        the forget gate is from Gers et al., Neural Computation 12 (2000). Heads: Pöppel
        et al., "FlashRNN: I/O-Aware Optimization of Traditional RNNs on modern
        hardware" (2412.07752).
    """

    W_ii: Float[Array, "d_state d_input"]
    W_if: Float[Array, "d_state d_input"]
    W_ig: Float[Array, "d_state d_input"]
    W_io: Float[Array, "d_state d_input"]
    W_hi: Float[Array, "*heads out in"]
    W_hf: Float[Array, "*heads out in"]
    W_hg: Float[Array, "*heads out in"]
    W_ho: Float[Array, "*heads out in"]
    b_ii: Float[Array, " d_state"]
    b_if: Float[Array, " d_state"]
    b_ig: Float[Array, " d_state"]
    b_io: Float[Array, " d_state"]
    b_hi: Float[Array, " d_state"]
    b_hf: Float[Array, " d_state"]
    b_hg: Float[Array, " d_state"]
    b_ho: Float[Array, " d_state"]
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
        - `heads`: the recurrent matrices are block-diagonal with this many blocks, each
            `[d_state // heads, d_state // heads]`; it must divide `d_state`.
        - `dtype`: dtype of the parameters. Defaults to JAX's default floating-point
            dtype. 16-bit parameters have a float32 state.
        - `key`: a key of `jax.random`. All parameters are drawn uniformly from
            $\pm 1 / \sqrt{d_{state}}$, as in torch; those of several heads from
            $\pm 1$ over the root of a block's width.

        **Raises:** `ValueError` on a size that is not a positive integer, heads that
        do not divide `d_state`, an invalid key, or a dtype that is not floating
        point.
        """
        self.d_input, self.d_state = check_sizes("LSTMCell", d_input, d_state)
        self.heads = check_heads(
            "LSTMCell", heads, "the recurrent", d_state=self.d_state
        )
        dtype = check_dtype("LSTMCell", dtype)
        check_key("LSTMCell", key)
        inputs, hidden, from_x, from_h = jr.split(key, 4)
        n, bound = self.d_state, 1 / math.sqrt(self.d_state)
        self.W_ii, self.W_if, self.W_ig, self.W_io = uniform(
            inputs, 4, (n, self.d_input), bound, dtype
        )
        self.W_hi, self.W_hf, self.W_hg, self.W_ho = recurrent(
            hidden, 4, n, self.heads, dtype
        )
        self.b_ii, self.b_if, self.b_ig, self.b_io = uniform(
            from_x, 4, (n,), bound, dtype
        )
        self.b_hi, self.b_hf, self.b_hg, self.b_ho = uniform(
            from_h, 4, (n,), bound, dtype
        )

    def gates(
        self, x: Float[Array, "*time d_input"]
    ) -> tuple[Float[Array, "*time d_state"], ...]:
        """What `x` and the biases add to i, f, g and o; see
        [`pararnn.AbstractCell.gates`][]."""
        x = check_input("LSTMCell", x, self.d_input)
        return (
            affine(self.W_ii, x, self.b_ii, self.b_hi),
            affine(self.W_if, x, self.b_if, self.b_hf),
            affine(self.W_ig, x, self.b_ig, self.b_hg),
            affine(self.W_io, x, self.b_io, self.b_ho),
        )

    def update(
        self,
        state: tuple[Float[Array, " d_state"], Float[Array, " d_state"]],
        gates: tuple[Float[Array, " d_state"], ...],
    ) -> tuple[Float[Array, " d_state"], Float[Array, " d_state"]]:
        """The next $(c, h)$, each `[d_state]`, in the dtypes of `state`."""
        c, h, g_i, g_f, g_g, g_o, W_i, W_f, W_g, W_o = widen(
            *state, *gates, self.W_hi, self.W_hf, self.W_hg, self.W_ho
        )
        i = sigmoid(g_i + linear(W_i, h))
        f = sigmoid(g_f + linear(W_f, h))
        g = jnp.tanh(g_g + linear(W_g, h))
        o = sigmoid(g_o + linear(W_o, h))
        c = f * c + i * g
        h = o * jnp.tanh(c)
        return c.astype(state[0].dtype), h.astype(state[1].dtype)

    def init_state(self) -> tuple[Float[Array, " d_state"], Float[Array, " d_state"]]:
        """Zeros $(c, h)$, each `[d_state]`, at least float32."""
        # Two buffers, since one that appears twice could not be donated.
        return zeros(self.d_state, self.W_hi.dtype), zeros(
            self.d_state, self.W_hi.dtype
        )

    def output(
        self, state: tuple[Float[Array, " d_state"], Float[Array, " d_state"]]
    ) -> Float[Array, " d_state"]:
        """$h$, `[d_state]`."""
        _, h = state
        return h
