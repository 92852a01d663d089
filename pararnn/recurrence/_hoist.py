"""What can be computed before the steps: stacked weights, and what needs no state.

Cells are written as their equations, `W_r @ h`, `W_z @ h`, `W_n @ h`. At each step
these are small products, and one with the stacked weights takes up to half the time of
three. `merge_products` stacks the weights once, before the solve.

Most cells project their input, `W @ x + b`. Inside the step this is a matrix-vector
product at every step, and in Newton's method at every step of every iteration.
`split_step` takes it out of the step, so that the solver does it for many steps at
once, as one matrix product over time. Only the forward solve is split this way.
"""

import copy
import math
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ..jaxprs import (
    backward_slice,
    dependents_of,
    evaluate,
    evaluate_equation,
    inner_jaxprs,
    primitives_of,
    read,
    read_by,
    sub_jaxpr,
    variables,
    written_by,
)
from ._recurrence import Recurrence, shape_dtype
from ._stepwise import changes_under_vmap

PRODUCTS = {"dot_general", "conv_general_dilated"}
# These compute nothing: XLA fuses them into the operations that read them.
LAYOUT_ONLY = {"broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "split"}
# With a state of at least so many numbers, cheap operations stay in the step too: LSTM,
# 16 sequences of width 128, 24.8 ms outside, 20.7 within; a diagonal GRU of width 16,
# 2.1 ms outside, 2.8 within.
WIDE_ENOUGH = 64
_CHEAP = {"add", "add_any", "sub", "mul", "neg", "convert_element_type"}
# For all steps at once these would be more work: `vmap` takes every branch, and as many
# iterations as the longest loop.
NOT_HOISTABLE = {"cond", "while"}

# Storing a number for each step, and reading it again, costs as many operations.
COST_PER_STORED = 8
# Hoisting has to save at least this fraction of a step's operations.
MIN_GAIN = 1 / 8
# Hoisted values may be at most this many times as large as a state and an input.
MAX_GROWTH = 16


class SplitStep(NamedTuple):
    """A step as `advance(h, kept, prepare(x))`; both also take the cell's constants.

    `kept` are the positions of the leaves of x that `advance` reads itself.
    """

    prepare: jex.core.Jaxpr
    kept: tuple[int, ...]
    advance: Recurrence


def program_with_products(recurrence: Recurrence) -> jex.core.Jaxpr | None:
    """Return the program of a step that may be rewritten, if it has any products."""
    # An implicit step is one loop, and effects must stay in order.
    if recurrence.refinement is not None or recurrence.jaxpr.effects:
        return None
    if not PRODUCTS & primitives_of(recurrence.jaxpr):
        return None
    return recurrence.inlined()


def split_step(recurrence: Recurrence) -> SplitStep | None:
    """Split a step in two, or return `None` if that saves nothing."""
    program = program_with_products(recurrence)
    if program is None:
        return None
    count, width = len(recurrence.constant_structs), len(recurrence.state_leaves)
    constants, h, x = split_at(program.invars, count, count + width)
    partition = _partition(program, h, x)
    if not partition.worthwhile:
        return None
    kept = tuple(i for i, v in enumerate(x) if v in partition.read_later)
    made = [v for v in written_by(partition.prepared) if v in partition.read_later]
    left = [*(x[i] for i in kept), *made]
    # This copy describes the rest of the step, and is used for nothing else.
    advance = copy.copy(recurrence)
    given = [*constants, *h, *left]
    advance.jaxpr = sub_jaxpr(program, partition.advancing, given, program.outvars)
    advance.x_structs = [shape_dtype(v.aval) for v in left]
    prepare = sub_jaxpr(program, partition.prepared, [*constants, *x], made)
    return SplitStep(prepare, kept, advance)


class _Partition(NamedTuple):
    """The equations of a step, in two lists."""

    prepared: list[Any]
    advancing: list[Any]
    read_later: set[jex.core.Var]  # the variables that `advancing` reads, and others
    worthwhile: bool


def _partition(program: jex.core.Jaxpr, h, x) -> _Partition:
    """Prepare what depends on the input and not on the state.

    Operations at the end of this that only enlarge their operands, such as a broadcast,
    are left in the step, so that the smaller operands are stored. So are cheap ones of
    a wide cell, such as the addition of a bias: outside, each is another pass.
    """
    of_x = dependents_of(program, x)
    staying = [
        e
        for e in program.eqns
        if _must_stay_in_step(e) and not of_x.isdisjoint(e.outvars)
    ]
    of_h = dependents_of(program, [*h, *(v for e in staying for v in e.outvars)])
    mixed = [e for e in program.eqns if not of_h.isdisjoint(e.outvars)]
    read_later = read_by(mixed) | set(variables(program.outvars))
    prepared, delayed, read_before = [], [], set()
    wide = count_numbers(h) >= WIDE_ENOUGH
    for eqn in reversed(program.eqns):
        made = of_x.intersection(eqn.outvars) - of_h
        if made.isdisjoint(read_later | read_before):
            continue
        operands = of_x.intersection(variables(eqn.invars))
        simple = count_operations(eqn) <= count_numbers(eqn.outvars)
        growth = count_numbers(made) - count_numbers(operands - read_later)
        cheap = wide and growth >= 0 and eqn.primitive.name in _CHEAP
        if simple and (cheap or growth > 0) and made.isdisjoint(read_before):
            delayed.append(eqn)
            read_later |= operands
        else:
            prepared.append(eqn)
            read_before |= operands
    prepared.reverse()
    stored = read_later.intersection(written_by(prepared))
    saved = sum(map(count_operations, prepared))
    added = (
        count_numbers(stored)
        + count_numbers(read_later.intersection(x))
        - count_numbers(x)
    )
    gain = saved - COST_PER_STORED * max(0, added)
    of_either = sum(map(count_operations, mixed)) + saved
    largest = max((count_numbers(e.outvars) for e in prepared), default=0)
    small = max(largest, count_numbers(stored)) <= MAX_GROWTH * (
        count_numbers(h) + count_numbers(x)
    )
    return _Partition(
        _with_constants(program, prepared, of_x | of_h, stored),
        _with_constants(program, mixed + delayed, of_x | of_h, program.outvars),
        read_later,
        bool(stored) and small and gain > MIN_GAIN * of_either,
    )


def _must_stay_in_step(eqn) -> bool:
    """Return whether an equation has to be done one step at a time."""
    names = {eqn.primitive.name}
    for inner in inner_jaxprs(eqn.params):
        names |= primitives_of(inner)
    return not NOT_HOISTABLE.isdisjoint(names) or changes_under_vmap(eqn)


def split_at(sequence, *bounds):
    starts, ends = (0, *bounds), (*bounds, len(sequence))
    return [sequence[a:b] for a, b in zip(starts, ends, strict=True)]


def _with_constants(program: jex.core.Jaxpr, eqns, varying: set, outvars) -> list:
    """Return equations in the program's order, with the constant ones they need."""
    chosen = set(map(id, eqns))
    needed, found = set(variables(outvars)), []
    for eqn in reversed(program.eqns):
        constant = varying.isdisjoint(eqn.outvars)
        if id(eqn) in chosen or (constant and not needed.isdisjoint(eqn.outvars)):
            found.append(eqn)
            needed.update(variables(eqn.invars))
    return found[::-1]


def count_numbers(of) -> int:
    """Return how many numbers some variables hold."""
    return sum(math.prod(v.aval.shape) for v in of)


def count_operations(eqn) -> int:
    """Count multiplications and additions, and one for each number of other results."""
    name, results = eqn.primitive.name, count_numbers(eqn.outvars)
    inner = list(inner_jaxprs(eqn.params))
    if inner:
        turns = eqn.params.get("length", 1)
        return turns * sum(
            count_operations(e) for program in inner for e in program.eqns
        )
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2 * results * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
        return 2 * results * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    return 0 if name in LAYOUT_ONLY else results


class _Product(NamedTuple):
    """A product of an operand that changes from step to step with fixed weights.

    **Attributes:** `contract` and `batch`, the axes of the operand and of the weights
    that are summed over, and that are common; `free`, the remaining axis of the
    weights; `options`, what else two products must agree in.
    """

    eqn: Any
    operand: Any
    weights: Any
    contract: tuple[tuple[int, ...], tuple[int, ...]]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    free: int
    options: tuple

    @property
    def key(self):
        shape = list(self.weights.aval.shape)
        shape[self.free] = 0
        form = self.contract, self.batch, self.free, tuple(shape)
        return self.operand, form, self.weights.aval.dtype, self.options


def merge_products(recurrence: Recurrence) -> Recurrence:
    """Merge the products of a step that share an operand.

    The weights are stacked twice: the loop is faster where the axis summed over comes
    first, and the derivative where it comes last.
    """
    program = program_with_products(recurrence)
    if program is None:
        return recurrence
    count = len(recurrence.constant_structs)
    constants, moving = program.invars[:count], program.invars[count:]
    groups = _find_groups(program, dependents_of(program, moving))
    if not groups:
        return recurrence
    weights = [product.weights for group in groups for product in group]
    fixed = backward_slice(program, weights, constants)
    given = dict(zip(constants, recurrence.constants, strict=True))
    found = evaluate(fixed, *(given[v] for v in fixed.invars))
    stacks = [stack for last in (True, False) for stack in _stack(groups, found, last)]
    merged = copy.copy(recurrence)
    merged.add_constants(stacks, [None] * len(stacks))
    merged.distinct_constants = count
    for_derivative = copy.copy(merged)
    merged.jaxpr = _merged(program, groups, stacks, count, True)
    for_derivative.jaxpr = _merged(program, groups, stacks, count, False)
    merged.derivative_form = for_derivative
    return merged


def _find_groups(program: jex.core.Jaxpr, varying: set) -> list[list[_Product]]:
    groups: dict[Any, list[_Product]] = {}
    for eqn in program.eqns:
        product = _as_product(eqn, varying)
        if product is not None:
            groups.setdefault(product.key, []).append(product)
    return [group for group in groups.values() if len(group) > 1]


def _as_product(eqn, varying: set) -> _Product | None:
    """Return an equation as a product that can be merged with others, or `None`."""
    if eqn.primitive.name != "dot_general":
        return None
    moves = [isinstance(v, jex.core.Var) and v in varying for v in eqn.invars]
    if sum(moves) != 1:
        return None
    at = moves.index(True)
    contract, batch = (
        (tuple(axes[at]), tuple(axes[1 - at]))
        for axes in eqn.params["dimension_numbers"]
    )
    operand, weights = eqn.invars[at], eqn.invars[1 - at]
    if isinstance(weights, jex.core.Literal):
        return None
    taken = {*contract[1], *batch[1]}
    free = [axis for axis in range(weights.aval.ndim) if axis not in taken]
    # With one free axis in all, it is the last axis of the result.
    alone = operand.aval.ndim == len(contract[0]) + len(batch[0])
    if len(free) != 1 or not alone:
        return None
    names = ("precision", "preferred_element_type", "out_sharding")
    options = tuple(eqn.params.get(name) for name in names)
    return _Product(eqn, operand, weights, contract, batch, free[0], options)


def _stack(groups, weights, free_last: bool) -> list[Array]:
    """Return the stacked weights of each group.

    The common axes come first, then those summed over, with the free one after or
    before these.
    """
    given, stacks = iter(weights), []
    for group in groups:
        parts, common = [], len(group[0].batch[0])
        for product in group:
            summed, free = product.contract[1], (product.free,)
            inner = (*summed, *free) if free_last else (*free, *summed)
            parts.append(jnp.transpose(next(given), (*product.batch[1], *inner)))
        stacks.append(jnp.concatenate(parts, -1 if free_last else common))
    return stacks


def _merged(
    program: jex.core.Jaxpr, groups, stacks, before: int, free_last: bool
) -> jex.core.Jaxpr:
    """Return the program with one product for each group.

    It takes the stacks too, after the constants that came `before`.
    """
    first = {id(group[0].eqn): at for at, group in enumerate(groups)}
    replaced = {id(product.eqn) for group in groups for product in group}
    after = before + len(stacks)

    def run(*arguments):
        values = dict(
            zip(
                program.invars,
                (*arguments[:before], *arguments[after:]),
                strict=True,
            )
        )
        given = arguments[before:after]
        given = given[: len(groups)] if free_last else given[len(groups) :]
        for eqn in program.eqns:
            if id(eqn) in first:
                at = first[id(eqn)]
                values |= _multiply(groups[at], values, given[at], free_last)
            elif id(eqn) not in replaced:
                values |= evaluate_equation(program, eqn, values)
        return [read(v, values) for v in program.outvars]

    structs = [shape_dtype(v.aval) for v in program.invars]
    structs[before:before] = [shape_dtype(stack) for stack in stacks]
    return jax.make_jaxpr(run)(*structs).jaxpr


def _multiply(group: list[_Product], values: dict, stack, free_last: bool) -> dict:
    """Return the results of all products of a group, by variable."""
    one = group[0]
    common, summed = one.batch[0], one.contract[0]
    start = len(common) + (not free_last)
    axes = tuple(range(start, start + len(summed)))
    precision, dtype, sharding = one.options
    whole = lax.dot_general(
        values[one.operand],
        stack,
        ((summed, axes), (common, tuple(range(len(common))))),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=sharding,
    )
    sizes = [product.weights.aval.shape[product.free] for product in group]
    parts = lax.split(whole, sizes, axis=whole.ndim - 1)
    results = (product.eqn.outvars[0] for product in group)
    return dict(zip(results, parts, strict=True))
