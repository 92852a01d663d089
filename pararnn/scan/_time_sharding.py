"""Time sharded over devices, along the axis `"time"` of the mesh in context.

Whatever needs no other step of time is written as ordinary array operations on
`[length, shards, ...]`, and XLA divides them. No slice, shift or loop runs along
`shards`, so nothing is exchanged. `spread` pins arrays to this layout and leaves the
axes of batch and parameters as they are. Devices exchange one entry for each shard, in
a `jax.shard_map` (`docs/devdocs/scan.md` says why).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Shaped

from .._checks import is_symbolic, refuse_symbolic
from ._backends import Schedule, identity
from ._scaled import apply, multiply_all

TIME = "time"


def time_shards(steps: int) -> int:
    """Return how many devices share the time axis of arrays `[steps, ...]`.

    This is 1 where time is not sharded. Fewer steps than devices, as in decoding, are
    not divided.

    **Raises:** `ValueError` if the axis `"time"` is of the explicit kind.
    """
    mesh = get_abstract_mesh()
    if TIME not in mesh.axis_names:
        return 1
    count = mesh.shape[TIME]
    kind = mesh.axis_types[mesh.axis_names.index(TIME)]
    # Inside a `shard_map` over time, an array belongs to one device.
    if kind == AxisType.Manual or count == 1:
        return 1
    what = f'a mesh with {count} devices along its axis "{TIME}"'
    refuse_symbolic("pararnn", what, "Use a mesh without such an axis", steps)
    if steps < count:
        return 1
    if kind == AxisType.Explicit:
        raise ValueError(
            f'The mesh in context has an axis "{TIME}" of type Explicit; recurrences '
            "are divided along it by sharding constraints, which need type Auto. "
            "Likely cause: `jax.make_mesh` makes explicit axes unless told otherwise. "
            "Use `pararnn.make_mesh(time=...)`, or pass "
            "`axis_types=(jax.sharding.AxisType.Auto, ...)`."
        )
    return count


def spread(x: Shaped[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
    """Return `x` with `axis` divided over the devices that share time."""
    if time_shards(x.shape[axis]) == 1:
        return x
    # The other axes may be divided over anything.
    spec: list = [PartitionSpec.UNCONSTRAINED] * x.ndim
    spec[axis] = TIME
    return lax.with_sharding_constraint(x, PartitionSpec(*spec))


def split_time(x: Shaped[Array, "T ..."], parts: int, fill=None) -> Array:
    """Reshape `[T, ...]` to `[length, parts, ...]`, where length * parts is at least T.

    `parts` is a multiple of the devices that share time. Missing steps at the end are
    filled with `fill`, `[...]`, which defaults to the last entry.
    """
    steps = x.shape[0]
    length, missing = -(-steps // parts), -steps % parts
    if is_symbolic(missing) or missing:
        fill = x[-1] if fill is None else fill
        shape = (missing, *x.shape[1:])
        x = jnp.concatenate([x, jnp.broadcast_to(fill, shape)])
    return spread(x.reshape(parts, length, *x.shape[1:])).swapaxes(0, 1)


def join_time(x: Shaped[Array, "length parts ..."], steps: int) -> Array:
    """Reshape `[length, parts, ...]` to `[steps, ...]`, without what was filled in."""
    length, parts, *rest = x.shape
    x = spread(x.swapaxes(0, 1)).reshape(length * parts, *rest)
    return spread(x)[:steps]


def shift(
    first: Shaped[Array, "..."], x: Shaped[Array, "T ..."], *, reverse: bool = False
) -> Shaped[Array, "T ..."]:
    """Return `first, x_1, ..., x_{T-1}`; or `x_2, ..., x_T, first` if `reverse`.

    Each device sends one step to its neighbour.
    """
    shards = time_shards(x.shape[0])
    if shards == 1:
        parts = [x[1:], first[None]] if reverse else [first[None], x[:-1]]
        return jnp.concatenate(parts)
    split = split_time(x, shards, first)
    if reverse:
        entering = _from_neighbour(split[0], first, shards, -1)
        parts = [split[1:], entering[None]]
    else:
        entering = _from_neighbour(split[-1], first, shards, 1)
        parts = [entering[None], split[:-1]]
    return join_time(jnp.concatenate(parts), x.shape[0])


def _from_neighbour(x, first, shards: int, by: int):
    """Move rows `[shards, ...]` by one device; `first` enters at the free end."""

    def hand_on(at, mine, first):
        to = [(i, i + by) for i in range(shards) if 0 <= i + by < shards]
        received = lax.ppermute(mine, TIME, to)
        at_end = at == (0 if by > 0 else shards - 1)
        return jnp.where(at_end, first[None], received)

    return _on_devices(hand_on, shards, PartitionSpec(TIME), PartitionSpec())(x, first)


def on_each_device(fn: Callable, shards: int) -> Callable:
    """Return `fn(at, *arguments)`, run on the device `at` of each shard of time.

    Every device gets the whole arguments, and returns its row of the results,
    `[1, ...]`, which become `[shards, ...]`. The arguments are gathered where they are
    passed. (An `all_gather` within would gather them over the axes of the batch too,
    jax 0.10.2.)
    """
    return lambda *arguments: _on_devices(
        fn, shards, *(PartitionSpec() for _ in arguments)
    )(*arguments)


def _on_devices(fn, shards: int, *in_specs):
    over = PartitionSpec(TIME)

    def numbered(at, *arguments):
        return fn(at[0], *arguments)

    mapped = jax.shard_map(
        numbered, in_specs=(over, *in_specs), out_specs=over, axis_names={TIME}
    )
    # Not `lax.axis_index`: within a conditional, XLA cannot divide it beside axes that
    # are left to XLA ("PartitionId instruction is not supported", jax 0.10.2).
    place = jnp.arange(shards, dtype=jnp.int32)
    # Outside `jit`, `shard_map` may not leave axes to XLA.
    return lambda *arguments: jax.jit(mapped)(place, *arguments)


def delays(
    earlier: Shaped[Array, "n ..."], x: Shaped[Array, "T ..."]
) -> list[Shaped[Array, "T ..."]]:
    """Return `x` delayed by 0, ..., n steps; `earlier`, oldest first, precedes it."""
    count, steps = earlier.shape[0], x.shape[0]
    if time_shards(steps) == 1:
        whole = jnp.concatenate([earlier, x])
        return [whole[count - lag : count - lag + steps] for lag in range(count + 1)]
    shifted = [x]
    for entry in jnp.flip(earlier, 0):
        shifted.append(shift(entry, shifted[-1]))
    return shifted


def scan_shards(
    scan: Callable[..., tuple[Array, Array]],
    schedule: Schedule,
    shards: int,
    lanes: int,
    arguments: tuple,
) -> tuple[Array, Array]:
    r"""Solve a linear recurrence whose time is sharded over devices.

    A shard maps the state that it starts from by $u \mapsto P u + e$. Every device
    finds $e$ by a scan from zero, and $P$ as the product of its factors. All devices
    step through the shards together (replicated, `shards` steps), and each scans its
    own shard again from the true start. Only the pairs $(P, e)$ are exchanged. $P$ may
    be beyond the range of floating point where no state is, so it has an exponent of
    its own.

    **Arguments:**

    - `scan(a, b, u, reset)`: a method of `_backends.py` with its `schedule`; it takes
        the shards as a batch.
    - `lanes`: into how many pieces, side by side, a shard is cut for its product.
    - `arguments`: those of `scan`, with the whole time axis.
    """
    a, b, u, reset = arguments
    steps = b.shape[0]
    if a.shape[0] == 1 != steps and steps % shards:
        a = jnp.broadcast_to(a, (steps, *a.shape[1:]))
    # A step that was filled in leaves the state unchanged.
    unit = identity(schedule, a[0])
    a = a[:, None] if a.shape[0] == 1 else split_time(a, shards, unit)
    b = split_time(b, shards, jnp.zeros_like(b[0]))
    if reset is not None:
        reset = split_time(reset, shards, jnp.zeros_like(reset[0]))
    # After a reset the product is not used, so it ignores resets.
    P = multiply_all(schedule, a, b.shape[0], lanes)
    P = jax.tree.map(lambda v: jnp.broadcast_to(v, (shards, *v.shape[1:])), P)
    _, ends = scan(a, b, jnp.zeros_like(b[0]), reset)
    seen = None if reset is None else jnp.any(reset, axis=0)

    def through(u, shard):
        P, end, seen = shard
        carried = apply(schedule, P, u)
        if seen is not None:
            # By selection, so that an infinity in the dropped state does not survive.
            carried = jnp.where(seen, jnp.zeros_like(carried), carried)
        return carried + end, (u, carried + end)

    def step_through(at, all_shards, u):
        _, steps = lax.scan(through, u, all_shards, reverse=schedule.reverse)
        return [lax.dynamic_slice_in_dim(v, at, 1) for v in steps]

    exchange = on_each_device(step_through, shards)
    starts, after = exchange((P, ends, seen), u)
    x, _ = scan(a, b, starts, reset)
    return join_time(x, steps), after[0 if schedule.reverse else -1]
