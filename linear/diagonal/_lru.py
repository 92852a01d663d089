"""The Linear Recurrent Unit."""

import math
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Inexact, PRNGKeyArray

from pararnn._parameters import check_choice, check_number, leading, linear, widen

from .._arguments import Draw, check_sizes
from .._layer import AbstractConstantDiagonal
from .._parts import clamped_exp, complex_zeros, real_product

Eigenvalues = Literal["positive", "signed", "complex"]


class LRU(AbstractConstantDiagonal):
    r"""The linear recurrent unit.

    $$\begin{aligned}
    h_t &= \lambda \odot h_{t-1} + \exp(\gamma^{\log}) \odot B x_t, &
    \lambda &= \exp(-\exp(\nu^{\log}) + i \exp(\theta^{\log})) \\
    y_t &= \mathrm{Re}(C h_t) + D \odot x_t
    \end{aligned}$$

    The state is complex, `[d_state]`, and $|\lambda| < 1$ for any parameters. With
    real eigenvalues, $\lambda = \pm\exp(-\exp(\nu^{\log}))$, B, C and the state
    are real.

    ??? cite "Source"

        Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences"
        (2303.06349, section 3 and appendix A).
    """

    nu_log: Float[Array, " d_state"]
    theta_log: Float[Array, " d_state"] | None
    sign: tuple[int, ...] | None
    gamma_log: Float[Array, " d_state"]
    B_re: Float[Array, "d_state d_model"]
    B_im: Float[Array, "d_state d_model"] | None
    C_re: Float[Array, "d_model d_state"]
    C_im: Float[Array, "d_model d_state"] | None
    D: Float[Array, " d_model"]
    d_model: int
    d_state: int
    eigenvalues: Eigenvalues

    def __init__(
        self,
        d_model: int,
        d_state: int | None = None,
        *,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 6.28,
        eigenvalues: Eigenvalues = "complex",
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: size of an input and of an output.
        - `d_state`: number of entries of the state. Defaults to `d_model`.
        - `r_min`, `r_max`: the initial $\lambda$ are uniform on the ring between these
            radii, $0 \le r_{min} < r_{max} \le 1$. Long memory needs `r_min` near 1.
        - `max_phase`: the initial phases of $\lambda$ are uniform in
            $[0, \mathrm{max\_phase}]$, in radians.
        - `eigenvalues`: `"complex"` is the layer of the paper; `"positive"` keeps them
            in (0, 1), and `"signed"` in (-1, 1), with every other one negative.
        - `dtype`: of the (real) parameters. Defaults to JAX's default floating point.
        - `key`: a key of `jax.random`. $B \sim N(0, 1)/\sqrt{2 d_{model}}$ (without the
            2 if real) and $C \sim N(0, 1)/\sqrt{d_{state}}$, in both real and
            imaginary part; $D \sim N(0, 1)$;
            $\gamma^{\log} = \log\sqrt{1 - |\lambda|^2}$.

        **Raises:** `ValueError` on a size that is not a positive integer, radii or a
        phase out of range, unknown eigenvalues, an invalid key, or a dtype that
        is not floating point.
        """
        draw = Draw("LRU", dtype, key)
        d_model, d_state = check_sizes("LRU", d_model, d_state)
        self.d_model, self.d_state = d_model, d_state
        check_choice(
            "LRU", "eigenvalues", eigenvalues, ("positive", "signed", "complex")
        )
        self.eigenvalues = eigenvalues
        r_min = check_number("LRU", "r_min", r_min)
        r_max = check_number("LRU", "r_max", r_max)
        max_phase = check_number("LRU", "max_phase", max_phase)
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(
                f"LRU: `r_min` = {r_min!r} and `r_max` = {r_max!r} must satisfy 0 <= "
                "r_min < r_max <= 1: they are the radii of the ring that the "
                "eigenvalues start in. Likely cause: the two are swapped."
            )
        if not 0 < max_phase < math.inf:
            raise ValueError(
                f"LRU: `max_phase` must be positive and finite, got {max_phase!r}. It "
                "is in radians; the paper takes 6.28 or less."
            )
        # Draw 1 - |λ|², as |λ|² itself may round to 1. The logarithms need it strictly
        # between 0 and 1, and u > 0: `uniform` may return its lower end.
        u = 1 - draw.wide_uniform((self.d_state,), 0, 1)
        rest = (1 - r_max**2) + u * (r_max**2 - r_min**2)
        rest = jnp.clip(rest, draw.tiny, 1 - draw.epsilon)
        self.nu_log = draw.constant(jnp.log(-0.5 * jnp.log1p(-rest)))
        self.gamma_log = draw.constant(0.5 * jnp.log(rest))
        into, out = (self.d_state, self.d_model), (self.d_model, self.d_state)
        is_complex = eigenvalues == "complex"
        variance = 1 / (2 * self.d_model if is_complex else self.d_model)
        self.B_re = draw.normal(into, variance**0.5)
        self.C_re = draw.normal(out, self.d_state**-0.5)
        self.D = draw.normal((self.d_model,))
        self.B_im = self.C_im = self.theta_log = self.sign = None
        if is_complex:
            self.B_im = draw.normal(into, variance**0.5)
            self.C_im = draw.normal(out, self.d_state**-0.5)
            u = draw.wide_uniform((self.d_state,), draw.tiny, 1)
            self.theta_log = draw.constant(jnp.log(max_phase * u))
        elif eigenvalues == "signed":
            self.sign = tuple(1 - 2 * (i % 2) for i in range(self.d_state))

    def transition(self) -> Inexact[Array, " d_state"]:
        r"""Return the eigenvalues $\lambda$, `[d_state]`."""
        (nu_log,) = widen(self.nu_log)
        if self.theta_log is not None:
            nu_log, theta_log = widen(nu_log, self.theta_log)
            return jnp.exp(lax.complex(-clamped_exp(nu_log), jnp.exp(theta_log)))
        size = jnp.exp(-clamped_exp(nu_log))
        return size if self.sign is None else size * jnp.asarray(self.sign, size.dtype)

    def drive(
        self, xs: Float[Array, "*time d_model"]
    ) -> Inexact[Array, "*time d_state"]:
        r"""Return $\exp(\gamma^{\log}) \odot B x$, `[..., d_state]`."""
        gamma_log, B_re = widen(self.gamma_log, self.B_re)
        gamma = leading(jnp.exp(gamma_log), xs.ndim)
        drive = gamma * linear(B_re, xs)
        if self.B_im is None:
            return drive
        (B_im,) = widen(self.B_im)
        return lax.complex(drive, gamma * linear(B_im, xs))

    def readout(
        self,
        states: Inexact[Array, "*time d_state"],
        xs: Float[Array, "*time d_model"],
    ) -> Float[Array, "*time d_model"]:
        r"""Return $\mathrm{Re}(C h) + D \odot x$, `[..., d_model]`."""
        C_re, D = widen(self.C_re, self.D)
        if self.C_im is None:
            ys = linear(C_re, states)
        else:
            ys = real_product(C_re, widen(self.C_im)[0], states)
        return ys + leading(D, xs.ndim) * xs

    def init_state(self) -> Inexact[Array, " d_state"]:
        """Return zeros `[d_state]`, complex if eigenvalues are, at least 32 bits."""
        if self.theta_log is None:
            return jnp.zeros((self.d_state,), self.precision())
        return complex_zeros((self.d_state,), self.precision())
