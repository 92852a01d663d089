"""The linear state space layer, with full matrices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from pararnn._parameters import affine, check_flag, check_size, widen
from pararnn.scan import (
    BlockDiagonal,
    einsum,
    invert_matrices,
    linear_scan,
    multiply_matrices,
)

from .._arguments import Draw, check_range
from .._layer import AbstractLayer
from .._state_spaces import legs


class LSSL(AbstractLayer):
    r"""The linear state space layer: full HiPPO-LegS, one state for each feature.

    $$\begin{aligned}
    h_t &= \bar{A} h_{t-1} + \bar{B} x_t, &
    \bar{A} &= (I - \tfrac{\Delta}{2} A)^{-1} (I + \tfrac{\Delta}{2} A), \quad
    \bar{B} = (I - \tfrac{\Delta}{2} A)^{-1} \Delta B \\
    y_t &= W_{out} \, \mathrm{GELU}(C h_t + D x_t) + b_{out}
    \end{aligned}$$

    with a step $\Delta$ for each feature. Each feature has a state of `d_state` entries
    and `channels` outputs. $A$ and $B$ have no derivative by default; exclude them from
    weight decay, which would change them all the same.

    ??? cite "Source"

        Gu et al., "Combining Recurrent, Convolutional, and Continuous-time Models with
        Linear State-Space Layers" (2110.13985).
    """

    A: Float[Array, "d_state d_state"]
    B: Float[Array, " d_state"]
    C: Float[Array, "d_model channels d_state"]
    D: Float[Array, "d_model channels"]
    log_dt: Float[Array, " d_model"]
    W_out: Float[Array, "d_model channels*d_model"]
    b_out: Float[Array, " d_model"]
    d_model: int
    d_state: int
    train_hippo: bool

    def __init__(
        self,
        d_model: int,
        d_state: int = 32,
        *,
        channels: int = 1,
        train_hippo: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: number of features, of an input and of an output.
        - `d_state`: size of each feature's state.
        - `channels`: number of outputs of each state, before they are mixed.
        - `train_hippo`: whether A and B have a derivative. Nothing keeps a trained A
            stable.
        - `dt_min`, `dt_max`: the initial $\Delta$ is log-uniform between them.
        - `dtype`: of the parameters. Defaults to JAX's default floating point.
        - `key`: a key of `jax.random`. $C, D \sim N(0, 1)$.

        **Raises:** `ValueError` on a size that is not a positive integer, steps out of
        range, an invalid key, or a dtype that is not floating point.
        """
        draw = Draw("LSSL", dtype, key)
        self.d_model = check_size("LSSL", "d_model", d_model)
        self.d_state = check_size("LSSL", "d_state", d_state)
        check_size("LSSL", "channels", channels)
        self.train_hippo = check_flag("LSSL", "train_hippo", train_hippo)
        check_range("LSSL", "dt_min", "dt_max", (dt_min, dt_max))
        A, B = legs(d_state)
        self.A, self.B = draw.constant(A), draw.constant(B)
        self.C = draw.normal((d_model, channels, d_state))
        self.D = draw.normal((d_model, channels))
        self.log_dt = draw.log_uniform((d_model,), dt_min, dt_max)
        self.W_out = draw.weight(d_model, channels * d_model)
        self.b_out = draw.constant(np.zeros(d_model))

    def discretise(
        self,
    ) -> tuple[
        Float[Array, "d_model d_state d_state"], Float[Array, "d_model d_state"]
    ]:
        r"""Return $\bar{A}$ and $\bar{B}$ of every feature."""
        A, B, log_dt = widen(self.A, self.B, self.log_dt)
        if not self.train_hippo:
            A, B = lax.stop_gradient((A, B))
        dt = jnp.exp(log_dt)[:, None, None]
        half, eye = dt / 2 * A[None], jnp.eye(self.d_state, dtype=A.dtype)[None]
        inverse = invert_matrices(eye - half)
        B_bar = multiply_matrices(inverse, dt * B[None, :, None])[..., 0]
        return multiply_matrices(inverse, eye + half), B_bar

    def init_state(self) -> Float[Array, "d_model d_state"]:
        """Return zeros `[d_model, d_state]`, at least float32."""
        return jnp.zeros((self.d_model, self.d_state), self.precision())

    def numbers_per_step(self) -> int:
        """The derivative stores several states of each feature."""
        return 8 * self.d_model * self.d_state

    def mix(self, xs, state, reset):
        A, B = self.discretise()
        wide = xs.astype(A.dtype)
        drive = (wide[..., None] * B[None]).reshape(xs.shape[0], -1)
        states = linear_scan(
            BlockDiagonal(A[None]), drive, state.reshape(-1), reset=reset
        ).reshape(xs.shape[0], *state.shape)
        C, D = widen(self.C, self.D)
        outputs = einsum("tdn,dmn->tdm", states, C)
        outputs = jax.nn.gelu(outputs + wide[..., None] * D[None], approximate=False)
        ys = affine(self.W_out, outputs.reshape(xs.shape[0], -1), self.b_out)
        return ys, states[-1]
