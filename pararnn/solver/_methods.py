"""The iterative methods: what each takes for the Jacobian, all on the same segments."""

import abc
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import wadler_lindig as wl
from equinox import AbstractClassVar
from jaxtyping import Array, Float

from .._checks import check_count, check_tolerances, is_count, is_symbolic
from ..scan import Schedule, run_scan, vary
from ._hoist import hoist
from ._iteration import iterate_on_segments
from ._jacobian_layout import from_blocks, to_blocks, transition_factors
from ._problem import BoundProblem
from ._segments import Linearization, Push, Segments
from ._sequential import AbstractSolver, Sequential, States
from ._solution import Stats
from ._structure import Structure


class AbstractMethod(AbstractSolver):
    r"""An iterative method for the whole trajectory, on segments of time.

    All methods solve $r_t(h) = f(h_{t-1}, x_t) - h_t = 0$ by corrections $\delta$ with
    $\delta_t = A_t \delta_{t-1} + r_t$, or nearly so. They differ in what $A_t$ they
    take for the Jacobian $\partial f / \partial h$. The derivative of a solve does not
    depend on it: that is taken at the solution with the exact Jacobian.

    [`pararnn.RootFinder`][] makes an Optimistix root finder of a method.

    **Attributes:**

    - `segments`: from 1 (the plain loop) to T or `None` (every step by itself: most
        parallel, least robust). In between, each segment is stepped sequentially. All
        segments have the same length, rounded up, so there may be fewer; where devices
        share time, each has the same number of them.
    - `rtol`, `atol`: the solve has converged when at every step the residual of every
        entry of the state is at most `atol + rtol * size`, where the size is that of
        the entry itself around that step. `rtol` defaults to 64 roundings of the
        entry's dtype, and `atol` to 0.
    - `history`: how many steps of the residual history to keep in `stats`.
    """

    # Whether corrections shrink quadratically near the solution, rather than linearly.
    quadratic: AbstractClassVar[bool]
    segments: int | None = eqx.field(static=True, default=None)
    rtol: float | None = eqx.field(static=True, kw_only=True, default=None)
    atol: float | None = eqx.field(static=True, kw_only=True, default=None)
    history: int = eqx.field(static=True, kw_only=True, default=0)

    @abc.abstractmethod
    def linearize(
        self, width: int, find_structure: Callable[[], Structure]
    ) -> Linearization:
        """What is pushed along a segment; `find_structure()` gives the Jacobian's."""

    @abc.abstractmethod
    def correct(
        self,
        structure: Structure,
        tangents: Float[Array, "size S *batch width"],
        defects: Float[Array, "S *batch width"],
        length: int,
        progress: Float[Array, "*batch"],
    ) -> Float[Array, "S *batch width"]:
        """The correction of all starts, of which the first has no defect.

        `tangents` are the transitions from the start before, over `length` steps each,
        zero for the first two starts; `progress` is the last relative correction, 1 at
        the beginning.
        """

    def __check_init__(self):
        where = type(self).__name__
        if self.segments is not None and not is_count(self.segments, 1):
            raise ValueError(
                f"{where}: `segments` is {self.segments!r}; expected a whole number "
                "from 1 to the number of steps, or None for one segment a step."
            )
        check_tolerances(where, self.rtol, self.atol)
        check_count(where, "history", self.history)

    def run(self, problem, guess, limit):
        if self.only_steps(problem.steps):
            states, stats = Sequential().run(problem, None, None)
            return states, stats.padded(self.history)
        return iterate_on_segments(hoist(problem), self, guess, limit)

    @property
    def residuals_kept(self) -> int:
        return self.history

    @property
    def use_joint_newton(self) -> bool:
        # A method that takes many steps would take still more of them jointly.
        return self.quadratic

    def only_steps(self, steps: int) -> bool:
        return self.segments == 1 or (not is_symbolic(steps) and steps <= 1)

    def __pdoc__(self, **kwargs) -> wl.AbstractDoc:
        """How Equinox prints it: without the arguments that have their default."""
        return wl.bracketed(
            begin=wl.TextDoc(f"{type(self).__name__}("),
            docs=wl.named_objs(list(chosen_options(self).items()), **kwargs),
            sep=wl.comma,
            end=wl.TextDoc(")"),
            indent=kwargs["indent"],
        )


class Newton(AbstractMethod):
    r"""Newton's method, `segments` segments of time in parallel.

    From guesses $s_i$ of the states that the S segments start from, the segments are
    stepped side by side to their ends $\varphi_i(s_i)$ with Jacobians $P_i$; the
    correction $\delta_{i+1} = P_i \delta_i + \varphi_i(s_i) - s_{i+1}$ is a linear
    recurrence. S = T is the method of DEER (Lim et al. 2023, 2309.12252) and ParaRNN
    (Danieli et al. 2025, 2510.21450). It converges quadratically.

    **Arguments:** as in [`pararnn.AbstractMethod`][].

    **Raises:** `ValueError` for counts that are not whole numbers in range, and for
    negative tolerances.
    """

    quadratic: ClassVar[bool] = True

    def linearize(self, width: int, find_structure: Callable[[], Structure]):
        return Linearization(find_structure(), push_exactly)

    def correct(self, structure, tangents, defects, length, progress):
        return solve_corrections(structure, tangents, defects)


