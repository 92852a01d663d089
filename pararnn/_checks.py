"""Checks of arguments that every part of the library shares."""

from typing import Any

import numpy as np


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


def check_tolerances(where: str, rtol: float | None, atol: float | None) -> None:
    """Refuse tolerances that are negative or NaN.

    **Raises:** `ValueError`.
    """
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not value >= 0:
            raise ValueError(f"{where}: `{name}` is {value!r}; expected >= 0.")
