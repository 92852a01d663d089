import math
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax.nn import relu
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._parameters import (
    affine,
    check_dtype,
    check_input,
    check_key,
    check_sizes,
    linear,
    uniform,
    widen,
    zeros,
)
from ._base import AbstractCell

ACTIVATIONS = {"tanh": jnp.tanh, "relu": relu}


class ElmanCell(AbstractCell):
    r"""The vanilla recurrent cell, with a dense Jacobian.

    $$h_t = \tanh(W x_t + U h_{t-1} + b)$$

    or with $\max(\cdot, 0)$ instead of $\tanh$. The state is $h$, `[d_state]`.

    ??? cite "Source"

        Elman, "Finding structure in time", Cognitive Science 14 (1990); initialised
        like `torch.nn.RNN`.
    """

    W: Float[Array, "d_state d_input"]
    U: Float[Array, "d_state d_state"]
    b: Float[Array, " d_state"]
    d_input: int
    d_state: int
    activation: Literal["tanh", "relu"] = eqx.field(static=True)

    def __init__(
        self,
        d_input: int,
        d_state: int | None = None,
        *,
        activation: Literal["tanh", "relu"] = "tanh",
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_input`: size of the input.
        - `d_state`: size of the state. Defaults to `d_input`.
        - `activation`: `"tanh"` or `"relu"`.
        - `dtype`: dtype of the parameters. Defaults to JAX's default floating-point
            dtype. 16-bit parameters have a float32 state.
        - `key`: a key of `jax.random`. All parameters are drawn uniformly from
            $\pm 1 / \sqrt{d_{state}}$.

        **Raises:** `ValueError` on a size that is not a positive integer, an unknown
        activation, an invalid key, or a dtype that is not floating point.
        """
        self.d_input, self.d_state = check_sizes("ElmanCell", d_input, d_state)
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"ElmanCell: `activation` must be 'tanh' or 'relu', got {activation!r}."
            )
        self.activation = activation
        dtype = check_dtype("ElmanCell", dtype)
        check_key("ElmanCell", key)
        inputs, hidden, biases = jr.split(key, 3)
        n, bound = self.d_state, 1 / math.sqrt(self.d_state)
        (self.W,) = uniform(inputs, 1, (n, self.d_input), bound, dtype)
        (self.U,) = uniform(hidden, 1, (n, n), bound, dtype)
        (self.b,) = uniform(biases, 1, (n,), bound, dtype)

    def gates(
        self, x: Float[Array, "*time d_input"]
    ) -> tuple[Float[Array, "*time d_state"]]:
        """`(W x + b,)`; see [`pararnn.AbstractCell.gates`][]."""
        x = check_input("ElmanCell", x, self.d_input)
        return (affine(self.W, x, self.b),)

    def update(
        self,
        state: Float[Array, " d_state"],
        gates: tuple[Float[Array, " d_state"]],
    ) -> Float[Array, " d_state"]:
        """The next $h$, `[d_state]`, in the dtype of `state`."""
        h, g, U = widen(state, *gates, self.U)
        activation = ACTIVATIONS[self.activation]
        return activation(g + linear(U, h)).astype(state.dtype)

    def init_state(self) -> Float[Array, " d_state"]:
        """Zeros `[d_state]`, at least float32."""
        return zeros(self.d_state, self.U.dtype)

    def output(self, state: Float[Array, " d_state"]) -> Float[Array, " d_state"]:
        """The state itself, `[d_state]`."""
        return state
