"""What all cells and layers do with parameters: check, draw, cast and multiply."""

import math
import numbers
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from ._checks import is_count
from .scan import promote


def check_size(where: str, name: str, value, least: int = 1) -> int:
    """Return `value` as an int; `ValueError` unless it is an integer >= `least`."""
    if not is_count(value, least):
        wanted = "a positive integer" if least == 1 else f"an integer, at least {least}"
        raise ValueError(
            f"{where}: `{name}` must be {wanted}, got {value!r}. Likely "
            "causes: (a) a size computed with `/` instead of `//`, (b) arguments in "
            f"another order. Pass {wanted} for `{name}`."
        )
    return int(value)


def is_number(value) -> bool:
    """Return whether `value` is a real number of Python or NumPy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_number(where: str, name: str, value) -> float:
    """Return `value` as a float; `ValueError` if it is not a real number."""
    if not is_number(value):
        raise ValueError(
            f"{where}: `{name}` must be a real number, got {value!r}. Likely causes: "
            "(a) text, as read from a file or a command line, (b) an array; pass "
            f"`float(...)` of it, (c) the value of another argument. Pass a float for "
            f"`{name}`."
        )
    return float(value)


def check_flag(where: str, name: str, value) -> bool:
    """Return `value` as a bool; `ValueError` if it is not a bool."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(
            f"{where}: `{name}` must be True or False, got {value!r}. Likely causes: "
            "(a) text, as read from a file or a command line, which always counts as "
            f"true, (b) the value of another argument. Pass a bool for `{name}`."
        )
    return bool(value)


def check_sizes(where: str, d_input, d_state) -> tuple[int, int]:
    """Return both sizes; `d_state` defaults to `d_input`."""
    d_input = check_size(where, "d_input", d_input)
    if d_state is None:
        return d_input, d_input
    return d_input, check_size(where, "d_state", d_state)


def check_heads(where: str, heads, matrices: str = "the", **sizes: int) -> int:
    """Return `heads`, a number of blocks of matrices that has to divide all sizes."""
    heads = check_size(where, "heads", heads)
    for name, size in sizes.items():
        if size % heads:
            divisor = math.gcd(*sizes.values())
            raise ValueError(
                f"{where}: `{name}` = {size} is not divisible by `heads` = {heads}, so "
                f"{matrices} matrices cannot be block-diagonal with equal blocks. "
                f"Choose a divisor of {divisor} for `heads`; 1 is a dense matrix."
            )
    return heads


def check_choice(where: str, name: str, value, choices: Iterable[str]) -> None:
    """Raise a `ValueError` that lists the choices if `value` is not one of them."""
    choices = tuple(choices)
    # An array is compared entry by entry.
    if not isinstance(value, str) or value not in choices:
        raise ValueError(
            f"{where}: unknown `{name}` {value!r}; there are {', '.join(choices)}."
        )


def check_positive(where: str, name: str, value) -> float:
    """Return `value` as a float; `ValueError` unless it is positive and finite."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ValueError(
            f"{where}: `{name}` must be a positive finite number, got {value!r}. "
            "Likely causes: (a) its logarithm was given, (b) an array or a traced "
            f"value: `{name}` is a constant of the cell. Pass a float for `{name}`."
        )
    return float(value)


def check_key(where: str, key) -> None:
    """Raise a `ValueError` if `key` is not a single key of `jax.random`, new or old."""
    one = False
    if isinstance(key, jax.Array | np.ndarray):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        one = key.ndim == 0 if typed else key.ndim == 1 and key.dtype == np.uint32
    if not one:
        raise ValueError(
            f"{where}: `key` must be a key of `jax.random`, got {key!r}. Likely "
            "causes: (a) it was left out, (b) a bare integer seed, (c) several keys, "
            "as from `jax.random.split`; use `jax.vmap` over them. Pass "
            "`key=jax.random.key(0)`."
        )


def check_dtype(where: str, dtype: DTypeLike | None) -> np.dtype:
    """Return the dtype of the parameters; defaults to JAX's default floating point."""
    try:
        found = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise ValueError(
            f"{where}: `dtype` must be real floating point, got "
            f"{dtype if found is None else found}. Pass for instance `jnp.float32`, or "
            "leave it out."
        )
    if jnp.finfo(found).bits < 16:
        raise ValueError(
            f"{where}: `dtype` must have at least 16 bits, got {found}, in which JAX "
            "does not calculate. Pass for instance `jnp.bfloat16`."
        )
    return found


