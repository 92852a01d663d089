"""Tasks by name."""

import functools
import inspect
from collections.abc import Callable
from types import MappingProxyType

from ..._specs import parse_spec
from ._arithmetic import modular_arithmetic, modular_arithmetic_brackets
from ._arrows import arrow_pointing
from ._copying import copying, selective_copying
from ._counting import count_modulo, cycle_navigation, even_pairs, parity, sum_modulo
from ._digits import digits
from ._groups import GROUPS, word_problem
from ._library import library_package, library_text
from ._numbers import adding, oscillators
from ._recall import mqar
from ._task import Task

# The short forms of `make_task`: what an option without a value stands for.
FLAGS = {
    "swaps": ("generators", "swaps"),
    "cycles": ("generators", "cycles"),
    "permuted": ("permuted", True),
}

TASKS: MappingProxyType[str, Callable[..., Task]] = MappingProxyType(
    {
        "parity": parity,
        "even_pairs": even_pairs,
        "cycle_navigation": cycle_navigation,
        "sum_modulo": sum_modulo,
        "count_modulo": count_modulo,
        "modular_arithmetic": modular_arithmetic,
        "modular_arithmetic_brackets": modular_arithmetic_brackets,
        **{name: functools.partial(word_problem, name) for name in GROUPS},
        "mqar": mqar,
        "copying": copying,
        "selective_copying": selective_copying,
        "adding": adding,
        "oscillators": oscillators,
        "digits": digits,
        "arrow_pointing": arrow_pointing,
        "library_text": library_text,
        "library_package": library_package,
    }
)


# Those whose sequences are images, unless they are permuted.
IMAGE_TASKS = ("digits", "arrow_pointing")


def list_tasks() -> tuple[str, ...]:
    """The names that [`pararnn.comparison.make_task`][] knows."""
    return tuple(TASKS)


def make_task(spec: str) -> Task:
    """A task by its name and options.

    **Arguments:** `spec`, a name of `list_tasks()` and options behind colons:
    `"parity"`, `"sum_modulo:modulus=5"`, `"s5:generators=swaps:tokens=2"`; `swaps`,
    `cycles` and `permuted` are short for `generators=swaps`, `generators=cycles` and
    `permuted=True`.

    **Returns:** a [`pararnn.comparison.Task`][].

    **Raises:** `ValueError` on an unknown name or option, listing those that exist, and
    what the task raises; `ImportError` for the digits without scikit-learn.
    """
    name, options = parse_spec("make_task", spec, FLAGS)
    if name not in TASKS:
        raise ValueError(
            f"make_task: unknown task {name!r}; there are {', '.join(TASKS)}."
        )
    known = inspect.signature(TASKS[name]).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        existing = ", ".join(known) or "none"
        raise ValueError(
            f"make_task: {name!r} has no option {', '.join(unknown)}; there are "
            f"{existing}."
        )
    return TASKS[name](**options)
