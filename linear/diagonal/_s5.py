"""S5, a state space layer whose channels share one diagonal state."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, DTypeLike, Float, PRNGKeyArray

from pararnn._parameters import (
    check_choice,
    check_number,
    check_size,
    leading,
    linear,
    widen,
)

from .._arguments import Draw, check_range
from .._layer import AbstractConstantDiagonal
from .._parts import as_complex, clamped_exp, complex_zeros, real_product
from .._state_spaces import (
    DISCRETISATIONS,
    discretise,
    normal_legs,
    perturb_then_diagonalise,
)


class S5(AbstractConstantDiagonal):
    r"""The simplified state space layer: one state for all channels.

    $$h_t = \bar{\Lambda} \odot h_{t-1} + \bar{B} x_t, \qquad
    y_t = 2 \, \mathrm{Re}(C h_t) + D \odot x_t$$

    with $\bar{\Lambda}$ and $\bar{B}$ discretised as in [`linear.S4D`][], with a step
    $\Delta$ for each mode. $\mathrm{Re} \Lambda = -\exp(\log A_{real})$.

    The state is complex, `[d_state // 2]`: one of each conjugate pair.

    ??? cite "Source"

        Smith et al., "Simplified State Space Layers for Sequence Modeling"
        (2208.04933); perturbed: Yu et al. (2310.01698).
    """

    log_A_real: Float[Array, " modes"]
    A_imag: Float[Array, " modes"]
    B_re: Float[Array, "modes d_model"]
    B_im: Float[Array, "modes d_model"]
    C_re: Float[Array, "d_model modes"]
    C_im: Float[Array, "d_model modes"]
    D: Float[Array, " d_model"]
    log_dt: Float[Array, " modes"]
    d_model: int
    d_state: int
    discretisation: Literal["zoh", "bilinear"]

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        blocks: int = 1,
        initialisation: Literal["legs", "ptd"] = "legs",
        discretisation: Literal["zoh", "bilinear"] = "zoh",
        perturbation: float = 0.1,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: size of an input and of an output.
        - `d_state`: size of the state as conjugate pairs; `2 * blocks` divides it.
        - `blocks`: number of copies of HiPPO that the transition starts from.
        - `initialisation`: `"legs"`, the eigenvalues of the normal part of HiPPO-LegS,
            or `"ptd"`, those of HiPPO-LegS itself after a small perturbation.
            $B = V^{-1} B'$ and $C = C' V$ with real $B'$, $C'$ whose variance is
            one over the number of their columns.
        - `discretisation`: `"zoh"` or `"bilinear"`.
        - `perturbation`: of `"ptd"`, relative to HiPPO in the 2-norm.
        - `dt_min`, `dt_max`: the initial $\Delta$ is log-uniform between them.
        - `dtype`: of the (real) parameters. Defaults to JAX's default floating point.
        - `key`: a key of `jax.random`. $D \sim N(0, 1)$.

        **Raises:** `ValueError` on a size that is not a positive integer or not
        divisible, an unknown initialisation or discretisation, numbers out of range,
        an invalid key, or a dtype that is not floating point.
        """
        draw = Draw("S5", dtype, key)
        self.d_model = check_size("S5", "d_model", d_model)
        self.d_state = check_size("S5", "d_state", d_state)
        check_size("S5", "blocks", blocks)
        if d_state % (2 * blocks):
            raise ValueError(
                f"S5: `d_state` = {d_state} is not divisible by 2 * `blocks` = "
                f"{2 * blocks}: each block holds conjugate pairs. Choose a multiple."
            )
        check_choice("S5", "initialisation", initialisation, ("legs", "ptd"))
        check_choice("S5", "discretisation", discretisation, DISCRETISATIONS)
        perturbation = check_number("S5", "perturbation", perturbation)
        check_range("S5", "dt_min", "dt_max", (dt_min, dt_max))
        self.discretisation = discretisation
        size = d_state // blocks
        if initialisation == "legs":
            diagonal = normal_legs(size)
        else:
            diagonal = perturb_then_diagonalise(size, perturbation)

        def repeat(matrix):
            return jnp.asarray(np.kron(np.eye(blocks), matrix), B.dtype)

        A_re, A_im = _real_and_imaginary(np.tile(diagonal.eigenvalues, blocks))
        self.log_A_real, self.A_imag = draw.constant(np.log(-A_re)), draw.constant(A_im)
        B = draw.wide_normal((d_state, d_model), d_model**-0.5)
        C = draw.wide_normal((d_model, d_state), d_state**-0.5)
        # linear(W, x) is W x over the last axis of x.
        self.B_re, self.B_im = (
            draw.constant(linear(repeat(v), B.T).T)
            for v in _real_and_imaginary(diagonal.inverse)
        )
        self.C_re, self.C_im = (
            draw.constant(linear(repeat(v).T, C))
            for v in _real_and_imaginary(diagonal.vectors)
        )
        self.D = draw.normal((d_model,))
        self.log_dt = draw.log_uniform((d_state // 2,), dt_min, dt_max)

    def _discretise(self) -> tuple[Array, Array]:
        log_A_real, A_imag, log_dt = widen(self.log_A_real, self.A_imag, self.log_dt)
        A = lax.complex(-clamped_exp(log_A_real), A_imag)
        return discretise(self.discretisation, A, jnp.exp(log_dt).astype(A.dtype))

    def transition(self) -> Complex[Array, " modes"]:
        r"""Return $\bar{\Lambda}$, `[d_state // 2]`."""
        return self._discretise()[0]

    def drive(self, xs: Float[Array, "*time d_model"]) -> Complex[Array, "*time modes"]:
        r"""Return $\bar{B} x$, `[..., d_state // 2]`."""
        B = self._discretise()[1][:, None] * as_complex(self.B_re, self.B_im)
        return lax.complex(linear(B.real, xs), linear(B.imag, xs))

    def readout(
        self,
        states: Complex[Array, "*time modes"],
        xs: Float[Array, "*time d_model"],
    ) -> Float[Array, "*time d_model"]:
        r"""Return $2 \, \mathrm{Re}(C h) + D \odot x$, `[..., d_model]`."""
        C_re, C_im, D = widen(self.C_re, self.C_im, self.D)
        return 2 * real_product(C_re, C_im, states) + leading(D, xs.ndim) * xs

    def init_state(self) -> Complex[Array, " modes"]:
        """Return zeros `[d_state // 2]`, at least complex64."""
        return complex_zeros((self.d_state // 2,), self.precision())


def _real_and_imaginary(values) -> tuple[np.ndarray, np.ndarray]:
    return np.real(values), np.imag(values)
