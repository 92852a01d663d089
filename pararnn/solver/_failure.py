"""How a solve ended: the cause of a failure, and the check that raises one."""

import os
from collections.abc import Callable
from typing import NamedTuple

import equinox.internal as eqxi
import jax
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.interpreters import batching, mlir
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Int

from ..scan import vary
from ._problem import BoundProblem
from ._solution import RESULTS, Stats

# A solve carries its result as a number, so that an array can hold those of a batch: 0
# for success, else the position in this list, counted from 1.
FAILURES = (
    RESULTS.not_converged,
    RESULTS.nonfinite_inputs,
    RESULTS.nonfinite_parameters,
    RESULTS.nonfinite_states,
)


def as_result(code: Array):
    """Return the code of one sequence as a member of `RESULTS`."""
    result = RESULTS.successful
    for number, failure in enumerate(FAILURES, start=1):
        result = RESULTS.where(code == number, failure, result)
    return result


class Outcome(NamedTuple):
    """How a solve ended, for each sequence of the batch."""

    stats: Stats
    code: Int[Array, "*batch"]  # of the result
    # 0, for code that steps outside of the solver; reading it runs the failure check.
    checked: Int[Array, "*batch"] | None = None


def find_outcome(
    problem: BoundProblem, stats: Stats, *, throw: bool
) -> tuple[Outcome, Int[Array, ""]]:
    """Find the result of a solve, and the cause if it failed.

    Only a failed solve looks for it. The second value is 0; with `throw`, any
    use of it raises if the solve failed.
    """
    stats = vary(stats, problem.h0)
    first = stats.first_nonfinite
    good = jnp.all(first >= problem.steps)
    if throw:
        good = good & jnp.all(stats.certified)
    code = jnp.where(stats.certified, 0, 1).astype(jnp.int32)
    zero = vary(jnp.zeros((), jnp.int32), problem.h0)
    inputs = problem.batch_first()

    def all_good():
        return code, zero

    def find_failure():
        cause = _find_cause(problem, inputs)
        found = jnp.where(first < problem.steps, cause, code)
        return found, _check(found) if throw else zero

    # The check is in the same branch: a success costs one conditional.
    code, checked = lax.cond(good, all_good, find_failure)
    certified = jnp.minimum(stats.certified_steps, first)
    return Outcome(stats._replace(certified_steps=certified), code), checked


def check_batch(states: tuple[Array, ...], code: Array) -> Array:
    """Return 0, whose use raises if any sequence of the batch has failed."""
    zero = vary(jnp.zeros((), jnp.int32), states)
    return lax.cond(jnp.all(code == 0), lambda: zero, lambda: _check(code))


def attach_check(states: tuple[Array, ...], checked: Array, *, time_axis: int):
    """Make every use of `states` depend on the failure check, which is 0.

    Passing the trajectories through the check would copy them. Instead their last step
    is written again, at an index that depends on the check, so that the compiler cannot
    drop the check.
    """
    place = jnp.asarray(states[0].shape[time_axis] - 1, jnp.int32) + checked

    def rewrite(leaf):
        last = lax.index_in_dim(leaf, -1, time_axis, keepdims=False)
        return lax.dynamic_update_index_in_dim(leaf, last, place, time_axis)

    return tuple(rewrite(leaf) for leaf in states)


def _check(code: Array) -> Array:
    """Return 0; raise if any code is that of a failure."""
    messages = [RESULTS[failure] for failure in FAILURES]

    def check(code):
        code = refuse_export(code)
        # (JAX takes values from the host to be the same on all devices.)
        zero = jnp.zeros((), jnp.int32)
        return eqxi.branched_error_if(zero, code != 0, code - 1, messages)

    return vary(_on_every_device(check)(jnp.max(code, initial=0)), code)


def _on_every_device(check: Callable) -> Callable:
    """Make each device of the mesh in context run `check`, of replicated scalars.

    XLA would let one device call the host. If that one raised, the others would wait
    for it in the next exchange until the process is aborted.
    """
    mesh = get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    # (Batches are not sharded along explicit axes, so those need no exchange.)
    axes = {name for name, kind in kinds if kind == AxisType.Auto}
    if not axes or mesh.size == 1:
        return check
    whole = PartitionSpec()
    return jax.shard_map(
        check, in_specs=whole, out_specs=whole, axis_names=axes, check_vma=False
    )


def _find_cause(problem: BoundProblem, inputs) -> Int[Array, "*batch"]:
    """Return why states are not finite. Inputs are `[*batch, T, ...]`."""
    distinct = problem.recurrence.distinct_constants

    def cause(parameters, h0, inputs):
        constants, fresh = parameters
        given = _is_finite((constants[:distinct], fresh, h0))
        return jnp.where(_is_finite(inputs), jnp.where(given, 4, 3), 2)

    found = problem.lift(cause)(problem.parameters, problem.h0, inputs)
    return found.astype(jnp.int32)


def _is_finite(tree) -> Array:
    finite = jnp.asarray(True)
    for leaf in jtu.tree_leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            finite = finite & jnp.all(jnp.isfinite(leaf))
    return finite


# JAX refuses any program that calls the host with "serialization of host_callbacks is
# not yet implemented". Only the lowering of a primitive can tell that a program is
# being exported, so there is a primitive here that only checks this.
_not_exported = jex.core.Primitive("pararnn_not_exported")


def refuse_export(value: Array) -> Array:
    """Return `value`, in a program that calls the host if the solve has failed.

    **Raises:** `NotImplementedError` when `jax.export` exports the program.
    """
    return _not_exported.bind(value)


def _lower(ctx, value):
    parameters = ctx.module_context.lowering_parameters
    calls = os.environ.get("EQX_ON_ERROR", "raise") not in ("nan", "off")
    if calls and getattr(parameters, "for_export", False):
        raise NotImplementedError(
            "pararnn.solve: a program that raises if a solve fails cannot be exported "
            "by `jax.export`, since raising calls Python. Pass `throw=False` "
            "to `pararnn.solve`, or to the layer or model that calls it "
            "(`pararnn.RNN(..., throw=False)`), and export `Solution.result` or the "
            "statistics beside the states, to see failures."
        )
    return [value]


_not_exported.def_impl(lambda value: value)
_not_exported.def_abstract_eval(lambda value: value)
batching.primitive_batchers[_not_exported] = lambda args, axes: (
    _not_exported.bind(*args),
    *axes,
)
mlir.register_lowering(_not_exported, _lower)
