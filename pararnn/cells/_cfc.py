import math
from typing import Literal

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
    check_size,
    check_sizes,
    linear,
    uniform,
    wide_dtype,
    widen,
    zeros,
)
from ._base import AbstractCell


class CfCCell(AbstractCell):
    r"""The closed-form continuous-time cell: two networks, and a third that fades from
    one to the other as time passes.

    $$\begin{aligned}
    u_t &= 1.7159 \tanh(\tfrac{2}{3} (B_x x_t + B_h h_{t-1} + b)) \\
    f_t &= W_f u_t + b_f, \quad g_t = \tanh(W_g u_t + b_g), \quad
    k_t = \tanh(W_k u_t + b_k) \\
    h_t &= \sigma(-f_t \Delta t) \odot g_t
        + (1 - \sigma(-f_t \Delta t)) \odot k_t
    \end{aligned}$$

    The state is $h$, `[d_state]`, and the Jacobian dense. The backbone $u$ is shared by
    the three networks.

    ??? cite "Source"

        Hasani et al., "Closed-form continuous-time neural networks", Nature Machine
        Intelligence 4 (2022; 2106.13898). This is the variant with the gate. The
        backbone is a layer of the released code, `mlech26l/ncps`. There $f \Delta t$
        has a second network for an offset, which is part of $f$ where $\Delta t$ = 1.
    """

    B_x: Float[Array, "d_backbone features"]
    B_h: Float[Array, "d_backbone d_state"]
    W_f: Float[Array, "d_state d_backbone"]
    W_g: Float[Array, "d_state d_backbone"]
    W_k: Float[Array, "d_state d_backbone"]
    b: Float[Array, " d_backbone"]
    b_f: Float[Array, " d_state"]
    b_g: Float[Array, " d_state"]
    b_k: Float[Array, " d_state"]
    d_input: int
    d_state: int
    dt: float | str = eqx.field(static=True)

    def __init__(
        self,
        d_input: int,
        d_state: int | None = None,
        *,
        d_backbone: int | None = None,
        dt: float | Literal["input"] = 1.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_input`: size of the input.
        - `d_state`: size of the state. Defaults to `d_input`.
        - `d_backbone`: size of $u$. Defaults to `d_state` (128 in the released code).
        - `dt`: $\Delta t$, the time between two steps; or `"input"`, for steps at any
            times: the last feature of each input is then the time since the previous
            step, and the networks see the other `d_input - 1`.
        - `dtype`: dtype of the parameters. Defaults to JAX's default floating-point
            dtype. 16-bit parameters have a float32 state.
        - `key`: a key of `jax.random`. Matrices are drawn uniformly from
            $\pm \sqrt{6 / (\text{fan-in} + \text{fan-out})}$, where the fan-in of both
            $B$ is `features + d_state`, and biases from $\pm 1 / \sqrt{\text{fan-in}}$,
            as in the released code.

        **Raises:** `ValueError` on a size that is not a positive integer, a `dt` that
        is neither a positive number nor `"input"`, an input that is only the time,
        an invalid key, or a dtype that is not floating point.
        """
        where = "CfCCell"
        self.d_input, self.d_state = check_sizes(where, d_input, d_state)
        units = self.d_state if d_backbone is None else d_backbone
        units = check_size(where, "d_backbone", units)
        timed = isinstance(dt, str) and dt == "input"
        self.dt = dt if timed else check_positive(where, "dt", dt)
        features = self.d_input - timed
        if not features:
            raise ValueError(
                f"{where}: with `dt='input'` the last feature of an input is the time, "
                "so `d_input` = 1 leaves no other. Count the time in `d_input`, or "
                "pass a constant for `dt`."
            )
        dtype = check_dtype(where, dtype)
        check_key(where, key)
        keys, n = jr.split(key, 5), self.d_state
        fan_in = features + n
        bound = math.sqrt(6 / (fan_in + units))
        (self.B_x,) = uniform(keys[0], 1, (units, features), bound, dtype)
        (self.B_h,) = uniform(keys[1], 1, (units, n), bound, dtype)
        (self.b,) = uniform(keys[2], 1, (units,), 1 / math.sqrt(fan_in), dtype)
        bound = math.sqrt(6 / (units + n))
        self.W_f, self.W_g, self.W_k = uniform(keys[3], 3, (n, units), bound, dtype)
        self.b_f, self.b_g, self.b_k = uniform(
            keys[4], 3, (n,), 1 / math.sqrt(units), dtype
        )

    def gates(
        self, x: Float[Array, "*time d_input"]
    ) -> tuple[Float[Array, "*time _"], ...]:
        """`B_x x + b`, `[..., d_backbone]`, and with `dt="input"` the times
        `[..., d_state]`; see [`pararnn.AbstractCell.gates`][]."""
        x = check_input("CfCCell", x, self.d_input)
        if self.dt != "input":
            return (affine(self.B_x, x, self.b),)
        time = x[..., -1:].astype(wide_dtype(x.dtype))
        time = jnp.broadcast_to(time, (*x.shape[:-1], self.d_state))
        return affine(self.B_x, x[..., :-1], self.b), time

    def update(
        self,
        state: Float[Array, " d_state"],
        gates: tuple[Float[Array, " _"], ...],
    ) -> Float[Array, " d_state"]:
        """The next $h$, `[d_state]`, in the dtype of `state`."""
        h, g_u, *time, B_h = widen(state, *gates, self.B_h)
        dt = time[0] if time else float(self.dt)
        # The activation that LeCun et al., "Efficient BackProp" (1998), recommend.
        u = 1.7159 * jnp.tanh(2 / 3 * (g_u + linear(B_h, h)))
        g = jnp.tanh(affine(self.W_g, u, self.b_g))
        k = jnp.tanh(affine(self.W_k, u, self.b_k))
        kept = sigmoid(-affine(self.W_f, u, self.b_f) * dt)
        return (kept * g + (1 - kept) * k).astype(state.dtype)

    def init_state(self) -> Float[Array, " d_state"]:
        """Zeros `[d_state]`, at least float32."""
        return zeros(self.d_state, self.B_h.dtype)

    def output(self, state: Float[Array, " d_state"]) -> Float[Array, " d_state"]:
        """The state itself, `[d_state]`."""
        return state
