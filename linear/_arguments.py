"""How constructors check arguments and draw parameters."""

import math

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, DTypeLike, PRNGKeyArray

from pararnn._parameters import (
    check_dtype,
    check_key,
    check_number,
    check_size,
    wide_dtype,
)


def check_range(where: str, low: str, high: str, values: tuple) -> None:
    """Raise a `ValueError` unless 0 < low <= high < infinity."""
    for name, value in zip((low, high), values, strict=True):
        check_number(where, name, value)
    if not 0 < values[0] <= values[1] < math.inf:
        raise ValueError(
            f"{where}: `{low}` = {values[0]!r} and `{high}` = {values[1]!r} must "
            f"satisfy 0 < {low} <= {high}. Likely causes: (a) the two are swapped, "
            "(b) their logarithms were given."
        )


def check_sizes(where: str, d_model, d_state) -> tuple[int, int]:
    """Return both sizes as integers. `d_state` defaults to `d_model`."""
    d_model = check_size(where, "d_model", d_model)
    if d_state is None:
        return d_model, d_model
    return d_model, check_size(where, "d_state", d_state)


def check_divisor(where: str, name: str, value, of: str, size: int) -> int:
    """Return `value` as an int that divides `size`, which is named `of` in errors."""
    value = check_size(where, name, value)
    if size % value:
        raise ValueError(
            f"{where}: `{of}` = {size} is not divisible by `{name}` = {value}, but it "
            f"is split into equal sizes. Choose a divisor of {size}."
        )
    return value


def head_size(where: str, name: str, value, d_model: int, heads: int) -> int:
    """Return the size of one head. `value` defaults to `d_model // heads`."""
    if value is not None:
        return check_size(where, name, value)
    if d_model % heads:
        raise ValueError(
            f"{where}: `d_model` = {d_model} is not divisible by `heads` = {heads}. "
            f"Choose a divisor of {d_model}, or give `{name}`, the size of one head."
        )
    return d_model // heads


class Draw:
    """Draws parameters of one dtype from one key; their order decides their values.

    The draws are made in at least float32, as a 16-bit draw has only some hundred
    different values.
    """

    def __init__(self, where: str, dtype: DTypeLike | None, key: PRNGKeyArray):
        check_key(where, key)
        self.dtype = check_dtype(where, dtype)
        self._wide, self._key, self._count = wide_dtype(self.dtype), key, 0

    def _next(self) -> PRNGKeyArray:
        self._count += 1
        return jr.fold_in(self._key, self._count)

    @property
    def tiny(self) -> float:
        """The smallest normal number of the dtype that is drawn in."""
        return float(jnp.finfo(self._wide).tiny)

    @property
    def epsilon(self) -> float:
        """The distance from 1 to the next number of the dtype that is drawn in."""
        return float(jnp.finfo(self._wide).eps)

    def wide_uniform(self, shape: tuple[int, ...], low: float, high: float) -> Array:
        """Draw uniformly in at least float32, to transform before casting."""
        return jr.uniform(self._next(), shape, self._wide, low, high)

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> Array:
        return self.wide_uniform(shape, low, high).astype(self.dtype)

    def normal(self, shape: tuple[int, ...], deviation: float = 1.0) -> Array:
        return self.wide_normal(shape, deviation).astype(self.dtype)

    def wide_normal(self, shape: tuple[int, ...], deviation: float = 1.0) -> Array:
        """Draw normally in at least float32, to transform before casting."""
        return jr.normal(self._next(), shape, self._wide) * deviation

    def weight(self, *shape: int) -> Array:
        """Draw `[..., out, in]` uniformly within one over the root of `in`."""
        bound = shape[-1] ** -0.5
        return self.uniform(shape, -bound, bound)

    def log_uniform(self, shape: tuple[int, ...], low: float, high: float) -> Array:
        """Draw the logarithms of values log-uniform between `low` and `high`."""
        return self.uniform(shape, math.log(low), math.log(high))

    def log_of_uniform(self, shape: tuple[int, ...], low: float, high: float) -> Array:
        """Draw the logarithms of values uniform between `low` and `high`."""
        return jnp.log(self.wide_uniform(shape, low, high)).astype(self.dtype)

    def step_bias(
        self, shape: tuple[int, ...], low: float, high: float, floor: float = 1e-4
    ) -> Array:
        r"""Draw biases whose softplus is log-uniform between `low` and `high`, and at
        least `floor`: the initial step sizes $\Delta$ of Mamba."""
        log_dt = self.wide_uniform(shape, math.log(low), math.log(high))
        dt = jnp.maximum(jnp.exp(log_dt), floor)
        # The inverse of softplus, without the rounding of exp(dt) - 1.
        return (dt + jnp.log(-jnp.expm1(-dt))).astype(self.dtype)

    def constant(self, values) -> Array:
        """Cast given values to the dtype of the parameters."""
        return jnp.asarray(values, self.dtype)
