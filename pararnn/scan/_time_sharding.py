"""Time that lies across devices: the axis `"time"` of the mesh in context.

Whatever needs no other step of time is written as ordinary array operations on
`[length, shards, ...]`, one stretch of time for each device, and XLA divides them: as
no slice, shift or loop runs along `shards`, nothing crosses. `spread` pins arrays to
this layout and leaves the axes of batch and parameters to whatever they lie on. What
devices must know of each other is one entry a stretch, exchanged in `jax.shard_map`.
(Constraints alone, tried first, made XLA move these entries several times over, one
part of the features to each device and back.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh
from jaxtyping import Array, Shaped

from ._backends import Schedule, identity
from ._checks import is_symbolic, refuse_symbolic
from ._scaled import apply, multiply_all

TIME = "time"


def time_shards(steps: int) -> int:
    """How many devices share the time axis of arrays `[steps, ...]`; 1 if none do.

    Fewer steps than devices, as in decoding, are not divided.

    **Raises:** `ValueError` if the axis `"time"` is of the explicit kind.
    """
    mesh = get_abstract_mesh()
    if TIME not in mesh.axis_names:
        return 1
    count = mesh.shape[TIME]
    kind = mesh.axis_types[mesh.axis_names.index(TIME)]
    # Inside of a `shard_map` over time, an array is one device's own.
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
    """`x`, one slice of `axis` (or several) on each device of the time axis."""
    if time_shards(x.shape[axis]) == 1:
        return x
    # What the other axes are divided over is not this module's business.
    spec: list = [PartitionSpec.UNCONSTRAINED] * x.ndim
    spec[axis] = TIME
    return lax.with_sharding_constraint(x, PartitionSpec(*spec))


def split_time(x: Shaped[Array, "T ..."], parts: int, fill=None) -> Array:
    """`[T, ...]` to `[length, parts, ...]`, `length` being T / parts, rounded up.

    `parts` is a multiple of the devices that share time. What is missing at the end is
    `fill`, `[...]`; the last entry if not given.
    """
    steps = x.shape[0]
    length, missing = -(-steps // parts), -steps % parts
    if is_symbolic(missing) or missing:
        fill = x[-1] if fill is None else fill
        shape = (missing, *x.shape[1:])
        x = jnp.concatenate([x, jnp.broadcast_to(fill, shape)])
    return spread(x.reshape(parts, length, *x.shape[1:])).swapaxes(0, 1)


def join_time(x: Shaped[Array, "length parts ..."], steps: int) -> Array:
    """`[length, parts, ...]` back to `[steps, ...]`, without what was filled in."""
    length, parts, *rest = x.shape
    x = spread(x.swapaxes(0, 1)).reshape(length * parts, *rest)
    return spread(x)[:steps]


def shift(
    first: Shaped[Array, "..."], x: Shaped[Array, "T ..."], *, reverse: bool = False
) -> Shaped[Array, "T ..."]:
    """`x` one step later: `first, x_1, ..., x_{T-1}`; reversed, `x_2, ..., x_T, first`.

    Between devices, one step of each goes across.
    """
    shards = time_shards(x.shape[0])
    if shards == 1:
        parts = [x[1:], first[None]] if reverse else [first[None], x[:-1]]
        return jnp.concatenate(parts)
    stretches = split_time(x, shards, first)
    if reverse:
        entering = _from_neighbour(stretches[0], first, shards, -1)
        parts = [stretches[1:], entering[None]]
    else:
        entering = _from_neighbour(stretches[-1], first, shards, 1)
        parts = [entering[None], stretches[:-1]]
    return join_time(jnp.concatenate(parts), x.shape[0])


def _from_neighbour(x, first, shards: int, way: int):
    """Rows `[shards, ...]`, one device further; `first` enters where there is none."""

    def hand_on(at, mine, first):
        to = [(i, i + way) for i in range(shards) if 0 <= i + way < shards]
        received = lax.ppermute(mine, TIME, to)
        alone = at == (0 if way > 0 else shards - 1)
        return jnp.where(alone, first[None], received)

    return _on_devices(hand_on, shards, PartitionSpec(TIME), PartitionSpec())(x, first)


def on_each_device(fn: Callable, shards: int) -> Callable:
    """`fn(at, *arguments)`, on the device `at` of each stretch of time.

    Every device has the arguments whole; it returns what it is to hold of the results,
    `[1, ...]`, of which they become `[shards, ...]`. What each has of the arguments is
    exchanged as they are passed. (By `all_gather` within, they would be gathered over
    the axes of the batch too, jax 0.10.2.)
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
    # `lax.axis_index` would do, but within a conditional XLA cannot divide it beside
    # axes that are left to it ("PartitionId instruction is not supported", jax 0.10.2).
    place = jnp.arange(shards, dtype=jnp.int32)
    # Outside of `jit`, `shard_map` may not leave axes to XLA.
    return lambda *arguments: jax.jit(mapped)(place, *arguments)


