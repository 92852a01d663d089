import abc
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Complex, DTypeLike, Float, PRNGKeyArray

from pararnn.scan import Diagonal, linear_scan


class AbstractDiagonalLayer(eqx.Module):
    r"""A layer with a diagonal complex transition that is constant in time.

    $$h_t = \bar{A} \odot h_{t-1} + \mathrm{drive}(x_t), \qquad
    y_t = \mathrm{readout}(h_t, x_t)$$

    A subclass says what the transition, the drive and the readout are, and the fresh
    state; the protocol of a layer, parallel and step by step, is made of these here.

    **Attributes:** `d_model`, the size of an input and of an output; `d_state`, the
    size of the state as the layer's paper counts it.
    """

    d_model: eqx.AbstractVar[int]
    d_state: eqx.AbstractVar[int]

    @abc.abstractmethod
    def transition(self) -> Complex[Array, " *state"]:
        r"""$\bar{A}$, one factor for each entry of the state, at least complex64."""

    @abc.abstractmethod
    def drive(
        self, xs: Float[Array, "*time d_model"]
    ) -> Complex[Array, "*time_and_state"]:
        """What inputs add to the state; leading axes are free."""

    @abc.abstractmethod
    def readout(
        self,
        states: Complex[Array, "*time_and_state"],
        xs: Float[Array, "*time d_model"],
    ) -> Float[Array, "*time d_model"]:
        """Outputs of states and inputs; leading axes are free."""

    @abc.abstractmethod
    def init_state(self) -> Complex[Array, " *state"]:
        """The fresh state: zeros, complex, in the parameters' precision and at least
        complex64."""

    def __call__(
        self,
        xs: Float[Array, "T d_model"],
        state: Complex[Array, " *state"] | None = None,
        *,
        reset: Bool[Array, " T"] | None = None,
    ) -> tuple[Float[Array, "T d_model"], Complex[Array, " *state"]]:
        """A whole sequence, unbatched; use `jax.vmap` for a batch.

        **Arguments:**

        - `xs`: `[T, d_model]`, real floating point. `T` may be 0.
        - `state`: the state to continue from, of the shape of `init_state()`; the fresh
            one if not given.
        - `reset`: bool `[T]`. Where true, that step starts from the fresh state,
            whatever came before, `state` included.

        **Returns:** outputs `[T, d_model]` in the dtype of `xs`, and the state after
        the last step (of `T = 0` steps: `state`), in the dtype of `init_state()`.
        Computed in the parameters' precision, at least float32.

        **Raises:** `ValueError` on a shape that does not fit or an `xs` that is not
        real floating point; `TypeError` on a `reset` that is not bool.
        """
        xs = _check_features(self, "xs", xs, 2)
        state = self._continue(state)
        wide = xs.astype(jnp.finfo(state.dtype).dtype)
        states = linear_scan(
            Diagonal(self.transition()[None]), self.drive(wide), state, reset=reset
        )
        ys = self.readout(states, wide).astype(xs.dtype)
        return ys, states[-1] if xs.shape[0] else state

    def step(
        self, x: Float[Array, " d_model"], state: Complex[Array, " *state"]
    ) -> tuple[Float[Array, " d_model"], Complex[Array, " *state"]]:
        """One step, for decoding: the numbers of `__call__`, up to rounding.

        **Arguments:** `x`, `[d_model]`, real floating point; `state`, of the shape of
        `init_state()`.

        **Returns:** the output `[d_model]` in the dtype of `x`, and the next state, in
        the dtype of `init_state()`.

        **Raises:** `ValueError` on a shape that does not fit or an `x` that is not real
        floating point.
        """
        x = _check_features(self, "x", x, 1)
        state = self._continue(state)
        wide = x.astype(jnp.finfo(state.dtype).dtype)
        state = self.transition() * state + self.drive(wide)
        return self.readout(state, wide).astype(x.dtype), state

    def _continue(self, state) -> Array:
        fresh = self.init_state()
        if state is None:
            return fresh
        if jnp.shape(state) != fresh.shape:
            raise ValueError(
                f"{type(self).__name__}: `state` has shape {jnp.shape(state)}, "
                f"expected {fresh.shape}, as of `init_state()`. Likely causes: (a) a "
                "batch of states; pass it through the same `jax.vmap` as the inputs, "
                "(b) the state of another layer."
            )
        return jnp.asarray(state).astype(fresh.dtype)


def _check_features(layer: AbstractDiagonalLayer, name: str, x, rank: int) -> Array:
    where, x = type(layer).__name__, jnp.asarray(x)
    if x.ndim != rank or x.shape[-1] != layer.d_model:
        wanted = "[T, {}]" if rank == 2 else "[{}]"
        raise ValueError(
            f"{where}: `{name}` has shape {x.shape}, expected "
            f"{wanted.format(layer.d_model)}, as `d_model` is {layer.d_model}. Likely "
            "causes: (a) a batch axis; use `jax.vmap` for it, (b) the axes are in "
            "another order (time first, features last), (c) one step given to "
            "`layer(xs)`, or a sequence to `layer.step(x, state)`, (d) the layer was "
            "built for another `d_model`."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{where}: `{name}` is {x.dtype}, expected real floating point. Likely "
            "causes: (a) token indices; embed them first, (b) integer or boolean "
            "features; cast them, for instance with `.astype(jnp.float32)`."
        )
    return x


def check_arguments(
    where: str, d_model, d_state, dtype: DTypeLike | None, key
) -> tuple[int, int, np.dtype]:
    """What the constructor of every layer checks: sizes, dtype and key."""
    for name, size in (("d_model", d_model), ("d_state", d_state)):
        integer = isinstance(size, int | np.integer) and not isinstance(size, bool)
        if not integer or size < 1:
            raise ValueError(
                f"{where}: `{name}` must be a positive integer, got {size!r}. Likely "
                "causes: (a) a size computed with `/` instead of `//`, (b) arguments "
                f"in another order. Pass a positive int for `{name}`."
            )
    if not isinstance(key, jax.Array | np.ndarray):
        raise ValueError(
            f"{where}: `key` must be a key of `jax.random`, got {key!r}. Likely "
            "causes: (a) it was left out, (b) a bare integer seed. Pass "
            "`key=jax.random.key(0)`."
        )
    dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{where}: `dtype` must be real floating point, got {dtype}; complex "
            "parameters are stored as two real arrays. Pass for instance "
            "`jnp.float32`, or leave it out."
        )
    return int(d_model), int(d_state), dtype


def wide(dtype: DTypeLike) -> np.dtype:
    """The precision to compute in beside parameters of `dtype`: at least float32,
    also where promotion is strict."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.float32)


def widen(*parameters: Array) -> tuple[Array, ...]:
    """Parameters in the precision to compute in."""
    return tuple(p.astype(wide(p.dtype)) for p in parameters)


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> Complex[Array, "..."]:
    """A fresh complex state beside parameters of `dtype`."""
    return lax.complex(jnp.zeros(shape, wide(dtype)), jnp.zeros(shape, wide(dtype)))


def append_to(values: Array, rank: int) -> Array:
    """`values` with leading axes up to `rank`, as rank promotion may be an error."""
    return values.reshape((1,) * (rank - values.ndim) + values.shape)


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
