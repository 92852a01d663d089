"""The iterative methods, which differ in what they take for the Jacobian."""

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
from jaxtyping import Array, Float

from .._checks import check_count, check_tolerances, is_count, is_symbolic
from ..recurrence import Structure, from_blocks, to_blocks, transition_factors
from ..scan import Schedule, run_scan, vary
from ._iteration import iterate_on_segments
from ._problem import BoundProblem, hoist
from ._segments import Linearization, Push, Segments
from ._sequential import AbstractSolver, Sequential, States
from ._solution import Stats


class AbstractMethod(AbstractSolver):
    r"""An iterative method for the whole trajectory, on segments of time.

    All methods solve $r_t(h) = f(h_{t-1}, x_t) - h_t = 0$ by corrections $\delta$ with
    $\delta_t = A_t \delta_{t-1} + r_t$, or nearly so. They differ in the $A_t$
    that they take for the Jacobian $\partial f / \partial h$. The derivative of a solve
    does not depend on $A_t$: it is taken at the solution with the exact Jacobian.

    [`pararnn.RootFinder`][] makes an Optimistix root finder of a method.

    **Attributes:**

    - `segments`: from 1 (the sequential loop) to T or `None` (each step is a segment:
        the most parallel and the least robust). Each segment is stepped sequentially.
        All have the same length, rounded up, so there may be fewer of them. Devices
        that share time have equally many.
    - `rtol`, `atol`: the solve has converged when at every step the residual of every
        entry of the state is at most `atol + rtol * size`, where the size is that of
        the entry itself around that step. `rtol` defaults to 64 roundings of the
        entry's dtype, and `atol` to 0.
    - `history`: how many steps of the residual history to keep in `stats`. Defaults to
        0.
    """

    # Whether corrections shrink quadratically near the solution, not just linearly.
    quadratic: ClassVar[bool] = False
    segments: int | None = eqx.field(static=True, default=None)
    rtol: float | None = eqx.field(static=True, kw_only=True, default=None)
    atol: float | None = eqx.field(static=True, kw_only=True, default=None)
    history: int = eqx.field(static=True, kw_only=True, default=0)

    @abc.abstractmethod
    def linearize(
        self, width: int, find_structure: Callable[[], Structure]
    ) -> Linearization:
        """Return what to push along a segment, and which matrix it stands for.

        `find_structure()` gives the structure of the Jacobian. `push_exactly`,
        `push_unchanged` and `make_push_diagonal` below are what the methods here push.
        """

    @abc.abstractmethod
    def correct(
        self,
        structure: Structure,
        tangents: Float[Array, "size S *batch width"],
        defects: Float[Array, "S *batch width"],
        length: int,
        progress: Float[Array, "*batch"],
    ) -> Float[Array, "S *batch width"]:
        """Return the correction of all starts, of which the first has no defect.

        `tangents` are the transitions from the start before, over `length` steps each;
        they are zero for the first two starts. `progress` is the last relative
        correction, 1 at the beginning: all that a method knows of earlier steps.
        """

    def __check_init__(self):
        where = type(self).__name__
        if self.segments is not None and not is_count(self.segments, 1):
            raise ValueError(
                f"{where}: `segments` is {self.segments!r}; expected a whole number "
                "from 1 to the number of steps, or None for one segment for each step."
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
        # A method that converges linearly would take even more steps jointly.
        return self.quadratic

    def only_steps(self, steps: int) -> bool:
        return self.segments == 1 or (not is_symbolic(steps) and steps <= 1)

    def __pdoc__(self, **kwargs) -> wl.AbstractDoc:
        """Print like Equinox, without the arguments that have their default."""
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
    stepped side by side to their ends $\varphi_i(s_i)$, with Jacobians $P_i$. The
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
    overflow over long times. With scaled Jacobians they decay instead (the scaled
    variant of ELK in Gonzalez et al. 2024, 2407.19115).
    $\kappa = \mathrm{damping} \cdot \min(1, c)$ falls with the last relative correction
    $c$, so that convergence near the solution is nearly that of Newton's method.

    **Arguments:** as in [`pararnn.AbstractMethod`][], and `damping`, from 0 (Newton's
    method) to 1 (at first, the fixed-point iteration).

    **Raises:** `ValueError` for a damping out of range, counts that are not whole
    numbers in range, and negative tolerances.
    """

    damping: float = eqx.field(static=True, kw_only=True, default=0.5)

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
        # Each step of a segment is damped, so its transition is damped `length` times.
        tangents = tangents * (kept**length)[None, None, ..., None]
        return solve_corrections(structure, tangents, defects)


class QuasiNewton(AbstractMethod):
    r"""Newton's method with $A_t = \mathrm{diag}(\partial f / \partial h)$.

    The linear recurrence is elementwise for every cell: quasi-DEER (Gonzalez et al.
    2024, 2407.19115). It converges linearly, and faster if the Jacobian is small off
    its diagonal. For a diagonal cell it is Newton's method. On segments the diagonals
    are multiplied along each segment.

    **Arguments:** as in [`pararnn.AbstractMethod`][], and

    - `probes`: `None` for the true diagonal, which takes as many JVPs at each step as
        a block of the Jacobian is wide. A number K for Hutchinson's estimate from K
        random sign vectors, $\tfrac1K \sum_k v_k \odot J v_k$, which takes K JVPs and
        suits wide dense cells. The estimate changes the speed of convergence, not the
        limit.

    **Raises:** `ValueError` for counts that are not whole numbers in range, and for
    negative tolerances.
    """

    probes: int | None = eqx.field(static=True, kw_only=True, default=None)

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

    Each iteration is one evaluation of the cell and no scan, and makes one more segment
    exact. The error shrinks as segments forget the state that they start from, so this
    suits cells that forget within a segment. As a member of this family: "A unifying
    framework for parallelizing sequential models with linear dynamical systems"
    (Gonzalez et al. 2025). No derivative of the cell is taken.

    **Arguments:** as in [`pararnn.AbstractMethod`][].

    **Raises:** `ValueError` for counts that are not whole numbers in range, and for
    negative tolerances.
    """

    def linearize(self, width: int, find_structure: Callable[[], Structure]):
        return Linearization(diagonal(width), push_unchanged)

    def correct(self, structure, tangents, defects, length, progress):
        return defects


class Picard(AbstractMethod):
    r"""Picard iteration: $A_t = I$, corrections are sums of earlier residuals.

    $h_t \leftarrow h_0 + \sum_{s \le t} (f(h_{s-1}, x_s) - h_{s-1})$ is the iteration
    used for parallel sampling from diffusion models. It suits cells that change the
    state little at each step (a residual connection, a step of an ODE solver). As a
    member of this family: "A unifying framework for parallelizing sequential models
    with linear dynamical systems" (Gonzalez et al. 2025). No derivative of the cell is
    taken.

    **Arguments:** as in [`pararnn.AbstractMethod`][].

    **Raises:** `ValueError` for counts that are not whole numbers in range, and for
    negative tolerances.
    """

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
    """Check whether states that a solver of your own found solve the problem.

    One evaluation of the cell, for all steps at once, gives the residuals. The
    tolerances are those of every method. The last state is replaced by what the cell
    computes from the state before it.

    **Arguments:** `problem`, as `run` was given it; `states`, leaves
    `[T, *batch, ...]`; `rtol`, `atol`, as in [`pararnn.AbstractMethod`][].

    **Returns:** the states, likewise, and their statistics, arrays `[*batch]`.

    **Raises:** `ValueError` for negative tolerances.
    """
    segments = Segments(problem, Jacobi(rtol=rtol, atol=atol))
    starts = segments.guess_starts(states)
    states, stats = segments.join(segments.trajectory(starts), starts)
    return states, stats.shared() if problem.recurrence.coupled_along else stats


def push_exactly(step, h, tangents):
    """Push the compressed columns of the Jacobian."""
    ahead, push = jax.linearize(step, h)
    return ahead, jax.vmap(push)(tangents)


def push_unchanged(step, h, tangents):
    """Push nothing: the transition is the identity, or is not used."""
    return step(h), tangents


def make_push_diagonal(vectors, scale: float) -> Push:
    """Push `scale` times the sum of `v * Jv`, for the diagonal of the Jacobian.

    With the seeds of a structure as vectors this is the diagonal itself, as each state
    belongs to one seed; with random signs it is an estimate.
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
    """Solve the linear recurrence of the corrections, over the segments, from zero."""
    kind, factors = transition_factors(structure, tangents)
    terms = to_blocks(structure, defects)
    schedule = Schedule(kind, "after", False)
    x, _ = run_scan(schedule, "auto", factors, terms, jnp.zeros_like(terms[0]), None)
    return from_blocks(structure, x)


def options_of(method: AbstractSolver) -> dict[str, Any]:
    """Return the arguments of the constructor that are also attributes."""
    parameters = inspect.signature(type(method)).parameters
    return {name: getattr(method, name) for name in parameters if hasattr(method, name)}


def chosen_options(method: AbstractSolver) -> dict[str, Any]:
    """Return the arguments that do not have their default."""
    parameters = inspect.signature(type(method)).parameters
    return {
        name: value
        for name, value in options_of(method).items()
        # Compared as text, since arrays compare entry by entry.
        if repr(value) != repr(parameters[name].default)
    }
