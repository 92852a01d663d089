"""A method's name by its arguments, and how to make it anew with others."""

from typing import Any

from ..solver import AbstractMethod
from ..solver._methods import chosen_options, options_of


def name_of(method: AbstractMethod) -> str:
    """A method as it prints itself, but on one line and without its history."""
    options = ", ".join(
        f"{name}={value!r}"
        for name, value in chosen_options(method).items()
        if name != "history"
    )
    return f"{type(method).__name__}({options})"


def with_history(method: Any, count: int) -> Any:
    """The method with its residual history kept, if it can be made anew with one."""
    if not isinstance(method, AbstractMethod) or method.history:
        return method
    options = options_of(method)
    if "history" not in options:
        return method
    return type(method)(**{**options, "history": count})
