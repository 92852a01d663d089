"""The part of a step that needs no state, computed for all steps at once.

Most cells project their input, `W @ x + b`. Written inside of the step, that is a
product of a matrix and a vector at every step, and in Newton's method at every step of
every iteration. Here it is found in the cell's program and done once, as one matrix
product over time.

Only the forward solve is divided so, which no derivative passes through: the rule of
the derivative sees the cell as it was written.
"""

import copy
import math
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.tree_util as jtu

from ._program import (
    evaluate,
    inner_programs,
    part_of,
    primitives_of,
    variables,
    without_calls,
)
from ._recurrence import Batch, Recurrence, _shape_dtype

PRODUCTS = {"dot_general", "conv_general_dilated"}
# They compute nothing: XLA makes them part of what reads them.
LAYOUTS = {"broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "split"}

# What a number that is stored for each step, and read by it, costs in operations; and
# the part of a step's operations below which saving them is not worth a program.
STORED = 8
WORTHWHILE = 1 / 8
# Prepared numbers that stay in cache until they are read. They are a sixteenth of the
# whole at most, for the sake of memory.
WINDOW = 2**18


class Division(NamedTuple):
    """A step as `advance(h, prepare(x))`, both programs of the cell's constants too."""

    prepare: jex.core.Jaxpr
    advance: Recurrence


def divide(recurrence: Recurrence) -> Division | None:
    """The two parts of a step, or `None` where nothing is gained by them."""
    # An implicit step is one loop; what has effects keeps its place in time.
    if recurrence.refinement is not None or recurrence.jaxpr.effects:
        return None
    if not PRODUCTS & primitives_of(recurrence.jaxpr):
        return None
    count, width = len(recurrence.constant_structs), len(recurrence.state_leaves)
    program = without_calls(
        recurrence.jaxpr,
        *(*recurrence.constant_structs, *recurrence.state_leaves),
        *recurrence.x_structs,
    )
    constants, h, x = _split(program.invars, count, count + width)
    cut = _cut(program, h, x)
    if not cut.worthwhile:
        return None
    advance = copy.copy(recurrence)
    advance.jaxpr = part_of(
        program, cut.advancing, [*h, *cut.stored], program.outvars, constants
    )
    advance.x_structs = [_shape_dtype(v.aval) for v in cut.stored]
    return Division(part_of(program, cut.prepared, x, cut.stored, constants), advance)


class InputPart:
    """A division of the step, over the batch axes of a problem.

    **Attributes:** `batch`, the problem that is left once the inputs are prepared.
    """

    def __init__(self, batch: Batch, division: Division):
        self._levels = batch.levels
        self._division = division
        self.batch = Batch(division.advance)
        for parameters, (leaves, reset) in batch.levels:
            varies = jtu.tree_leaves((parameters[0], leaves))
            made = tuple(0 if varies else None for _ in division.prepare.outvars)
            self.batch = self.batch.under(parameters, (made, reset))

    def prepare(self, parameters, inputs):
        """The inputs of `batch`, `[T, *batch, ...]`, from those of the problem."""
        constants, _ = parameters
        leaves, reset = inputs

        def at_one_step(constants, leaves):
            return tuple(evaluate(self._division.prepare, constants, *leaves))

        over = at_one_step
        for (constants_axes, _), (leaves_axes, _) in self._levels:
            axes = constants_axes, leaves_axes
            if jtu.tree_leaves(axes):
                over = jax.vmap(over, in_axes=axes)
        return jax.vmap(over, in_axes=(None, 0))(constants, leaves), reset

    def window(self, steps: int, sequences: int) -> int:
        """How many steps to prepare at once, where they are then taken one by one."""
        numbers = sequences * _size(self._division.prepare.outvars)
        return max(32, min(steps // 16, WINDOW // max(1, numbers)))


class _Cut(NamedTuple):
    """Equations of a step, and the numbers that go from the first to the others."""

    prepared: list[Any]
    advancing: list[Any]
    stored: list[jex.core.Var]
    worthwhile: bool


def _cut(program: jex.core.Jaxpr, h, x) -> _Cut:
    """Prepare what depends on the input and not on the state.

    But not what only makes numbers into more numbers, such as a broadcast, at the end
    of it: then the fewer are stored.
    """
    of_h, of_x = _reached(program, h), _reached(program, x)
    mixed = [e for e in program.eqns if not of_h.isdisjoint(e.outvars)]
    read_later = _read(mixed) | set(variables(program.outvars))
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
    made = [v for eqn in reversed(prepared) for v in eqn.outvars]
    stored = [v for v in (*x, *made) if v in read_later]
    saved = sum(map(_operations, prepared))
    gain = saved - STORED * max(0, _size(stored) - _size(x))
    of_either = sum(_operations(e) for e in mixed) + saved
    return _Cut(
        _with_constants(program, prepared, of_x | of_h, stored),
        _with_constants(program, mixed + delayed, of_x | of_h, program.outvars),
        stored,
        bool(stored) and gain > WORTHWHILE * of_either,
    )


def _split(sequence, *bounds):
    starts, ends = (0, *bounds), (*bounds, len(sequence))
    return [sequence[a:b] for a, b in zip(starts, ends, strict=True)]


def _reached(program: jex.core.Jaxpr, start) -> set:
    """All that depends on some variables, they themselves included."""
    reached = set(start)
    for eqn in program.eqns:
        if not reached.isdisjoint(variables(eqn.invars)):
            reached.update(eqn.outvars)
    return reached


def _read(eqns) -> set:
    return {v for eqn in eqns for v in variables(eqn.invars)}


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


def _size(variables) -> int:
    return sum(math.prod(v.aval.shape) for v in variables)


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
