"""The Linear Recurrent Unit."""

import math

import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Complex, DTypeLike, Float, PRNGKeyArray

from ._base import AbstractDiagonalLayer, append_to, check_arguments, wide, widen, zeros


class LRU(AbstractDiagonalLayer):
    r"""The linear recurrent unit.

    $$\begin{aligned}
    h_t &= \lambda \odot h_{t-1} + \exp(\gamma^{\log}) \odot B x_t, &
    \lambda &= \exp(-\exp(\nu^{\log}) + i \exp(\theta^{\log})) \\
    y_t &= \mathrm{Re}(C h_t) + D \odot x_t
    \end{aligned}$$

    The state is complex, `[d_state]`, and $|\lambda| < 1$ whatever the parameters.

    ??? cite "Source"

        Orvieto et al., "Resurrecting Recurrent Neural Networks for Long Sequences"
        (2303.06349, section 3 and appendix A).
    """

    nu_log: Float[Array, " d_state"]
    theta_log: Float[Array, " d_state"]
    gamma_log: Float[Array, " d_state"]
    B_re: Float[Array, "d_state d_model"]
    B_im: Float[Array, "d_state d_model"]
    C_re: Float[Array, "d_model d_state"]
    C_im: Float[Array, "d_model d_state"]
    D: Float[Array, " d_model"]
    d_model: int
    d_state: int

    def __init__(
        self,
        d_model: int,
        d_state: int,
        *,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 6.28,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: size of an input and of an output.
        - `d_state`: number of complex entries of the state.
        - `r_min`, `r_max`: at the start $\lambda$ is uniform on the ring of these
            radii, $0 \le r_{min} < r_{max} \le 1$. Long memory wants `r_min` near 1.
        - `max_phase`: at the start the phases of $\lambda$ are uniform in
            $[0, \mathrm{max\_phase}]$, in radians.
        - `dtype`: of the (real) parameters; JAX's default floating point if not given.
        - `key`: a key of `jax.random`. $B \sim N(0, 1)/\sqrt{2 d_{model}}$ and
            $C \sim N(0, 1)/\sqrt{d_{state}}$, both in real and imaginary part;
            $D \sim N(0, 1)$; $\gamma^{\log} = \log\sqrt{1 - |\lambda|^2}$.

        **Raises:** `ValueError` on a size that is not a positive integer, radii or a
        phase out of range, a key that is not one, or a dtype that is not floating
        point.
        """
        self.d_model, self.d_state, dtype = check_arguments(
            "LRU", d_model, d_state, dtype, key
        )
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
        draw = wide(dtype)
        radius, phase, b_re, b_im, c_re, c_im, skip = jr.split(key, 7)
        # The logarithms want u > 0; `uniform` may return its lower end.
        tiny = jnp.finfo(draw).tiny
        u = jr.uniform(radius, (self.d_state,), draw, tiny)
        nu = -0.5 * jnp.log(u * (r_max**2 - r_min**2) + r_min**2)
        u = jr.uniform(phase, (self.d_state,), draw, tiny)
        self.nu_log = jnp.log(nu).astype(dtype)
        self.theta_log = jnp.log(max_phase * u).astype(dtype)
        # 1 - |λ|² itself rounds to zero where |λ| is nearly one.
        self.gamma_log = (0.5 * jnp.log(-jnp.expm1(-2 * nu))).astype(dtype)

        def normal(key, shape, variance):
            return (jr.normal(key, shape, draw) * variance**0.5).astype(dtype)

        into, out = (self.d_state, self.d_model), (self.d_model, self.d_state)
        self.B_re = normal(b_re, into, 1 / (2 * self.d_model))
        self.B_im = normal(b_im, into, 1 / (2 * self.d_model))
        self.C_re = normal(c_re, out, 1 / self.d_state)
        self.C_im = normal(c_im, out, 1 / self.d_state)
        self.D = normal(skip, (self.d_model,), 1)

    def transition(self) -> Complex[Array, " d_state"]:
        r"""The eigenvalues $\lambda$, `[d_state]`."""
        nu, theta = (jnp.exp(v) for v in widen(self.nu_log, self.theta_log))
        return jnp.exp(lax.complex(-nu, theta))

    def drive(
        self, xs: Float[Array, "*time d_model"]
    ) -> Complex[Array, "*time d_state"]:
        r"""$\exp(\gamma^{\log}) \odot B x$, `[..., d_state]`."""
        gamma_log, B_re, B_im = widen(self.gamma_log, self.B_re, self.B_im)
        gamma = append_to(jnp.exp(gamma_log), xs.ndim)
        return lax.complex(gamma * _product(B_re, xs), gamma * _product(B_im, xs))

    def readout(
        self,
        states: Complex[Array, "*time d_state"],
        xs: Float[Array, "*time d_model"],
    ) -> Float[Array, "*time d_model"]:
        r"""$\mathrm{Re}(C h) + D \odot x$, `[..., d_model]`."""
        C_re, C_im, D = widen(self.C_re, self.C_im, self.D)
        ys = _product(C_re, states.real) - _product(C_im, states.imag)
        return ys + append_to(D, xs.ndim) * xs

    def init_state(self) -> Complex[Array, " d_state"]:
        """Zeros `[d_state]`, at least complex64."""
        return zeros((self.d_state,), self.nu_log.dtype)


def _product(matrix: Array, x: Array) -> Array:
    # Full precision: what is lost on the way into the state stays in it.
    return jnp.einsum("...i,oi->...o", x, matrix, precision=lax.Precision.HIGHEST)
