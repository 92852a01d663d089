"""How a solve ended: statistics and the code of the result, for each sequence."""

from collections.abc import Callable
from typing import NamedTuple

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Bool

from ..scan import split_time, time_shards
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
    """The statistics of a solve, and what a check of it needs."""

    stats: dict[str, Array]
    good: Bool[Array, ""]
    find_code: Callable[[], Array]


def report(batch: Batch, stats, states, arguments, shape) -> Report:
    """Statistics for each sequence, `[*batch]`, with the code of the result."""
    steps = states[0].shape[0]
    certified = stats.pop("certified")
    finite = jnp.all(stats.pop("finite"))
    if "residual_history" in stats:
        stats["residual_history"] = jnp.moveaxis(stats["residual_history"], 0, -1)
    code = jnp.where(certified, 0, 1).astype(jnp.int32)

    def all_good():
        return code, jnp.full(shape, steps, jnp.int32)

    def find_failure():
        first = _first_nonfinite(states, shape)
        parameters, inputs, h0 = arguments
        # Loops over time here and below: beside the states, nothing grows with T.
        devices, inputs = _stretches(steps, inputs)
        over = batch.segmented(parameters, inputs) if devices else batch
        starts = jtu.tree_map(lambda h: jnp.broadcast_to(h, (*devices, *h.shape)), h0)

        def are_finite(good, x):
            found = over.lift(_which_are_finite)(parameters, starts, x)
            return tuple(map(jnp.logical_and, good, found)), None

        both = (jnp.ones((*devices, *shape), bool),) * 2
        good, _ = lax.scan(are_finite, both, inputs)
        axes = range(len(devices))
        good_parameters, good_inputs = (jnp.all(g, axis=tuple(axes)) for g in good)
        cause = jnp.where(good_parameters, 4, 3)
        cause = jnp.where(good_inputs, cause, 2).astype(jnp.int32)
        return jnp.where(first < steps, cause, code), first

    # Only a failed solve pays for finding out where and why.
    stats["code"], first = lax.cond(finite, all_good, find_failure)
    stats["first_nonfinite"] = first
    stats["certified_steps"] = jnp.minimum(stats["certified_steps"], first)
    return Report(stats, finite & jnp.all(certified), lambda: find_failure()[0])


def raise_on_failure(states, good, find_code: Callable[[], Array], *, time_axis: int):
    """`states`, no part of which can be had without the check that all is `good`.

    Raising here, below every transformation, costs a batch one check, and the
    derivative none. The trajectories themselves do not pass through the check, which
    would copy them: each has its last step written once more, at a place that only the
    check knows, so that the compiler can leave the check out for none of them.
    """

    messages = [RESULTS[failure] for failure in FAILURES]

    def check(shift, code):
        return eqxi.branched_error_if(shift, code != 0, code - 1, messages)

    def fail(shift):
        return _on_every_device(check)(shift, jnp.max(find_code()))

    # The search for the cause stands inside the check: a call that succeeds passes one
    # conditional, not two.
    shift = lax.cond(good, lambda shift: shift, fail, jnp.zeros((), jnp.int32))
    place = jnp.asarray(states[0].shape[time_axis] - 1, jnp.int32) + shift

    def rewrite(leaf):
        last = lax.index_in_dim(leaf, -1, time_axis, keepdims=False)
        return lax.dynamic_update_index_in_dim(leaf, last, place, time_axis)

    return tuple(rewrite(leaf) for leaf in states)


def _on_every_device(check: Callable) -> Callable:
    """`check` of replicated scalars, run by each device of the mesh in context.

    XLA has one device call the host, and if that one raises, the others wait for it in
    the next exchange until the process is aborted.
    """
    mesh = get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = {name for name, kind in kinds if kind != AxisType.Manual}
    if not axes or mesh.size == 1:
        return check
    whole = PartitionSpec()
    return jax.shard_map(
        check, in_specs=whole, out_specs=whole, axis_names=axes, check_vma=False
    )


def _which_are_finite(parameters, h0, x):
    return _is_finite((parameters, h0)), _is_finite(x)


def _is_finite(tree) -> Array:
    finite = jnp.asarray(True)
    for leaf in jtu.tree_leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            finite = finite & jnp.all(jnp.isfinite(leaf))
    return finite


def _first_nonfinite(states, shape) -> Array:
    steps = states[0].shape[0]
    times = jnp.arange(steps, dtype=jnp.int32)
    devices, parts = _stretches(steps, (times, states))
    own = len(devices) + len(shape)

    def look(first, at_t):
        t, leaves = at_t
        bad = jnp.zeros((*devices, *shape), bool)
        for leaf in leaves:
            bad = bad | jnp.any(~jnp.isfinite(leaf), tuple(range(own, leaf.ndim)))
        t = t.reshape(*devices, *(1,) * len(shape))
        return jnp.where(bad, jnp.minimum(first, t), first), None

    start = jnp.full((*devices, *shape), steps, jnp.int32)
    first = lax.scan(look, start, parts)[0]
    return jnp.min(first, axis=tuple(range(len(devices))))


def _stretches(steps: int, tree):
    """`[T, ...]` as `[length, *devices, ...]`, and `devices`: `(shards,)` or `()`.

    On one device no axis is added: XLA would copy the sequence to add it.
    """
    shards = time_shards(steps)
    if shards == 1:
        return (), tree
    return (shards,), jtu.tree_map(lambda x: split_time(x, shards), tree)
