"""Checks of arguments that every part of the library shares.

They are about whole numbers, tolerances, floating point, resets, and symbolic sizes:
those that `jax.export` knows only when a program runs. JAX can compute with them, but
not compare them. Where the number of steps is symbolic, every choice by size takes a
loop over the whole sequence, which is right for every length.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim
from jaxtyping import Array


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a whole number, not below `least`; a bool is not one."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and bool(value >= least)


def check_count(
    where: str, name: str, value: Any, *, least: int = 0, hint: str = ""
) -> None:
    """Refuse what is not a whole number, or below `least`.

    **Raises:** `ValueError`.
    """
    if not is_count(value, least):
        raise ValueError(
            f"{where}: `{name}` is {value!r:.80}; expected a whole number >= "
            f"{least}{hint}."
        )


def check_whole_count(where: str, name: str, value: Any, *, least: int = 0) -> None:
    """`check_count`, where another kind of value is an error of its own.

    **Raises:** `TypeError` for what is not a whole number, `ValueError` below `least`.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(
            f"{where}: `{name}` is {value!r:.80}; expected a whole number >= {least}."
        )
    check_count(where, name, value, least=least)


def check_tolerances(where: str, rtol: float | None, atol: float | None) -> None:
    """Refuse tolerances that are negative or NaN.

    **Raises:** `ValueError`.
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not value >= 0:
            raise ValueError(f"{where}: `{name}` is {value!r}; expected >= 0.")


def is_symbolic(*sizes) -> bool:
    """Whether any of the sizes is unknown while tracing."""
    return any(is_symbolic_dim(size) for size in sizes)


def refuse_symbolic(where: str, what: str, remedy: str, *sizes) -> None:
    """Refuse what has to know the sizes.

    **Raises:** `ValueError`.
    """
    if is_symbolic(*sizes):
        raise ValueError(
            f"{where}: {what} needs to know the number of steps, which is symbolic "
            f"here, {', '.join(map(str, filter(is_symbolic_dim, sizes)))}. Likely "
            "cause: an export by `jax.export` with `symbolic_shape` for the time axis. "
            f"{remedy}, or export for a fixed number of steps."
        )


def check_bits(where: str, name: str, value) -> None:
    """Refuse floating point of fewer than 16 bits, which JAX stores but cannot add.

    **Raises:** `TypeError`, naming the dtype.
    """
    dtype = value.dtype if hasattr(value, "dtype") else jnp.result_type(value)
    if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 16:
        raise TypeError(
            f"{where}: `{name}` is {dtype}. A recurrence needs floating point of at "
            "least 16 bits: JAX stores narrower numbers but does not calculate with "
            f"them. Cast it, for instance `{name}.astype(jnp.bfloat16)`; inputs and "
            "weights that are stored in fewer bits can be cast inside the cell."
        )


def check_floating(where: str, given: dict[str, Array]) -> None:
    """Refuse what is not an array of real floating point of at least 16 bits.

    **Raises:** `TypeError`, naming the argument.
    """
    for name, v in given.items():
        if not hasattr(v, "shape") or not jnp.issubdtype(v.dtype, jnp.floating):
            raise TypeError(
                f"{where}: `{name}` must be an array of real floating point, got "
                f"{getattr(v, 'dtype', type(v).__name__)}. Cast it, for instance with "
                "`.astype(jnp.float32)`."
            )
        check_bits(where, name, v)


def check_reset(where: str, reset, reset_state, steps: int) -> None:
    """Refuse resets of another length or dtype, and a reset state without resets.

    **Raises:** `ValueError`, `TypeError`.
    """
    if reset is None:
        if reset_state is not None:
            raise ValueError(
                f"{where}: `reset_state` was given without `reset`, so it would never "
                "be used. Pass `reset` as well, or drop it."
            )
        return
    if not hasattr(reset, "dtype"):
        raise TypeError(
            f"{where}: `reset` is a {type(reset).__name__}, expected a bool array of "
            "shape [T]. Wrap it: `jnp.asarray(reset)`."
        )
    if jnp.shape(reset) != (steps,):
        raise ValueError(
            f"{where}: `reset` has shape {jnp.shape(reset)}, expected ({steps},), one "
            "flag for each step. Under a batch, pass it through the same `jax.vmap`."
        )
    if jnp.asarray(reset).dtype != jnp.bool_:
        raise TypeError(
            f"{where}: `reset` is {jnp.asarray(reset).dtype}, expected bool: true at "
            "the steps that start a new sequence. Integers might be positions; write "
            "`reset = segment_ids != previous_segment_ids` or the like."
        )
