"""Newton's method with a Jacobian that is scaled down far from the solution."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp

from .._segments import Linearization
from .._structure import Structure
from ._base import AbstractMethod, check_method, max_norm, solve_corrections
from ._newton import push_exactly


class DampedNewton(AbstractMethod):
    r"""Newton's method with $A_t = (1 - \kappa) \, \partial f / \partial h$.

    A recurrence that expands, even if only far from its solution, makes Newton's
    corrections overflow over long stretches; scaled Jacobians forget instead (the
    scaled variant of ELK in Gonzalez et al. 2024, 2407.19115). Here
    $\kappa = \mathrm{damping} \cdot \min(1, c)$ falls with the last relative correction
    $c$, so that convergence near the solution is nearly that of Newton's method.

    **Arguments:** as in [`pararnn.AbstractMethod`][], and `damping`, from 0 (Newton's
    method) to 1 (at first, the fixed-point iteration).

    **Raises:** `ValueError` for a damping out of range, counts that are not whole
    numbers in range, and negative tolerances.
    """

    segments: int | None = eqx.field(static=True)
    damping: float = eqx.field(static=True)
    rtol: float | None = eqx.field(static=True)  # pyright: ignore
    atol: float | None = eqx.field(static=True)  # pyright: ignore
    history: int = eqx.field(static=True)
    norm: Callable = eqx.field(static=True, repr=False)
    quadratic: ClassVar[bool] = False

    def __init__(
        self,
        segments: int | None = None,
        *,
        damping: float = 0.5,
        rtol: float | None = None,
        atol: float | None = None,
        history: int = 0,
    ):
        self.segments = segments
        self.damping = damping
        self.rtol, self.atol, self.history = rtol, atol, history
        self.norm = max_norm

    def __check_init__(self):
        check_method(self)
        check_damping(self.damping, "DampedNewton", 1.0)

    def linearize(self, width: int, find_structure: Callable[[], Structure]):
        return Linearization(find_structure(), push_exactly)

    def correct(self, structure, tangents, defects, length, progress):
        kept = 1 - self.damping * jnp.minimum(progress, 1)
        # Every step of a segment is damped, so a segment's transition is by all.
        tangents = tangents * (kept**length)[None, None, ..., None]
        return solve_corrections(structure, tangents, defects)


def check_damping(damping: float, where: str, most: float) -> None:
    if not 0 <= damping <= most:
        raise ValueError(
            f"{where}: `damping` is {damping!r}; expected a number from 0, which is "
            f"Newton's method, to {most:g}."
        )
