r"""Products of factors that no floating-point number can hold.

A thousand factors of 1.5 multiply to $10^{176}$. As a float32 that is infinite, and
anything multiplied by it becomes infinite or NaN. But the factors leave a state of zero
at zero, and grow a state of $10^{-170}$ to about $10^6$. So the product has an exponent
of its own: $v \cdot 2^e$, where the largest entry of v is about one. It is finite if
the factors are, and NaN if one of them is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ._backends import Schedule, identity

# Beyond any exponent that matters, and far enough from the largest integer.
_BOUND = 2**29


class Scaled(NamedTuple):
    """`values * 2**exponent`.

    There is an exponent for each entry, or for each column of a matrix, `[..., 1, n]`,
    that is, for what each entry of a state is mapped to.
    """

    values: Array
    exponent: Int[Array, "..."]


def multiply_all(schedule: Schedule, a: Array, steps: int, lanes: int) -> Scaled:
    """Return the product of factors `[T or 1, ...]` in scan order, `T = steps`.

    Time is cut into `lanes`, which are multiplied side by side and then joined one
    after the other.
    """
    if a.shape[0] == 1 != steps:
        return _power(schedule, a[0], steps)
    unit = identity(schedule, a[0])
    length = -(-steps // lanes)
    if length * lanes > steps:
        missing = jnp.broadcast_to(unit, (length * lanes - steps, *unit.shape))
        a = jnp.concatenate([a, missing])
    if lanes > 1:
        a = a.reshape(lanes, length, *unit.shape).swapaxes(0, 1)

    def step(product, a_t):
        values = schedule.product(a_t, product.values)
        return _normalise(schedule, values, product.exponent), None

    def join(product, lane):
        return _compose(schedule, lane, product), None

    start = _scaled(schedule, identity(schedule, a[0]))
    product, _ = lax.scan(step, start, a, reverse=schedule.reverse)
    if lanes > 1:
        start = _scaled(schedule, unit)
        product, _ = lax.scan(join, start, product, reverse=schedule.reverse)
    return product


def apply(schedule: Schedule, product: Scaled, state: Array) -> Array:
    """Apply the product to a state."""
    return _times_power(*_compose(schedule, product, _scaled(schedule, state)))


def _power(schedule: Schedule, factor: Array, count: int) -> Scaled:
    """Return the power of a factor, by squaring, bit by bit."""

    def step(carry, bit):
        power, factor = carry
        further = _compose(schedule, factor, power)
        power = jax.tree.map(lambda a, b: jnp.where(bit, a, b), further, power)
        return (power, _compose(schedule, factor, factor)), None

    start = _scaled(schedule, identity(schedule, factor)), _scaled(schedule, factor)
    bits = [bool(count >> i & 1) for i in range(count.bit_length())]
    return lax.scan(step, start, jnp.asarray(bits))[0][0]


def _compose(schedule: Schedule, later: Scaled, earlier: Scaled) -> Scaled:
    """Return the product that applies `earlier`, then `later`."""
    (a, p), (b, q) = later, earlier
    if schedule.kind == "elementwise":
        return _normalise(schedule, schedule.product(a, b), p + q)
    # The exponent of a column of `later` belongs to a row of `earlier`. From each
    # column of that, the largest entry is factored out.
    p = jnp.swapaxes(p, -1, -2)
    reached = jnp.where(b == 0, -_BOUND, p + _exponent(b))
    largest = jnp.max(reached, axis=-2, keepdims=True)
    b = _times_power(b, p - largest)
    return _normalise(schedule, schedule.product(a, b), q + largest)


def _scaled(schedule: Schedule, v: Array) -> Scaled:
    shape = v.shape
    if schedule.kind == "matrix":
        shape = (*shape[:-2], 1, shape[-1])
    return _normalise(schedule, v, jnp.zeros(shape, jnp.int32))


def _normalise(schedule: Schedule, v: Array, exponent: Int[Array, "..."]) -> Scaled:
    size = _exponent(v)
    if schedule.kind == "matrix":
        size = jnp.max(size, axis=-2, keepdims=True)
    # For entries that are zero or not finite, any exponent will do.
    info = jnp.finfo(v.dtype)
    shift = jnp.clip(-size, info.minexp, info.maxexp - 1)
    exponent = jnp.clip(exponent - shift, -_BOUND, _BOUND)
    return Scaled(_shift(v, shift), exponent)


def _exponent(v: Array) -> Int[Array, "..."]:
    """Return the e of $v = m 2^e$ with $1 \\le |m| < 2$, from the bits.

    (`jnp.frexp` takes ten more operations, for zeros, denormals, infinities and NaN.)
    """
    if jnp.iscomplexobj(v):
        v = jnp.maximum(jnp.abs(v.real), jnp.abs(v.imag))
    info = jnp.finfo(v.dtype)
    bits = lax.bitcast_convert_type(jnp.abs(v), _integers(info.dtype))
    return (bits >> info.nmant).astype(jnp.int32) - (1 - info.minexp)


def _times_power(v: Array, exponent: Int[Array, "..."]) -> Array:
    """Return `v * 2**exponent`, exact unless that is too large or too small."""
    # In three factors, each a power of two that is a normal number.
    info = jnp.finfo(v.dtype)
    exponent = jnp.clip(exponent, 3 * info.minexp, -3 * info.minexp)
    for parts in (3, 2, 1):
        part = exponent // parts
        v, exponent = _shift(v, part), exponent - part
    return v


def _shift(v: Array, exponent: Int[Array, "..."]) -> Array:
    """Return `v * 2**exponent`, for the exponent of a normal number."""
    if jnp.iscomplexobj(v):
        return lax.complex(_shift(v.real, exponent), _shift(v.imag, exponent))
    info, integer = jnp.finfo(v.dtype), _integers(v.dtype)
    bits = exponent.astype(integer) + (1 - info.minexp)
    return v * lax.bitcast_convert_type(bits << info.nmant, v.dtype)


def _integers(dtype):
    return jnp.int32 if jnp.finfo(dtype).bits == 32 else jnp.int64
