"""Tasks by name."""

import functools
from collections.abc import Callable
from types import MappingProxyType

from ..._registry import make_by_name, parse_spec
from ._formal import (
    GROUPS,
    count_modulo,
    cycle_navigation,
    even_pairs,
    modular_arithmetic,
    modular_arithmetic_brackets,
    parity,
    sum_modulo,
    word_problem,
)
from ._memory import adding, copying, mqar, oscillators, selective_copying
from ._raw import arrow_pointing, digits, library_package, library_text
from ._task import Task

# Flags of `make_task`, and the option and value that each stands for.
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


# Tasks whose sequences are images, unless permuted.
IMAGE_TASKS = ("digits", "arrow_pointing")


def list_tasks() -> tuple[str, ...]:
    """Return the names that [`pararnn.comparison.make_task`][] knows."""
    return tuple(TASKS)


def make_task(spec: str) -> Task:
    """Make a task by its name and options.

    **Arguments:** `spec`, a name of `list_tasks()` and options after colons:
    `"parity"`, `"sum_modulo:modulus=5"`, `"s5:generators=swaps:tokens=2"`; `swaps`,
    `cycles` and `permuted` are short for `generators=swaps`, `generators=cycles` and
    `permuted=True`.

    **Returns:** a [`pararnn.comparison.Task`][].

    **Raises:** `ValueError` on an unknown name or option, listing those that exist, and
    what the task raises; `ImportError` for the digits without scikit-learn.
    """
    name, options = parse_spec("make_task", spec, FLAGS)
    return make_by_name("make_task", "task", TASKS, name, {}, options)
