"""Meshes of devices, parameters and batches sharded over them, what they exchange.

What devices exchange is read from the text of a compiled program.
"""

import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import linear_call
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    get_abstract_mesh,
)
from jax.stages import Compiled
from jaxtyping import PyTree

from ._checks import is_count
from .scan import TIME

AXES = ("data", "fsdp", TIME)
Tree = TypeVar("Tree")

# Arrays with fewer entries are replicated: gathering them would cost more.
MIN_SIZE = 2**12


def make_mesh(
    *,
    data: int | None = None,
    fsdp: int = 1,
    time: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Make a mesh with the axes `"data"`, `"fsdp"` and `"time"`.

    While a mesh is in context, `with jax.set_mesh(mesh):`, every recurrence with at
    least as many steps as there are devices along `"time"` is solved on all of these:
    each takes its own shard of time, and one entry of each is exchanged. On several
    hosts, call `jax.distributed.initialize` first; the mesh then has the devices of all
    hosts.

    **Arguments:**

    - `data`: over how many devices the batch is divided. Defaults to all that are
        left.
    - `fsdp`: over how many devices the parameters are divided, and the batch once
        more.
    - `time`: over how many devices time is divided.
    - `devices`: defaults to all of them, of all hosts.

    **Returns:** a `jax.sharding.Mesh` of these axes, all of type `Auto`.

    **Raises:** `ValueError` if a size is not a positive integer, or the product of the
    sizes is not the number of devices.
    """
    count = len(jax.devices() if devices is None else devices)
    _check_size("fsdp", fsdp)
    _check_size(TIME, time)
    if data is None:
        data = max(1, count // (fsdp * time))
    _check_size("data", data)
    shape = (data, fsdp, time)
    if math.prod(shape) != count:
        raise ValueError(
            f"make_mesh: data = {data}, fsdp = {fsdp} and time = {time} need "
            f"{math.prod(shape)} devices, and there are {count}. Likely causes: (a) "
            f"`fsdp` * `time` = {fsdp * time} does not divide their number, (b) on "
            "several hosts, `jax.distributed.initialize` was not called, (c) fewer "
            "devices are meant; pass them as `devices`."
        )
    types = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)


def _check_size(name: str, size) -> None:
    if not is_count(size, 1):
        raise ValueError(
            f"make_mesh: `{name}` is {size!r}, expected a positive integer: how many "
            "devices share it. 1 means that it is not divided."
        )


def shard_parameters(module: Tree, mesh: Mesh, *, min_size: int = MIN_SIZE) -> Tree:
    """Divide the parameters of a module over the axis `"fsdp"` of the mesh.

    This is fully sharded data parallelism: the devices hold pieces of each array, until
    [`pararnn.gather_parameters`][] makes it whole where it is used. Within `jit`, it
    keeps new parameters, or the state of an optimiser, in the same pieces.

    **Arguments:**

    - `module`: a pytree. Arrays of any dtype are divided along the largest of their
        axes whose length the axis of the mesh divides. Other leaves are unchanged.
    - `mesh`: as from [`pararnn.make_mesh`][].
    - `min_size`: arrays smaller than this, or with no divisible axis, are replicated.

    **Returns:** the module, with arrays of the same shapes, dtypes and values.

    **Raises:** `ValueError` for a mesh without the axes of `pararnn.make_mesh`.
    """
    _check_mesh("shard_parameters", mesh)

    def place(leaf):
        sharding = parameter_sharding(leaf.shape, mesh, min_size=min_size)
        return _place(leaf, sharding)

    return _map_arrays(place, module)


def parameter_sharding(
    shape: tuple[int, ...], mesh: Mesh, *, min_size: int = MIN_SIZE
) -> NamedSharding:
    """Return how [`pararnn.shard_parameters`][] shards an array of a shape.

    **Arguments:** as there.

    **Raises:** `ValueError` for a mesh without the axes of `pararnn.make_mesh`.
    """
    _check_mesh("parameter_sharding", mesh)
    return NamedSharding(mesh, _pieces(shape, mesh.shape["fsdp"], min_size))


def _pieces(shape: tuple[int, ...], count: int, min_size: int) -> PartitionSpec:
    spec: list[str | None] = [None] * len(shape)
    divisible = [i for i, size in enumerate(shape) if size % count == 0]
    if count > 1 and math.prod(shape) >= max(1, min_size) and divisible:
        spec[max(divisible, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*spec)


def gather_parameters(module: Tree, *, min_size: int = MIN_SIZE) -> Tree:
    """Make the parameters of a module whole, just before it is used.

    Call it inside the function that is differentiated, and only on what is used next:
    on one block, within the loop over blocks and within `jax.checkpoint`, so that no
    device ever holds all parameters. Their gradient is summed over the devices and left
    in pieces. Without this, XLA may leave the weights where they are and move the batch
    instead, every sequence to every device.

    [`pararnn.LanguageModel`][] calls it on each of its blocks. It does nothing unless
    the mesh in context has an axis `"fsdp"` of more than one device.

    **Arguments:** `module`, a pytree, whose floating-point arrays are gathered;
    `min_size`, as for [`pararnn.shard_parameters`][].

    **Returns:** the module, with the same values.
    """
    mesh = get_abstract_mesh()
    if "fsdp" not in mesh.axis_names or mesh.shape["fsdp"] == 1:
        return module
    kind = mesh.axis_types[mesh.axis_names.index("fsdp")]
    # Inside a `shard_map` over it, an array belongs to one device.
    if kind == AxisType.Manual:
        return module
    count = mesh.shape["fsdp"]

    def gather(leaf):
        pieces = _pieces(leaf.shape, count, min_size)
        if not any(pieces):
            return leaf
        # A constraint's transpose is the same constraint; here it leaves pieces.
        return linear_call(
            lambda _, x: lax.with_sharding_constraint(x, PartitionSpec()),
            lambda _, ct: lax.with_sharding_constraint(ct, pieces),
            (),
            leaf,
        )

    arrays, rest = eqx.partition(module, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(gather, arrays), rest)


def shard_batch(
    batch: PyTree, mesh: Mesh, *, batch_axis: int = 0, time_axis: int | None = 1
) -> PyTree[jax.Array]:
    """Divide the sequences over `"data"` and `"fsdp"`, and their time over `"time"`.

    **Arguments:**

    - `batch`: a pytree of arrays, `[B, T, ...]` or, without time, `[B]`; of any dtype.
        Every host passes the same whole batch, and its devices keep their shards.
    - `mesh`: as from [`pararnn.make_mesh`][].
    - `batch_axis`: which axis counts sequences: 1 where microbatches come first.
    - `time_axis`: which axis is time, in all leaves that have it; `None` for leaves
        without time.

    **Returns:** the same pytree, with `jax.Array`s on the mesh.

    **Raises:** `ValueError` for a mesh without the axes of `pararnn.make_mesh`, a leaf
    without a batch axis, and lengths that do not divide.
    """
    _check_mesh("shard_batch", mesh)
    if time_axis is not None and not 0 <= batch_axis < time_axis:
        raise ValueError(
            f"shard_batch: `batch_axis` is {batch_axis} and `time_axis` {time_axis}; "
            "expected the batch first, and then time, or None. Likely cause: sequences "
            "are [T, B, ...]; swap the axes."
        )

    def place(path, leaf):
        name = "batch" + jax.tree_util.keystr(path)
        if leaf.ndim <= batch_axis:
            raise ValueError(
                f"shard_batch: `{name}` has no batch axis. Keep what all sequences "
                "share out of the batch."
            )
        spec: list = [None] * leaf.ndim
        spec[batch_axis] = ("data", "fsdp")
        if time_axis is not None and time_axis < leaf.ndim:
            spec[time_axis] = TIME
        _check_divides(name, leaf.shape, spec, mesh)
        return _place(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    arrays, rest = eqx.partition(batch, eqx.is_array)
    arrays = jax.tree_util.tree_map_with_path(place, arrays)
    return eqx.combine(arrays, rest)


def _check_divides(name: str, shape, spec, mesh: Mesh) -> None:
    for axis, over in enumerate(spec):
        names = (over,) if isinstance(over, str) else over or ()
        count = math.prod(mesh.shape[n] for n in names)
        if shape[axis] % count:
            raise ValueError(
                f"shard_batch: axis {axis} of `{name}`, of shape {shape}, has length "
                f"{shape[axis]}, which the {count} devices of {' and '.join(names)} do "
                "not divide. Likely causes: (a) a last, smaller batch; drop it, (b) a "
                "sequence that was cut for the next step's target; divide inputs and "
                "targets of equal length, (c) an axis that is not time; see "
                "`time_axis`."
            )


def _check_mesh(where: str, mesh) -> None:
    if not isinstance(mesh, Mesh) or not set(AXES) <= set(mesh.axis_names):
        raise ValueError(
            f"{where}: `mesh` is {mesh!r:.200}, expected a mesh with the axes "
            f"{', '.join(AXES)}. Make it by `pararnn.make_mesh`."
        )


def _map_arrays(fn, tree):
    arrays, rest = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.tree.map(fn, arrays), rest)


def _place(leaf, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, Tracer) or sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    # Across hosts: each has the whole array, and gives its devices their shards.
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda at: host[at])


# What devices exchange.

_OPERATIONS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "reduce-scatter",
)
# An instruction: its results, then its name. The second half of an asynchronous pair
# (`-done`) repeats the results of the first.
_EXCHANGE = re.compile(rf"= (.+?) ({'|'.join(_OPERATIONS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
# The start of a computation, the call of one, and how often a loop runs.
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(
    r"(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Exchange(NamedTuple):
    """How many instructions of one kind a program runs, and the bytes of their results.

    Instructions within a loop count as often as it runs if the compiler knows this, as
    for `jax.lax.scan`, and otherwise once, as for a Newton iteration. Those of a branch
    count whether or not it is taken. Bytes are those that one device receives, its own
    shard included; for an asynchronous `all-gather-start` the operand counts too.
    """

    count: int
    bytes: int
    largest: int


def communication(compiled: Compiled) -> dict[str, Exchange]:
    """Return what devices exchange in a compiled program, by the kind of instruction.

    **Arguments:** `compiled`, from `jax.jit(f).lower(*arguments).compile()`, within
    `jax.set_mesh(mesh)` where there is a mesh.

    **Returns:** for each kind of instruction that occurs, such as `"all-gather"`, its
    [`pararnn.Exchange`][]: their number, the bytes of all, and those of the largest.

    **Raises:** `ValueError` if the program's text is not available.
    """
    text = compiled.as_text()
    if not text:
        raise ValueError(
            "communication: the compiled program has no text. Likely cause: a backend "
            "that does not keep it."
        )
    return _count_exchanges(text)


def _count_exchanges(text: str) -> dict[str, Exchange]:
    """Count the exchanges of the program that a text describes."""
    computations, entry = _computations(text)

    @functools.cache
    def count(name: str) -> dict[str, Exchange]:
        found: dict[str, Exchange] = {}
        for line in computations.get(name, ()):
            _add_exchanges(found, _exchange_of(line), 1)
            for called, times in _calls(line):
                _add_exchanges(found, count(called), times)
        return found

    return count(entry)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of every computation, and the name of the first to run."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head is not None:
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _calls(line: str) -> Iterator[tuple[str, int]]:
    """Yield the computations that an instruction runs, and how often."""
    trips = _TRIPS.search(line)
    for role, name in _CALLED.findall(line):
        yield name, int(trips[1]) if trips and role == "body" else 1
    for names in _BRANCHES.findall(line):
        for name in names.split(","):
            yield name.strip().removeprefix("%"), 1


def _exchange_of(line: str) -> dict[str, Exchange]:
    match = _EXCHANGE.search(line)
    if match is None:
        return {}
    size = sum(_bytes(*array) for array in _ARRAY.findall(match[1]))
    return {match[2]: Exchange(1, size, size)}


def _add_exchanges(
    found: dict[str, Exchange], more: dict[str, Exchange], times: int
) -> None:
    for kind, (count, size, largest) in more.items():
        before = found.get(kind, Exchange(0, 0, 0))
        found[kind] = Exchange(
            before.count + times * count,
            before.bytes + times * size,
            max(before.largest, largest),
        )


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    entries = math.prod(int(n) for n in shape.split(",") if n)
    return -(-bits * entries // 8)
