"""A reduction by a learned operation."""

import jax
import jax.numpy as jnp
from jax.nn import sigmoid
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from pararnn._parameters import affine, check_size, linear
from pararnn.scan import tree_prefix, tree_reduce, tree_state

from ._arguments import Draw
from ._layer import AbstractLayer


class CommutativeMonoid(AbstractLayer):
    r"""Every prefix reduced by a learned commutative operation, in a balanced tree.

    $$\mathrm{op}(l, r) = \tfrac12 \left[ \mathrm{GRU}(l, r) + \mathrm{GRU}(r, l)
    \right], \qquad y_t = W_{out} \, \mathrm{reduce}(e_1 \dots e_t), \qquad
    e_t = W_x x_t + b_x$$

    with the gated recurrent unit of a state $h$ and an input $x$,

    $$\begin{aligned}
    r &= \sigma(W_{ir} x + b_{ir} + W_{hr} h + b_{hr}), &
    z &= \sigma(W_{iz} x + b_{iz} + W_{hz} h + b_{hz}), \\
    n &= \tanh(W_{in} x + b_{in} + r \odot (W_{hn} h + b_{hn})), &
    \mathrm{GRU}(h, x) &= (1 - z) \odot n + z \odot h
    \end{aligned}$$

    The operation is commutative by construction, but associative only as far as
    training makes it so. The shape of the tree is therefore fixed, and the result
    depends on it: neighbours are paired level by level, and an odd leftover passes up
    one level. Swapping the two halves of any full pair does not change the result;
    other permutations do. The depth of the tree, which is the number of operations
    between an output and any input, is $\lceil \log_2 t \rceil$. The reduction of one
    element is the element.

    The state works like a binary counter. It holds the reductions of full subtrees of
    $2^l$ inputs, `[levels, d_model]`, and the number of inputs since the last reset,
    int32.

    ??? cite "Source"

        Ong & Veličković, "Learnable Commutative Monoids for Graph Neural Networks"
        (2212.08541).
    """

    W_x: Float[Array, "d_model d_model"]
    b_x: Float[Array, " d_model"]
    W_ir: Float[Array, "d_model d_model"]
    W_iz: Float[Array, "d_model d_model"]
    W_in: Float[Array, "d_model d_model"]
    W_hr: Float[Array, "d_model d_model"]
    W_hz: Float[Array, "d_model d_model"]
    W_hn: Float[Array, "d_model d_model"]
    b_ir: Float[Array, " d_model"]
    b_iz: Float[Array, " d_model"]
    b_in: Float[Array, " d_model"]
    b_hr: Float[Array, " d_model"]
    b_hz: Float[Array, " d_model"]
    b_hn: Float[Array, " d_model"]
    W_out: Float[Array, "d_model d_model"]
    d_model: int
    max_length: int

    def __init__(
        self,
        d_model: int,
        *,
        max_length: int = 65535,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: size of an input, of the state and of an output.
        - `max_length`: the largest number of steps without a reset, summed over calls
            that continue one another. One more step is an error at run time. The state
            has a level for each bit of it, and each level costs two operations a step.
        - `dtype`: of the parameters. Defaults to JAX's default floating point.
        - `key`: a key of `jax.random`. All parameters are drawn uniformly from
            $\pm 1 / \sqrt{d_{model}}$.

        **Raises:** `ValueError` on a size that is not a positive integer or a length of
        2**30 or more, an invalid key, or a dtype that is not floating point.
        """
        where = "CommutativeMonoid"
        draw = Draw(where, dtype, key)
        self.d_model = n = check_size(where, "d_model", d_model)
        self.max_length = check_size(where, "max_length", max_length)
        if self.max_length >= 2**30:
            raise ValueError(
                f"{where}: `max_length` = {max_length} must be below 2**30, so that "
                "int32 can count. Pass the length of the longest sequence; resets "
                "start a new one."
            )
        bound = n**-0.5
        self.W_x, self.b_x = draw.weight(n, n), draw.uniform((n,), -bound, bound)
        self.W_ir, self.W_iz, self.W_in = jnp.unstack(draw.weight(3, n, n))
        self.W_hr, self.W_hz, self.W_hn = jnp.unstack(draw.weight(3, n, n))
        self.b_ir, self.b_iz, self.b_in, self.b_hr, self.b_hz, self.b_hn = jnp.unstack(
            draw.uniform((6, n), -bound, bound)
        )
        self.W_out = draw.weight(n, n)

    def combine(
        self,
        left: Float[Array, "*batch d_model"],
        right: Float[Array, "*batch d_model"],
    ) -> Float[Array, "*batch d_model"]:
        r"""Return $\mathrm{op}(l, r)$, `[..., d_model]`; the same for `(r, l)`."""
        h, x = jnp.stack([left, right]), jnp.stack([right, left])
        r = sigmoid(affine(self.W_ir, x, self.b_ir, self.b_hr) + linear(self.W_hr, h))
        z = sigmoid(affine(self.W_iz, x, self.b_iz, self.b_hz) + linear(self.W_hz, h))
        n = jnp.tanh(
            affine(self.W_in, x, self.b_in) + r * affine(self.W_hn, h, self.b_hn)
        )
        both = (1 - z) * n + z * h
        return (both[0] + both[1]) / 2

    def reduce(self, xs: Float[Array, "T d_model"]) -> Float[Array, " d_model"]:
        """Reduce a whole set to the last output of `layer(xs)`, `[d_model]`, with
        `T - 1` operations.

        **Raises:** `ValueError` on an empty set or a wrong shape.
        """
        if xs.ndim != 2 or xs.shape[1] != self.d_model:
            raise ValueError(
                f"CommutativeMonoid.reduce: `xs` has shape {xs.shape}, expected "
                f"[T, {self.d_model}], as `d_model` is {self.d_model}. Likely causes: "
                "(a) a batch axis; use `jax.vmap` for it, (b) the axes are in another "
                "order (features last), (c) the layer was built for another `d_model`."
            )
        elements = affine(self.W_x, xs.astype(self.precision()), self.b_x)
        return linear(self.W_out, tree_reduce(self.combine, elements)).astype(xs.dtype)

    def init_state(self) -> tuple[Float[Array, "levels d_model"], Int[Array, ""]]:
        """Return empty levels, `[levels, d_model]`, and a count of zero."""
        like = jax.ShapeDtypeStruct((self.d_model,), self.precision())
        return tree_state(like, self.max_length)

    def numbers_per_step(self) -> int:
        """A quarter of an operation, two gated recurrent units, for each level.

        All of it would make windows so short that they take up to 70% more time.
        """
        levels = self.init_state()[0].shape[0]
        return 10 * levels * self.d_model

    def mix(self, xs, state, reset):
        elements = affine(self.W_x, xs.astype(self.precision()), self.b_x)
        reduced, state = tree_prefix(
            self.combine, elements, state, reset=reset, max_length=self.max_length
        )
        return linear(self.W_out, reduced), state
