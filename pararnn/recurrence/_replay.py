"""Replay: the derivative takes products, or gates, from the loop that computed them.

A derivative linearises the cell at the solution, and so evaluates it again. Most of the
work of a wide cell are its matrix products. The loop computes them anyway, and can
return them. The derivative then only repeats what is cheap. This takes memory, one
number for each entry of a product, but no more than backpropagation through the loop.

What is kept are sums of products, such as `W x + U h + b`, if nothing else reads the
summands. If all that reads a sum is a function whose derivative follows from its
result, such as tanh, then the result is kept instead. In the repeated step, the kept
value stands for the sum, or the result, and has its derivative. So derivatives of any
order are those of the cell.
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend as jex
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, PyTree

from .._checks import is_symbolic
from ..jaxprs import (
    dependents_of,
    evaluate,
    evaluate_equation,
    read,
    read_by,
    sub_jaxpr,
    variables,
    written_by,
)
from ._hoist import (
    LAYOUT_ONLY,
    PRODUCTS,
    count_numbers,
    count_operations,
    program_with_products,
    split_at,
)
from ._recurrence import Recurrence, shape_dtype, split_by_tangents, states_before

# Keeping a number, and reading it again, costs as many operations.
COST_PER_KEPT = 8
# Up to so many entries in a step's states, of all sequences, everything is recomputed:
# that takes a fraction of the memory.
MAX_RECOMPUTED = 1024
# What may follow a product within a sum: it adds no work, and no entries.
_SUMS = {"add", "add_any", "sub", "neg", "convert_element_type", *LAYOUT_ONLY}
# The derivatives of functions, from their results.
_SLOPES: dict[str, Callable[[Array], Array]] = {
    "logistic": lambda y: y * (1 - y),
    "tanh": lambda y: (1 + y) * (1 - y),
    "exp": lambda y: y,
}


class Replay(NamedTuple):
    """A step that also returns what its products lead to, and one that is given it.

    **Attributes:**

    - `recorded`: its step returns the leaves of the state, and then the values kept.
    - `places`: where the values are among what that step returns. A value that is a
        state too is returned once.
    - `replayed`: its step takes these values as further leaves of the input.
    """

    recorded: Recurrence
    places: tuple[int, ...]
    replayed: Recurrence

    def tangents(self, primals, tangents) -> tuple[Array, ...]:
        """Return the tangents of the values kept, leaves `[T, ...]`.

        `primals` are (parameters, inputs, h0, states), and `tangents` theirs.
        """
        moved, held = split_by_tangents(primals, tangents)

        def values(moved):
            parameters, inputs, h0, states = eqx.combine(held, moved)
            step = jax.vmap(self.recorded.step, in_axes=(None, 0, 0))
            ends = step(parameters, states_before(h0, states), inputs)
            return tuple(ends[place] for place in self.places)

        return jax.jvp(values, (moved,), (tangents,))[1]


class _Stage(NamedTuple):
    """Sums of products that do not depend on each other, and what is kept of them.

    **Attributes:** `sums`, the program that computes them; `applied`, for each the
    equation of the function applied to it, or `None`; `kept`, the results.
    """

    sums: jex.core.Jaxpr
    applied: list[Any]
    kept: list[jex.core.Var]

    @property
    def eqns(self) -> list[Any]:
        return [*self.sums.eqns, *(e for e in self.applied if e is not None)]


def count_sequences(arrays: PyTree[Array]) -> int:
    """Return how many sequences there are: the product of all batch axes of `vmap`.

    Within `vmap` an array has the shape of one sequence, but a `vmap` rule is told the
    size of the axis. A `vmap` that comes later, as in `jax.vmap(jax.grad(...))`, is not
    counted; nor is a batch of symbolic size, as in `jax.export`.
    """
    sizes = []

    @custom_vmap
    def look(arrays):
        return jnp.zeros((), bool)

    @look.def_vmap
    def _(size, batched, arrays):
        sizes.append(size)
        return look(arrays), False

    look(jax.lax.stop_gradient(arrays))
    return 1 if is_symbolic(*sizes) else math.prod(sizes)


def find_replay(recurrence: Recurrence) -> Replay | None:
    """Find what to keep of a step, or return `None` if that saves nothing."""
    program = program_with_products(recurrence)
    stages = [] if program is None else _find_stages(recurrence, program)
    if program is None or not stages:
        return None
    recorded = copy.copy(recurrence)
    kept = [v for stage in stages for v in stage.kept]
    outvars = [*program.outvars, *(v for v in kept if v not in program.outvars)]
    recorded.jaxpr = sub_jaxpr(program, program.eqns, program.invars, outvars)
    replayed = copy.copy(recurrence.for_derivative)
    structs = [shape_dtype(v.aval) for v in kept]
    again = replayed.inlined()
    replayed.jaxpr = _replayed(again, _find_stages(replayed, again), structs)
    replayed.x_structs = [*recurrence.x_structs, *structs]
    return Replay(recorded, tuple(map(outvars.index, kept)), replayed)


def _find_stages(recurrence: Recurrence, program: jex.core.Jaxpr) -> list[_Stage]:
    """Return the sums of products that are worth keeping.

    A product whose operands depend on other products belongs to a later stage.
    """
    moving = program.invars[len(recurrence.constant_structs) :]
    varying = dependents_of(program, moving)
    depth: dict[jex.core.Var, int] = dict.fromkeys(varying, 0)
    members: dict[int, list] = {}
    sums: set[jex.core.Var] = set()
    for eqn in program.eqns:
        operands = varying.intersection(variables(eqn.invars))
        if not operands:
            continue
        deepest = max(depth[v] for v in operands)
        name = eqn.primitive.name
        joins = name in _SUMS and operands <= sums
        joins = joins and all(depth[v] == deepest for v in operands)
        if name in PRODUCTS or (joins and not _enlarges(eqn, operands)):
            deepest += name in PRODUCTS
            members.setdefault(deepest, []).append(eqn)
            sums.update(eqn.outvars)
        depth |= dict.fromkeys(eqn.outvars, deepest)
    stages = (_as_stage(program, members[d]) for d in sorted(members))
    return [stage for stage in stages if stage is not None]


def _enlarges(eqn, operands) -> bool:
    return count_numbers(eqn.outvars) > count_numbers(operands)


def _as_stage(program: jex.core.Jaxpr, eqns) -> _Stage | None:
    """Return equations as a stage, unless computing them again is as cheap."""
    inside = set(map(id, eqns))
    outside = read_by(e for e in program.eqns if id(e) not in inside)
    outside |= set(variables(program.outvars))
    made = written_by(eqns)
    kept = [v for v in made if v in outside]
    if sum(map(count_operations, eqns)) <= COST_PER_KEPT * count_numbers(kept):
        return None
    operands = variables([v for e in eqns for v in e.invars])
    sums = sub_jaxpr(program, eqns, [v for v in operands if v not in made], kept)
    applied = [_only_function_of(program, v) for v in kept]
    pairs = zip(kept, applied, strict=True)
    return _Stage(sums, applied, [v if e is None else e.outvars[0] for v, e in pairs])


def _only_function_of(program: jex.core.Jaxpr, v: jex.core.Var):
    """Return the equation that alone reads a variable, if its slope is known."""
    readers = [e for e in program.eqns if v in variables(e.invars)]
    if len(readers) != 1 or v in variables(program.outvars):
        return None
    (reader,) = readers
    # At the highest accuracy JAX differentiates at the argument.
    precise = reader.params.get("accuracy") is lax.AccuracyMode.HIGHEST
    known = reader.primitive.name in _SLOPES and not precise
    return reader if known else None


def _replayed(program: jex.core.Jaxpr, stages, structs) -> jex.core.Jaxpr:
    """Return the program with the results of some stages as its last arguments."""
    kept = [v for stage in stages for v in stage.kept]
    within = {id(e) for stage in stages for e in stage.eqns}

    def run(*arguments):  # the arguments of the program, and what was kept
        own, given = split_at(arguments, len(program.invars))
        values = dict(zip(program.invars, own, strict=True))
        known = dict(zip(kept, given, strict=True))

        def advance(eqns):
            """Evaluate all equations that only need what is known; return the rest."""
            left = []
            for eqn in eqns:
                if all(v in values for v in variables(eqn.invars)):
                    values.update(evaluate_equation(program, eqn, values))
                else:
                    left.append(eqn)
            return left

        eqns = advance(e for e in program.eqns if id(e) not in within)
        for stage in stages:
            results = [known[v] for v in stage.kept]
            operands = [values[v] for v in stage.sums.invars]
            outs = _with_known(stage)(results, operands)
            values.update(zip(stage.kept, outs, strict=True))
            eqns = advance(eqns)
        return [read(v, values) for v in program.outvars]

    own = [shape_dtype(v.aval) for v in program.invars]
    return jax.make_jaxpr(run)(*own, *structs).jaxpr


def _with_known(stage: _Stage) -> Callable:
    """Return `f(results, operands)`: the results, with the derivative of the stage."""

    @jax.custom_jvp
    def known(results, operands):
        return results

    def differentiate(primals, tangents):
        (results, operands), (_, moved) = primals, tangents
        moves = [not isinstance(t, SymbolicZero) for t in moved]

        def of_moving(*moving):
            rest = iter(moving)
            pairs = zip(moves, operands, strict=True)
            return evaluate(stage.sums, *(next(rest) if m else o for m, o in pairs))

        at, along = (
            tuple(leaf for leaf, m in zip(leaves, moves, strict=True) if m)
            for leaves in (operands, moved)
        )
        t_sums = jax.jvp(of_moving, at, along)[1]
        return results, [
            t if eqn is None else _SLOPES[eqn.primitive.name](y) * t
            for eqn, y, t in zip(stage.applied, results, t_sums, strict=True)
        ]

    known.defjvp(differentiate, symbolic_zeros=True)
    return known
