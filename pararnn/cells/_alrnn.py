import jax.numpy as jnp
from jax.nn import relu
from jaxtyping import Array, Bool, DTypeLike, Float, PRNGKeyArray

from .._parameters import (
    affine,
    check_dtype,
    check_input,
    check_key,
    check_size,
    linear,
    widen,
    zeros,
)
from ._base import AbstractCell
from ._plrnn import check_autonomous_sizes, draw_piecewise_linear


class ALRNNCell(AbstractCell):
    r"""The almost-linear recurrent network: few rectified units, the others linear.

    $$\begin{aligned}
    z_t &= A \odot z_{t-1} + W \phi(z_{t-1}) + h + C u_t \\
    \phi(z) &= (z_1, \dots, z_{M-P}, \max(z_{M-P+1}, 0), \dots, \max(z_M, 0))
    \end{aligned}$$

    with $M$ = `d_state` and $P$ = `rectified`. The state is $z$, `[d_state]`. The
    signs of the last $P$ units say which of $2^P$ linear maps the next step is: a
    symbolic code of the trajectory, see [`pararnn.ALRNNCell.region`][]. The Jacobian
    $\mathrm{diag}(A) + W \, \mathrm{diag}(1, \dots, 1, [z > 0])$ is dense.

    **Without inputs** (`d_input=0`, as in dynamics reconstruction) $C$ is empty, and a
    layer takes `xs=jnp.zeros((T, 0))`, which has a length but no numbers.

    ??? cite "Source"

        Brenner et al., "Almost-Linear RNNs Yield Highly Interpretable Symbolic Codes in
        Dynamical Systems Reconstruction" (2410.14240); initialised as in its code.
    """

    A: Float[Array, " d_state"]
    W: Float[Array, "d_state d_state"]
    h: Float[Array, " d_state"]
    C: Float[Array, "d_state d_input"]
    d_input: int
    d_state: int
    rectified: int

    def __init__(
        self,
        d_input: int,
        d_state: int | None = None,
        *,
        rectified: int | None = None,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_input`: size of the input; 0 for a system without inputs.
        - `d_state`: size of the state. Defaults to `d_input`.
        - `rectified`: how many units, the last ones, are rectified: 0 (a linear
            recurrence) to `d_state` (the [`pararnn.PLRNNCell`][]). Defaults to a
            tenth of the units, but at least one. The paper takes 2 of 20 for the
            Lorenz attractor.
        - `dtype`: dtype of the parameters. Defaults to JAX's default floating-point
            dtype. 16-bit parameters have a float32 state.
        - `key`: a key of `jax.random`. The parameters are drawn like those of
            [`pararnn.PLRNNCell`][].

        **Raises:** `ValueError` on a size that is not an integer or too small,
        `rectified` above `d_state`, an invalid key, or a dtype that is not
        floating point.
        """
        self.d_input, self.d_state = check_autonomous_sizes(
            "ALRNNCell", d_input, d_state
        )
        if rectified is None:
            rectified = max(1, self.d_state // 10)
        self.rectified = check_size("ALRNNCell", "rectified", rectified, least=0)
        if self.rectified > self.d_state:
            raise ValueError(
                f"ALRNNCell: `rectified` = {rectified} is more than `d_state` = "
                f"{self.d_state}. Likely cause: the two are swapped. Choose "
                "`rectified` from 0 to `d_state`."
            )
        dtype = check_dtype("ALRNNCell", dtype)
        check_key("ALRNNCell", key)
        self.A, self.W, self.h, self.C = draw_piecewise_linear(
            key, self.d_input, self.d_state, dtype
        )

    def gates(
        self, x: Float[Array, "*time d_input"]
    ) -> tuple[Float[Array, "*time d_state"]]:
        """`(C u + h,)`; see [`pararnn.AbstractCell.gates`][]."""
        x = check_input("ALRNNCell", x, self.d_input)
        return (affine(self.C, x, self.h),)

    def update(
        self,
        state: Float[Array, " d_state"],
        gates: tuple[Float[Array, " d_state"]],
    ) -> Float[Array, " d_state"]:
        """The next $z$, `[d_state]`, in the dtype of `state`."""
        z, g, A, W = widen(state, *gates, self.A, self.W)
        rectified = jnp.arange(self.d_state) >= self.d_state - self.rectified
        phi = jnp.where(rectified, relu(z), z)
        return (A * z + linear(W, phi) + g).astype(state.dtype)

    def region(
        self, state: Float[Array, "*time d_state"]
    ) -> Bool[Array, "*time rectified"]:
        """Return which linear map steps from a state: the symbol of that state.

        **Arguments:** `state`, `[..., d_state]`, floating point, for instance all
        states of a sequence.

        **Returns:** bool `[..., rectified]`, true where a rectified unit is positive.
        As a number, for up to 31 units:
        `cell.region(states).astype(int) @ 2 ** jnp.arange(cell.rectified)`.

        **Raises:** `ValueError` if the last axis or the dtype of `state` does not fit.
        """
        state = jnp.asarray(state)
        if state.ndim < 1 or state.shape[-1] != self.d_state:
            raise ValueError(
                f"ALRNNCell.region: `state` has shape {state.shape}, expected [..., "
                f"{self.d_state}] as `d_state` is {self.d_state}. Likely causes: (a) "
                "inputs or observations were passed rather than states, (b) the axes "
                "are in another order (units come last)."
            )
        if not jnp.issubdtype(state.dtype, jnp.floating):
            raise ValueError(
                f"ALRNNCell.region: `state` is {state.dtype}, expected real floating "
                "point. Likely cause: something other than a state was passed, for "
                "instance a region."
            )
        return state[..., self.d_state - self.rectified :] > 0

    def init_state(self) -> Float[Array, " d_state"]:
        """Zeros `[d_state]`, at least float32."""
        return zeros(self.d_state, self.W.dtype)

    def output(self, state: Float[Array, " d_state"]) -> Float[Array, " d_state"]:
        """The state itself, `[d_state]`."""
        return state