class DampedNewton(AbstractMethod):
    r"""Newton's method with $A_t = (1 - \kappa) \, \partial f / \partial h$.

    If a recurrence expands, even only far from its solution, Newton's corrections
    overflow over long times; scaled Jacobians forget instead (the scaled variant of ELK
    in Gonzalez et al. 2024, 2407.19115). Here
    $\kappa = \mathrm{damping} \cdot \min(1, c)$ falls with the last relative correction
    $c$, so that convergence near the solution is nearly that of Newton's method.

    **Arguments:** as in [`pararnn.AbstractMethod`][], and `damping`, from 0 (Newton's
    method) to 1 (at first, the fixed-point iteration).

    **Raises:** `ValueError` for a damping out of range, counts that are not whole
    numbers in range, and negative tolerances.
    """

    damping: float = eqx.field(static=True, kw_only=True, default=0.5)
    quadratic: ClassVar[bool] = False

    def __check_init__(self):
        if not 0 <= self.damping <= 1:
            raise ValueError(
                f"DampedNewton: `damping` is {self.damping!r}; expected a number from "
                "0, which is Newton's method, to 1."
            )

    def linearize(self, width: int, find_structure: Callable[[], Structure]):
        return Linearization(find_structure(), push_exactly)

    def correct(self, structure, tangents, defects, length, progress):
        kept = 1 - self.damping * jnp.minimum(progress, 1)
        # Every step of a segment is damped, so a segment's transition is by all.
        tangents = tangents * (kept**length)[None, None, ..., None]
        return solve_corrections(structure, tangents, defects)


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

    probes: int | None = eqx.field(static=True, kw_only=True, default=None)
    quadratic: ClassVar[bool] = False

    def __check_init__(self):
        if self.probes is not None and not is_count(self.probes, 1):
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
        return solve_corrections(structure, tangents, defects)


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

    quadratic: ClassVar[bool] = False

    def linearize(self, width: int, find_structure: Callable[[], Structure]):
        return Linearization(diagonal(width), push_unchanged)

    def correct(self, structure, tangents, defects, length, progress):
        return defects


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

    quadratic: ClassVar[bool] = False

    def linearize(self, width: int, find_structure: Callable[[], Structure]):
        return Linearization(diagonal(width), push_unchanged)

    def correct(self, structure, tangents, defects, length, progress):
        return solve_corrections(structure, tangents, defects)


def certify(
    problem: BoundProblem,
    states: States,
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> tuple[States, Stats]:
    """States that a solver of your own has found, and whether they solve the problem.

    One evaluation of the cell, for all steps at once, gives the residuals, which are
    held to the same tolerances as those of any method. The last state is then the one
    that the cell computes from the state before it.

    **Arguments:** `states`, leaves `[T, *batch, ...]`; `rtol`, `atol`, as in
    [`pararnn.AbstractMethod`][].
    """
    segments = Segments(problem, Jacobi(rtol=rtol, atol=atol))
    starts = segments.guess_starts(states)
    return segments.join(segments.trajectory(starts), starts)


def push_exactly(step, h, tangents):
    """Push the Jacobian: its columns, as the structure compresses them."""
    ahead, push = jax.linearize(step, h)
    return ahead, jax.vmap(push)(tangents)


def push_unchanged(step, h, tangents):
    """Push nothing: the transition is the identity, or is not used."""
    return step(h), tangents


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


def diagonal(width: int) -> Structure:
    return Structure(np.arange(width)[:, None], width)


def solve_corrections(structure: Structure, tangents: Array, defects: Array) -> Array:
    """The linear recurrence of the corrections, over the segments, from zero."""
    kind, factors = transition_factors(structure, tangents)
    terms = to_blocks(structure, defects)
    schedule = Schedule(kind, "after", False)
    x, _ = run_scan(schedule, "auto", factors, terms, jnp.zeros_like(terms[0]), None)
    return from_blocks(structure, x)


def options_of(method: AbstractSolver) -> dict[str, Any]:
    """The arguments of its constructor, as far as its attributes show them."""
    parameters = inspect.signature(type(method)).parameters
    return {name: getattr(method, name) for name in parameters if hasattr(method, name)}


def chosen_options(method: AbstractSolver) -> dict[str, Any]:
    """Those that do not have their default."""
    parameters = inspect.signature(type(method)).parameters
    return {
        name: value
        for name, value in options_of(method).items()
        # By their text, as the equality of arrays is an array.
        if repr(value) != repr(parameters[name].default)
    }
