"""minGRU and minLSTM: gated layers whose gates do not see the state."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from pararnn._parameters import affine, linear
from pararnn.scan import Diagonal, linear_scan

from .._arguments import Draw, check_sizes
from .._layer import AbstractLayer
from .._parts import normalised_gates


def positive(x: Array) -> Array:
    r"""Return $g(x) = x + 1/2$ if $x \ge 0$, else $\sigma(x)$: positive, continuous."""
    return jnp.where(x >= 0, x + 0.5, jax.nn.sigmoid(x))


class MinGRU(AbstractLayer):
    r"""A GRU whose gate and candidate see only the input.

    $$z_t = \sigma(W_z x_t + b_z), \qquad
    h_t = (1 - z_t) \odot h_{t-1} + z_t \odot g(W_h x_t + b_h), \qquad
    y_t = W_{out} h_t$$

    with $g(x) = x + 1/2$ for $x \ge 0$ and $\sigma(x)$ below, so that the state is
    positive. The paper computes this with logarithms. Here the factors themselves are
    multiplied, which is as accurate and allows negative states.

    ??? cite "Source"

        Feng et al., "Were RNNs All We Needed?" (2410.01201).
    """

    W_z: Float[Array, "d_state d_model"]
    W_h: Float[Array, "d_state d_model"]
    b_z: Float[Array, " d_state"]
    b_h: Float[Array, " d_state"]
    W_out: Float[Array, "d_model d_state"]
    d_model: int
    d_state: int

    def __init__(
        self,
        d_model: int,
        d_state: int | None = None,
        *,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: size of an input and of an output.
        - `d_state`: size of the state. Defaults to `d_model`.
        - `dtype`: of the parameters. Defaults to JAX's default floating point.
        - `key`: a key of `jax.random`.

        **Raises:** `ValueError` on a size that is not a positive integer, an invalid
        key, or a dtype that is not floating point.
        """
        draw = Draw("MinGRU", dtype, key)
        d_model, d_state = check_sizes("MinGRU", d_model, d_state)
        self.d_model, self.d_state = d_model, d_state
        self.W_z, self.W_h = (draw.weight(d_state, d_model) for _ in range(2))
        self.b_z, self.b_h = (draw.constant(jnp.zeros(d_state)) for _ in range(2))
        self.W_out = draw.weight(d_model, d_state)

    def init_state(self) -> Float[Array, " d_state"]:
        """Return zeros `[d_state]`, at least float32."""
        return jnp.zeros((self.d_state,), self.precision())

    def mix(self, xs, state, reset):
        logits = affine(self.W_z, xs, self.b_z)
        candidate = positive(affine(self.W_h, xs, self.b_h))
        # 1 - sigmoid(x) = sigmoid(-x), which rounds better.
        states = linear_scan(
            Diagonal(jax.nn.sigmoid(-logits)),
            jax.nn.sigmoid(logits) * candidate,
            state,
            reset=reset,
        )
        return linear(self.W_out, states), states[-1]


class MinLSTM(AbstractLayer):
    r"""An LSTM with normalised gates; gates and candidate see only the input.

    $$f_t = \sigma(W_f x_t + b_f), \quad i_t = \sigma(W_i x_t + b_i), \qquad
    h_t = \frac{f_t}{f_t + i_t} \odot h_{t-1} +
    \frac{i_t}{f_t + i_t} \odot g(W_h x_t + b_h), \qquad y_t = W_{out} h_t$$

    with $g$ as in [`linear.MinGRU`][].

    ??? cite "Source"

        Feng et al., "Were RNNs All We Needed?" (2410.01201).
    """

    W_f: Float[Array, "d_state d_model"]
    W_i: Float[Array, "d_state d_model"]
    W_h: Float[Array, "d_state d_model"]
    b_f: Float[Array, " d_state"]
    b_i: Float[Array, " d_state"]
    b_h: Float[Array, " d_state"]
    W_out: Float[Array, "d_model d_state"]
    d_model: int
    d_state: int

    def __init__(
        self,
        d_model: int,
        d_state: int | None = None,
        *,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """The arguments are those of [`linear.MinGRU`][]."""
        draw = Draw("MinLSTM", dtype, key)
        d_model, d_state = check_sizes("MinLSTM", d_model, d_state)
        self.d_model, self.d_state = d_model, d_state
        self.W_f, self.W_i, self.W_h = (draw.weight(d_state, d_model) for _ in range(3))
        self.b_f, self.b_i, self.b_h = (
            draw.constant(jnp.zeros(d_state)) for _ in range(3)
        )
        self.W_out = draw.weight(d_model, d_state)

    def init_state(self) -> Float[Array, " d_state"]:
        """Return zeros `[d_state]`, at least float32."""
        return jnp.zeros((self.d_state,), self.precision())

    def mix(self, xs, state, reset):
        forget, enter = normalised_gates(
            affine(self.W_f, xs, self.b_f), affine(self.W_i, xs, self.b_i)
        )
        candidate = positive(affine(self.W_h, xs, self.b_h))
        states = linear_scan(Diagonal(forget), enter * candidate, state, reset=reset)
        return linear(self.W_out, states), states[-1]
