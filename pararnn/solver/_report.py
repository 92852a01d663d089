"""How a solve ended: statistics and the code of the result, for each sequence."""

from collections.abc import Callable
from typing import NamedTuple

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh
from jaxtyping import Array

from ..scan import split_time, time_shards, vary
from ._export import refuse_export
from ._recurrence import Batch
from ._solution import RESULTS

# A solve carries the result as a number, which arrays of sequences can hold: 0 for
# success, and the place in this list, from 1.
FAILURES = (
    RESULTS.not_converged,
    RESULTS.nonfinite_inputs,
    RESULTS.nonfinite_parameters,
    RESULTS.nonfinite_states,
)


def as_result(code: Array):
    """The code of one sequence as a member of `RESULTS`."""
    result = RESULTS.successful
    for number, failure in enumerate(FAILURES, start=1):
        result = RESULTS.where(code == number, failure, result)
    return result


class Report(NamedTuple):
    """The statistics of a solve, and 0, which only the check of it can tell."""

    stats: dict[str, Array]
    checked: Array


def report(batch: Batch, stats, states, arguments, shape, *, throw: bool) -> Report:
    """Statistics for each sequence, `[*batch]`, with the code of the result.

    With `throw`, whatever uses `checked` raises if the solve failed.
    """
    steps = states[0].shape[0]
    stats = vary(stats, states)
    certified = stats.pop("certified")
    good = jnp.all(stats.pop("finite"))
    if throw:
        good = good & jnp.all(certified)
    if "residual_history" in stats:
        stats["residual_history"] = jnp.moveaxis(stats["residual_history"], 0, -1)
    code = jnp.where(certified, 0, 1).astype(jnp.int32)
    zero = vary(jnp.zeros((), jnp.int32), states)

    def all_good():
        return code, vary(jnp.full(shape, steps, jnp.int32), states), zero

    def find_failure():
        first, cause = _look_for_nonfinite(batch, states, arguments, shape)
        found = jnp.where(first < steps, cause, code)
        return found, first, _check(found) if throw else zero

    # Only a failed solve pays for finding out where and why. The check stands beside
    # the search, so that a call that succeeds passes one conditional.
    stats["code"], first, checked = lax.cond(good, all_good, find_failure)
    stats["first_nonfinite"] = first
    stats["certified_steps"] = jnp.minimum(stats["certified_steps"], first)
    return Report(stats, checked)


def raise_on_failure(states, code: Array, *, time_axis: int):
    """`states`, no part of which can be had if any sequence has failed, and 0 likewise.

    Raising behind a `vmap` costs a batch one check.
    """
    zero = vary(jnp.zeros((), jnp.int32), states)
    checked = lax.cond(jnp.all(code == 0), lambda: zero, lambda: _check(code))
    return hold_back(states, checked, time_axis=time_axis), checked


def hold_back(states, checked: Array, *, time_axis: int):
    """`states`, no part of which can be had without `checked`, which is 0.

    The trajectories themselves do not pass through the check, which would copy them:
    each has its last step written once more, at a place that only the check knows, so
    that the compiler can leave the check out for none of them.
    """
    place = jnp.asarray(states[0].shape[time_axis] - 1, jnp.int32) + checked

    def rewrite(leaf):
        last = lax.index_in_dim(leaf, -1, time_axis, keepdims=False)
        return lax.dynamic_update_index_in_dim(leaf, last, place, time_axis)

    return tuple(rewrite(leaf) for leaf in states)


def _check(code: Array) -> Array:
    """0, if no code is that of a failure."""
    messages = [RESULTS[failure] for failure in FAILURES]

    def check(code):
        code = refuse_export(code)
        # (What comes from the host is the same on all devices, for all JAX knows.)
        zero = jnp.zeros((), jnp.int32)
        return eqxi.branched_error_if(zero, code != 0, code - 1, messages)

    return vary(_on_every_device(check)(jnp.max(code, initial=0)), code)


def _on_every_device(check: Callable) -> Callable:
    """`check` of replicated scalars, run by each device of the mesh in context.

    XLA has one device call the host, and if that one raises, the others wait for it in
    the next exchange until the process is aborted.
    """
    mesh = get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    # (An explicit axis, over which no batch is divided, has no exchanges.)
    axes = {name for name, kind in kinds if kind == AxisType.Auto}
    if not axes or mesh.size == 1:
        return check
    whole = PartitionSpec()
    return jax.shard_map(
        check, in_specs=whole, out_specs=whole, axis_names=axes, check_vma=False
    )


def _look_for_nonfinite(batch: Batch, states, arguments, shape):
    """The first step whose state is not finite (T if none is), and the cause's code."""
    steps = states[0].shape[0]
    parameters, inputs, h0 = arguments
    times = jnp.arange(steps, dtype=jnp.int32)
    devices, at = _stretches(steps, (times, states, inputs))
    over = batch.segmented(parameters, inputs) if devices else batch
    starts = jtu.tree_map(lambda h: jnp.broadcast_to(h, (*devices, *h.shape)), h0)
    own = (*devices, *shape)

    def look(found, at_t):
        first, *good = found
        t, leaves, x = at_t
        bad = jnp.zeros(own, bool)
        for leaf in leaves:
            bad = bad | jnp.any(~jnp.isfinite(leaf), tuple(range(len(own), leaf.ndim)))
        t = t.reshape(*devices, *(1,) * len(shape))
        first = jnp.where(bad, jnp.minimum(first, t), first)
        finite = over.lift(_which_are_finite)(parameters, starts, x)
        return (first, *map(jnp.logical_and, good, finite)), None

    # A loop over time: beside the states, nothing grows with T.
    start = jnp.full(own, steps, jnp.int32), jnp.ones(own, bool), jnp.ones(own, bool)
    start = vary(start, states)
    found, _ = lax.scan(look, start, at)
    first, good_parameters, good_inputs = found
    axes = tuple(range(len(devices)))
    cause = jnp.where(jnp.all(good_parameters, axis=axes), 4, 3)
    cause = jnp.where(jnp.all(good_inputs, axis=axes), cause, 2).astype(jnp.int32)
    return jnp.min(first, axis=axes), cause


def _which_are_finite(parameters, h0, x):
    return _is_finite((parameters, h0)), _is_finite(x)


def _is_finite(tree) -> Array:
    finite = jnp.asarray(True)
    for leaf in jtu.tree_leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            finite = finite & jnp.all(jnp.isfinite(leaf))
    return finite


def _stretches(steps: int, tree):
    """`[T, ...]` as `[length, *devices, ...]`, and `devices`: `(shards,)` or `()`.

    On one device no axis is added: XLA would copy the sequence to add it.
    """
    shards = time_shards(steps)
    if shards == 1:
        return (), tree
    return (shards,), jtu.tree_map(lambda x: split_time(x, shards), tree)
