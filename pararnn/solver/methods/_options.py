"""The arguments that a method was made with."""

import inspect
from typing import Any


def options_of(method) -> dict[str, Any]:
    """All arguments of its constructor, as far as its attributes show them."""
    parameters = inspect.signature(type(method)).parameters
    return {name: getattr(method, name) for name in parameters if hasattr(method, name)}


def chosen_options(method) -> dict[str, Any]:
    """Those that are not the default."""
    parameters = inspect.signature(type(method)).parameters
    return {
        name: value
        for name, value in options_of(method).items()
        # By their text, as the equality of arrays is an array.
        if repr(value) != repr(parameters[name].default)
    }
