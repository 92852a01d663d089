"""Cells, layers, tasks and the like, made by name as scripts are given it."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

Made = TypeVar("Made")


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
