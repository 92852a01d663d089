"""Newton's method with the diagonal of the Jacobian."""

from collections.abc import Callable
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from ...scan import vary
from .._segments import Linearization, Push
from .._structure import Structure
from ._base import (
    AbstractMethod,
    check_method,
    diagonal,
    is_count,
    max_norm,
    solve_corrections,
)


def make_push_diagonal(vectors, scale: float) -> Push:
    """Push the diagonal of the Jacobian, `scale` times the sum of `v * Jv`.

    Along the columns of a structure's blocks that is the diagonal itself, for no two of
    them meet; along random signs it is an estimate.
    """

    def push_diagonal(step, h, tangents):
        ahead, push = jax.linearize(step, h)
        v = vary(jnp.asarray(vectors, h.dtype), h)
        diagonal = jnp.sum(v * jax.vmap(push)(v), axis=0) * scale
        return ahead, diagonal[None] * tangents

    return push_diagonal


class QuasiNewton(AbstractMethod):
    r"""Newton's method with $A_t = \mathrm{diag}(\partial f / \partial h)$.

    The linear recurrence is elementwise whatever the cell: quasi-DEER (Gonzalez et al.
    2024, 2407.19115). It converges linearly, the faster the smaller the Jacobian off
    its diagonal; for a diagonal cell it is Newton's method. On segments the diagonals
    are multiplied along each segment.

    **Arguments:** as in [`pararnn.AbstractMethod`][], and

    - `probes`: `None` for the true diagonal, which takes as many JVPs a step as a block
        of the Jacobian is wide (its width, if dense). A number K for Hutchinson's
        estimate from K random sign vectors, $\tfrac1K \sum_k v_k \odot J v_k$, with K
        JVPs: for wide dense cells. The estimate changes the speed of convergence, not
        what is converged to.

    **Raises:** `ValueError` for counts that are not whole numbers in range, and for
    negative tolerances.
    """

    segments: int | None = eqx.field(static=True)
    probes: int | None = eqx.field(static=True)
    rtol: float | None = eqx.field(static=True)  # pyright: ignore
    atol: float | None = eqx.field(static=True)  # pyright: ignore
    history: int = eqx.field(static=True)
    norm: Callable = eqx.field(static=True, repr=False)
    quadratic: ClassVar[bool] = False

    def __init__(
        self,
        segments: int | None = None,
        *,
        probes: int | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        history: int = 0,
    ):
        self.segments = segments
        self.probes = probes
        self.rtol, self.atol, self.history = rtol, atol, history
        self.norm = max_norm

    def __check_init__(self):
        check_method(self)
        if self.probes is not None and not (is_count(self.probes) and self.probes >= 1):
            raise ValueError(
                f"QuasiNewton: `probes` is {self.probes!r}; expected a whole number "
                ">= 1, or None for the true diagonal."
            )

    def linearize(self, width: int, find_structure: Callable[[], Structure]):
        if self.probes is None:
            vectors, scale = find_structure().seeds, 1.0
        else:
            vectors = jr.rademacher(jr.key(0), (self.probes, width))
            scale = 1 / self.probes
        return Linearization(diagonal(width), make_push_diagonal(vectors, scale))

    def correct(self, structure, tangents, defects, length, progress):
        del length, progress
        return solve_corrections(structure, tangents, defects)
