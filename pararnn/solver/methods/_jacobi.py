"""Jacobi iteration: the fixed point of stepping everything at once."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx

from .._segments import Linearization
from .._structure import Structure
from ._base import AbstractMethod, check_method, diagonal, max_norm


class Jacobi(AbstractMethod):
    r"""Jacobi iteration: $A_t = 0$, $h_t \leftarrow f(h_{t-1}, x_t)$ for all t at once.

    Each iteration is one evaluation of the cell and no scan, and each brings the answer
    one segment further; the error shrinks by what a segment forgets of the state that
    it starts from. For cells that forget within a segment. As a member of this family:
    "A unifying framework for parallelizing sequential models with linear dynamical
    systems" (Gonzalez et al. 2025). No derivative of the cell is taken.

    **Arguments:** as in [`pararnn.AbstractMethod`][].

    **Raises:** `ValueError` for counts that are not whole numbers in range, and for
    negative tolerances.
    """

    segments: int | None = eqx.field(static=True)
    rtol: float | None = eqx.field(static=True)  # pyright: ignore
    atol: float | None = eqx.field(static=True)  # pyright: ignore
    history: int = eqx.field(static=True)
    norm: Callable = eqx.field(static=True, repr=False)
    quadratic: ClassVar[bool] = False

    def __init__(
        self,
        segments: int | None = None,
        *,
        rtol: float | None = None,
        atol: float | None = None,
        history: int = 0,
    ):
        self.segments = segments
        self.rtol, self.atol, self.history = rtol, atol, history
        self.norm = max_norm

    def __check_init__(self):
        check_method(self)

    def linearize(self, width: int, find_structure: Callable[[], Structure]):
        del find_structure
        return Linearization(
            diagonal(width), lambda step, h, tangents: (step(h), tangents)
        )

    def correct(self, structure, tangents, defects, length, progress):
        del structure, tangents, length, progress
        return defects
