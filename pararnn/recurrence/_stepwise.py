"""Operations that must run one step at a time: done before the solve if possible.

A solver evaluates a cell for many steps at once, by `vmap`. Most programs then compute
the same for each step, but some silently compute something else. Random keys of the
kinds `rbg` and `unsafe_rbg` draw other numbers. A callback or a function with
`custom_vmap` does whatever its rule says. Communication along a named axis (`lax.psum`,
`lax.axis_index`) couples the sequences along it, so they cannot be solved one by one.

If such an operation does not depend on the state, its results are inputs like any
other. They are computed here by `lax.scan`, which JAX batches and differentiates
itself, and any solver can solve the rest of the cell. If one depends on the state, the
recurrence records it (`must_step`, `coupled_along`), and the cell is stepped through.
"""

import copy
from typing import NamedTuple

import jax.extend as jex
import numpy as np
from jax import lax
from jax.sharding import AxisType, get_abstract_mesh
from jaxtyping import Array

from ..jaxprs import (
    backward_slice,
    dependents_of,
    evaluate,
    inner_jaxprs,
    read_by,
    sub_jaxpr,
    variables,
    written_by,
)
from ._recurrence import Recurrence, is_key, known_index, shape_dtype

# The names of all primitives whose `vmap` may be another computation: bits drawn by the
# compiler's own generator, and functions with a rule of the user's own.
_UNBATCHABLE = {"rng_bit_generator", "rng_uniform", "infeed", "outfeed"}
_UNBATCHABLE |= {"custom_vmap_call"}
# So may callbacks, except for those that are called once for each.
_CALLBACKS = {"pure_callback", "io_callback", "buffer_callback", "ffi_call"}
_SEQUENTIAL_METHODS = {"sequential", "sequential_unrolled"}
# These differ at each call: never evaluated twice, and never once for all steps.
_IMPURE = {"rng_uniform", "io_callback", "infeed", "outfeed"}
# These name an axis only to say what varies along it.
_TYPES_ONLY = {"pvary", "pcast", "reduced_vary_cast", "vary_unreduced_cast"}


def changes_under_vmap(eqn) -> bool:
    """Return whether `vmap` over steps changes what an equation computes."""
    name = eqn.primitive.name
    if name in _UNBATCHABLE:
        return True
    if name in _CALLBACKS and eqn.params.get("vmap_method") not in _SEQUENTIAL_METHODS:
        return True
    values = [v.aval for v in (*variables(eqn.invars), *eqn.outvars)]
    kinds = {str(getattr(value, "dtype", None)) for value in values if is_key(value)}
    # Only JAX's own kind draws the same from a key under `vmap`.
    return bool(kinds - {"key<fry>"}) or any(
        changes_under_vmap(e)
        for program in inner_jaxprs(eqn.params)
        for e in program.eqns
    )


def _is_impure(eqn) -> bool:
    return eqn.primitive.name in _IMPURE or any(
        _is_impure(e) for program in inner_jaxprs(eqn.params) for e in program.eqns
    )


def _named_axes_of(eqn) -> set:
    """Return the named axes that an equation communicates along."""
    inner = [e for program in inner_jaxprs(eqn.params) for e in program.eqns]
    if inner:
        # (A `shard_map` within the cell names axes of its own.)
        own = eqn.params.get("manual_axes", frozenset())
        return set().union(*map(_named_axes_of, inner)) - own
    if eqn.primitive.name in _TYPES_ONLY:
        return set()
    names = eqn.params.get("axis_name", eqn.params.get("axes", ()))
    names = names if isinstance(names, tuple | list) else (names,)
    # An array's own axes are numbers.
    return {name for name in names if not isinstance(name, int | np.integer)}


class _Precomputed(NamedTuple):
    """Equations evaluated before the solve: once, or at each step."""

    once: list
    stepped: list


def precompute_unbatchable(
    recurrence: Recurrence, x_leaves: tuple[Array, ...]
) -> tuple[Recurrence, tuple[Array, ...]]:
    """Move such operations from the cell to its inputs, if they need no state.

    **Returns:** the recurrence without them, and its inputs with their results.
    """
    # (A copy, which describes the rest of the step.)
    rest = copy.copy(recurrence)
    if recurrence.refinement is not None and _is_unbatchable(recurrence.refinement):
        rest.refinement = None
    if not _is_unbatchable(recurrence.jaxpr):
        return rest, x_leaves
    program = recurrence.inlined()
    constants, h, x = _arguments(recurrence, program)
    once, stepped = _find_precomputable(program, h, x)
    before = {id(e) for e in (*once, *stepped)}
    left = [e for e in program.eqns if id(e) not in before]
    later = read_by(left) | set(variables(program.outvars))
    fixed = [v for v in written_by(once) if v in later | read_by(stepped)]
    moving = [v for v in written_by(stepped) if v in later]

    own = recurrence.constants
    values = evaluate(_program_for(program, constants, fixed), *own)
    given = [*constants, *fixed, *x]
    at_each_step = _program_for(program, given, moving)

    def one_step(_, x):
        return None, tuple(evaluate(at_each_step, *own, *values, *x))

    made = lax.scan(one_step, None, x_leaves)[1] if moving else ()

    rest.jaxpr = sub_jaxpr(
        program, left, [*constants, *fixed, *h, *x, *moving], program.outvars
    )
    rest.add_constants(values, [known_index(v) for v in values])
    rest.x_structs = [*recurrence.x_structs, *(shape_dtype(v.aval) for v in moving)]
    rest.must_step = any(map(changes_under_vmap, left))
    rest.is_impure = any(map(_is_impure, left))
    rest.coupled_along = tuple(sorted(set().union(*map(_named_axes_of, left)), key=str))
    return rest, (*x_leaves, *made)


