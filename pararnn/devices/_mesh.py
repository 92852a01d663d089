"""The mesh: which devices share the batch, the parameters and time."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from ..scan import TIME

AXES = ("data", "fsdp", TIME)


def make_mesh(
    *,
    data: int | None = None,
    fsdp: int = 1,
    time: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes `"data"`, `"fsdp"` and `"time"`.

    While a mesh is in context, `with jax.set_mesh(mesh):`, every recurrence with at
    least as many steps as there are devices along `"time"` is solved on all of these:
    each takes its own stretch of time, and one entry of each is exchanged. Over several
    hosts, call `jax.distributed.initialize` first; the mesh is then made of the
    devices of all of them.

    **Arguments:**

    - `data`: over how many devices the batch is divided; all that are left if not
        given.
    - `fsdp`: over how many devices the parameters are divided, and the batch once
        more.
    - `time`: over how many devices time is divided.
    - `devices`: all of them, of all hosts, if not given.

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
    integer = isinstance(size, int | np.integer) and not isinstance(size, bool)
    if not integer or size < 1:
        raise ValueError(
            f"make_mesh: `{name}` is {size!r}, expected a positive integer: how many "
            "devices share it. 1 is for not divided."
        )
