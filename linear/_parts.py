"""What several layers are made of: gates, norms, heads and short convolutions."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Complex, DTypeLike, Float

from pararnn._parameters import (
    check_flag,
    leading,
    linear,
    rms_norm,
    wide_dtype,
    widen,
)
from pararnn.scan import delays, running_max, shift

from ._arguments import Draw

WIDTH = 4


def complex_zeros(shape: tuple[int, ...], dtype: DTypeLike) -> Complex[Array, "..."]:
    """Return a fresh complex state for parameters of `dtype`."""
    zeros = jnp.zeros(shape, wide_dtype(dtype))
    return lax.complex(zeros, zeros)


def as_complex(re: Array, im: Array) -> Complex[Array, "..."]:
    """Combine the real and the imaginary part, in at least complex64."""
    return lax.complex(*widen(re, im))


def real_product(C_re: Array, C_im: Array, states: Complex[Array, "... n"]) -> Array:
    r"""Return $\mathrm{Re}(C h)$ over the last axis, without complex products."""
    return linear(C_re, states.real) - linear(C_im, states.imag)


def decay_and_complement(
    log_a: Float[Array, "*shape"],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    r"""Return $a$ and $1 - a^2$, to a few roundings also where $a$ is nearly 1.

    $$\tanh(-\log a) = \frac{1 - a^2}{1 + a^2}$$
    """
    a = jnp.exp(log_a)
    return a, jnp.tanh(-log_a) * (1 + a * a)


def normalised_gates(
    u: Float[Array, "*shape"], w: Float[Array, "*shape"]
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    r"""Return $f / (f + i)$ and $i / (f + i)$ for $f = \sigma(u)$, $i = \sigma(w)$.

    $$\frac{f}{f + i} = \frac{1 + e^{-w}}{2 + e^{-u} + e^{-w}}$$

    Numerator and denominator are divided by the largest of $1, e^{-u}, e^{-w}$, so that
    the quotient holds even where both gates underflow.
    """
    # A gate that is shut for good has a logit of -inf.
    u, w = (jnp.maximum(v, jnp.finfo(v.dtype).min / 2) for v in (u, w))
    # The quotient does not depend on this divisor, so neither does its derivative.
    largest = jax.lax.stop_gradient(jnp.maximum(0, -jnp.minimum(u, w)))
    one, at_u, at_w = jnp.exp(-largest), jnp.exp(-u - largest), jnp.exp(-w - largest)
    total = 2 * one + at_u + at_w
    return (one + at_w) / total, (one + at_u) / total


def clamped_exp(log: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return `exp(log)`, or the largest finite number where that overflows.

    A decay at an infinite rate is zero, and its derivative would be zero times
    infinity.
    """
    return jnp.exp(jnp.minimum(log, jnp.log(jnp.finfo(log.dtype).max) * (1 - 2**-20)))


def signed(decay: Array, eigenvalues: str) -> Array:
    """Map a factor in [0, 1] to [-1, 1] if `eigenvalues` is `"signed"`."""
    return 2 * decay - 1 if eigenvalues == "signed" else decay


