"""pLSTM on images: four directions over a grid."""

from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from pararnn._parameters import affine, check_choice, check_size, linear
from pararnn.scan import grid_scan

from .._arguments import Draw, head_size
from .._parts import read_out
from ._plstm import DIRECT_BIAS, MARK_BIAS, SOURCE_BIAS, small_deviation

# The axes to flip so that a direction runs right and down: right and down, right and
# up, left and down, left and up.
_FLIPS = ((), (0,), (1,), (0, 1))

# Table 4 of the paper: an initial decay of 0.9999.
_DECAY_BIAS, _DECAY_SCALE = 1.0, 5.0


class PLSTMGrid(eqx.Module):
    r"""pLSTM on an image: a recurrence over rows and columns at once.

    In each direction and head, [`pararnn.grid_scan`][] runs

    $$C^r = T^{rl} C^r_{left} + T^{ru} C^d_{above} + S^r k v^\top, \qquad
    C^d = T^{dl} C^r_{left} + T^{du} C^d_{above} + S^d k v^\top$$

    and each cell reads what it receives. The directions are summed, with one direct
    term:

    $$o = K^{-1/2} \Big( \sum_{directions}
    (M^l C^r_{left} + M^u C^d_{above})^\top q + D \, (k \cdot q) v \Big), \qquad
    y = W_{out} \, \mathrm{RMSNorm}(o)$$

    The directions share queries, keys, values and $D$; each has its own other gates.
    With $\sigma$ the sigmoid, $S^r, S^d, M^l, M^u$ and $D$ are $\sigma(W x + b)$. The
    transitions depend on `mode`:

    - `"P"`, propagation along a line: an angle $\alpha = \sigma(W_a x + b_a)$ and a
        decay $\gamma = \tanh(5 (W_t x + b_t))$,

        $$\begin{pmatrix} T^{rl} & T^{ru} \\ T^{dl} & T^{du} \end{pmatrix} = \gamma
        \begin{pmatrix} \alpha & \alpha \\ 1 - \alpha & 1 - \alpha \end{pmatrix}$$

        whose columns sum to $\gamma$, critical at $\gamma = 1$;
    - `"D"`, distribution over all later cells: $T^{dl} = 0$, so that a single path
        leads from one cell to another, and $T^{rl}, T^{ru}, T^{du}$ are each
        $\tanh(5 (W_t x + b_t))$.

    The paper alternates layers of both modes. The layer maps an image
    `[H, W, d_model]`, real floating point, to one of the same shape and dtype. H and W
    may be 0. It is computed in the parameters' precision, at least float32. Use
    `jax.vmap` for a batch.

    ??? cite "Source"

        Pöppel et al., "pLSTM: parallelizable Linear Source Transition Mark networks"
        (2506.11997): equations 5, 6 and 10; appendix A.7 for the sum over directions,
        B.1 and D.1 for the activations and the initial values. The released code uses
        $1 - \alpha \gamma$ for $T^{dl}, T^{du}$ and $1 - S^r$ for $S^d$, and adds a
        convolution in front.
    """

    W_q: Float[Array, "features_k d_model"]
    W_k: Float[Array, "features_k d_model"]
    W_v: Float[Array, "features_v d_model"]
    W_s: Float[Array, "directions 2 heads d_model"]
    W_m: Float[Array, "directions 2 heads d_model"]
    W_t: Float[Array, "directions transitions heads d_model"]
    W_a: Float[Array, "directions heads d_model"] | None
    W_d: Float[Array, "heads d_model"]
    b_s: Float[Array, "directions 2 heads"]
    b_m: Float[Array, "directions 2 heads"]
    b_t: Float[Array, "directions transitions heads"]
    b_a: Float[Array, "directions heads"] | None
    b_d: Float[Array, " heads"]
    norm_weight: Float[Array, " V"]
    W_out: Float[Array, "d_model features_v"]
    d_model: int
    heads: int
    mode: Literal["P", "D"]
    directions: Literal[1, 4]

    def __init__(
        self,
        d_model: int,
        *,
        heads: int = 1,
        mode: Literal["P", "D"] = "P",
        directions: Literal[1, 4] = 4,
        d_key: int | None = None,
        d_value: int | None = None,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""Initially the gates are nearly constant, with the biases of table 4 of the
        paper: -4 for sources and marks, -6 for the direct gate, 1 for decays. $b_a$
        ranges from -2 to 2 over the heads and $W_a$ is zero, so that the heads fan out.

        **Arguments:**

        - `d_model`: size of a cell of the image, and of one of the output.
        - `heads`: number of states on an edge, each a matrix `[d_key, d_value]`.
        - `mode`: `"P"`, in which each head propagates along a line at its own angle, or
            `"D"`, in which it spreads.
        - `directions`: 4, from all corners of the image, or 1, from the upper left.
        - `d_key`, `d_value`: sizes of a key and a value of one head.
            Both default to `d_model // heads`.
        - `dtype`: of the parameters. Defaults to JAX's default floating point.
        - `key`: a key of `jax.random`.

        **Raises:** `ValueError` on sizes that are not positive integers or not
        divisible by `heads`, an unknown mode or number of directions, a dtype that is
        not floating point, or an invalid key.
        """
        draw = Draw("PLSTMGrid", dtype, key)
        self.d_model = check_size("PLSTMGrid", "d_model", d_model)
        self.heads = check_size("PLSTMGrid", "heads", heads)
        check_choice("PLSTMGrid", "mode", mode, ("P", "D"))
        if check_size("PLSTMGrid", "directions", directions) not in (1, 4):
            raise ValueError(
                f"PLSTMGrid: `directions` must be 1 or 4, got {directions!r}. Pass 4 "
                "for recurrences from all corners of the image, 1 for one from the "
                "upper left corner."
            )
        self.mode, self.directions = mode, directions
        features_k = heads * head_size("PLSTMGrid", "d_key", d_key, d_model, heads)
        d_value = head_size("PLSTMGrid", "d_value", d_value, d_model, heads)
        transitions = 1 if mode == "P" else 3

        def gates(*shape):
            return draw.normal((*shape, heads, d_model), small_deviation(d_model))

        def biases(value, *shape):
            return draw.constant(jnp.full((*shape, heads), value))

        self.W_q = draw.weight(features_k, d_model)
        self.W_k = draw.weight(features_k, d_model)
        self.W_v = draw.weight(heads * d_value, d_model)
        self.W_s, self.W_m = gates(directions, 2), gates(directions, 2)
        self.W_t, self.W_d = gates(directions, transitions), gates()
        self.b_s = biases(SOURCE_BIAS, directions, 2)
        self.b_m = biases(MARK_BIAS, directions, 2)
        self.b_t = biases(_DECAY_BIAS, directions, transitions)
        self.b_d = biases(DIRECT_BIAS)
        self.W_a = self.b_a = None
        if mode == "P":
            self.W_a = draw.constant(jnp.zeros((directions, heads, d_model)))
            fan = jnp.linspace(-2, 2, heads) if heads > 1 else jnp.zeros(1)
            self.b_a = draw.constant(jnp.broadcast_to(fan, (directions, heads)))
        self.norm_weight = draw.constant(jnp.ones(d_value))
        self.W_out = draw.weight(d_model, heads * d_value)

    def __call__(
        self, image: Float[Array, "H W d_model"]
    ) -> Float[Array, "H W d_model"]:
        """**Arguments:** `image`, `[H, W, d_model]`, real floating point.

        **Returns:** `[H, W, d_model]` in the dtype of `image`.

        **Raises:** `ValueError` on another shape or dtype.
        """
        image = self._check(jnp.asarray(image))
        if image.size == 0:
            return image
        height, width, _ = image.shape
        cells, n = (height, width), self.directions

        def every_direction(weight):
            """Return queries, keys or values, the same for every direction."""
            features = linear(weight, image).reshape(*cells, self.heads, -1)
            return jnp.tile(features, (1, 1, n, 1))

        def gate(weight, bias):
            """Return a gate, `[..., H, W, directions * heads]`."""
            flat = weight.reshape(-1, weight.shape[-1])
            values = affine(flat, image, bias.reshape(-1))
            values = values.reshape(*cells, n, -1, self.heads)
            values = jnp.moveaxis(values, 3, 0)
            return values.reshape(-1, *cells, n * self.heads)

        def turn(v):
            """Flip directions to run right and down, or back; stack them as heads."""
            split = v.reshape(*cells, n, self.heads, *v.shape[3:])
            turned = [jnp.flip(split[:, :, i], _FLIPS[i]) for i in range(n)]
            return jnp.concatenate(turned, 2)

        q, k, v = (every_direction(weight) for weight in (self.W_q, self.W_k, self.W_v))
        source, mark = (
            jax.nn.sigmoid(gate(weight, bias))
            for weight, bias in ((self.W_s, self.b_s), (self.W_m, self.b_m))
        )
        decay = jnp.tanh(_DECAY_SCALE * gate(self.W_t, self.b_t))
        if self.W_a is None:
            T_rl, T_ru, T_du = decay
            T_dl = jnp.zeros_like(T_rl)
        else:
            (angle,) = jax.nn.sigmoid(gate(self.W_a, self.b_a))
            T_rl = T_ru = decay[0] * angle
            T_dl = T_du = decay[0] * (1 - angle)
        # The direct term is divided equally among the directions.
        direct = jax.nn.sigmoid(affine(self.W_d, image, self.b_d)) / n
        outputs = grid_scan(
            turn(q * q.shape[-1] ** -0.5),
            turn(k),
            turn(v),
            jax.vmap(turn)(source),
            jax.vmap(turn)(mark),
            turn(jnp.tile(direct, (1, 1, n))),
            *(turn(T) for T in (T_rl, T_ru, T_dl, T_du)),
        )
        outputs = turn(outputs).reshape(height * width, n, self.heads, -1).sum(1)
        ys = read_out(outputs, self.norm_weight, self.W_out)
        return ys.reshape(image.shape).astype(image.dtype)

    def _check(self, image: Array) -> Array:
        if image.ndim != 3 or image.shape[-1] != self.d_model:
            raise ValueError(
                f"PLSTMGrid: `image` has shape {image.shape}, expected [H, W, "
                f"{self.d_model}], as `d_model` is {self.d_model}. Likely causes: (a) "
                "a batch axis; use `jax.vmap` for it, (b) the axes are in another "
                "order; channels come last, (c) patches in a row; reshape them to rows "
                "and columns, (d) the layer was built for another `d_model`."
            )
        if not jnp.issubdtype(image.dtype, jnp.floating):
            raise ValueError(
                f"PLSTMGrid: `image` is {image.dtype}, expected real floating point. "
                "Likely cause: pixels as integers; cast them, for instance with "
                "`.astype(jnp.float32) / 255`."
            )
        return image
