"""Classes by name, for scripts that take a cell or a layer as an argument."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

Made = TypeVar("Made")


def make_by_name(
    where: str,
    kind: str,
    classes: Mapping[str, type[Made]],
    name: str,
    sizes: dict[str, Any],
    options: dict[str, Any],
) -> Made:
    """`classes[name](**sizes, **options)`, with errors that list what there is.

    **Arguments:** `where` and `kind`, how the caller and an entry are called in errors;
    `sizes`, the caller's own arguments; `options`, further ones of its user.

    **Raises:** `ValueError` on an unknown name or option, and what the constructor
    raises.
    """
    if not isinstance(name, str) or name not in classes:
        near = difflib.get_close_matches(str(name).lower(), classes, n=1)
        raise ValueError(
            f"{where}: unknown {kind} {name!r}; there are {', '.join(classes)}."
            + "".join(f" Did you mean {n!r}?" for n in near)
        )
    known = [
        option
        for option in inspect.signature(classes[name].__init__).parameters
        if option not in ("self", *sizes)
    ]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"{where}: {name!r} has no option {', '.join(unknown)}; there are "
            f"{', '.join(known)}."
        )
    return classes[name](**sizes, **options)