def delays(
    earlier: Shaped[Array, "n ..."], x: Shaped[Array, "T ..."]
) -> list[Shaped[Array, "T ..."]]:
    """`x`, and `x` 1, ..., n steps before; `earlier` stands before it, oldest first."""
    count, steps = earlier.shape[0], x.shape[0]
    if time_shards(steps) == 1:
        whole = jnp.concatenate([earlier, x])
        return [whole[count - lag : count - lag + steps] for lag in range(count + 1)]
    shifted = [x]
    for entry in jnp.flip(earlier, 0):
        shifted.append(shift(entry, shifted[-1]))
    return shifted


def scan_stretches(
    scan: Callable[..., tuple[Array, Array]],
    schedule: Schedule,
    shards: int,
    lanes: int,
    arguments: tuple,
) -> tuple[Array, Array]:
    r"""A linear recurrence over stretches of time on different devices.

    What a stretch does to the state that it starts from is $u \mapsto P u + e$. Every
    device finds $e$ by a scan from zero and $P$ as the product of its factors, all of
    them step through the stretches together (replicated, `shards` steps), and each
    scans its own stretch again from the true start. The pair $(P, e)$ of every stretch
    is all that is exchanged. $P$ may be beyond the range of floating point where no
    state is, so that it has an exponent of its own.

    **Arguments:** `scan(a, b, u, reset)`, that `schedule` of `_backends.py` by some
    method, which takes the stretches as a batch; `lanes`, how many pieces of a stretch
    to take the product of side by side; `arguments`, its own ones, with the
    time axis whole.
    """
    a, b, u, reset = arguments
    steps = b.shape[0]
    if a.shape[0] == 1 != steps and steps % shards:
        a = jnp.broadcast_to(a, (steps, *a.shape[1:]))
    # A step that was filled in leaves the state as it is.
    unit = identity(schedule, a[0])
    a = a[:, None] if a.shape[0] == 1 else split_time(a, shards, unit)
    b = split_time(b, shards, jnp.zeros_like(b[0]))
    if reset is not None:
        reset = split_time(reset, shards, jnp.zeros_like(reset[0]))
    # Behind a reset nothing is left of the product, so that it need not know of it.
    P = multiply_all(schedule, a, b.shape[0], lanes)
    P = jax.tree.map(lambda v: jnp.broadcast_to(v, (shards, *v.shape[1:])), P)
    _, ends = scan(a, b, jnp.zeros_like(b[0]), reset)
    seen = None if reset is None else jnp.any(reset, axis=0)

    def through(u, stretch):
        P, end, seen = stretch
        carried = apply(schedule, P, u)
        if seen is not None:
            # Selected, as an infinity in the dropped state must not survive.
            carried = jnp.where(seen, jnp.zeros_like(carried), carried)
        return carried + end, (u, carried + end)

    def step_through(at, stretches, u):
        _, steps = lax.scan(through, u, stretches, reverse=schedule.reverse)
        return [lax.dynamic_slice_in_dim(v, at, 1) for v in steps]

    exchange = on_each_device(step_through, shards)
    starts, after = exchange((P, ends, seen), u)
    x, _ = scan(a, b, starts, reset)
    return join_time(x, steps), after[0 if schedule.reverse else -1]
