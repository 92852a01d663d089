"""A linear recurrence whose block-diagonal transition depends on the input."""

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from pararnn._parameters import check_number, linear
from pararnn.scan import BlockDiagonal, linear_scan

from .._arguments import Draw, check_divisor, check_sizes
from .._layer import AbstractLayer


class BlockLRNN(AbstractLayer):
    r"""A linear RNN whose transition is full within blocks and depends on the input.

    $$h_t = A_t h_{t-1} + W_B x_t, \qquad y_t = W_C h_t$$

    $A_t$ is block-diagonal and linear in $x_t$, except that each column $v$ is divided
    by $\max(1, \|v\|_p)$ with $p = 1.2$. A block of n entries can hold the state of an
    automaton of n states. Only $p = 1$ bounds the growth of a step by 1: otherwise a
    block of size b may grow by a factor of up to $b^{1 - 1/p}$ a step.

    ??? cite "Source"

        Fan et al., "Advancing Regular Language Reasoning in Linear Recurrent Neural
        Networks" (2309.07412).
    """

    W_A: Float[Array, "blocks size size d_model"]
    W_B: Float[Array, "d_state d_model"]
    W_C: Float[Array, "d_model d_state"]
    d_model: int
    d_state: int
    p: float

    def __init__(
        self,
        d_model: int,
        d_state: int | None = None,
        *,
        blocks: int = 1,
        p: float = 1.2,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """**Arguments:**

        - `d_model`: size of an input and of an output.
        - `d_state`: size of the state. Defaults to `d_model`.
        - `blocks`: number of blocks of the transition; divides `d_state`.
        - `p`: the norm that bounds a column, from 1 to 16.
        - `dtype`: of the parameters. Defaults to JAX's default floating point.
        - `key`: a key of `jax.random`.

        **Raises:** `ValueError` on a size that is not a positive integer or not
        divisible, a `p` out of range, an invalid key, or a dtype that is not floating
        point.
        """
        draw = Draw("BlockLRNN", dtype, key)
        d_model, d_state = check_sizes("BlockLRNN", d_model, d_state)
        self.d_model, self.d_state = d_model, d_state
        check_divisor("BlockLRNN", "blocks", blocks, "d_state", d_state)
        if not 1 <= check_number("BlockLRNN", "p", p) <= 16:
            raise ValueError(
                f"BlockLRNN: `p` must be a number from 1 to 16, got {p!r}: below 1 it "
                "does not define a norm, and high powers overflow."
            )
        self.p = p
        size = d_state // blocks
        self.W_A = draw.weight(blocks, size, size, d_model)
        self.W_B = draw.weight(d_state, d_model)
        self.W_C = draw.weight(d_model, d_state)

    def init_state(self) -> Float[Array, "blocks size"]:
        """Return zeros `[blocks, d_state // blocks]`, at least float32."""
        return jnp.zeros(self.W_A.shape[:2], self.precision())

    def numbers_per_step(self) -> int:
        """The derivative stores transitions and the norms of their columns."""
        return 4 * self.W_A[..., 0].size

    def mix(self, xs, state, reset):
        blocks, size, _, d_model = self.W_A.shape
        A = linear(self.W_A.reshape(-1, d_model), xs)
        A = A.reshape(xs.shape[0], blocks, size, size)
        powers = jnp.sum(jnp.abs(A) ** self.p, 2, keepdims=True)
        # The maximum comes before the root, as the root of zero has no derivative.
        A = A / jnp.maximum(1, powers) ** (1 / self.p)
        states = linear_scan(
            BlockDiagonal(A), linear(self.W_B, xs), state.reshape(-1), reset=reset
        )
        return linear(self.W_C, states), states[-1].reshape(blocks, size)
