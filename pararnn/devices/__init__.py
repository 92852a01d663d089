"""Meshes of devices, and parameters and batches sharded over them."""

from ._communication import Exchange as Exchange, communication as communication
from ._sharding import (
    gather_parameters as gather_parameters,
    make_mesh as make_mesh,
    parameter_sharding as parameter_sharding,
    shard_batch as shard_batch,
    shard_parameters as shard_parameters,
)
