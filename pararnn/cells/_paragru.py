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


class ParaGRUCell(AbstractCell):
    r"""A GRU whose recurrent weights are diagonal, so that its Jacobian is too.

    $$\begin{aligned}
    z_t &= \sigma(a_z \odot h_{t-1} + B_z x_t + b_z) \\
    r_t &= \sigma(a_r \odot h_{t-1} + B_r x_t + b_r) \\
    n_t &= \tanh(a_n \odot h_{t-1} \odot r_t + B_n x_t + b_n) \\
    h_t &= z_t \odot n_t + (1 - z_t) \odot h_{t-1}
    \end{aligned}$$

    The state is $h$, `[d_state]`. Note that $z$ opens towards the new value, the
    reverse of [`pararnn.GRUCell`][].

    ??? cite "Source"

        Danieli et al., "ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for
        Large Language Models" (2510.21450).
    """

    a_z: Float[Array, " d_state"]
    a_r: Float[Array, " d_state"]
    a_n: Float[Array, " d_state"]
    B_z: Float[Array, "heads out in"]
    B_r: Float[Array, "heads out in"]
    B_n: Float[Array, "heads out in"]
    b_z: Float[Array, " d_state"]
    b_r: Float[Array, " d_state"]
    b_n: Float[Array, " d_state"]
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
        - `heads`: the input matrices $B$ are block-diagonal with this many blocks; it
            must divide both sizes.
        - `dtype`: dtype of the parameters. Defaults to JAX's default floating-point
            dtype. 16-bit parameters have a float32 state.
        - `key`: a key of `jax.random`. Each group of parameters is drawn uniformly from
            $\pm 1 / \sqrt{\text{fan-in}}$: the fan-in of $B$ and $b$ is
            `d_input // heads`, and that of $a$ is 1, so that $|a| \le 1$.

        **Raises:** `ValueError` on a size that is not a positive integer, heads that
        do not divide the sizes, an invalid key, or a dtype that is not floating
        point.
        """
        self.d_input, self.d_state = check_sizes("ParaGRUCell", d_input, d_state)
        self.heads = check_heads(
            "ParaGRUCell",
            heads,
            "the input",
            d_input=self.d_input,
            d_state=self.d_state,
        )
        dtype = check_dtype("ParaGRUCell", dtype)
        check_key("ParaGRUCell", key)
        recurrent, inputs, biases = jr.split(key, 3)
        n, fan_in = self.d_state, self.d_input // self.heads
        block, bound = (self.heads, n // self.heads, fan_in), 1 / math.sqrt(fan_in)
        self.a_z, self.a_r, self.a_n = uniform(recurrent, 3, (n,), 1.0, dtype)
        self.B_z, self.B_r, self.B_n = uniform(inputs, 3, block, bound, dtype)
        self.b_z, self.b_r, self.b_n = uniform(biases, 3, (n,), bound, dtype)

    def gates(
        self, x: Float[Array, "*time d_input"]
    ) -> tuple[Float[Array, "*time d_state"], ...]:
        """`B x + b` for z, r and n; see [`pararnn.AbstractCell.gates`][]."""
        x = check_input("ParaGRUCell", x, self.d_input)
        return (
            affine(self.B_z, x, self.b_z),
            affine(self.B_r, x, self.b_r),
            affine(self.B_n, x, self.b_n),
        )

    def update(
        self,
        state: Float[Array, " d_state"],
        gates: tuple[Float[Array, " d_state"], ...],
    ) -> Float[Array, " d_state"]:
        """The next $h$, `[d_state]`, in the dtype of `state`."""
        h, g_z, g_r, g_n, a_z, a_r, a_n = widen(
            state, *gates, self.a_z, self.a_r, self.a_n
        )
        z = sigmoid(a_z * h + g_z)
        r = sigmoid(a_r * h + g_r)
        n = jnp.tanh(a_n * h * r + g_n)
        return (z * n + (1 - z) * h).astype(state.dtype)

    def init_state(self) -> Float[Array, " d_state"]:
        """Zeros `[d_state]`, at least float32."""
        return zeros(self.d_state, self.a_z.dtype)

    def output(self, state: Float[Array, " d_state"]) -> Float[Array, " d_state"]:
        """The state itself, `[d_state]`."""
        return state
