"""One of two processes that train a small model together; run by test_sharding.py."""

import json
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import pararnn

STEPS, RATE = 5, 0.5
MESHES = ({"data": 1, "time": 4}, {"data": 1, "fsdp": 2, "time": 2})


def problem():
    """Return the model, a cell followed by a matrix, and a batch."""
    keys = jr.split(jr.key(0), 4)
    cell = pararnn.ParaGRUCell(2, 8, key=keys[0])
    model = cell, jr.normal(keys[1], (8, 1)) * 0.3
    xs = jr.normal(keys[2], (4, 32, 2))
    # The target at each step is a running sum, which needs the past.
    return model, (xs, jnp.cumsum(xs[..., :1], axis=1) / 4)


def loss(model, batch):
    cell, readout = model
    xs, targets = batch
    states = jax.vmap(lambda xs: pararnn.RNN(cell)(xs)[0])(xs)
    return jnp.mean((states @ readout - targets) ** 2)


def train(loss, model, batch, keep=lambda model: model) -> list[float]:
    """Return the losses of some steps of gradient descent; `keep` places the model."""

    @eqx.filter_jit
    def step(model, batch):
        value, gradient = eqx.filter_value_and_grad(loss)(model, batch)
        moved = jax.tree.map(lambda g: -RATE * g, gradient)
        return value, keep(eqx.apply_updates(model, moved))

    losses = []
    for _ in range(STEPS):
        value, model = step(model, batch)
        losses.append(float(value))
    return losses


def main(address: str, number: int, output: Path) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=number)
    runs = []
    for sizes in MESHES:
        mesh = pararnn.make_mesh(**sizes)

        def keep(model, mesh=mesh):
            return pararnn.shard_parameters(model, mesh, min_size=16)

        with jax.set_mesh(mesh):
            model, batch = problem()
            batch = pararnn.shard_batch(batch, mesh)
            runs.append(train(loss, keep(model), batch, keep))
    # To a file: Gloo's threads write to the standard output too, in pieces.
    output.write_text(json.dumps(runs))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
