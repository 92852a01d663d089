"""The time mixing of RWKV-7."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from pararnn._parameters import check_size, leading, linear, widen
from pararnn.scan import matrix_scan

from .._arguments import Draw, check_divisor
from .._layer import AbstractLayer
from .._parts import group_norm, merge_heads, previous_inputs, split_heads


class RWKV7(AbstractLayer):
    r"""A generalised delta rule with a decay for each key.

    $$S_t = (\mathrm{diag}(w_t) - (a_t \odot \hat\kappa_t) \hat\kappa_t^\top) S_{t-1} +
    \tilde{k}_t v_t^\top, \qquad o_t = S_t^\top r_t$$

    With the mix $x^c_t = x_t + \mu_c \odot (x_{t-1} - x_t)$ for each use $c$:

    $$\begin{aligned}
    r &= W_r x^r, \quad k = W_k x^k, \quad v = W_v x^v, \quad
    w = \exp(-e^{-1/2} \sigma(w_0 + W_{w2} \tanh(W_{w1} x^w))) \\
    a &= \sigma(a_0 + W_{a2} W_{a1} x^a), \quad
    \hat\kappa = \mathrm{normalise}(k \odot k_k), \quad
    \tilde{k} = k \odot (1 + (a - 1) \odot k_a) \\
    y &= W_{out} ((\mathrm{GroupNorm}(o) + (r \cdot \tilde{k} \cdot r_k) v) \odot
    W_{g2} \sigma(W_{g1} x^g))
    \end{aligned}$$

    The state here is `[heads, K, V]`, the transpose of the paper's.

    ??? cite "Source"

        Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution"
        (2503.14456). The mix of the values with those of the first layer belongs to the
        model and is left out.
    """

    mu: Float[Array, "6 d_model"]
    W_r: Float[Array, "d_model d_model"]
    W_k: Float[Array, "d_model d_model"]
    W_v: Float[Array, "d_model d_model"]
    w0: Float[Array, " d_model"]
    W_w1: Float[Array, "rank d_model"]
    W_w2: Float[Array, "d_model rank"]
    a0: Float[Array, " d_model"]
    W_a1: Float[Array, "rank d_model"]
    W_a2: Float[Array, "d_model rank"]
    W_g1: Float[Array, "rank d_model"]
    W_g2: Float[Array, "d_model rank"]
    k_k: Float[Array, " d_model"]
    k_a: Float[Array, " d_model"]
    r_k: Float[Array, "heads K"]
    norm_weight: Float[Array, " d_model"]
    norm_bias: Float[Array, " d_model"]
    W_out: Float[Array, "d_model d_model"]
    d_model: int
    heads: int

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 1,
        rank: int | None = None,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: size of an input and of an output.
        - `heads`: number of heads; divides `d_model`.
        - `rank`: of the maps to the decay, the strength and the gate. Defaults to a
            quarter of `d_model`, at least 1.
        - `dtype`: of the parameters. Defaults to JAX's default floating point.
        - `key`: a key of `jax.random`.

        **Raises:** `ValueError` on a size that is not a positive integer, `heads` that
        do not divide, an invalid key, or a dtype that is not floating point.
        """
        draw = Draw("RWKV7", dtype, key)
        self.d_model = d = check_size("RWKV7", "d_model", d_model)
        self.heads = check_divisor("RWKV7", "heads", heads, "d_model", d)
        size = d // heads
        rank = check_size("RWKV7", "rank", max(1, d // 4) if rank is None else rank)
        self.mu = draw.uniform((6, d), 0, 1)
        self.W_r, self.W_k, self.W_v = (draw.weight(d, d) for _ in range(3))
        # From slow to fast decays, by the position of a channel in its head.
        place = jnp.tile(jnp.linspace(0.0, 1.0, size), heads)
        self.w0 = draw.constant(-6 + 6 * place)
        self.a0 = draw.constant(jnp.zeros(d))
        self.W_w1, self.W_a1, self.W_g1 = (draw.weight(rank, d) for _ in range(3))
        self.W_w2, self.W_a2, self.W_g2 = (draw.weight(d, rank) for _ in range(3))
        self.k_k, self.k_a = (draw.constant(jnp.ones(d)) for _ in range(2))
        self.r_k = draw.normal((heads, size), 0.1)
        self.norm_weight = draw.constant(jnp.ones(d))
        self.norm_bias = draw.constant(jnp.zeros(d))
        self.W_out = draw.weight(d, d)

    def init_state(self):
        """Return zeros: the last input `[d_model]` and the matrices `[heads, K, V]`."""
        dtype, size = self.precision(), self.d_model // self.heads
        return (
            jnp.zeros((self.d_model,), dtype),
            jnp.zeros((self.heads, size, size), dtype),
        )

    def mix(self, xs, state, reset):
        previous, state = state
        xs, mu, previous = widen(xs, self.mu, previous)
        earlier = previous_inputs(xs, previous, reset)
        x_r, x_w, x_k, x_v, x_a, x_g = (xs + leading(m, 2) * (earlier - xs) for m in mu)
        w0, a0, k_k, k_a, r_k = (
            leading(v, 2) if v.ndim == 1 else v[None]
            for v in widen(self.w0, self.a0, self.k_k, self.k_a, self.r_k)
        )
        r, k, v = (
            linear(W, x) for W, x in ((self.W_r, x_r), (self.W_k, x_k), (self.W_v, x_v))
        )
        w = jax.nn.sigmoid(w0 + linear(self.W_w2, jnp.tanh(linear(self.W_w1, x_w))))
        w = jnp.exp(-(jnp.e**-0.5) * w)
        a = jax.nn.sigmoid(a0 + linear(self.W_a2, linear(self.W_a1, x_a)))
        gate = linear(self.W_g2, jax.nn.sigmoid(linear(self.W_g1, x_g)))
        r, kappa, written, v, w, a = (
            split_heads(value, self.heads)
            for value in (r, k * k_k, k * (1 + (a - 1) * k_a), v, w, a)
        )
        kappa = _normalise(kappa)
        outputs, state = matrix_scan(
            r, written, v, w, read=kappa, write=a * kappa, initial=state, reset=reset
        )
        normed = merge_heads(group_norm(outputs, 64e-5))
        weight, bias = widen(self.norm_weight, self.norm_bias)
        bonus = jnp.sum(r * written * r_k, -1, keepdims=True) * v
        ys = normed * leading(weight, 2) + leading(bias, 2) + merge_heads(bonus)
        return linear(self.W_out, ys * gate), (xs[-1], state)


def _normalise(x: Array) -> Array:
    """Normalise to length 1 over the last axis.

    Vectors shorter than 1e-12, as at a padded step, become zero, with a derivative of
    zero.
    """
    square = jnp.sum(x * x, -1, keepdims=True)
    known = square > 1e-24
    return jnp.where(known, x * jax.lax.rsqrt(jnp.where(known, square, 1)), 0)
