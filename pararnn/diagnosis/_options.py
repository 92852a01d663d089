"""The arguments a method was made with: its name by them, and how to make it anew."""

import inspect
from typing import Any

from ..solver import AbstractMethod


def _options(method: AbstractMethod) -> dict[str, Any]:
    """The arguments that a method was made with, as far as its attributes show them."""
    parameters = inspect.signature(type(method)).parameters
    return {name: getattr(method, name) for name in parameters if hasattr(method, name)}


def name_of(method: AbstractMethod) -> str:
    """A method as it would be written, options that are the default left out."""
    parameters = inspect.signature(type(method)).parameters
    options = ", ".join(
        f"{name}={value!r}"
        for name, value in _options(method).items()
        if name != "history" and repr(value) != repr(parameters[name].default)
    )
    return f"{type(method).__name__}({options})"


def with_history(method: Any, count: int) -> Any:
    """The method with its residual history kept, if it can be made anew with one."""
    if not isinstance(method, AbstractMethod) or method.history:
        return method
    options = _options(method)
    if "history" not in options:
        return method
    return type(method)(**{**options, "history": count})
