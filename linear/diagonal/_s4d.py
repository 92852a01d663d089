"""S4D, the diagonal state space layer."""

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, DTypeLike, Float, PRNGKeyArray

from pararnn._checks import is_symbolic, refuse_symbolic
from pararnn._parameters import check_choice, check_number, check_size, leading, widen
from pararnn.scan import einsum, time_shards

from .._arguments import Draw, check_range
from .._layer import AbstractConstantDiagonal
from .._parts import as_complex, clamped_exp, complex_zeros
from .._state_spaces import (
    DISCRETISATIONS,
    discretise,
    legs,
    normal_legs,
    perturb_then_diagonalise,
)


def _lin(d_state: int, _):
    modes = np.arange(d_state // 2)
    return -0.5 + 1j * np.pi * modes, np.ones(modes.shape)


def _inv(d_state: int, _):
    modes = np.arange(d_state // 2)
    frequency = d_state / np.pi * (d_state / (2 * modes + 1) - 1)
    return -0.5 + 1j * frequency, np.ones(modes.shape)


def _real(d_state: int, _):
    modes = np.arange(d_state // 2)
    return -(modes + 1.0) + 0j, np.ones(modes.shape)


def _legs(d_state: int, _):
    diagonal = normal_legs(d_state)
    return diagonal.eigenvalues, diagonal.inverse @ legs(d_state)[1]


def _ptd(d_state: int, perturbation: float):
    diagonal = perturb_then_diagonalise(d_state, perturbation)
    return diagonal.eigenvalues, diagonal.inverse @ legs(d_state)[1]


# Each returns A and B, `[d_state // 2]`, for `d_state` and the perturbation.
_INITIALISATIONS = {"lin": _lin, "inv": _inv, "real": _real, "legs": _legs, "ptd": _ptd}


class S4D(AbstractConstantDiagonal):
    r"""The diagonal structured state space layer.

    For each of the `d_model` channels, with $N$ = `d_state` modes in conjugate pairs,
    one of each pair stored:

    $$\begin{aligned}
    h_t &= \bar{A} \odot h_{t-1} + \bar{B} x_t \\
    y_t &= 2 \, \mathrm{Re} \sum_{n < N/2} C_n h_{t,n} + D x_t
    \end{aligned}$$

    with the zero-order hold
    $\bar{A} = e^{\Delta A}$, $\bar{B} = A^{-1}(e^{\Delta A} - 1) B$, or the bilinear
    $\bar{A} = (1 + \Delta A / 2) / (1 - \Delta A / 2)$,
    $\bar{B} = \Delta B / (1 - \Delta A / 2)$.
    $\mathrm{Re} A = -\exp(\log A_{real})$ is negative for any parameters, so
    $|\bar{A}| < 1$ in both.

    The state is complex, `[d_model, d_state // 2]`. The layer has no nonlinearity and
    does not mix channels; that is left to the model around it.

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
    form: Literal["auto", "scan", "convolution"]

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        *,
        initialisation: Literal["lin", "inv", "real", "legs", "ptd"] = "lin",
        discretisation: Literal["zoh", "bilinear"] = "zoh",
        form: Literal["auto", "scan", "convolution"] = "auto",
        perturbation: float = 0.1,
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
            the eigenvalues of the normal part of HiPPO-LegS, with $B = V^* B_{HiPPO}$;
            `"ptd"`, those of HiPPO-LegS after a small perturbation, with
            $B = V^{-1} B_{HiPPO}$ (`linear.perturb_then_diagonalise`). For the others
            $B = 1$.
        - `discretisation`: `"zoh"` or `"bilinear"`.
        - `form`: how a sequence without resets is computed: `"scan"`, `"convolution"`
            by FFT, or `"auto"`, by length. Sequences with resets are always scanned.
            The rounding errors of the FFT scale with the largest of all inputs, later
            ones included.
        - `perturbation`: of `"ptd"`, relative to HiPPO in the 2-norm.
        - `dt_min`, `dt_max`: the initial $\Delta$ is log-uniform between them.
        - `dtype`: of the (real) parameters. Defaults to JAX's default floating point.
        - `key`: a key of `jax.random`. $C \sim CN(0, 1)$, $D \sim N(0, 1)$.

        **Raises:** `ValueError` on a size that is not a positive integer, an odd
        `d_state`, an unknown initialisation, discretisation or form, steps or a
        perturbation out of range, an invalid key, or a dtype that is not
        floating point.
        """
        draw = Draw("S4D", dtype, key)
        self.d_model = check_size("S4D", "d_model", d_model)
        self.d_state = check_size("S4D", "d_state", d_state)
        if self.d_state % 2:
            raise ValueError(
                f"S4D: `d_state` must be even, got {d_state}: modes come in conjugate "
                "pairs, one of each stored. Likely cause: it is the number of stored "
                "modes; pass twice that."
            )
        check_choice("S4D", "initialisation", initialisation, _INITIALISATIONS)
        check_choice("S4D", "discretisation", discretisation, DISCRETISATIONS)
        check_choice("S4D", "form", form, ("auto", "scan", "convolution"))
        perturbation = check_number("S4D", "perturbation", perturbation)
        check_range("S4D", "dt_min", "dt_max", (dt_min, dt_max))
        self.discretisation, self.form = discretisation, form
        shape = (self.d_model, self.d_state // 2)

        def each_channel(values):
            return jnp.tile(draw.constant(values), (self.d_model, 1))

        A, B = _INITIALISATIONS[initialisation](self.d_state, perturbation)
        self.log_A_real = each_channel(np.log(-A.real))
        self.A_imag = each_channel(A.imag)
        self.B_re, self.B_im = each_channel(B.real), each_channel(B.imag)
        # Each part of CN(0, 1) has a variance of 1/2.
        self.C_re = draw.normal(shape, 0.5**0.5)
        self.C_im = draw.normal(shape, 0.5**0.5)
        self.D = draw.normal((self.d_model,))
        self.log_dt = draw.log_uniform((self.d_model,), dt_min, dt_max)

    def mix(self, xs, state, reset):
        steps = xs.shape[0]
        if self.form == "convolution":
            refuse_symbolic("S4D", "`form` 'convolution'", "Pass 'auto'", steps)
        # The FFT would gather a sequence that is sharded in time.
        long = not is_symbolic(steps) and steps >= _CONVOLVED_FROM
        long = long and time_shards(steps) == 1 and self.form == "auto"
        if reset is None and (long or self.form == "convolution"):
            return self._convolve(xs.astype(self.precision()), state)
        return super().mix(xs, state, reset)

    def _convolve(self, xs, state):
        """Convolve the inputs with the kernel, add the response to the initial state,
        and return the last state too."""
        steps = xs.shape[0]
        # The FFT would spread what is not finite to all steps, even earlier ones.
        bad = ~jnp.isfinite(xs)
        spoiled = jnp.where(lax.cummax(bad.astype(jnp.int8)) > 0, jnp.nan, 0)
        xs = jnp.where(bad, 0, xs)
        A_bar, B_bar = self._discretise()
        C, powers = as_complex(self.C_re, self.C_im), _Powers.of(A_bar, steps)
        kernel = powers.sum_over_modes(C * B_bar)
        # Both are padded with zeros to twice their length.
        spectrum = (jnp.fft.rfft(v, 2 * steps, axis=0) for v in (kernel, xs))
        ys = jnp.fft.irfft(next(spectrum) * next(spectrum), 2 * steps, axis=0)[:steps]
        left = powers.sum_over_modes(C * A_bar * state)
        last = powers.at(steps) * state + B_bar * powers.sum_over_steps(jnp.flip(xs, 0))
        spoiled = spoiled.astype(ys.dtype)
        ys = ys + left + leading(widen(self.D)[0], 2) * xs + spoiled
        return ys, last + spoiled[-1][:, None].astype(last.dtype)

    def _discretise(self) -> tuple[Array, Array]:
        log_A_real, A_imag, log_dt = widen(self.log_A_real, self.A_imag, self.log_dt)
        A = lax.complex(-clamped_exp(log_A_real), A_imag)
        dt = jnp.exp(log_dt)[:, None].astype(A.dtype)
        A_bar, factor = discretise(self.discretisation, A, dt)
        return A_bar, factor * as_complex(self.B_re, self.B_im)

    def transition(self) -> Complex[Array, "d_model modes"]:
        r"""Return $\bar{A}$, `[d_model, d_state // 2]`."""
        return self._discretise()[0]

    def drive(
        self, xs: Float[Array, "*time d_model"]
    ) -> Complex[Array, "*time d_model modes"]:
        r"""Return $\bar{B} x$, `[..., d_model, d_state // 2]`."""
        _, B_bar = self._discretise()
        return leading(B_bar, xs.ndim + 1) * xs[..., None].astype(B_bar.dtype)

    def readout(
        self,
        states: Complex[Array, "*time d_model modes"],
        xs: Float[Array, "*time d_model"],
    ) -> Float[Array, "*time d_model"]:
        r"""Return $2 \, \mathrm{Re}(C h) + D x$, `[..., d_model]`."""
        C_re, C_im, D = (
            leading(v, xs.ndim + v.ndim - 1)
            for v in widen(self.C_re, self.C_im, self.D)
        )
        ys = 2 * jnp.sum(C_re * states.real - C_im * states.imag, axis=-1)
        return ys + D * xs

    def init_state(self) -> Complex[Array, "d_model modes"]:
        """Return zeros `[d_model, d_state // 2]`, at least complex64."""
        return complex_zeros((self.d_model, self.d_state // 2), self.precision())

    def kernel(self, length: int) -> Float[Array, "length d_model"]:
        r"""Return the impulse response
        $K_l = 2 \, \mathrm{Re} \sum_n C_n \bar{A}_n^l \bar{B}_n$.

        From the fresh state and without resets, the layer is the causal convolution
        $y_t = \sum_{l \le t} K_l x_{t-l} + D x_t$.

        **Arguments:** `length`, the number of lags, from 0.

        **Returns:** `[length, d_model]`, at least float32.
        """
        A_bar, B_bar = self._discretise()
        C = as_complex(self.C_re, self.C_im)
        return _Powers.of(A_bar, length).sum_over_modes(C * B_bar)


class _Powers(NamedTuple):
    r"""$\bar{A}^l$ for $l$ = 0, 1, ... as $\bar{A}^{b i} \bar{A}^j$, $j < b$.

    Only twice the root of the length of them are computed. Sums over powers are
    products of matrices, channel by channel.
    """

    A_bar: Complex[Array, "d_model modes"]
    coarse: Complex[Array, "count d_model modes"]
    fine: Complex[Array, "spacing d_model modes"]
    length: int

    @classmethod
    def of(cls, A_bar, length: int) -> "_Powers":
        spacing = max(1, math.isqrt(length))
        fine = _power(A_bar, jnp.arange(spacing))
        count = -(-length // spacing)
        return cls(A_bar, _power(A_bar, spacing * jnp.arange(count)), fine, length)

    def at(self, exponent: int) -> Complex[Array, "d_model modes"]:
        return _power(self.A_bar, jnp.array([exponent]))[0]

    def sum_over_modes(self, weights) -> Float[Array, "length d_model"]:
        r"""Return $2 \, \mathrm{Re} \sum_n w_n \bar{A}_n^l$ for every $l$."""
        left = self.coarse * weights[None]
        ys = einsum("idn,jdn->ijd", left.real, self.fine.real) - einsum(
            "idn,jdn->ijd", left.imag, self.fine.imag
        )
        return 2 * ys.reshape(-1, ys.shape[-1])[: self.length]

    def sum_over_steps(self, xs) -> Complex[Array, "d_model modes"]:
        r"""Return $\sum_l \bar{A}^l x_l$."""
        count, spacing = self.coarse.shape[0], self.fine.shape[0]
        xs = jnp.pad(xs, [(0, count * spacing - self.length), (0, 0)])
        xs = xs.reshape(count, spacing, -1)
        inner = lax.complex(
            einsum("ijd,jdn->idn", xs, self.fine.real),
            einsum("ijd,jdn->idn", xs, self.fine.imag),
        )
        return jnp.sum(self.coarse * inner, 0)


def _power(A_bar, exponents) -> Complex[Array, "count *state"]:
    # In polar form. Where the square of A_bar underflows, its size and angle have no
    # derivative; all its powers except for the first are taken as zero.
    exponents = exponents.astype(A_bar.real.dtype)[:, None, None]
    tiny = jnp.finfo(A_bar.dtype).tiny ** 0.5
    gone = jnp.abs(lax.stop_gradient(A_bar)) < tiny
    A_bar = jnp.where(gone, 1, A_bar)
    first = (exponents == 0).astype(exponents.dtype)
    size = jnp.where(gone[None], first, jnp.abs(A_bar)[None] ** exponents)
    phase = jnp.angle(A_bar)[None] * exponents
    return lax.complex(size * jnp.cos(phase), size * jnp.sin(phase))


# From this length on the convolution is faster than the scan. Milliseconds of value,
# and of value and gradient (64 channels of 32 modes, the CPU of docs/benchmarks.md):
#
# |             | T = 256  | T = 1024 | T = 4096 |
# |-------------|----------|----------|----------|
# | scan        | 1.4, 4.5 | 19, 50   | 65, 183  |
# | convolution | 3.7, 3.6 | 4.5, 7.5 | 14, 17   |
_CONVOLVED_FROM = 256
