"""Window by window over time, for sequences whose solve would not fit in memory."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax

from ..scan import refuse_symbolic, vary
from ._auto import Auto
from ._ladder import Ladder
from ._sequential import Sequential
from .methods import AbstractMethod, is_count

# What can solve a window.
WholeSolver = Auto | Ladder | AbstractMethod | Sequential


def check_solver(where: str, solver: Any, kinds: Any = None) -> None:
    """Refuse what is not a solver, or not one of these kinds.

    **Raises:** `TypeError`.
    """
    if isinstance(solver, kinds or WholeSolver | Windows):
        return
    windows = "pararnn.Windows(...), " if kinds is None else ""
    raise TypeError(
        f"{where}: `solver` is {solver!r:.80}; expected pararnn.Auto(), a method such "
        f"as pararnn.Newton(segments=...), pararnn.Ladder(...), {windows}"
        "or pararnn.Sequential()."
        + (" Did you forget to call the class?" if isinstance(solver, type) else "")
    )


class Windows(eqx.Module):
    """Solve one window of time after the other, and carry the state between them.

    The memory beside inputs and states is that of one window, whatever T. A window is
    also as far as a method has to predict: cells that are hard over the whole sequence
    may be easy over a window.

    **Arguments:**

    - `solver`: the solver of each window, any but `Windows`.
    - `length`: steps in a window. The last window overlaps the one before it if the
        length does not divide T.

    Of the statistics, counts are summed over the windows, and of the residual and of
    each entry of its history the largest is taken.

    **Raises:** `ValueError` for a length that is not a positive whole number,
    `TypeError` for what is not a solver, and for windows within windows.
    """

    solver: WholeSolver
    length: int = eqx.field(static=True)

    def __check_init__(self):
        if isinstance(self.solver, Windows):
            raise TypeError("Windows: `solver` is itself a `Windows`; give its solver.")
        check_solver("Windows", self.solver, WholeSolver)
        if not (is_count(self.length) and self.length >= 1):
            raise ValueError(
                f"Windows: `length` is {self.length!r}; expected a whole number >= 1: "
                "the number of steps that are solved together."
            )


def solve_windows(run, steps: int, length: int, inputs, h0, guess):
    """States `[T, *batch, ...]` by leaf, and statistics of all windows.

    `run(inputs, h0, guess)` solves one window. The windows' states are written into one
    array in place, and inputs are read where they are: nothing is split or joined.
    """
    refuse_symbolic("solve", "`solver` `Windows`", "Pass the solver itself", steps)
    length = min(length, steps)
    count = -(-steps // length)

    def window(tree, start):
        return jtu.tree_map(
            lambda x: lax.dynamic_slice_in_dim(x, start, length, axis=0), tree
        )

    def body(states, number):
        start = jnp.minimum(number * length, steps - length)
        before = tuple(
            jnp.where(
                number == 0,
                h,
                lax.dynamic_index_in_dim(s, jnp.maximum(start - 1, 0), keepdims=False),
            )
            for s, h in zip(states, h0, strict=True)
        )
        found, stats = run(window(inputs, start), before, window(guess, start))
        states = tuple(
            lax.dynamic_update_slice_in_dim(s, new, start, axis=0)
            for s, new in zip(states, found, strict=True)
        )
        stats = {name: jnp.asarray(value) for name, value in stats.items()}
        return states, (start, stats)

    empty = tuple(vary(jnp.zeros((steps, *h.shape), h.dtype), h) for h in h0)
    states, (starts, stats) = lax.scan(body, empty, jnp.arange(count, dtype=jnp.int32))
    return states, _summarize(stats, starts, steps)


def _summarize(stats, starts, steps: int):
    certified, prefix = stats["certified"], stats["certified_steps"]
    starts = starts.reshape(-1, *(1,) * (prefix.ndim - 1))
    certified = jnp.broadcast_to(certified, prefix.shape)
    # Up to the first window that is not certified, and its own certified steps.
    prefix = jnp.min(jnp.where(certified, steps, starts + prefix), axis=0)
    over_windows = {
        "num_steps": jnp.sum,
        "nonfinite": jnp.sum,
        "residual": jnp.max,
        "rung": jnp.max,
        "sequential": jnp.any,
        "certified": jnp.all,
        "finite": jnp.all,
        "residual_history": jnp.nanmax,
    }
    summary = {
        name: over_windows[name](value, axis=0)
        for name, value in stats.items()
        if name in over_windows
    }
    return summary | {"certified_steps": prefix}
