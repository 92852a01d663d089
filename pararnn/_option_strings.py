"""Names with options, as written on a command line: `"gru:heads=4"`."""

import ast
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

NONE: Mapping[str, Any] = MappingProxyType({})


def parse_spec(
    where: str,
    spec: str,
    flags: Mapping[str, tuple[str, Any]] = NONE,
    short: Mapping[str, str] = NONE,
) -> tuple[str, dict[str, Any]]:
    """Split `"name:option=value:flag"` into a name and its options.

    **Arguments:** `where`, the caller's name for errors; `flags`, the option and value
    that a flag stands for; `short`, from short names of options to long ones.

    **Raises:** `ValueError` on a part that is neither an option nor a flag, listing the
    flags, and on an option that is given twice.
    """
    name, *parts = spec.split(":")
    options = {}
    for part in parts:
        option, equals, text = part.partition("=")
        if not equals and option in flags:
            option, value = flags[option]
        elif option.isidentifier() and equals and text:
            option, value = short.get(option, option), _read(text)
        else:
            known = f", nor one of {', '.join(flags)}" if flags else ""
            raise ValueError(
                f"{where}: {part!r} in {spec!r} is not of the form option=value"
                f"{known}. Write for instance {name}:option=value."
            )
        if option in options:
            raise ValueError(f"{where}: {option!r} is given twice in {spec!r}.")
        options[option] = value
    return name, options


def _read(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
