"""The problem: a recurrence with its data, in one batch."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree

from .._checks import is_symbolic
from ..jaxprs import evaluate
from ..recurrence import Recurrence, SplitStep, Structure, count_numbers
from ..scan import split_time

# The sequential loop hoists a window of steps at a time: as many numbers as stay in
# cache until they are read, but at least MIN_WINDOW steps.
WINDOW_SIZE, MIN_WINDOW = 2**18, 8


class BoundProblem(eqx.Module):
    """A recurrence with its data: all that a solver needs to know.

    Under `vmap` the data has batch axes, which a solver handles itself: `lift` maps a
    step over all of them, and everything else is array operations.

    **Attributes:**

    - `recurrence`: the step.
    - `parameters`: what the cell closes over, and the state that resets select.
    - `inputs`: the leaves of `xs`, `[T, *batch, ...]`, and the resets.
    - `h0`: leaves `[*batch, ...]`.
    - `find_structure()`: the structure of the Jacobian, found at the first call.
    - `split`: the step in two parts, if one of them needs no state; see `hoist`.
    - `axes`: the batch axes, innermost first. For each: which parameters and inputs
        have it, and its name if the cell communicates along it.
    """

    recurrence: Recurrence = eqx.field(static=True)
    parameters: PyTree[Array]
    inputs: PyTree[Array]
    h0: tuple[Array, ...]
    find_structure: Callable[[], Structure] = eqx.field(static=True)
    split: SplitStep | None = eqx.field(static=True, default=None)
    axes: tuple = eqx.field(static=True, default=())

    @property
    def steps(self) -> int:
        return jtu.tree_leaves(self.inputs)[0].shape[0]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.h0[0].shape[: len(self.axes)]

    @property
    def rank(self) -> int:
        """The number of batch axes."""
        return len(self.axes)

    @property
    def arrays(self) -> tuple:
        return self.parameters, self.inputs, self.h0

    def with_arrays(self, arrays: tuple) -> "BoundProblem":
        parameters, inputs, h0 = arrays
        return self.replace(parameters=parameters, inputs=inputs, h0=h0)

    def without_arrays(self) -> "BoundProblem":
        """Return what is static of the problem, to be kept in a closure."""
        return self.with_arrays((None, None, ()))

    def replace(self, **changes: Any) -> "BoundProblem":
        return dataclasses.replace(self, **changes)

    def under(self, parameters_axes, inputs_axes, name=None) -> "BoundProblem":
        """Return the problem with one more batch axis, in front of the others."""
        axis = parameters_axes, inputs_axes, name
        return self.replace(axes=(*self.axes, axis))

    def segmented(self, count: int) -> "BoundProblem":
        """Cut time into segments, which become one more batch axis.

        Inputs `[T, ...]` become `[length, count, ...]`; the last segment repeats the
        last input. `h0` is unchanged.
        """
        split = jtu.tree_map(lambda x: split_time(x, count), self.inputs)
        fixed, moving = (
            jtu.tree_map(lambda _: axis, tree)
            for axis, tree in ((None, self.parameters), (0, split))
        )
        return self.under(fixed, moving).replace(inputs=split)

    def lift(self, fn: Callable, *, extra: tuple = (), out: Any = 0) -> Callable:
        """Map `fn(parameters, state, inputs, *extra)` over all batch axes.

        `extra` and `out` are the positions of the batch axes in further arguments and
        in the result.
        """
        for parameters_axes, inputs_axes, name in self.axes:
            axes = (parameters_axes, 0, inputs_axes, *extra)
            fn = jax.vmap(fn, in_axes=axes, out_axes=out, axis_name=name)
        return fn

    def batch_first(self) -> PyTree[Array]:
        """Return the inputs as `[*batch, T, ...]`, which is how `vmap` has them.

        Where only a window of them is read at a time, or only after a failure, XLA then
        need not transpose the whole sequence first.
        """
        return self._map_inputs(self.inputs, lambda x, rank: jnp.moveaxis(x, 0, rank))

    def at_window(self, inputs: PyTree[Array], start, length: int) -> "BoundProblem":
        """Return the problem of a window of inputs given as `[*batch, T, ...]`."""

        def take(x, rank):
            x = lax.dynamic_slice_in_dim(x, start, length, rank)
            return jnp.moveaxis(x, rank, 0)

        return self.replace(inputs=self._map_inputs(inputs, take))

    def _map_inputs(self, inputs, fn: Callable[[Array, int], Array]) -> PyTree[Array]:
        """Map over leaves and the number of their batch axes."""
        leaves, tree = jtu.tree_flatten(inputs, is_leaf=_is_none)
        axes = [jtu.tree_leaves(axes, is_leaf=_is_none) for _, axes, _ in self.axes]
        for at, leaf in enumerate(leaves):
            rank = sum(own[at] is not None for own in axes)
            leaves[at] = None if leaf is None else fn(leaf, rank)
        return jtu.tree_unflatten(tree, leaves)

    def step(self, h, x):
        """Take one step of states `[*batch, ...]`, by leaf."""
        return self.lift(self.recurrence.step)(self.parameters, h, x)

    def ravel(self, h) -> Array:
        """Return states `[*batch, ...]` by leaf as real vectors `[*batch, width]`."""
        return self._over_batch(self.recurrence.ravel)(h)

    def unravel(self, v: Array) -> tuple[Array, ...]:
        """Return real vectors `[*batch, width]` as states, by leaf."""
        return self._over_batch(self.recurrence.unravel)(v)

    def _over_batch(self, fn: Callable) -> Callable:
        for _ in self.axes:
            fn = jax.vmap(fn)
        return fn


def _is_none(leaf) -> bool:
    return leaf is None


def hoist(problem: BoundProblem) -> BoundProblem:
    """Compute for all steps what needs no state; return the rest of the problem."""
    split = problem.split
    if split is None:
        return problem
    (leaves, reset), axes = problem.inputs, []
    for parameters_axes, (leaves_axes, reset_axis), name in problem.axes:
        batched = jtu.tree_leaves((parameters_axes[0], leaves_axes))
        kept = (leaves_axes[i] for i in split.kept)
        made = (0 if batched else None for _ in split.prepare.outvars)
        axes.append((parameters_axes, ((*kept, *made), reset_axis), name))
    kept = (leaves[i] for i in split.kept)
    inputs = (*kept, *_prepare(problem, split)), reset
    return problem.replace(
        recurrence=split.advance, inputs=inputs, axes=tuple(axes), split=None
    )


def _prepare(problem: BoundProblem, split: SplitStep) -> tuple:
    def at_one_step(constants, leaves):
        return tuple(evaluate(split.prepare, *constants, *leaves))

    over = at_one_step
    for (constants_axes, _), (leaves_axes, _), _ in problem.axes:
        axes = constants_axes, leaves_axes
        if jtu.tree_leaves(axes):
            over = jax.vmap(over, in_axes=axes)
    return jax.vmap(over, in_axes=(None, 0))(problem.parameters[0], problem.inputs[0])


def hoisting_window(problem: BoundProblem) -> int:
    """Return how many steps the sequential loop hoists at a time.

    To save memory, this is at most a sixteenth of all steps, unless that is too few.
    """
    steps, sequences = problem.steps, math.prod(problem.batch_shape)
    if problem.split is None or is_symbolic(steps, sequences):
        return MIN_WINDOW
    numbers = sequences * count_numbers(problem.split.prepare.outvars)
    return max(MIN_WINDOW, min(steps // 16, WINDOW_SIZE // max(1, numbers)))
