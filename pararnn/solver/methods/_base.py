"""What all methods have in common, and their interface as Optimistix root finders."""

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import wadler_lindig as wl
from equinox import AbstractClassVar, AbstractVar
from jaxtyping import Array, Float, PyTree

from ...scan import Schedule, run_scan
from .._blocks import from_blocks, to_blocks, transition_factors
from .._certificate import largest
from .._root_finding import RootState, finish_root, init_root, step_root
from .._segments import Linearization
from .._structure import Structure
from ._options import chosen_options


class AbstractMethod(optx.AbstractRootFinder):
    r"""An iterative method for the whole trajectory, on segments of time.

    All solve $r_t(h) = f(h_{t-1}, x_t) - h_t = 0$ by corrections $\delta$ with
    $\delta_t = A_t \delta_{t-1} + r_t$, or nearly so, and differ in what $A_t$ they
    take for the Jacobian $\partial f / \partial h$. The derivative of a solve does not
    depend on it: that is taken at the solution with the exact Jacobian.

    A method is also an `optimistix.AbstractRootFinder` of the function
    [`pararnn.residual`][], see there.

    **Attributes:**

    - `segments`: from 1 (the plain loop) to T or `None` (every step by itself: most
        parallel, least robust). In between, each segment is stepped sequentially. All
        segments have the same length, rounded up, so there may be fewer; where devices
        share time, each has the same number of them.
    - `rtol`, `atol`: the solve has converged when at every step the residual of every
        entry of the state is at most `atol + rtol * size`, the size being that of the
        entry itself around that step. `rtol` defaults to 64 roundings of the entry's
        dtype, and `atol` to 0.
    - `history`: how many steps of the residual history to keep in `stats`.
    """

    segments: AbstractVar[int | None]
    history: AbstractVar[int]
    # Whether corrections shrink quadratically near the solution, rather than linearly.
    quadratic: AbstractClassVar[bool]

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

    def __pdoc__(self, **kwargs) -> wl.AbstractDoc:
        """How Equinox prints it, by itself or within another module: without the
        arguments that are the default."""
        return wl.bracketed(
            begin=wl.TextDoc(f"{type(self).__name__}("),
            docs=wl.named_objs(list(chosen_options(self).items()), **kwargs),
            sep=wl.comma,
            end=wl.TextDoc(")"),
            indent=kwargs["indent"],
        )

    # The interface of Optimistix. It wants the whole trajectory as the iterate, and
    # one step at a time; `pararnn.solve` runs the same steps without either.

    def init(self, fn, y, args, options, f_struct, aux_struct, tags) -> RootState:
        del options, aux_struct, tags
        return init_root(self, fn, y, args, f_struct)

    def step(self, fn, y, args, options, state, tags):
        del options, tags
        return step_root(self, fn, y, args, state)

    def terminate(self, fn, y, args, options, state, tags):
        del fn, y, args, options, tags
        return state.certified, optx.RESULTS.successful

    def postprocess(
        self, fn, y, aux, args, options, state, tags, result
    ) -> tuple[PyTree, Any, dict[str, Any]]:
        del options, tags, result
        return finish_root(self, fn, y, aux, args, state)


def max_norm(tree: PyTree) -> Array:
    """The largest number of a pytree, infinite if one is not a number."""
    sizes = [largest(leaf) for leaf in jax.tree.leaves(tree)]
    return jnp.max(jnp.stack(sizes))


def is_count(value) -> bool:
    """Whether a whole number, which a bool is not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_tolerances(where: str, rtol: float | None, atol: float | None) -> None:
    """Refuse tolerances that are negative or NaN."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not value >= 0:
            raise ValueError(f"{where}: `{name}` is {value!r}; expected >= 0.")


def check_method(method: AbstractMethod) -> None:
    """Refuse counts that are not whole numbers in range, and negative tolerances."""
    where = type(method).__name__
    if method.segments is not None and not (
        is_count(method.segments) and method.segments >= 1
    ):
        raise ValueError(
            f"{where}: `segments` is {method.segments!r}; expected a whole number "
            "from 1 to the number of steps, or None for one segment a step."
        )
    check_tolerances(where, method.rtol, method.atol)
    if not (is_count(method.history) and method.history >= 0):
        raise ValueError(
            f"{where}: `history` is {method.history!r}; expected a whole number >= 0."
        )


def solve_corrections(structure: Structure, tangents: Array, defects: Array) -> Array:
    """The linear recurrence of the corrections, over the segments, from zero."""
    kind, factors = transition_factors(structure, tangents)
    terms = to_blocks(structure, defects)
    schedule = Schedule(kind, "after", False)
    x, _ = run_scan(schedule, "auto", factors, terms, jnp.zeros_like(terms[0]), None)
    return from_blocks(structure, x)


def diagonal(width: int) -> Structure:
    return Structure(np.arange(width)[:, None], width)
