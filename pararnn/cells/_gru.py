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


class GRUCell(AbstractCell):
    r"""The gated recurrent unit in the form of cuDNN and `torch.nn.GRU`.

    $$\begin{aligned}
    r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
    z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
    n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
    h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}
    \end{aligned}$$

    The state is $h$, `[d_state]`. The Jacobian is dense, or has one block for each head
    if there are several. With one head, the parameters are the row blocks of torch's
    `weight_ih_l0`, `weight_hh_l0`, `bias_ih_l0` and `bias_hh_l0`, in the order r, z, n.

    ??? cite "Source"

        Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for
        Statistical Machine Translation" (1406.1078v1; its later versions put $r$ inside
        the product). Heads: Pöppel et al., "FlashRNN: I/O-Aware Optimization of
        Traditional RNNs on modern hardware" (2412.07752).
    """

    W_ir: Float[Array, "d_state d_input"]
    W_iz: Float[Array, "d_state d_input"]
    W_in: Float[Array, "d_state d_input"]
    W_hr: Float[Array, "*heads out in"]
    W_hz: Float[Array, "*heads out in"]
    W_hn: Float[Array, "*heads out in"]
    b_ir: Float[Array, " d_state"]
    b_iz: Float[Array, " d_state"]
    b_in: Float[Array, " d_state"]
    b_hr: Float[Array, " d_state"]
    b_hz: Float[Array, " d_state"]
    b_hn: Float[Array, " d_state"]
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
        - `d_state`: size of the state. Defaults to `d_input`.
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
        self.d_input, self.d_state = check_sizes("GRUCell", d_input, d_state)
        self.heads = check_heads(
            "GRUCell", heads, "the recurrent", d_state=self.d_state
        )
        dtype = check_dtype("GRUCell", dtype)
        check_key("GRUCell", key)
        inputs, hidden, biases = jr.split(key, 3)
        n, bound = self.d_state, 1 / math.sqrt(self.d_state)
        self.W_ir, self.W_iz, self.W_in = uniform(
            inputs, 3, (n, self.d_input), bound, dtype
        )
        self.W_hr, self.W_hz, self.W_hn = recurrent(hidden, 3, n, self.heads, dtype)
        self.b_ir, self.b_iz, self.b_in, self.b_hr, self.b_hz, self.b_hn = uniform(
            biases, 6, (n,), bound, dtype
        )

    def gates(
        self, x: Float[Array, "*time d_input"]
    ) -> tuple[Float[Array, "*time d_state"], ...]:
        """What `x` and the biases add to r, z and n; see
        [`pararnn.AbstractCell.gates`][]."""
        x = check_input("GRUCell", x, self.d_input)
        return (
            affine(self.W_ir, x, self.b_ir, self.b_hr),
            affine(self.W_iz, x, self.b_iz, self.b_hz),
            # b_hn stands inside the product with r.
            affine(self.W_in, x, self.b_in),
        )

    def update(
        self,
        state: Float[Array, " d_state"],
        gates: tuple[Float[Array, " d_state"], ...],
    ) -> Float[Array, " d_state"]:
        """The next $h$, `[d_state]`, in the dtype of `state`."""
        h, g_r, g_z, g_n, W_r, W_z, W_n, b_n = widen(
            state, *gates, self.W_hr, self.W_hz, self.W_hn, self.b_hn
        )
        r = sigmoid(g_r + linear(W_r, h))
        z = sigmoid(g_z + linear(W_z, h))
        n = jnp.tanh(g_n + r * (linear(W_n, h) + b_n))
        return ((1 - z) * n + z * h).astype(state.dtype)

    def init_state(self) -> Float[Array, " d_state"]:
        """Zeros `[d_state]`, at least float32."""
        return zeros(self.d_state, self.W_hr.dtype)

    def output(self, state: Float[Array, " d_state"]) -> Float[Array, " d_state"]:
        """The state itself, `[d_state]`."""
        return state
