"""The recurrence of rotations that the input chooses."""

import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from pararnn._parameters import linear, widen
from pararnn.scan import Dense, linear_scan

from .._layer import AbstractLayer
from ..parts import Draw, check_sizes
from ..parts._orthogonal import orthogonal, skew_symmetric


class UnitaryRNN(AbstractLayer):
    r"""Each input rotates the state: nothing is added, and nothing is forgotten.

    $$s_t = U_t s_{t-1}, \qquad U_t = \exp(K_t - K_t^\top), \qquad y_t = W_{out} s_t$$

    where the entries of $K_t$ strictly below its diagonal are $W_{skew} x_t$, row by
    row. $U_t$ is orthogonal, so $\|s_t\| = \|s_0\|$ and the derivative in $s_0$ has
    norm 1 over any distance. The state is $s$, `[d_state]`; the fresh one is
    $s_0 / \|s_0\|$ with the parameter $s_0$ = `initial`, also at resets, for a state of
    zeros would stay there.

    An input that makes the 1-norm of $K_t - K_t^\top$ larger than 2048 gives NaN: scale
    features to about 1, for which it starts near half of `d_state`. So does an
    `initial` of zeros, which has no direction.

    ??? cite "Source"

        Bernardy & Lappin, "Assessing the Unitary RNN as an End-to-End Compositional
        Model of Syntax" (2208.05719).
    """

    W_skew: Float[Array, "entries d_model"]
    initial: Float[Array, " d_state"]
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
        r"""**Arguments:**

        - `d_model`: size of an input and of an output.
        - `d_state`: size of the state; `d_model` if not given. A step costs some twenty
            products of matrices of this size, and twice that under `jax.vmap`.
        - `dtype`: of the parameters; JAX's default floating point if not given.
        - `key`: a key of `jax.random`. Weights are uniform within one over the root of
            the number of their inputs; `initial` is standard normal, so that the fresh
            state is uniform on the sphere.

        **Raises:** `ValueError` on a size that is not a positive integer, a key that is
        not one, or a dtype that is not floating point.
        """
        draw = Draw("UnitaryRNN", dtype, key)
        self.d_model, n = check_sizes("UnitaryRNN", d_model, d_state)
        self.d_state = n
        self.W_skew = draw.weight(n * (n - 1) // 2, self.d_model)
        self.initial = draw.normal((n,))
        self.W_out = draw.weight(self.d_model, n)

    def transition(self, xs: Float[Array, "T d_model"]) -> Float[Array, "T n n"]:
        r"""The orthogonal matrices $U_t$, `[T, d_state, d_state]`."""
        xs = xs.astype(self.precision())
        return orthogonal(skew_symmetric(linear(self.W_skew, xs), self.d_state))

    def init_state(self) -> Float[Array, " d_state"]:
        """`initial / ‖initial‖`, `[d_state]`, at least float32."""
        (initial,) = widen(self.initial)
        return initial / jnp.sqrt(jnp.sum(initial**2))

    def numbers_per_step(self) -> int:
        """The exponential of a matrix, by some seventy of its size."""
        return 70 * self.d_state**2

    def mix(self, xs, state, reset):
        states = linear_scan(
            Dense(self.transition(xs)),
            jnp.zeros((xs.shape[0], self.d_state), state.dtype),
            state,
            reset=reset,
            reset_state=None if reset is None else self.init_state(),
        )
        return linear(self.W_out, states), states[-1]
