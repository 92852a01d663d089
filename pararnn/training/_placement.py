"""Where a run's state and batches lie: on one device, or over a mesh."""

import contextlib
from collections.abc import Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import PyTree

from ..devices import make_mesh, parameter_sharding, shard_batch, shard_parameters
from ._config import MeshConfig

Tree = TypeVar("Tree")


class Placement:
    """What the mesh of a configuration means for states and batches.

    **Raises:** `ValueError` if the mesh has another number of devices than there are.
    """

    def __init__(self, config: MeshConfig):
        divided = max(config.data, config.fsdp, config.time) > 1
        self.mesh: Mesh | None = None
        if divided:
            self.mesh = make_mesh(data=config.data, fsdp=config.fsdp, time=config.time)

    def context(self) -> contextlib.AbstractContextManager:
        """In which programs are traced and run."""
        return (
            contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
        )

    def state(self, state: Tree) -> Tree:
        """The state in its place; also within `jit`."""
        return state if self.mesh is None else shard_parameters(state, self.mesh)

    def batch(self, batch: Mapping[str, Any], batch_axis: int) -> Mapping[str, Any]:
        """The batch in its place: sequences along `batch_axis`, time behind it."""
        if self.mesh is None:
            return batch
        axes = {"batch_axis": batch_axis, "time_axis": batch_axis + 1}
        return shard_batch(dict(batch), self.mesh, **axes)

    def describe(self, shapes: PyTree) -> PyTree:
        """Shapes and dtypes together with the places, for what is read from a file."""

        def one(leaf):
            if not isinstance(leaf, jax.ShapeDtypeStruct):
                return leaf
            if self.mesh is None:
                place = SingleDeviceSharding(jax.local_devices()[0])
            else:
                place = parameter_sharding(leaf.shape, self.mesh)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        return jax.tree.map(one, shapes)


def make_in_place(make, placement: Placement):
    """What `make()` returns, never whole on one device."""
    with placement.context():
        return eqx.filter_jit(lambda: placement.state(make()))()
