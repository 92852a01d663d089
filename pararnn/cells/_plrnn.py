import math

import jax.numpy as jnp
import jax.random as jr
from jax.nn import relu
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._parameters import (
    affine,
    check_dtype,
    check_input,
    check_key,
    check_size,
    linear,
    uniform,
    wide_dtype,
    widen,
    zeros,
)
from ._base import AbstractCell


def check_autonomous_sizes(where: str, d_input, d_state) -> tuple[int, int]:
    """Check both sizes; that of the input may be 0."""
    d_input = check_size(where, "d_input", d_input, least=0)
    if d_state is None and d_input == 0:
        raise ValueError(
            f"{where}: `d_input` is 0, so the size of the state does not follow from "
            "it. Pass `d_state`, for instance `d_state=20`."
        )
    d_state = d_input if d_state is None else check_size(where, "d_state", d_state)
    return d_input, d_state


def draw_piecewise_linear(
    key: PRNGKeyArray, d_input: int, d_state: int, dtype: DTypeLike
) -> tuple[Array, Array, Array, Array]:
    """Draw `A`, `W`, `h` and `C` as the published code of both cells does."""
    decays, weights, inputs = jr.split(key, 3)
    wide = wide_dtype(dtype)
    R = jr.normal(decays, (d_state, d_state), wide)
    K = R.T @ R / d_state + jnp.eye(d_state, dtype=wide)
    A = jnp.diag(K) / jnp.linalg.eigvalsh(K)[-1]
    W = 0.01 * jr.normal(weights, (d_state, d_state), wide)
    glorot = math.sqrt(6 / (d_state + d_input))
    (C,) = uniform(inputs, 1, (d_state, d_input), glorot, dtype)
    return A.astype(dtype), W.astype(dtype), jnp.zeros(d_state, dtype), C


class PLRNNCell(AbstractCell):
    r"""The piecewise-linear recurrent network, a model of dynamical systems.

    $$z_t = A \odot z_{t-1} + W \max(z_{t-1}, 0) + h + C u_t$$

    The state is $z$, `[d_state]`, and the Jacobian
    $\mathrm{diag}(A) + W \, \mathrm{diag}([z > 0])$ is dense. Nothing bounds the state:
    where the spectral radius of that matrix stays above 1, $z$ grows without limit.

    **Without inputs** (`d_input=0`, as in dynamics reconstruction) $C$ is empty, and a
    layer takes `xs=jnp.zeros((T, 0))`, which has a length but no numbers.

    ??? cite "Source"

        Durstewitz, "A state space approach for piecewise-linear recurrent neural
        networks for identifying computational dynamics from neural measurements", PLOS
        Computational Biology 13 (2017); initialised as in the code of Hess et al.,
        "Generalized Teacher Forcing for Learning Chaotic Dynamics" (2306.04406).
    """

    A: Float[Array, " d_state"]
    W: Float[Array, "d_state d_state"]
    h: Float[Array, " d_state"]
    C: Float[Array, "d_state d_input"]
    d_input: int
    d_state: int

    def __init__(
        self,
        d_input: int,
        d_state: int | None = None,
        *,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_input`: size of the input; 0 for a system without inputs.
        - `d_state`: size of the state. Defaults to `d_input`.
        - `dtype`: dtype of the parameters. Defaults to JAX's default floating-point
            dtype. 16-bit parameters have a float32 state.
        - `key`: a key of `jax.random`. $A$ is the diagonal of $K / \lambda_{max}(K)$
            with $K = R^T R / d_{state} + I$ and $R \sim N(0, 1)$, so that
            $0 < A \le 1$; $W \sim 0.01\, N(0, 1)$; $h = 0$; $C$ is uniform in
            $\pm\sqrt{6 / (d_{state} + d_{input})}$.

        **Raises:** `ValueError` on a size that is not an integer or too small, an
        invalid key, or a dtype that is not floating point.
        """
        self.d_input, self.d_state = check_autonomous_sizes(
            "PLRNNCell", d_input, d_state
        )
        dtype = check_dtype("PLRNNCell", dtype)
        check_key("PLRNNCell", key)
        self.A, self.W, self.h, self.C = draw_piecewise_linear(
            key, self.d_input, self.d_state, dtype
        )

    def gates(
        self, x: Float[Array, "*time d_input"]
    ) -> tuple[Float[Array, "*time d_state"]]:
        """`(C u + h,)`; see [`pararnn.AbstractCell.gates`][]."""
        x = check_input("PLRNNCell", x, self.d_input)
        return (affine(self.C, x, self.h),)

    def update(
        self,
        state: Float[Array, " d_state"],
        gates: tuple[Float[Array, " d_state"]],
    ) -> Float[Array, " d_state"]:
        """The next $z$, `[d_state]`, in the dtype of `state`."""
        z, g, A, W = widen(state, *gates, self.A, self.W)
        return (A * z + linear(W, relu(z)) + g).astype(state.dtype)

    def init_state(self) -> Float[Array, " d_state"]:
        """Zeros `[d_state]`, at least float32."""
        return zeros(self.d_state, self.W.dtype)

    def output(self, state: Float[Array, " d_state"]) -> Float[Array, " d_state"]:
        """The state itself, `[d_state]`."""
        return state
