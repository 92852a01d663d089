"""The diagonal state space layer S4D."""

import math
from typing import Literal

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, DTypeLike, Float, PRNGKeyArray

from ._base import (
    AbstractDiagonalLayer,
    append_to,
    check_arguments,
    wide,
    widen,
    zeros,
)


def _lin(d_state: int):
    modes = np.arange(d_state // 2)
    return -0.5 + 1j * np.pi * modes, np.ones(modes.shape)


def _inv(d_state: int):
    modes = np.arange(d_state // 2)
    frequency = d_state / np.pi * (d_state / (2 * modes + 1) - 1)
    return -0.5 + 1j * frequency, np.ones(modes.shape)


def _real(d_state: int):
    modes = np.arange(d_state // 2)
    return -(modes + 1.0) + 0j, np.ones(modes.shape)


def _legs(d_state: int):
    # HiPPO-LegS is -1/2 + (skew-symmetric) - P Pᵀ with P_n = √(n + 1/2); the normal
    # part is what stands before the last term. The lower triangle of the skew part is
    # that of HiPPO, -√((2n + 1)(2k + 1)), plus P_n P_k, half of it.
    n = np.arange(d_state)
    lower = np.tril(-0.5 * np.sqrt(np.outer(2 * n + 1.0, 2 * n + 1.0)), -1)
    frequency, vectors = np.linalg.eigh(-1j * (lower - lower.T))
    half = slice(d_state // 2, None)
    b = vectors[:, half].conj().T @ np.sqrt(2 * n + 1.0)
    # The phase of an eigenvector is free, and the phase of C is uniform: choose the one
    # that makes B positive, so that every LAPACK gives the same layer.
    return -0.5 + 1j * frequency[half], np.abs(b)


# Each makes A and B, complex or real `[d_state // 2]`, from `d_state`.
_INITIALISATIONS = {"lin": _lin, "inv": _inv, "real": _real, "legs": _legs}


def _zoh(A: Array, dt: Array) -> tuple[Array, Array]:
    return jnp.exp(dt * A), jnp.expm1(dt * A) / A


def _bilinear(A: Array, dt: Array) -> tuple[Array, Array]:
    half = dt * A / 2
    return (1 + half) / (1 - half), dt / (1 - half)


# Each makes Ā and the factor of B in B̄ from A and Δ.
_DISCRETISATIONS = {"zoh": _zoh, "bilinear": _bilinear}


def _check_choice(name: str, value, choices: dict) -> None:
    if value not in choices:
        raise ValueError(
            f"S4D: unknown `{name}` {value!r}; there are {', '.join(choices)}."
        )


class S4D(AbstractDiagonalLayer):
    r"""The diagonal structured state space layer.

    For each of the `d_model` channels, with $N$ = `d_state` modes in conjugate pairs,
    of which one half is stored:

    $$\begin{aligned}
    h_t &= \bar{A} \odot h_{t-1} + \bar{B} x_t \\
    y_t &= 2 \, \mathrm{Re} \sum_{n < N/2} C_n h_{t,n} + D x_t
    \end{aligned}$$

    with the zero-order hold
    $\bar{A} = e^{\Delta A}$, $\bar{B} = A^{-1}(e^{\Delta A} - 1) B$, or the bilinear
    $\bar{A} = (1 + \Delta A / 2) / (1 - \Delta A / 2)$,
    $\bar{B} = \Delta B / (1 - \Delta A / 2)$.
    $\mathrm{Re} A = -\exp(\log A_{real})$ is negative whatever the parameters,
    so that $|\bar{A}| < 1$ in both.

    The state is complex, `[d_model, d_state // 2]`. The layer has no nonlinearity and
    does not mix channels: the blocks around it do.

    ??? cite "Source"

        Gu et al., "On the Parameterization and Initialization of Diagonal State Space
        Models" (2206.11893).
    """

    log_A_real: Float[Array, "d_model modes"]
    A_imag: Float[Array, "d_model modes"]
    B_re: Float[Array, "d_model modes"]
    B_im: Float[Array, "d_model modes"]
    C_re: Float[Array, "d_model modes"]
    C_im: Float[Array, "d_model modes"]
    D: Float[Array, " d_model"]
    log_dt: Float[Array, " d_model"]
    d_model: int
    d_state: int
    discretisation: Literal["zoh", "bilinear"]

    def __init__(
        self,
        d_model: int,
        d_state: int,
        *,
        initialisation: Literal["lin", "inv", "real", "legs"] = "lin",
        discretisation: Literal["zoh", "bilinear"] = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: number of channels, of an input and of an output.
        - `d_state`: $N$, the size of each channel's state; even, as modes come in
            conjugate pairs.
        - `initialisation`: of $A$, for $n < N/2$: `"lin"`, $-1/2 + i \pi n$; `"inv"`,
            $-1/2 + i \frac{N}{\pi} (\frac{N}{2n+1} - 1)$; `"real"`, $-(n+1)$; `"legs"`,
            the eigenvalues of the normal part of HiPPO-LegS, with $B = V^* B_{HiPPO}$.
            $B = 1$ for the others.
        - `discretisation`: `"zoh"` or `"bilinear"`.
        - `dt_min`, `dt_max`: at the start $\Delta$ is log-uniform between them.
        - `dtype`: of the (real) parameters; JAX's default floating point if not given.
        - `key`: a key of `jax.random`. $C \sim CN(0, 1)$, $D \sim N(0, 1)$.

        **Raises:** `ValueError` on a size that is not a positive integer, an odd
        `d_state`, an unknown initialisation or discretisation, steps out of range, a
        key that is not one, or a dtype that is not floating point.
        """
        self.d_model, self.d_state, dtype = check_arguments(
            "S4D", d_model, d_state, dtype, key
        )
        if self.d_state % 2:
            raise ValueError(
                f"S4D: `d_state` must be even, got {d_state}: modes come in conjugate "
                "pairs, of which one half is stored. Likely cause: the number of "
                "stored modes was meant; pass twice that."
            )
        _check_choice("initialisation", initialisation, _INITIALISATIONS)
        _check_choice("discretisation", discretisation, _DISCRETISATIONS)
        if not 0 < dt_min <= dt_max < math.inf:
            raise ValueError(
                f"S4D: `dt_min` = {dt_min!r} and `dt_max` = {dt_max!r} must "
                "satisfy 0 < dt_min <= dt_max. Likely causes: (a) the two are "
                "swapped, (b) their logarithms were given."
            )
        self.discretisation = discretisation
        draw = wide(dtype)
        c_re, c_im, skip, steps = jr.split(key, 4)
        shape = (self.d_model, self.d_state // 2)

        def each_channel(values):
            return jnp.tile(jnp.asarray(values, dtype), (self.d_model, 1))

        A, B = _INITIALISATIONS[initialisation](self.d_state)
        self.log_A_real = each_channel(np.log(-A.real))
        self.A_imag = each_channel(A.imag)
        self.B_re = each_channel(B)
        self.B_im = jnp.zeros(shape, dtype)
        # CN(0, 1) has variance 1/2 in either part.
        self.C_re = (jr.normal(c_re, shape, draw) * 0.5**0.5).astype(dtype)
        self.C_im = (jr.normal(c_im, shape, draw) * 0.5**0.5).astype(dtype)
        self.D = jr.normal(skip, (self.d_model,), draw).astype(dtype)
        self.log_dt = jr.uniform(
            steps, (self.d_model,), draw, math.log(dt_min), math.log(dt_max)
        ).astype(dtype)

    def _discretise(self) -> tuple[Array, Array]:
        log_A_real, A_imag, B_re, B_im, log_dt = widen(
            self.log_A_real, self.A_imag, self.B_re, self.B_im, self.log_dt
        )
        A = lax.complex(-jnp.exp(log_A_real), A_imag)
        dt = jnp.exp(log_dt)[:, None].astype(A.dtype)
        A_bar, factor = _DISCRETISATIONS[self.discretisation](A, dt)
        return A_bar, factor * lax.complex(B_re, B_im)

    def transition(self) -> Complex[Array, "d_model modes"]:
        r"""$\bar{A}$, `[d_model, d_state // 2]`."""
        return self._discretise()[0]

    def drive(
        self, xs: Float[Array, "*time d_model"]
    ) -> Complex[Array, "*time d_model modes"]:
        r"""$\bar{B} x$, `[..., d_model, d_state // 2]`."""
        _, B_bar = self._discretise()
        return append_to(B_bar, xs.ndim + 1) * xs[..., None].astype(B_bar.dtype)

    def readout(
        self,
        states: Complex[Array, "*time d_model modes"],
        xs: Float[Array, "*time d_model"],
    ) -> Float[Array, "*time d_model"]:
        r"""$2 \, \mathrm{Re}(C h) + D x$, `[..., d_model]`."""
        C_re, C_im, D = (
            append_to(v, xs.ndim + v.ndim - 1)
            for v in widen(self.C_re, self.C_im, self.D)
        )
        ys = 2 * jnp.sum(C_re * states.real - C_im * states.imag, axis=-1)
        return ys + D * xs

    def init_state(self) -> Complex[Array, "d_model modes"]:
        """Zeros `[d_model, d_state // 2]`, at least complex64."""
        return zeros((self.d_model, self.d_state // 2), self.D.dtype)

    def kernel(self, length: int) -> Float[Array, "length d_model"]:
        r"""The impulse response
        $K_l = 2 \, \mathrm{Re} \sum_n C_n \bar{A}_n^l \bar{B}_n$.

        From the fresh state and without resets, the layer is the causal convolution
        $y_t = \sum_{l \le t} K_l x_{t-l} + D x_t$.

        **Arguments:** `length`, the number of lags, from 0.

        **Returns:** `[length, d_model]`, at least float32.
        """
        A_bar, B_bar = self._discretise()
        lags = jnp.arange(length, dtype=A_bar.real.dtype)[:, None, None]
        # In polar form, as a factor of zero has no logarithm.
        size, phase = jnp.abs(A_bar)[None] ** lags, jnp.angle(A_bar)[None] * lags
        powers = lax.complex(size * jnp.cos(phase), size * jnp.sin(phase))
        return self.readout(
            powers * B_bar[None], jnp.zeros((length, self.d_model), size.dtype)
        )