def check_input(where: str, x, d_input: int) -> Array:
    """Return `x` as an array; `ValueError` if it is not floating `[..., d_input]`."""
    x = jnp.asarray(x)
    if x.ndim < 1 or x.shape[-1] != d_input:
        raise ValueError(
            f"{where}: `x` has shape {x.shape}, expected [..., {d_input}] as `d_input` "
            f"is {d_input}. Likely causes: (a) the axes are in another order (features "
            "come last), (b) state and input are swapped: a cell is called as "
            "`cell(state, x)`, (c) the cell was built for another `d_input`."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{where}: `x` is {x.dtype}, expected real floating point. Likely causes: "
            "(a) token indices; embed them first, (b) integer or boolean features; "
            "cast them, for instance with `x.astype(jnp.float32)`."
        )
    return x


def wide_dtype(*dtypes: DTypeLike) -> np.dtype:
    """Return the promoted dtype, at least float32, even if promotion is strict."""
    return promote(jnp.float32, *dtypes)


def uniform(
    key: PRNGKeyArray,
    count: int,
    shape: tuple[int, ...],
    bound: float,
    dtype: DTypeLike,
) -> tuple[Array, ...]:
    """Draw `count` arrays of `shape`, uniform in [-bound, bound)."""
    # A draw in 16 bits has only some hundred different values.
    values = jr.uniform(key, (count, *shape), wide_dtype(dtype), -bound, bound)
    return tuple(jnp.unstack(values.astype(dtype)))


def recurrent(
    key: PRNGKeyArray, count: int, d_state: int, heads: int, dtype: DTypeLike
) -> tuple[Array, ...]:
    """Draw `count` matrices `[d_state, d_state]`, uniform within 1 / sqrt(size).

    With several heads, draw their blocks `[heads, size, size]`.
    """
    size = d_state // heads
    shape = (size, size) if heads == 1 else (heads, size, size)
    return uniform(key, count, shape, 1 / math.sqrt(size), dtype)


def zeros(d_state: int, dtype: DTypeLike) -> Float[Array, " d_state"]:
    """Return a fresh state for parameters of `dtype`."""
    return jnp.zeros(d_state, wide_dtype(dtype))


def widen(*arrays: Array) -> tuple[Array, ...]:
    """Return all arrays in their promoted dtype, at least float32."""
    dtype = wide_dtype(*(array.dtype for array in arrays))
    return tuple(jnp.asarray(array).astype(dtype) for array in arrays)


def linear(weight: Array, x: Array) -> Array:
    """Return `W x` over the last axis of `x`, accumulated in at least float32.

    **Arguments:** `weight`, `[out, in]`, or `[heads, out // heads, in // heads]` for
    the diagonal blocks of a matrix `[out, in]`; `x`, `[..., in]`.

    **Returns:** `[..., out]`.
    """
    wide = wide_dtype(weight.dtype, x.dtype)
    if weight.dtype != x.dtype:
        weight, x = weight.astype(wide), x.astype(wide)
    options = {
        # TF32, the default on Ampere and later GPUs, spoils Newton's convergence.
        "precision": lax.Precision.HIGHEST,
        # Two 16-bit arrays are multiplied without a cast, and summed in 32 bits.
        "preferred_element_type": wide,
    }
    if weight.ndim == 3 and len(weight) == 1:
        # One block is a matrix: its product needs no transposition (half the time).
        weight = weight[0]
    if weight.ndim == 2:
        return jnp.einsum("...i,oi->...o", x, weight, **options)
    heads, out, size = weight.shape
    split = x.reshape(*x.shape[:-1], heads, size)
    product = jnp.einsum("...hi,hoi->...ho", split, weight, **options)
    return product.reshape(*x.shape[:-1], heads * out)


def affine(weight: Array, x: Array, *biases: Array) -> Array:
    """Return `W x` plus biases `[out]`, in at least float32; shapes as in `linear`."""
    product, *wide = widen(linear(weight, x), *biases)
    for bias in wide:
        product = product + leading(bias, product.ndim)
    return product


def leading(values: Array, rank: int) -> Array:
    """Add leading axes to `values` up to `rank`, as rank promotion may be an error."""
    return values.reshape((1,) * (rank - values.ndim) + values.shape)


def rms_norm(
    x: Float[Array, "... n"], weight: Float[Array, "*heads n"], epsilon: float = 1e-5
) -> Float[Array, "... n"]:
    r"""$x / \sqrt{\mathrm{mean}(x^2) + \epsilon} \odot w$."""
    x, weight = widen(x, weight)
    scale = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon)
    return x * scale * leading(weight, x.ndim)
