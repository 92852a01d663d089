"""Newton's method with the exact Jacobian."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax

from .._segments import Linearization
from .._structure import Structure
from ._base import AbstractMethod, check_method, max_norm, solve_corrections


def push_exactly(step, h, tangents):
    """The Jacobian along the segment: its columns, as the structure compresses them."""
    ahead, push = jax.linearize(step, h)
    return ahead, jax.vmap(push)(tangents)


class Newton(AbstractMethod):
    r"""Newton's method, `segments` stretches of time in parallel.

    From guesses $s_i$ of the states that the S segments start from, the segments are
    stepped side by side to their ends $\varphi_i(s_i)$ with Jacobians $P_i$; the
    correction $\delta_{i+1} = P_i \delta_i + \varphi_i(s_i) - s_{i+1}$ is a linear
    recurrence. S = T is the method of DEER (Lim et al. 2023, 2309.12252) and ParaRNN
    (Danieli et al. 2025, 2510.21450). It converges quadratically.

    **Arguments:** as in [`pararnn.AbstractMethod`][].

    **Raises:** `ValueError` for counts that are not whole numbers in range, and for
    negative tolerances.
    """

    segments: int | None = eqx.field(static=True)
    rtol: float | None = eqx.field(static=True)  # pyright: ignore
    atol: float | None = eqx.field(static=True)  # pyright: ignore
    history: int = eqx.field(static=True)
    norm: Callable = eqx.field(static=True, repr=False)
    quadratic: ClassVar[bool] = True

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
        return Linearization(find_structure(), push_exactly)

    def correct(self, structure, tangents, defects, length, progress):
        del length, progress
        return solve_corrections(structure, tangents, defects)
