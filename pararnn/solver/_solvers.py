"""Solvers made of other solvers: a ladder of methods, windows, and the default."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax

from .._checks import (
    check_count,
    check_tolerances,
    is_count,
    is_symbolic,
    refuse_symbolic,
)
from ..recurrence import Structure
from ..scan import time_shards, vary
from ._methods import AbstractMethod, Jacobi, Newton
from ._problem import hoist
from ._sequential import AbstractSolver, Sequential, States
from ._solution import Stats

# On a GPU: the largest product of channels and the square of a block's size for which
# segments are used, and the most bytes of Jacobians. See `choose_ladder`.
_MAX_WORK_PER_STEP = 10**7
_MAX_JACOBIAN_BYTES = 2**30


def check_solver(where: str, solver: Any) -> None:
    """Refuse anything that is not a solver.

    **Raises:** `TypeError`.
    """
    if isinstance(solver, AbstractSolver):
        return
    raise TypeError(
        f"{where}: `solver` is {solver!r:.80}; expected pararnn.Auto(), a method such "
        "as pararnn.Newton(segments=...), pararnn.Ladder(...), "
        + "pararnn.Windows(...), " * (where != "Windows")
        + "or pararnn.Sequential()."
        + (" Did you forget to call the class?" if isinstance(solver, type) else "")
    )


class Ladder(AbstractSolver):
    """Several methods, from cheap to robust, and finally the sequential loop.

    Each method takes a few steps. Sequences that are certified by then are done; the
    others continue with the next method, from their current states. The loop computes
    the sequences that no method has certified, so the answer is always right.
    `stats["rung"]` says for each sequence which rung its answer comes from, counted
    from 0; the loop comes last.

    **Arguments:**

    - `methods`: from cheap to robust, each an [`pararnn.AbstractMethod`][].
    - `max_steps`: how many steps each method may take: one number, or one for each.

    **Raises:** `TypeError` for anything but methods, `ValueError` for counts that do
    not fit.
    """

    methods: tuple[AbstractMethod, ...]
    max_steps: int | tuple[int, ...] = eqx.field(static=True, default=8)

    def __check_init__(self):
        if not isinstance(self.methods, tuple) or not all(
            isinstance(method, AbstractMethod) for method in self.methods
        ):
            among = self.methods if isinstance(self.methods, tuple | list) else ()
            raise TypeError(
                f"Ladder: `methods` is {self.methods!r:.200}; expected a tuple of "
                "methods, for instance (pararnn.Jacobi(64), pararnn.Newton(64)). The "
                "sequential loop follows them in any case."
                + " Did you forget to call the class?"
                * any(isinstance(method, type) for method in among)
            )
        if len(self.steps) != len(self.methods) or not all(
            is_count(n, 1) for n in self.steps
        ):
            raise ValueError(
                f"Ladder: `max_steps` is {self.max_steps!r} for {len(self.methods)} "
                "methods; expected a whole number >= 1, or one for each method."
            )

    @property
    def steps(self) -> tuple[int, ...]:
        """The limit of each method."""
        if isinstance(self.max_steps, tuple):
            return self.max_steps
        return (self.max_steps,) * len(self.methods)

    @property
    def residuals_kept(self) -> int:
        return max((method.history for method in self.methods), default=0)

    def only_steps(self, steps: int) -> bool:
        return not self.methods

    def choose(self, problem, channels):
        return self if self.methods else Sequential()

    def run(self, problem, guess, limit):
        if not self.methods:
            return Sequential().run(problem, None, None)
        problem = hoist(problem)

        def attempt(number, guess):
            """Return the answer of a method, or of the loop after the last one."""
            if number == len(self.methods):
                states, stats = Sequential().run(problem, None, None)
            else:
                own = limit or self.steps[number]
                states, stats = self.methods[number].run(problem, guess, own)
            rung = jnp.full_like(stats.rung, number)
            stats = stats._replace(rung=rung).padded(self.residuals_kept)
            return states, vary(stats, states)

        found = attempt(0, guess)
        for number in range(1, len(self.methods) + 1):

            def climb(found, number=number):
                return keep_certified(found, attempt(number, found[0]))

            found = lax.cond(
                jnp.all(found[1].certified), lambda found: found, climb, found
            )
        return found


def keep_certified(
    before: tuple[States, Stats], after: tuple[States, Stats]
) -> tuple[States, Stats]:
    """Take the later answer, except for sequences whose earlier one is certified."""
    (states, stats), (new_states, new_stats) = before, after
    kept = stats.certified

    def choose(old, new):
        after_batch = (1,) * (old.ndim - 1 - kept.ndim)
        return jnp.where(kept.reshape(1, *kept.shape, *after_batch), old, new)

    return jtu.tree_map(choose, states, new_states), stats.unless_certified(new_stats)


class Windows(AbstractSolver):
    """Solve one window of time after the other, and carry the state between them.

    The memory beside inputs and states is that of one window, whatever T is. A method
    only has to predict the states of one window. So cells that are hard over the whole
    sequence may be easy over a window.

    **Arguments:**

    - `solver`: the solver of each window, any except `Windows`.
    - `length`: steps in a window. The last window overlaps the one before it if the
      length does not divide T.

    Counts in the statistics are summed over the windows. The residual, and each entry
    of its history, is the largest of all windows.

    **Raises:** `ValueError` for a length that is not a positive whole number,
    `TypeError` for anything that is not a solver, and for windows within windows.
    """

    solver: AbstractSolver
    length: int = eqx.field(static=True)

    def __check_init__(self):
        check_solver("Windows", self.solver)
        if isinstance(self.solver, Windows):
            raise TypeError("Windows: `solver` is itself a `Windows`; give its solver.")
        hint = ": the number of steps that are solved together"
        check_count("Windows", "length", self.length, least=1, hint=hint)

    def check(self, where: str, steps: int) -> None:
        if time_shards(steps) > 1:
            raise ValueError(
                f"{where}: `solver` is a `Windows`, which solves one window of time "
                "after the other, but time is sharded across devices (the mesh in "
                'context has an axis "time"), so that only one of them would work at a '
                "time. Pass the solver of the windows itself, or use a mesh without an "
                'axis "time".'
            )
        self.solver.check(where, steps)

    @property
    def residuals_kept(self) -> int:
        return self.solver.residuals_kept

    @property
    def use_joint_newton(self) -> bool:
        return self.solver.use_joint_newton

    def for_stepping(self) -> AbstractSolver:
        return Windows(self.solver.for_stepping(), self.length)

    def only_steps(self, steps: int) -> bool:
        return self.solver.only_steps(steps)

    def run(self, problem, guess, limit):
        """Solve the windows, reading inputs and writing states in place."""
        steps, h0 = problem.steps, problem.h0
        refuse_symbolic("solve", "`solver` `Windows`", "Pass the solver itself", steps)
        length = min(self.length, steps)
        count = -(-steps // length)

        def window(tree, start):
            return jtu.tree_map(
                lambda x: lax.dynamic_slice_in_dim(x, start, length, axis=0), tree
            )

        def state_before(start, h, states):
            at = jnp.maximum(start - 1, 0)
            before = lax.dynamic_index_in_dim(states, at, keepdims=False)
            return jnp.where(start == 0, h, before)

        def body(states, number):
            start = jnp.minimum(number * length, steps - length)
            before = (
                state_before(start, *pair) for pair in zip(h0, states, strict=True)
            )
            part = problem.replace(
                inputs=window(problem.inputs, start), h0=tuple(before)
            )
            found, stats = self.solver.run(part, window(guess, start), limit)
            states = tuple(
                lax.dynamic_update_slice_in_dim(s, new, start, axis=0)
                for s, new in zip(states, found, strict=True)
            )
            return states, (start, stats)

        empty = tuple(vary(jnp.zeros((steps, *h.shape), h.dtype), h) for h in h0)
        numbers = jnp.arange(count, dtype=jnp.int32)
        states, (starts, stats) = lax.scan(body, empty, numbers)
        return states, stats.over_windows(starts, length, steps)


class Auto(AbstractSolver):
    """Choose the method by platform, size and structure; the answer is always right.

    If solving in parallel over time is faster, this first tries a [`pararnn.Ladder`][]
    of a few cheap steps on segments. If any sequence is not certified by then, the
    sequential loop runs, and `stats["sequential"]` says so. If devices share time, the
    ladder is tried on every platform.

    **Arguments:** `rtol`, `atol`, as for [`pararnn.Newton`][].

    **Raises:** `ValueError` for negative tolerances.
    """

    rtol: float | None = eqx.field(static=True, default=None)
    atol: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_tolerances("Auto", self.rtol, self.atol)

    def for_stepping(self) -> AbstractSolver:
        return Sequential()

    def choose(self, problem, channels):
        return self._ladder(problem, channels, None).choose(problem, channels)

    def run(self, problem, guess, limit):
        channels = problem.recurrence.width * math.prod(problem.batch_shape)
        return self._ladder(problem, channels, limit).run(problem, guess, None)

    def _ladder(self, problem, channels: int, limit: int | None) -> Ladder:
        return choose_ladder(
            self,
            problem.steps,
            channels,
            problem.find_structure,
            limit,
            time_shards(problem.steps),
        )


def choose_ladder(
    auto: Auto,
    steps: int,
    channels: int,
    find_structure: Callable[[], Structure],
    limit: int | None = None,
    shards: int = 1,
) -> Ladder:
    """Return the ladder to climb; without methods it is the sequential loop.

    **Arguments:** `channels`, the number of entries in one step's state, including the
    batch; `limit`, the user's limit on the steps of each rung; `shards`, the number of
    devices that share time.

    CPU: the loop. XLA compiles a small loop to plain machine code, and 16 channels
    already fill the vector units. Only a single narrow sequence can gain from parallel
    time, and whether it does depends on the machine (diagonal GRU with one channel in
    float32, ms for the forward solve; the best of 8 to 256 segments):

    | machine                          | T      | loop | Newton, 2 steps |
    |----------------------------------|--------|------|-----------------|
    | 2 cores, AMD EPYC, AVX-512 (a)   | 16384  | 0.62 | 0.28            |
    | the same (a)                     | 131072 | 4.94 | 2.27            |
    | another such machine (b)         | 4096   | 0.16 | 0.53            |
    | the same (b)                     | 16384  | 0.63 | 1.03            |

    GPU (a model of the cost; not measured): a step of the loop is a few kernel
    launches, which take about 10 us for any cell. Three sweeps of Newton push `size`
    tangents through blocks of `size`: 2 * 3 * 3 * channels * size^2 operations at each
    step with three gates. At 20 Tflop/s these take 10 us at channels * size^2 = 1e7.
    Beyond that the loop runs at once. Below it, segments have 16 steps, or more if
    their Jacobians would take more than 1 GiB in float32.

    The first rung is one step of Jacobi: enough for packed sequences that are shorter
    than a segment, and cheap beside Newton's steps otherwise (trained cells, in
    docs/benchmarks.md). No rung is damped: if a few steps of Newton's method do not
    converge, the loop is cheaper than the many damped steps that would
    (docs/devdocs/solver.md).

    If devices share time, the loop would let only one of them work at a time. So time
    is always cut into segments, on a CPU into one for each device.
    """
    if is_symbolic(steps, channels) and shards == 1:
        return Ladder(())
    if jax.default_backend() == "cpu":
        if shards == 1:
            return Ladder(())
        segments, limits = shards, (1, 3)
    elif shards == 1 and steps < 64:
        return Ladder(())
    else:
        size, limits = find_structure().size, (1, 8)
        segments = _count_segments(steps, channels, size, shards)
        if shards == 1 and (segments < 4 or channels * size**2 > _MAX_WORK_PER_STEP):
            return Ladder(())
        segments = max(shards, segments)
    methods = (
        Jacobi(segments, rtol=auto.rtol, atol=auto.atol),
        Newton(segments, rtol=auto.rtol, atol=auto.atol),
    )
    return Ladder(methods, limits if limit is None else limit)


def _count_segments(steps: int, channels: int, size: int, devices: int = 1) -> int:
    """Return the number of segments of 16 steps, or fewer if memory is short."""
    room = devices * _MAX_JACOBIAN_BYTES // (4 * max(1, channels) * max(1, size))
    return min(steps // 16, room)
