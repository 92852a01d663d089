"""pLSTM on sequences: source, transition and mark."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from pararnn._parameters import affine, check_size, linear
from pararnn.scan import matrix_scan

from .._arguments import Draw, head_size
from .._layer import AbstractLayer
from .._parts import read_out, split_heads


class PLSTM(AbstractLayer):
    r"""Linear attention with three gates, in which a step reads only its past.

    $$C_t = T_t C_{t-1} + S_t k_t v_t^\top, \qquad
    o_t = K^{-1/2} \left( M_t C_{t-1}^\top q_t + D_t (k_t \cdot q_t) v_t \right),
    \qquad y_t = W_{out} \, \mathrm{RMSNorm}(o_t)$$

    for each head, where the source $S_t$, the transition $T_t$, the mark $M_t$ and the
    direct gate $D_t$ are $\sigma(W x_t + b)$, each with its own weights. The mark gates
    what a step reads from the previous state; the direct gate, what it reads of itself.
    [`linear.PLSTMGrid`][] does the same on images.

    ??? cite "Source"

        Pöppel et al., "pLSTM: parallelizable Linear Source Transition Mark networks"
        (2506.11997), equations 5 and 6 on a line. The paper's transition is a tanh;
        this one is positive.
    """

    W_q: Float[Array, "features_k d_model"]
    W_k: Float[Array, "features_k d_model"]
    W_v: Float[Array, "features_v d_model"]
    W_s: Float[Array, "heads d_model"]
    W_t: Float[Array, "heads d_model"]
    W_m: Float[Array, "heads d_model"]
    W_d: Float[Array, "heads d_model"]
    b_s: Float[Array, " heads"]
    b_t: Float[Array, " heads"]
    b_m: Float[Array, " heads"]
    b_d: Float[Array, " heads"]
    norm_weight: Float[Array, " V"]
    W_out: Float[Array, "d_model features_v"]
    d_model: int
    heads: int

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 1,
        d_key: int | None = None,
        d_value: int | None = None,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Initially the gates are nearly constant. The bias of source and mark is -4
        and that of the direct gate -6 (table 4 of the paper). That of the transition
        ranges from 3 to 6 over the heads, a memory of 20 to 400 steps.

        **Arguments:**

        - `d_model`: size of an input and of an output.
        - `heads`: number of states, each a matrix `[d_key, d_value]`.
        - `d_key`, `d_value`: sizes of a key and a value of one head.
            Both default to `d_model // heads`.
        - `dtype`: of the parameters. Defaults to JAX's default floating point.
        - `key`: a key of `jax.random`.

        **Raises:** `ValueError` on sizes that are not positive integers or not
        divisible by `heads`, a dtype that is not floating point, or an invalid key.
        """
        draw = Draw("PLSTM", dtype, key)
        self.d_model = check_size("PLSTM", "d_model", d_model)
        self.heads = check_size("PLSTM", "heads", heads)
        features_k = heads * head_size("PLSTM", "d_key", d_key, d_model, heads)
        d_value = head_size("PLSTM", "d_value", d_value, d_model, heads)
        self.W_q = draw.weight(features_k, d_model)
        self.W_k = draw.weight(features_k, d_model)
        self.W_v = draw.weight(heads * d_value, d_model)
        self.W_s, self.W_t, self.W_m, self.W_d = (
            draw.normal((heads, d_model), small_deviation(d_model)) for _ in range(4)
        )
        self.b_s = draw.constant(jnp.full(heads, SOURCE_BIAS))
        self.b_m = draw.constant(jnp.full(heads, MARK_BIAS))
        self.b_d = draw.constant(jnp.full(heads, DIRECT_BIAS))
        self.b_t = draw.constant(jnp.linspace(3, 6, heads))
        self.norm_weight = draw.constant(jnp.ones(d_value))
        self.W_out = draw.weight(d_model, heads * d_value)

    def init_state(self):
        """Return zeros, the matrices `[heads, K, V]`."""
        size = self.W_k.shape[0] // self.heads
        shape = (self.heads, size, self.norm_weight.shape[0])
        return jnp.zeros(shape, self.precision())

    def mix(self, xs, state, reset):
        q, k, v = (
            split_heads(linear(weight, xs), self.heads)
            for weight in (self.W_q, self.W_k, self.W_v)
        )
        source, transition, mark, direct = (
            jax.nn.sigmoid(affine(weight, xs, bias))
            for weight, bias in (
                (self.W_s, self.b_s),
                (self.W_t, self.b_t),
                (self.W_m, self.b_m),
                (self.W_d, self.b_d),
            )
        )
        q = q * q.shape[-1] ** -0.5
        past, state = matrix_scan(
            q * mark[..., None],
            k * source[..., None],
            v,
            transition,
            initial=state,
            reset=reset,
            emit="before",
        )
        own = direct * jnp.sum(k * q, axis=-1)
        return read_out(past + own[..., None] * v, self.norm_weight, self.W_out), state


# Table 4 of the paper.
SOURCE_BIAS, MARK_BIAS, DIRECT_BIAS = -4.0, -4.0, -6.0


def small_deviation(d_model: int) -> float:
    """Return the initial deviation of the gates' weights; the paper only says small."""
    return (2 / (5 * d_model)) ** 0.5
