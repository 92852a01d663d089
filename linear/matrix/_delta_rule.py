"""The delta rule and its products, with and without a gate."""

from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from pararnn._parameters import check_choice, check_flag, check_size, linear
from pararnn.scan import matrix_scan

from .._arguments import Draw, head_size
from .._layer import AbstractLayer
from .._parts import WIDTH, l2_norm, log_decay, read_out, short_convolution, split_heads

Eigenvalues = Literal["positive", "signed"]


class AbstractDeltaRule(AbstractLayer):
    r"""$n$ delta steps a token, each with its own key, value and strength.

    $$S \leftarrow g_t S, \qquad
    S \leftarrow S + \beta_j k_j (v_j - S^\top k_j)^\top \quad (j = 1 \dots n), \qquad
    o_t = S^\top q_t / \sqrt{K}$$

    Queries, keys and values pass through a short causal convolution, unless it is left
    out, and SiLU. Queries and keys are normalised to length 1. $g_t$ is 1 unless the
    layer is gated.
    """

    W_q: Float[Array, "features_k d_model"]
    W_k: Float[Array, "n features_k d_model"]
    W_v: Float[Array, "n features_v d_model"]
    W_b: Float[Array, "n heads d_model"]
    conv_q: Float[Array, "features_k 4"] | None
    conv_k: Float[Array, "n features_k 4"] | None
    conv_v: Float[Array, "n features_v 4"] | None
    norm_weight: Float[Array, " V"]
    W_out: Float[Array, "d_model features_v"]
    A_log: Float[Array, " heads"] | None
    dt_bias: Float[Array, " heads"] | None
    W_a: Float[Array, "heads d_model"] | None
    W_g: Float[Array, "features_v d_model"] | None
    d_model: int
    heads: int
    eigenvalues: Eigenvalues
    gated: eqx.AbstractClassVar[bool]

    def _make(
        self,
        d_model,
        heads,
        d_key,
        d_value,
        householders,
        eigenvalues,
        convolution,
        dtype,
        key,
    ) -> None:
        where = type(self).__name__
        draw = Draw(where, dtype, key)
        self.d_model = check_size(where, "d_model", d_model)
        self.heads = check_size(where, "heads", heads)
        check_choice(where, "eigenvalues", eigenvalues, ("positive", "signed"))
        self.eigenvalues = eigenvalues
        n = check_size(where, "householders", householders)
        features_k = heads * head_size(where, "d_key", d_key, d_model, heads)
        d_value = head_size(where, "d_value", d_value, d_model, heads)
        features_v = heads * d_value
        self.W_q = draw.weight(features_k, d_model)
        self.W_k = draw.weight(n, features_k, d_model)
        self.W_v = draw.weight(n, features_v, d_model)
        self.W_b = draw.weight(n, heads, d_model)
        self.conv_q = self.conv_k = self.conv_v = None
        if check_flag(where, "convolution", convolution):
            self.conv_q = draw.weight(features_k, WIDTH)
            self.conv_k = draw.weight(n, features_k, WIDTH)
            self.conv_v = draw.weight(n, features_v, WIDTH)
        self.norm_weight = draw.constant(jnp.ones(d_value))
        self.W_out = draw.weight(d_model, features_v)
        self.A_log = self.dt_bias = self.W_a = self.W_g = None
        if self.gated:
            # Away from 0, whose logarithm is infinite.
            self.A_log = draw.log_of_uniform((heads,), 2**-10, 16)
            self.dt_bias = draw.step_bias((heads,), 1e-3, 1e-1)
            self.W_a = draw.weight(heads, d_model)
            self.W_g = draw.weight(features_v, d_model)

    def _log_gate(self, xs) -> Float[Array, "T heads"] | None:
        if self.A_log is None or self.dt_bias is None or self.W_a is None:
            return None
        return log_decay(self.A_log, self.dt_bias, linear(self.W_a, xs))[0]

    def init_state(self):
        """Return zeros: the last three inputs of the convolutions, if there are any, of
        queries `[3, features]`, keys and values `[3, n * features]`, and the matrices
        `[heads, K, V]`."""
        dtype = self.precision()
        n, features_k, _ = self.W_k.shape
        features_v = self.W_v.shape[1]
        sizes = (features_k, n * features_k, n * features_v)
        windows = [jnp.zeros((WIDTH - 1, size), dtype) for size in sizes]
        matrix = (self.heads, features_k // self.heads, features_v // self.heads)
        if self.conv_q is None:
            windows = [None, None, None]
        return *windows, jnp.zeros(matrix, dtype)

    def recurrent_state(self, state):
        return state[-1]

    def mix(self, xs, state, reset):
        *windows, matrix = state
        n, steps = self.W_k.shape[0], xs.shape[0]

        def features(weight, conv, window):
            drive = linear(weight.reshape(-1, weight.shape[-1]), xs)
            taps = None if conv is None else conv.reshape(-1, WIDTH)
            drive, window = short_convolution(drive, window, taps, reset=reset)
            return jax.nn.silu(drive), window

        def substeps(v):
            """Reshape `[T, n * features]` to `[T * n, heads, size]`."""
            return split_heads(v.reshape(steps * n, -1), self.heads)

        q, w_q = features(self.W_q, self.conv_q, windows[0])
        k, w_k = features(self.W_k, self.conv_k, windows[1])
        v, w_v = features(self.W_v, self.conv_v, windows[2])
        q, k = l2_norm(split_heads(q, self.heads)), l2_norm(substeps(k))
        q = q * q.shape[-1] ** -0.5
        beta = jax.nn.sigmoid(linear(self.W_b.reshape(-1, self.d_model), xs))
        beta = beta.reshape(steps * n, self.heads, 1)
        beta = 2 * beta if self.eigenvalues == "signed" else beta

        decay, read, log_gate = None, k, self._log_gate(xs)
        if log_gate is not None:
            # The first delta step of a token reads the state after the gate.
            decay = _first_of(jnp.exp(log_gate), n)
            read = k * decay[..., None]
        outputs, matrix = matrix_scan(
            q,
            k * beta,
            substeps(v),
            decay,
            read=read,
            initial=matrix,
            reset=None if reset is None else _first_of(reset, n, False),
        )
        output_gate = None if self.W_g is None else linear(self.W_g, xs)
        ys = read_out(outputs, self.norm_weight, self.W_out, output_gate)
        return ys, (w_q, w_k, w_v, matrix)


def _first_of(v: Array, n: int, rest: float | bool = 1) -> Array:
    """Return `v` at the first of every n substeps and `rest` at the others."""
    later = jnp.full((v.shape[0], n - 1, *v.shape[1:]), rest, v.dtype)
    return jnp.concatenate([v[:, None], later], 1).reshape(-1, *v.shape[1:])


class DeltaNet(AbstractDeltaRule):
    r"""The delta rule: a new value replaces what the state holds under its key.

    $$S_t = (I - \beta_t k_t k_t^\top) S_{t-1} + \beta_t k_t v_t^\top, \qquad
    y_t = W_{out} \, \mathrm{RMSNorm}(S_t^\top q_t / \sqrt{K})$$

    with $\beta_t = \sigma(W_b x_t)$ for each head, or twice that if eigenvalues are
    `"signed"`. Queries, keys and values pass through a short causal convolution and
    SiLU. Queries and keys are normalised to length 1, so that $I - \beta k k^\top$ has
    the eigenvalue $1 - \beta$ along $k$ and 1 across it.

    ??? cite "Source"

        Yang et al., "Parallelizing Linear Transformers with the Delta Rule over
        Sequence Length" (2406.06484); negative eigenvalues: Grazzi et al., "Unlocking
        State-Tracking in Linear RNNs Through Negative Eigenvalues" (2411.12537).
    """

    gated: ClassVar[bool] = False

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 1,
        d_key: int | None = None,
        d_value: int | None = None,
        eigenvalues: Eigenvalues = "positive",
        convolution: bool = True,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: size of an input and of an output.
        - `heads`: number of states, each a matrix `[d_key, d_value]`.
        - `d_key`, `d_value`: sizes of a key and a value of one head.
            Both default to `d_model // heads`.
        - `eigenvalues`: `"positive"` keeps those of the transition in [0, 1], and
            `"signed"` in [-1, 1], which parity needs.
        - `convolution`: whether queries, keys and values also see the three steps
            before. If not, a transition depends on a single step, which makes it
            easier to learn to track a state.
        - `dtype`: of the parameters. Defaults to JAX's default floating point.
        - `key`: a key of `jax.random`.

        **Raises:** `ValueError` on sizes that are not positive integers or not
        divisible by `heads`, unknown eigenvalues, a dtype that is not floating point,
        or an invalid key.
        """
        self._make(
            d_model, heads, d_key, d_value, 1, eigenvalues, convolution, dtype, key
        )


class GatedDeltaNet(AbstractDeltaRule):
    r"""The delta rule with a gate that forgets.

    $$S_t = (I - \beta_t k_t k_t^\top) \, g_t S_{t-1} + \beta_t k_t v_t^\top, \qquad
    g_t = \exp(-\exp(A^{\log}) \, \mathrm{softplus}(W_a x_t + b_{dt}))$$

    $y_t = W_{out} (\mathrm{RMSNorm}(S_t^\top q_t / \sqrt{K}) \odot
    \mathrm{SiLU}(W_g x_t))$. With $g_t = 1$ the state is that of `DeltaNet`.

    ??? cite "Source"

        Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule"
        (2412.06464).
    """

    gated: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 1,
        d_key: int | None = None,
        d_value: int | None = None,
        eigenvalues: Eigenvalues = "positive",
        convolution: bool = True,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""The arguments are those of [`linear.DeltaNet`][], except that `d_value`
        defaults to twice `d_model // heads`. Initially $\exp(A^{\log})$ is uniform up
        to 16, and the softplus of `dt_bias` is log-uniform in [0.001, 0.1]."""
        if d_value is None:
            d_model = check_size("GatedDeltaNet", "d_model", d_model)
            heads = check_size("GatedDeltaNet", "heads", heads)
            d_value = 2 * head_size("GatedDeltaNet", "d_value", None, d_model, heads)
        self._make(
            d_model, heads, d_key, d_value, 1, eigenvalues, convolution, dtype, key
        )


class DeltaProduct(AbstractDeltaRule):
    r"""Several delta steps a token: a product of `householders` reflections.

    $$S \leftarrow (I - \beta_{t,j} k_{t,j} k_{t,j}^\top) S +
    \beta_{t,j} k_{t,j} v_{t,j}^\top \quad (j = 1 \dots n), \qquad
    y_t = W_{out} \, \mathrm{RMSNorm}(S^\top q_t / \sqrt{K})$$

    The transition of a token is $\prod_j (I - \beta_j k_j k_j^\top)$, of norm at most
    1. With $\beta$ up to 2 it can be any orthogonal map that moves at most n
    dimensions: two reflections are a rotation. The layer is a `DeltaNet` on a sequence
    n times as long, read at every n-th step.

    ??? cite "Source"

        Siems et al., "DeltaProduct: Improving State-Tracking in Linear RNNs via
        Householder Products" (2502.10297).
    """

    gated: ClassVar[bool] = False

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 1,
        householders: int = 2,
        d_key: int | None = None,
        d_value: int | None = None,
        eigenvalues: Eigenvalues = "signed",
        convolution: bool = True,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """The arguments are those of [`linear.DeltaNet`][], and `householders`, the
        number of delta steps a token. Eigenvalues default to signed."""
        self._make(
            d_model,
            heads,
            d_key,
            d_value,
            householders,
            eigenvalues,
            convolution,
            dtype,
            key,
        )


class GatedDeltaProduct(AbstractDeltaRule):
    r"""[`linear.DeltaProduct`][] with the gate of [`linear.GatedDeltaNet`][].

    The gate acts once for each token, before the first delta step.

    ??? cite "Source"

        Siems et al., "DeltaProduct: Improving State-Tracking in Linear RNNs via
        Householder Products" (2502.10297).
    """

    gated: ClassVar[bool] = True

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 1,
        householders: int = 2,
        d_key: int | None = None,
        d_value: int | None = None,
        eigenvalues: Eigenvalues = "signed",
        convolution: bool = True,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """The arguments are those of [`linear.DeltaProduct`][]. The gate is initialised
        like that of [`linear.GatedDeltaNet`][]."""
        self._make(
            d_model,
            heads,
            d_key,
            d_value,
            householders,
            eigenvalues,
            convolution,
            dtype,
            key,
        )
