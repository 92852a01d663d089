r"""Products of factors that no floating-point number can hold.

A thousand factors of 1.5 multiply to $10^{176}$. As a float32 that is infinite, and
infinite or NaN would be whatever it is multiplied with, also a state of zero, which
all these factors leave at zero, and a state of $10^{-170}$, which they lead to one. So
the product has an exponent of its own: $v \cdot 2^e$ with a largest entry of v between
1/2 and 1. It is finite if the factors are, and NaN if one of them is.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from ._backends import Schedule, identity

# Beyond any exponent that matters, and far enough from the largest integer.
_BOUND = 2**29


class Scaled(NamedTuple):
    """`values * 2**exponent`. Exponents `[...]` as the values have entries, or one for
    each column, `[..., 1, n]`, of a matrix: what becomes of each entry of a state."""

    values: Array
    exponent: Int[Array, "..."]


def multiply_all(schedule: Schedule, a: Array, steps: int) -> Scaled:
    """The product of factors `[T or 1, ...]` in the order of the scan, `T = steps`."""
    scaled = _normalise(schedule, a, _exponents_like(schedule, a))
    if a.shape[0] == 1 != steps:
        return _power(schedule, scaled, steps)
    while (count := scaled.values.shape[0]) > 1:
        even = count - count % 2
        first, second = (Scaled(*(v[i:even:2] for v in scaled)) for i in (0, 1))
        earlier, later = (second, first) if schedule.reverse else (first, second)
        rest = (v[even:] for v in scaled)
        pairs = _compose(schedule, later, earlier)
        scaled = Scaled(*map(lambda p, r: jnp.concatenate([p, r]), pairs, rest))
    return Scaled(*(v[0] for v in scaled))


def apply(schedule: Schedule, product: Scaled, state: Array) -> Array:
    """What the product makes of a state."""
    exponent = jnp.zeros_like(_exponents_like(schedule, state))
    return _times_power(*_compose(schedule, product, Scaled(state, exponent)))


def _power(schedule: Schedule, factor: Scaled, count: int) -> Scaled:
    """By squaring."""
    factor = Scaled(*(v[0] for v in factor))
    unit = identity(schedule, factor.values)
    power = Scaled(unit, jnp.zeros_like(factor.exponent))
    while count:
        if count % 2:
            power = _compose(schedule, factor, power)
        factor, count = _compose(schedule, factor, factor), count // 2
    return power


def _compose(schedule: Schedule, later: Scaled, earlier: Scaled) -> Scaled:
    """First the earlier, then the later."""
    (a, p), (b, q) = later, earlier
    if schedule.kind == "elementwise":
        return _normalise(schedule, schedule.product(a, b), p + q)
    # The exponent of a column of the later belongs to a row of the earlier. Of each
    # column of that, the largest entry is taken out.
    p = jnp.swapaxes(p, -1, -2)
    reached = jnp.where(b == 0, -_BOUND, p + _exponent(b))
    largest = jnp.max(reached, axis=-2, keepdims=True)
    b = _times_power(b, p - largest)
    return _normalise(schedule, schedule.product(a, b), q + largest)


def _exponents_like(schedule: Schedule, v: Array) -> Int[Array, "..."]:
    shape = v.shape
    if schedule.kind == "matrix":
        shape = (*shape[:-2], 1, shape[-1])
    return jnp.zeros(shape, jnp.int32)


def _normalise(schedule: Schedule, v: Array, exponent) -> Scaled:
    shift = _exponent(v)
    if schedule.kind == "matrix":
        shift = jnp.where(v == 0, -_BOUND, shift)
        shift = jnp.max(shift, axis=-2, keepdims=True)
    return Scaled(
        _times_power(v, -shift), jnp.clip(exponent + shift, -_BOUND, _BOUND)
    )


def _exponent(v: Array) -> Int[Array, "..."]:
    """The e of $v = m 2^e$ with a size of m from 1/2 to 1.

    From the bits, as `jnp.frexp` has: it takes ten operations more for what is zero,
    denormal or not finite, where any number does.
    """
    if jnp.iscomplexobj(v):
        v = jnp.maximum(jnp.abs(v.real), jnp.abs(v.imag))
    info, integer = jnp.finfo(v.dtype), _integers(v.dtype)
    bits = lax.bitcast_convert_type(jnp.abs(v), integer)
    return (bits >> info.nmant).astype(jnp.int32) + info.minexp


def _times_power(v: Array, exponent: Int[Array, "..."]) -> Array:
    """`v * 2**exponent`, exact unless that is too large or too small."""
    if jnp.iscomplexobj(v):
        return lax.complex(
            _times_power(v.real, exponent), _times_power(v.imag, exponent)
        )
    # In three parts, each a power of two that is a normal number.
    limit = -int(jnp.finfo(v.dtype).minexp)
    exponent = jnp.clip(exponent, -3 * limit, 3 * limit)
    for parts in (3, 2, 1):
        part = exponent // parts
        v, exponent = v * _power_of_two(part, v.dtype), exponent - part
    return v


def _power_of_two(exponent: Int[Array, "..."], dtype) -> Array:
    """Exactly, of what is the exponent of a normal number."""
    info, integer = jnp.finfo(dtype), _integers(dtype)
    bits = (exponent.astype(integer) + (1 - info.minexp)) << info.nmant
    return lax.bitcast_convert_type(bits, dtype)


def _integers(dtype):
    return jnp.int32 if jnp.finfo(dtype).bits == 32 else jnp.int64
