"""A recurrence of rotations that depend on the input."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from pararnn._parameters import linear, widen
from pararnn.scan import Dense, linear_scan, multiply_matrices

from .._arguments import Draw, check_sizes
from .._layer import AbstractLayer

# Up to this 1-norm a Taylor polynomial of degree 15 is exact to rounding in float64:
# its truncation error is below 0.5^16 / 16! = 1e-18.
_TAYLOR_NORM, _TAYLOR_DEGREE = 0.5, 15
# Twelve squarings extend it to 1-norms of 0.5 * 2^12 = 2048.
_MAX_SQUARINGS = 12


class UnitaryRNN(AbstractLayer):
    r"""Each input rotates the state; nothing is added and nothing is forgotten.

    $$s_t = U_t s_{t-1}, \qquad U_t = \exp(K_t - K_t^\top), \qquad y_t = W_{out} s_t$$

    where the entries of $K_t$ strictly below its diagonal are $W_{skew} x_t$, row by
    row. $U_t$ is orthogonal, so $\|s_t\| = \|s_0\|$ and the derivative in $s_0$ has
    norm 1 over any distance. The state is $s$, `[d_state]`. The fresh one, also at
    resets, is $s_0 / \|s_0\|$ with the parameter $s_0$ = `initial`, as a state of zeros
    would stay zero.

    An input for which the 1-norm of $K_t - K_t^\top$ exceeds 2048 gives NaN. Scale
    features to about 1, for which that norm is initially near half of `d_state`. An
    `initial` of zeros, which has no direction, gives NaN too.

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
        - `d_state`: size of the state. Defaults to `d_model`. A step costs about
            twenty products of matrices of this size, and twice that under `jax.vmap`.
        - `dtype`: of the parameters. Defaults to JAX's default floating point.
        - `key`: a key of `jax.random`. Weights are uniform within one over the root of
            the number of their inputs. `initial` is standard normal, so that the fresh
            state is uniform on the sphere.

        **Raises:** `ValueError` on a size that is not a positive integer, an invalid
        key, or a dtype that is not floating point.
        """
        draw = Draw("UnitaryRNN", dtype, key)
        self.d_model, n = check_sizes("UnitaryRNN", d_model, d_state)
        self.d_state = n
        self.W_skew = draw.weight(n * (n - 1) // 2, self.d_model)
        self.initial = draw.normal((n,))
        self.W_out = draw.weight(self.d_model, n)

    def transition(self, xs: Float[Array, "T d_model"]) -> Float[Array, "T n n"]:
        r"""Return the orthogonal matrices $U_t$, `[T, d_state, d_state]`."""
        xs = xs.astype(self.precision())
        return orthogonal(skew_symmetric(linear(self.W_skew, xs), self.d_state))

    def init_state(self) -> Float[Array, " d_state"]:
        """Return `initial / ‖initial‖`, `[d_state]`, at least float32."""
        (initial,) = widen(self.initial)
        return initial / jnp.sqrt(jnp.sum(initial**2))

    def numbers_per_step(self) -> int:
        """The exponential of a matrix stores about seventy matrices of its size."""
        return 70 * self.d_state**2

    def mix(self, xs, state, reset):
        states = linear_scan(
            Dense(self.transition(xs)),
            jnp.zeros((xs.shape[0], self.d_state), state.dtype),
            state,
            reset=reset,
            reset_state=None if reset is None else self.init_state(),
        )
        states = states * _drift(states, state, reset)[:, None]
        return linear(self.W_out, states), states[-1]


def _drift(states: Array, start: Array, reset: Array | None) -> Array:
    """Return what the states have to be multiplied by to keep their norm, `[T]`.

    The norm is that of the start, or 1 after a reset. Without this, rounding adds up to
    1e-4 in 20000 steps in float32. No derivative is taken, as the exact factor is 1.
    """
    states, start = lax.stop_gradient((states, start))
    wanted = jnp.broadcast_to(jnp.linalg.norm(start), states.shape[:1])
    if reset is not None:
        wanted = jnp.where(lax.cummax(reset.astype(jnp.int32)) > 0, 1, wanted)
    sizes = jnp.linalg.norm(states, axis=1)
    return jnp.where(sizes == 0, 1, wanted / sizes)


def skew_symmetric(
    entries: Float[Array, "*batch entries"], size: int
) -> Float[Array, "*batch size size"]:
    r"""Return $K - K^\top$, where K holds the `size * (size - 1) / 2` entries strictly
    below its diagonal, row by row."""
    rows, columns = np.tril_indices(size, -1)
    lower = jnp.zeros((*entries.shape[:-1], size, size), entries.dtype)
    lower = lower.at[..., rows, columns].set(entries)
    return lower - jnp.swapaxes(lower, -1, -2)


def orthogonal(
    skew: Float[Array, "*batch n n"],
) -> Float[Array, "*batch n n"]:
    r"""Return $\exp(S)$ of skew-symmetric $S$: orthogonal to rounding, determinant 1.

    By scaling and squaring, $\exp(S) = \exp(S / 2^s)^{2^s}$, of a Taylor polynomial. It
    avoids linear solves, as LAPACK's hang on a CPU of two cores on a large batch inside
    a loop (see `invert_matrices`). Each squaring would double the distance from
    orthogonality. A Newton-Schulz step after it, $Q \leftarrow Q (3I - Q^\top Q) / 2$,
    brings it back to rounding. Angles are exact up to the rounding of $S$ itself.

    Differentiable to any order. **A matrix whose 1-norm (the largest sum of absolute
    values in a column) exceeds 2048 gives NaN**, as does one that is not finite: there
    float32 resolves angles only to 1e-4, and the number of squarings must be bounded.
    """
    norm = lax.stop_gradient(jnp.max(jnp.sum(jnp.abs(skew), -2), -1))[..., None, None]
    # norm / _TAYLOR_NORM < 2^exponent; zero has the exponent 0.
    squarings = jnp.clip(jnp.frexp(norm / _TAYLOR_NORM)[1], 0, _MAX_SQUARINGS).astype(
        jnp.int32
    )
    identity = jnp.eye(skew.shape[-1], dtype=skew.dtype)
    identity = identity.reshape((1,) * (skew.ndim - 2) + identity.shape)
    q = _taylor(skew * jnp.ldexp(jnp.ones_like(norm), -squarings), identity)

    def square(q):
        q = multiply_matrices(q, q)
        gram = multiply_matrices(jnp.swapaxes(q, -1, -2), q)
        # As a correction of q, whose rounding is unbiased. `q @ (1.5 I - 0.5 gram)`
        # shrinks every state by 1e-8 a step in float32.
        return q + multiply_matrices(q, 0.5 * (identity - gram))

    def step(q, done):
        missing = done < squarings
        squared = lax.cond(jnp.any(missing), square, lambda q: q, q)
        return jnp.where(missing, squared, q), None

    q, _ = lax.scan(step, q, jnp.arange(_MAX_SQUARINGS, dtype=jnp.int32))
    limit = _TAYLOR_NORM * 2**_MAX_SQUARINGS
    return jnp.where(norm <= limit, q, jnp.nan)


def _taylor(a: Array, identity: Array) -> Array:
    """Return the sum of `a^k / k!` in six products (Paterson and Stockmeyer)."""
    width = math.isqrt(_TAYLOR_DEGREE + 1)
    powers = [identity, a]
    while len(powers) <= width:
        powers.append(multiply_matrices(powers[-1], a))

    def polynomial(first):
        terms = (powers[i] * (1 / math.factorial(first + i)) for i in range(width))
        return sum(terms, start=jnp.zeros_like(a))

    total = polynomial(_TAYLOR_DEGREE + 1 - width)
    for first in range(_TAYLOR_DEGREE + 1 - 2 * width, -1, -width):
        total = polynomial(first) + multiply_matrices(total, powers[-1])
    return total
