"""The real-gated linear recurrent unit."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from pararnn._parameters import affine, check_number, check_size, leading, widen
from pararnn.scan import Diagonal, linear_scan

from .._arguments import Draw, check_divisor
from .._layer import AbstractLayer
from .._parts import decay_and_complement


class RGLRU(AbstractLayer):
    r"""The real-gated linear recurrent unit of Griffin.

    $$\begin{aligned}
    r_t &= \sigma(W_a x_t + b_a), \quad i_t = \sigma(W_x x_t + b_x), \quad
    \log a_t = -8 \, r_t \odot \mathrm{softplus}(\Lambda) \\
    h_t &= a_t \odot h_{t-1} + \sqrt{1 - a_t^2} \odot (i_t \odot x_t), \qquad y_t = h_t
    \end{aligned}$$

    except that the first input of a sequence, after a fresh state or a reset, has the
    weight 1 in place of $\sqrt{1 - a^2}$. The state is h, `[d_model]`, and a number
    that is 1 before the first input and 0 after it.

    ??? cite "Source"

        De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention for
        Efficient Language Models" (2402.19427, section 2.4).
    """

    W_a: Float[Array, "blocks size size"]
    W_x: Float[Array, "blocks size size"]
    b_a: Float[Array, " d_model"]
    b_x: Float[Array, " d_model"]
    Lambda: Float[Array, " d_model"]
    d_model: int

    def __init__(
        self,
        d_model: int,
        *,
        blocks: int = 1,
        r_min: float = 0.9,
        r_max: float = 0.999,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: size of an input, of the state and of an output.
        - `blocks`: number of diagonal blocks of the gates' matrices; divides `d_model`.
        - `r_min`, `r_max`: the initial $\exp(-\mathrm{softplus}(\Lambda))$ lies between
            them, and its square is uniform.
        - `dtype`: of the parameters. Defaults to JAX's default floating point.
        - `key`: a key of `jax.random`.

        **Raises:** `ValueError` on a size that is not a positive integer or not
        divisible, radii out of range, an invalid key, or a dtype that is not
        floating point.
        """
        draw = Draw("RGLRU", dtype, key)
        self.d_model = check_size("RGLRU", "d_model", d_model)
        check_divisor("RGLRU", "blocks", blocks, "d_model", d_model)
        r_min = check_number("RGLRU", "r_min", r_min)
        r_max = check_number("RGLRU", "r_max", r_max)
        if not 0 < r_min < r_max < 1:
            raise ValueError(
                f"RGLRU: `r_min` = {r_min!r} and `r_max` = {r_max!r} must satisfy "
                "0 < r_min < r_max < 1. Likely cause: the two are swapped."
            )
        size = d_model // blocks
        self.W_a = draw.weight(blocks, size, size)
        self.W_x = draw.weight(blocks, size, size)
        self.b_a, self.b_x = (draw.constant(np.zeros(d_model)) for _ in range(2))
        u = draw.wide_uniform((d_model,), 0, 1)
        rho = 0.5 * jnp.log(u * (r_max**2 - r_min**2) + r_min**2)
        # softplus(Lambda) = -rho.
        self.Lambda = draw.constant(jnp.log(jnp.expm1(-rho)))

    def init_state(self) -> tuple[Float[Array, " d_model"], Float[Array, ""]]:
        """Return zeros `[d_model]` and 1, at least float32."""
        precision = self.precision()
        return jnp.zeros((self.d_model,), precision), jnp.ones((), precision)

    def recurrent_state(self, state):
        """Return h, `[d_model]`."""
        return state[0]

    def mix(self, xs, state, reset):
        state, fresh = state
        gate = jax.nn.sigmoid(affine(self.W_a, xs, self.b_a))
        inputs = jax.nn.sigmoid(affine(self.W_x, xs, self.b_x))
        Lambda, gate, inputs, xs = widen(self.Lambda, gate, inputs, xs)
        log_a = -8 * gate * leading(jax.nn.softplus(Lambda), 2)
        # The root of zero has no derivative.
        tiny = jnp.finfo(log_a.dtype).tiny
        a, one_minus_a2 = decay_and_complement(log_a)
        scale = jnp.sqrt(jnp.maximum(one_minus_a2, tiny))
        first = (jnp.arange(xs.shape[0]) == 0) & (fresh > 0)
        if reset is not None:
            first = first | reset
        scale = jnp.where(first[:, None], 1, scale)
        states = linear_scan(Diagonal(a), scale * inputs * xs, state, reset=reset)
        return states, (states[-1], jnp.zeros_like(fresh))