def l2_norm(x: Float[Array, "... n"], epsilon: float = 1e-6) -> Float[Array, "... n"]:
    r"""$x / \sqrt{\sum x^2 + \epsilon}$ over the last axis."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + epsilon)


def group_norm(x: Float[Array, "... n"], epsilon: float) -> Float[Array, "... n"]:
    r"""$(x - \mathrm{mean}) / \sqrt{\mathrm{var} + \epsilon}$, without parameters."""
    centred = x - jnp.mean(x, -1, keepdims=True)
    variance = jnp.mean(centred * centred, -1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon)


def split_heads(x: Float[Array, "T features"], heads: int) -> Float[Array, "T heads n"]:
    """Split features into `heads`, each made of neighbouring features."""
    return x.reshape(x.shape[0], heads, -1)


def merge_heads(x: Float[Array, "T heads n"]) -> Float[Array, "T features"]:
    """Undo `split_heads`."""
    return x.reshape(x.shape[0], -1)


def log_decay(
    A_log: Float[Array, " heads"],
    dt_bias: Float[Array, " heads"],
    dt: Float[Array, "T heads"],
) -> tuple[Float[Array, "T heads"], Float[Array, "T heads"]]:
    r"""Return $-\exp(A^{\log}) \, \Delta$ and $\Delta = \mathrm{softplus}(dt + b)$."""
    A_log, dt_bias, dt = widen(A_log, dt_bias, dt)
    steps = jax.nn.softplus(dt + leading(dt_bias, 2))
    return -clamped_exp(leading(A_log, 2)) * steps, steps


def read_out(
    outputs: Float[Array, "T heads V"],
    norm_weight: Float[Array, " V"],
    W_out: Float[Array, "d_model features"],
    gate: Float[Array, "T features"] | None = None,
) -> Float[Array, "T d_model"]:
    """Normalise each head, apply SiLU of the gate if there is one, and project."""
    ys = merge_heads(rms_norm(outputs, norm_weight))
    return linear(W_out, ys if gate is None else ys * jax.nn.silu(gate))


def short_convolution(
    xs: Float[Array, "T channels"],
    window: Float[Array, "3 channels"] | None,
    weight: Float[Array, "channels 4"] | None,
    bias: Float[Array, " channels"] | None = None,
    *,
    reset: Bool[Array, " T"] | None,
) -> tuple[Float[Array, "T channels"], Float[Array, "3 channels"] | None]:
    r"""$c_t = b + \sum_{j=0}^{3} w_{3-j} \odot x_{t-j}$, channel by channel.

    `window` holds the last inputs before the sequence, oldest first. The new window is
    returned with the outputs. Inputs from before a reset are left out by selection, not
    multiplied by zero. Without weights or a window, the inputs are returned as they
    are.
    """
    if weight is None or window is None:
        return xs, window
    xs, window, weight = widen(xs, window, weight)
    steps, earlier = xs.shape[0], delays(window, xs)
    index = jnp.arange(steps, dtype=jnp.int32)
    newest = None
    if reset is not None:
        newest = running_max(jnp.where(reset, index, -WIDTH))

    def lagged(lag):
        """Return the inputs `lag` steps ago, with zeros where a reset lies between."""
        if newest is None or lag == 0:
            return earlier[lag]
        return jnp.where((index - lag >= newest)[:, None], earlier[lag], 0)

    ys = jnp.zeros_like(xs)
    for lag in range(WIDTH):
        ys = ys + lagged(lag) * leading(weight[:, WIDTH - 1 - lag], 2)
    if bias is not None:
        ys = ys + leading(bias.astype(ys.dtype), 2)
    window = jnp.concatenate([window, xs[1 - WIDTH :]])[1 - WIDTH :]
    if newest is not None:
        age = jnp.arange(WIDTH - 2, -1, -1, dtype=jnp.int32)
        window = jnp.where((steps - 1 - age >= newest[-1])[:, None], window, 0)
    return ys, window


def draw_convolution(
    where: str, draw: Draw, channels: int, wanted: bool
) -> tuple[Float[Array, "channels 4"] | None, Float[Array, " channels"] | None]:
    """Draw weights and biases as PyTorch does; both are `None` if not `wanted`.

    **Raises:** `ValueError` if `wanted`, the argument `convolution`, is not a bool.
    """
    if not check_flag(where, "convolution", wanted):
        return None, None
    bound = WIDTH**-0.5
    return draw.weight(channels, WIDTH), draw.uniform((channels,), -bound, bound)


def empty_window(
    weight: Float[Array, "channels 4"] | None, dtype: DTypeLike
) -> Float[Array, "3 channels"] | None:
    """Return the window of a fresh state: zeros, or `None` without a convolution."""
    return None if weight is None else jnp.zeros((WIDTH - 1, len(weight)), dtype)


def previous_inputs(
    xs: Float[Array, "T n"], previous: Float[Array, " n"], reset
) -> Float[Array, "T n"]:
    """Return the input before each step: `previous` at the first, zeros at resets."""
    earlier = shift(previous, xs)
    return earlier if reset is None else jnp.where(reset[:, None], 0, earlier)
