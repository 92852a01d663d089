"""A cell that predicts the next byte of a text, trained for a short while."""

import pathlib
import sysconfig

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import pararnn

WIDTH, BATCH, WINDOW, STEPS, LEARNING_RATE = 32, 16, 256, 200, 3e-3


class ByteModel(eqx.Module):
    """An embedding of bytes, a cell that is stepped sequentially, and a readout."""

    embedding: Float[Array, "256 width"]
    layer: pararnn.RNN
    readout: eqx.nn.Linear

    def __init__(self, cell: pararnn.AbstractCell):
        keys = jr.split(jr.key(1))
        self.embedding = jr.normal(keys[0], (256, WIDTH))
        self.layer = pararnn.RNN(cell, solver=pararnn.Sequential())
        self.readout = eqx.nn.Linear(WIDTH, 256, key=keys[1])

    def inputs(self, text: Int[Array, " T"]) -> Float[Array, "T width"]:
        """Return the inputs of the cell."""
        return self.embedding[text]

    def loss(self, text: Int[Array, " T"]) -> Float[Array, ""]:
        """Return the bits per byte."""
        ys, _ = self.layer(self.inputs(text[:-1]))
        logits = jax.vmap(self.readout)(ys)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, text[1:])
        return jnp.mean(nats) / jnp.log(2.0)


def load_text() -> np.ndarray:
    """Return the source of Python's standard library, as bytes."""
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return np.frombuffer(data, np.uint8).astype(np.int32)


def train(model: ByteModel, text: np.ndarray) -> tuple[ByteModel, float]:
    """Return the model after `STEPS` steps of Adam, and its loss in the last ten."""
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LEARNING_RATE))
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)

    @jax.jit
    def step(arrays, state, windows):
        def loss(arrays):
            return jnp.mean(jax.vmap(eqx.combine(arrays, rest).loss)(windows))

        value, gradient = jax.value_and_grad(loss)(arrays)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(arrays, updates), state, value

    rng, state, losses = np.random.default_rng(0), optimiser.init(arrays), []
    for _ in range(STEPS):
        starts = rng.integers(0, len(text) - WINDOW - 1, BATCH)
        windows = np.stack([text[i : i + WINDOW + 1] for i in starts])
        arrays, state, value = step(arrays, state, windows)
        losses.append(value)
    return eqx.combine(arrays, rest), float(np.mean(losses[-10:]))