def refuse_unbatchable(where: str, recurrence: Recurrence) -> None:
    """Refuse operations that only `pararnn.solve` does one step at a time.

    **Raises:** `ValueError`.
    """
    if _is_unbatchable(recurrence.jaxpr):
        raise ValueError(
            f"{where}: the cell does something that gives other results when many "
            "steps are taken at once: (a) it draws from random keys of the kind 'rbg' "
            "or 'unsafe_rbg'; (b) it calls a function with `custom_vmap`, or a "
            "callback whose `vmap_method` is not 'sequential'; (c) it communicates "
            "along a named axis. Use `pararnn.solve`, which does this one step at a "
            "time, or do it beforehand and pass the results as `xs`."
        )


def must_sweep(where: str, recurrence: Recurrence) -> bool:
    """Return whether the derivative, too, has to be taken one step at a time.

    **Raises:** `NotImplementedError` if the cell differs at each call, and so has no
    derivative at the solution.
    """
    if recurrence.is_impure:
        raise NotImplementedError(
            f"{where}: the cell calls, on its state, a function that returns something "
            "else each time (`io_callback`, `lax.rng_uniform`). The derivative "
            "evaluates the cell again, so it would belong to other states. Call the "
            "function before the solve, for all steps, and pass the results as `xs`."
        )
    coupled = bool(recurrence.coupled_along)
    return recurrence.has_custom_vjp or recurrence.must_step or coupled


def why_stepped(recurrence: Recurrence) -> str | None:
    """Return why a cell has to be stepped through, or `None` if it does not."""
    if recurrence.must_step:
        return (
            "the cell does something on its state that gives other results when many "
            "steps are taken at once: (a) it draws from random keys of the kind 'rbg' "
            "or 'unsafe_rbg' that depend on the state, or within a loop or branch that "
            "does: use keys of JAX's default kind, or draw before the loop or branch; "
            "(b) it calls a function with `custom_vmap`, or a callback whose "
            "`vmap_method` is not 'sequential', on the state"
        )
    if recurrence.coupled_along:
        axes = ", ".join(map(repr, recurrence.coupled_along))
        return (
            f"the cell communicates values that depend on its state along the axis "
            f"{axes}, which couples the sequences: communicate only values that depend "
            "on `xs` alone"
        )
    return None


def needs_loop(recurrence: Recurrence) -> bool:
    """Return whether only the sequential loop can solve this cell.

    Along an axis of a `shard_map`, an iterative solver would take another number of
    iterations on each device, and devices would wait for messages that are never sent.
    """
    mesh = get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return recurrence.must_step or any(
        kinds.get(name) == AxisType.Manual for name in recurrence.coupled_along
    )


def _is_unbatchable(program: jex.core.Jaxpr) -> bool:
    return any(changes_under_vmap(e) or _named_axes_of(e) for e in program.eqns)


def _arguments(recurrence: Recurrence, program: jex.core.Jaxpr):
    count, width = len(recurrence.constant_structs), len(recurrence.state_leaves)
    arguments = program.invars
    return (
        arguments[:count],
        arguments[count : count + width],
        arguments[count + width :],
    )


def _find_precomputable(program: jex.core.Jaxpr, h, x) -> _Precomputed:
    """Find the unbatchable equations that do not depend on the state."""
    impure = [e for e in program.eqns if _is_impure(e)]
    of_h = dependents_of(program, h)
    of_x = dependents_of(program, [*x, *written_by(impure)])
    found = [
        e
        for e in program.eqns
        if (changes_under_vmap(e) or _named_axes_of(e))
        and of_h.isdisjoint(variables(e.invars))
    ]
    stepped = [e for e in found if not of_x.isdisjoint(e.outvars) or _is_impure(e)]
    steps = set(map(id, stepped))
    return _Precomputed([e for e in found if id(e) not in steps], stepped)


def _program_for(program: jex.core.Jaxpr, given, wanted) -> jex.core.Jaxpr:
    """Return the program that computes the wanted variables from all given ones."""
    eqns = backward_slice(program, wanted, given).eqns
    return sub_jaxpr(program, eqns, given, wanted)
