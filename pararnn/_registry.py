"""Cells, layers, tasks and the like, made by names with options.

These are written as on a command line: `"gru:heads=4"`.
"""

import ast
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

Made = TypeVar("Made")
NONE: Mapping[str, Any] = MappingProxyType({})


def make_by_name(
    where: str,
    kind: str,
    makers: Mapping[str, Callable[..., Made]],
    name: str,
    sizes: dict[str, Any],
    options: dict[str, Any],
) -> Made:
    """Return `makers[name](**sizes, **options)`, with errors that list the choices.

    **Arguments:** `where`, the caller, and `kind`, what an entry is, for errors;
    `makers`, classes or functions by name; `sizes`, the caller's own arguments;
    `options`, those that its user gave.

    **Raises:** `ValueError` on an unknown name or option, and what the class or
    function raises.
    """
    check_name(where, kind, name, makers)
    made = makers[name]
    # The signature of a class of Equinox is that of its metaclass.
    signature = inspect.signature(made.__init__ if isinstance(made, type) else made)
    known = [n for n in signature.parameters if n not in ("self", *sizes)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"{where}: {name!r} has no option {', '.join(unknown)}; there are "
            f"{', '.join(known) or 'none'}."
        )
    return made(**sizes, **options)


def check_name(where: str, kind: str, name: Any, names: Iterable[str]) -> None:
    """Refuse a name that is not among `names`.

    **Raises:** `ValueError` that lists them and suggests the nearest.
    """
    names = tuple(names)
    if not isinstance(name, str) or name not in names:
        near = difflib.get_close_matches(str(name).lower(), names, n=1)
        raise ValueError(
            f"{where}: unknown {kind} {name!r}; there are {', '.join(names)}."
            + "".join(f" Did you mean {n!r}?" for n in near)
        )


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
