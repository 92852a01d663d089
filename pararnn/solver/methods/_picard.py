"""Picard iteration."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx

from .._segments import Linearization
from .._structure import Structure
from ._base import AbstractMethod, check_method, diagonal, max_norm, solve_corrections


class Picard(AbstractMethod):
    r"""Picard iteration: $A_t = I$, corrections are sums of the residuals before.

    $h_t \leftarrow h_0 + \sum_{s \le t} (f(h_{s-1}, x_s) - h_{s-1})$: the iteration
    behind parallel sampling from diffusion models, for cells that change the state
    little at each step (a residual connection, a step of an ODE solver). As a member of
    this family: "A unifying framework for parallelizing sequential models with linear
    dynamical systems" (Gonzalez et al. 2025). No derivative of the cell is taken.

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
        del length, progress
        return solve_corrections(structure, tangents, defects)
