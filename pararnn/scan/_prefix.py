"""Prefixes under any associative operation, by the same two schedules as a scan."""

from collections.abc import Callable
from typing import Literal, TypeVar

import jax
from jax import lax

Element = TypeVar("Element")


def prefix(
    combine: Callable[[Element, Element], Element],
    elements: Element,
    backend: Literal["auto", "sequential", "associative"] = "auto",
) -> Element:
    """All prefixes `e_1`, `e_1 * e_2`, ... of elements `[T, ...]`, a pytree.

    `combine(earlier, later)` acts on leaves `[n, ...]`, n pairs at once, and must be
    associative. `auto` is sequential on a CPU, where `linear_scan` is (see
    `_choose.py`), and associative elsewhere.
    """
    if backend == "auto":
        on_cpu = jax.default_backend() == "cpu"
        backend = "sequential" if on_cpu else "associative"
    if backend == "associative":
        return lax.associative_scan(combine, elements)

    def step(before, element):
        after = combine(before, jax.tree.map(lambda e: e[None], element))
        return after, jax.tree.map(lambda e: e[0], after)

    first = jax.tree.map(lambda e: e[:1], elements)
    _, later = lax.scan(step, first, jax.tree.map(lambda e: e[1:], elements))
    return jax.tree.map(lambda a, b: lax.concatenate([a, b], 0), first, later)
