"""Which methods are measured."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..solver import (
    ELK,
    AbstractMethod,
    Jacobi,
    Newton,
    Picard,
    QuasiNewton,
    Structure,
)
from ..solver._structure import find_structure
from ._options import name_of
from ._problem import WHERE, Posed

# From how many bytes of Jacobians, of all steps together, on the default methods are
# cheaper ones, and from how many on `Newton()` is none of them. Beside 256 KiB of
# Jacobians, ELK took 5.4 MiB and `Newton()` 0.9 MiB. Of a GRU of width 64 over 2048
# steps (32 MiB), the diagonal took 1.6 s a step on two cores, and 4 probes 0.1 s.
LARGE, VERY_LARGE = 2**24, 2**28


def default_methods(
    structure: Structure, steps: int, itemsize: int
) -> list[AbstractMethod]:
    jacobians = steps * len(structure.blocks) * structure.size**2 * itemsize
    large = jacobians >= LARGE
    return [
        *([Newton()] if jacobians < VERY_LARGE else []),
        Newton(max(2, steps // 16)),
        QuasiNewton(probes=4 if large else None),
        *([] if large else [ELK()]),
        Jacobi(),
        Picard(),
    ]


def choose_methods(methods: Any, problem: Posed) -> dict[str, AbstractMethod]:
    if methods is None:
        recurrence = problem.recurrence
        itemsize = np.dtype(recurrence.dtype).itemsize
        structure = find_structure(recurrence)
        methods = default_methods(structure, problem.length, itemsize)
    if not isinstance(methods, Iterable) or isinstance(methods, str):
        methods = [methods]
    chosen = {}
    for method in methods:
        if not isinstance(method, AbstractMethod):
            raise TypeError(
                f"{WHERE}: `methods` holds {method!r:.80}; expected methods such as "
                "pararnn.Newton(segments=...) or pararnn.Jacobi(). The sequential loop "
                "is always measured; `Auto`, `Ladder` and `Windows` are made of methods"
                " and loops, which are to be diagnosed one by one."
                + (" Did you forget to call the class?" * isinstance(method, type))
            )
        name = name_of(method)
        if name in chosen:
            raise ValueError(f"{WHERE}: `methods` holds {name} twice.")
        chosen[name] = method
    return chosen
