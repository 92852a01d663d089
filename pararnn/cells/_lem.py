import math

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax.nn import sigmoid
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._parameters import (
    affine,
    check_dtype,
    check_input,
    check_key,
    check_positive,
    check_sizes,
    linear,
    uniform,
    widen,
    zeros,
)
from ._base import AbstractCell


class LEMCell(AbstractCell):
    r"""Long Expressive Memory: two states with learned step sizes.

    $$\begin{aligned}
    \Delta_{1,t} &= \Delta t \, \sigma(W_1 y_{t-1} + V_1 x_t + b_1), \quad
    \Delta_{2,t} = \Delta t \, \sigma(W_2 y_{t-1} + V_2 x_t + b_2) \\
    z_t &= (1 - \Delta_{1,t}) \odot z_{t-1}
        + \Delta_{1,t} \odot \tanh(W_z y_{t-1} + V_z x_t + b_z) \\
    y_t &= (1 - \Delta_{2,t}) \odot y_{t-1}
        + \Delta_{2,t} \odot \tanh(W_y z_t + V_y x_t + b_y)
    \end{aligned}$$

    The state is the tuple $(z, y)$, each `[d_state]`, and a layer emits $y$. The
    Jacobian is dense. Note that $y$ sees the new $z$.

    ??? cite "Source"

        Rusch et al., "Long Expressive Memory for Sequence Modeling" (2110.04744).
    """

    W_1: Float[Array, "d_state d_state"]
    W_2: Float[Array, "d_state d_state"]
    W_z: Float[Array, "d_state d_state"]
    W_y: Float[Array, "d_state d_state"]
    V_1: Float[Array, "d_state d_input"]
    V_2: Float[Array, "d_state d_input"]
    V_z: Float[Array, "d_state d_input"]
    V_y: Float[Array, "d_state d_input"]
    b_1: Float[Array, " d_state"]
    b_2: Float[Array, " d_state"]
    b_z: Float[Array, " d_state"]
    b_y: Float[Array, " d_state"]
    d_input: int
    d_state: int
    dt: float = eqx.field(static=True)

    def __init__(
        self,
        d_input: int,
        d_state: int | None = None,
        *,
        dt: float = 1.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_input`: size of the input.
        - `d_state`: size of $z$ and of $y$. Defaults to `d_input`.
        - `dt`: $\Delta t$, the largest step size, a constant. Up to 1, both states stay
            in [-1, 1]. The smaller it is, the longer the states last.
        - `dtype`: dtype of the parameters. Defaults to JAX's default floating-point
            dtype. 16-bit parameters have a float32 state.
        - `key`: a key of `jax.random`. All parameters are drawn uniformly from
            $\pm 1 / \sqrt{d_{state}}$, as in the released code, `tk-rusch/LEM`.

        **Raises:** `ValueError` on a size that is not a positive integer, a `dt` that
        is not a positive number, an invalid key, or a dtype that is not floating
        point.
        """
        self.d_input, self.d_state = check_sizes("LEMCell", d_input, d_state)
        self.dt = check_positive("LEMCell", "dt", dt)
        dtype = check_dtype("LEMCell", dtype)
        check_key("LEMCell", key)
        inputs, hidden, biases = jr.split(key, 3)
        n, bound = self.d_state, 1 / math.sqrt(self.d_state)
        self.W_1, self.W_2, self.W_z, self.W_y = uniform(
            hidden, 4, (n, n), bound, dtype
        )
        self.V_1, self.V_2, self.V_z, self.V_y = uniform(
            inputs, 4, (n, self.d_input), bound, dtype
        )
        self.b_1, self.b_2, self.b_z, self.b_y = uniform(biases, 4, (n,), bound, dtype)

    def gates(
        self, x: Float[Array, "*time d_input"]
    ) -> tuple[Float[Array, "*time d_state"], ...]:
        """`V x + b` for both step sizes, z and y; see
        [`pararnn.AbstractCell.gates`][]."""
        x = check_input("LEMCell", x, self.d_input)
        return (
            affine(self.V_1, x, self.b_1),
            affine(self.V_2, x, self.b_2),
            affine(self.V_z, x, self.b_z),
            affine(self.V_y, x, self.b_y),
        )

    def update(
        self,
        state: tuple[Float[Array, " d_state"], Float[Array, " d_state"]],
        gates: tuple[Float[Array, " d_state"], ...],
    ) -> tuple[Float[Array, " d_state"], Float[Array, " d_state"]]:
        """The next $(z, y)$, each `[d_state]`, in the dtypes of `state`."""
        z, y, g_1, g_2, g_z, g_y, W_1, W_2, W_z, W_y = widen(
            *state, *gates, self.W_1, self.W_2, self.W_z, self.W_y
        )
        step_z = self.dt * sigmoid(g_1 + linear(W_1, y))
        step_y = self.dt * sigmoid(g_2 + linear(W_2, y))
        z = (1 - step_z) * z + step_z * jnp.tanh(g_z + linear(W_z, y))
        y = (1 - step_y) * y + step_y * jnp.tanh(g_y + linear(W_y, z))
        return z.astype(state[0].dtype), y.astype(state[1].dtype)

    def init_state(self) -> tuple[Float[Array, " d_state"], Float[Array, " d_state"]]:
        """Zeros $(z, y)$, each `[d_state]`, at least float32."""
        # Two buffers, since one that appears twice could not be donated.
        return zeros(self.d_state, self.W_1.dtype), zeros(self.d_state, self.W_1.dtype)

    def output(
        self, state: tuple[Float[Array, " d_state"], Float[Array, " d_state"]]
    ) -> Float[Array, " d_state"]:
        """$y$, `[d_state]`."""
        _, y = state
        return y
