"""Hoisting: what a step computes without the state is computed for all steps at once.

Most cells project their input, `W @ x + b`. Inside the step that is a product of a
matrix and a vector at every step, and in Newton's method at every step of every
iteration. Here it is found in the cell's program and done once, as one matrix product
over time.

Only the forward solve is split this way. The derivative sees the cell as written.
"""

import copy
import math
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.tree_util as jtu

from .._checks import is_symbolic
from ..jaxprs import (
    evaluate,
    inner_programs,
    primitives_of,
    reached,
    read_by,
    sub_jaxpr,
    variables,
    without_calls,
    written_by,
)
from ._problem import BoundProblem, Recurrence, _shape_dtype
from ._stepwise import must_step

PRODUCTS = {"dot_general", "conv_general_dilated"}
# These compute nothing: XLA makes them part of what reads them.
LAYOUTS = {"broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "split"}
# These would be more work for all steps at once: `vmap` takes every branch, and as many
# turns as the longest loop.
NOT_HOISTABLE = {"cond", "while"}

# The operations that storing a number for each step, and reading it there, costs.
COST_PER_STORED = 8
# Fewer operations saved than this part of a step are not worth a program.
WORTHWHILE = 1 / 8
# Nothing that is hoisted may be larger than this many times a state and an input.
LARGEST = 16
# A loop that hoists a window of steps at a time: as many numbers as stay in cache until
# they are read, and at least so many steps.
WINDOW, SHORTEST = 2**18, 32


class SplitStep(NamedTuple):
    """A step as `advance(h, kept, prepare(x))`; both also take the cell's constants.

    `kept` are the places of the leaves of x that `advance` reads as they are.
    """

    prepare: jex.core.Jaxpr
    kept: tuple[int, ...]
    advance: Recurrence


def split_step(recurrence: Recurrence) -> SplitStep | None:
    """Split a step in two, or return `None` where that gains nothing."""
    # An implicit step is one loop, and what has effects keeps its place in time.
    if recurrence.refinement is not None or recurrence.jaxpr.effects:
        return None
    if not PRODUCTS & primitives_of(recurrence.jaxpr):
        return None
    count, width = len(recurrence.constant_structs), len(recurrence.state_leaves)
    program = without_calls(jex.core.ClosedJaxpr(recurrence.jaxpr, [])).jaxpr
    constants, h, x = _split(program.invars, count, count + width)
    cut = _cut(program, h, x)
    if not cut.worthwhile:
        return None
    kept = tuple(i for i, v in enumerate(x) if v in cut.read_later)
    made = [v for v in written_by(cut.prepared) if v in cut.read_later]
    left = [*(x[i] for i in kept), *made]
    # This copy describes the rest of the step; nothing else is asked of it.
    advance = copy.copy(recurrence)
    given = [*constants, *h, *left]
    advance.jaxpr = sub_jaxpr(program, cut.advancing, given, program.outvars)
    advance.x_structs = [_shape_dtype(v.aval) for v in left]
    prepare = sub_jaxpr(program, cut.prepared, [*constants, *x], made)
    return SplitStep(prepare, kept, advance)


def hoist(problem: BoundProblem) -> BoundProblem:
    """Compute for all steps what needs no state; return the problem that is left."""
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
    """How many steps to hoist at a time for a loop that then takes them one by one.

    To save memory, at most a sixteenth of all, unless those are too few.
    """
    steps, sequences = problem.steps, math.prod(problem.batch_shape)
    if problem.split is None or is_symbolic(steps, sequences):
        return SHORTEST
    numbers = sequences * _size(problem.split.prepare.outvars)
    return max(SHORTEST, min(steps // 16, WINDOW // max(1, numbers)))


class _Cut(NamedTuple):
    """Equations of a step, and what those of the second list read, among others."""

    prepared: list[Any]
    advancing: list[Any]
    read_later: set[jex.core.Var]
    worthwhile: bool


def _cut(program: jex.core.Jaxpr, h, x) -> _Cut:
    """Prepare what depends on the input and not on the state.

    But not what only makes numbers into more numbers, such as a broadcast, at the end
    of it: then the fewer are stored.
    """
    of_x = reached(program, x)
    staying = [e for e in program.eqns if _stays(e) and not of_x.isdisjoint(e.outvars)]
    of_h = reached(program, [*h, *(v for e in staying for v in e.outvars)])
    mixed = [e for e in program.eqns if not of_h.isdisjoint(e.outvars)]
    read_later = read_by(mixed) | set(variables(program.outvars))
    prepared, delayed, read_before = [], [], set()
    for eqn in reversed(program.eqns):
        made = of_x.intersection(eqn.outvars) - of_h
        if made.isdisjoint(read_later | read_before):
            continue
        operands = of_x.intersection(variables(eqn.invars))
        simple = _operations(eqn) <= _size(eqn.outvars)
        enlarges = _size(operands - read_later) < _size(made)
        if simple and enlarges and made.isdisjoint(read_before):
            delayed.append(eqn)
            read_later |= operands
        else:
            prepared.append(eqn)
            read_before |= operands
    prepared.reverse()
    stored = read_later.intersection(written_by(prepared))
    saved = sum(map(_operations, prepared))
    added = _size(stored) + _size(read_later.intersection(x)) - _size(x)
    gain = saved - COST_PER_STORED * max(0, added)
    of_either = sum(map(_operations, mixed)) + saved
    largest = max((_size(e.outvars) for e in prepared), default=0)
    small = max(largest, _size(stored)) <= LARGEST * (_size(h) + _size(x))
    return _Cut(
        _with_constants(program, prepared, of_x | of_h, stored),
        _with_constants(program, mixed + delayed, of_x | of_h, program.outvars),
        read_later,
        bool(stored) and small and gain > WORTHWHILE * of_either,
    )


def _stays(eqn) -> bool:
    """Whether an equation has to be done one step at a time."""
    names = {eqn.primitive.name}
    for inner in inner_programs(eqn.params):
        names |= primitives_of(inner)
    return not NOT_HOISTABLE.isdisjoint(names) or must_step(eqn)


def _split(sequence, *bounds):
    starts, ends = (0, *bounds), (*bounds, len(sequence))
    return [sequence[a:b] for a, b in zip(starts, ends, strict=True)]


def _with_constants(program: jex.core.Jaxpr, eqns, varying: set, outvars) -> list:
    """Equations in the program's order, with those that they need of constants."""
    chosen = set(map(id, eqns))
    needed, found = set(variables(outvars)), []
    for eqn in reversed(program.eqns):
        constant = varying.isdisjoint(eqn.outvars)
        if id(eqn) in chosen or (constant and not needed.isdisjoint(eqn.outvars)):
            found.append(eqn)
            needed.update(variables(eqn.invars))
    return found[::-1]


def _size(of) -> int:
    """How many numbers some variables hold."""
    return sum(math.prod(v.aval.shape) for v in of)


def _operations(eqn) -> int:
    """Multiplications and additions, and one for each number of any other result."""
    name, results = eqn.primitive.name, _size(eqn.outvars)
    inner = list(inner_programs(eqn.params))
    if inner:
        turns = eqn.params.get("length", 1)
        return turns * sum(_operations(e) for program in inner for e in program.eqns)
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2 * results * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
        return 2 * results * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    return 0 if name in LAYOUTS else results
