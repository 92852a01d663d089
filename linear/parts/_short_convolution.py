"""The causal convolution over a few steps in front of a recurrence."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float

from pararnn._parameters import check_flag, leading, widen
from pararnn.scan import delays, running_max, shift

from ._arguments import Draw

WIDTH = 4


def short_convolution(
    xs: Float[Array, "T channels"],
    window: Float[Array, "3 channels"] | None,
    weight: Float[Array, "channels 4"] | None,
    bias: Float[Array, " channels"] | None = None,
    *,
    reset: Bool[Array, " T"] | None,
) -> tuple[Float[Array, "T channels"], Float[Array, "3 channels"] | None]:
    r"""$c_t = b + \sum_{j=0}^{3} w_{3-j} \odot x_{t-j}$, channel by channel.

    `window` holds the last inputs before the sequence, oldest first; the new window is
    returned. Inputs from before a reset are left out, by selection. A layer without a
    convolution has neither weights nor a window; then the inputs are returned.
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
        """The inputs `lag` steps ago, zeros where a reset lies between."""
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
    """Weights and biases as PyTorch draws them, or `None` for both.

    **Raises:** `ValueError` unless `wanted`, the argument `convolution`, is a bool.
    """
    if not check_flag(where, "convolution", wanted):
        return None, None
    bound = WIDTH**-0.5
    return draw.weight(channels, WIDTH), draw.uniform((channels,), -bound, bound)


def empty_window(
    weight: Float[Array, "channels 4"] | None, dtype: DTypeLike
) -> Float[Array, "3 channels"] | None:
    """What a fresh state holds for a convolution of these weights: zeros, if any."""
    return None if weight is None else jnp.zeros((WIDTH - 1, len(weight)), dtype)


def shifted(
    xs: Float[Array, "T n"], previous: Float[Array, " n"], reset
) -> Float[Array, "T n"]:
    """The step before: `previous` first, zeros at resets."""
    earlier = shift(previous, xs)
    return earlier if reset is None else jnp.where(reset[:, None], 0, earlier)
