"""The recurrences that are measured, and what is computed with them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def diagonal_gru(weights):
    """Each unit sees only itself; the gates' inputs are already projected."""
    w_z, w_r, w_n = weights

    def step(h, x):
        x_z, x_r, x_n = x
        z = jax.nn.sigmoid(w_z * h + x_z)
        r = jax.nn.sigmoid(w_r * h + x_r)
        n = jnp.tanh(w_n * h * r + x_n)
        return z * n + (1 - z) * h

    return step


def dense_gru(weights):
    """cuDNN's form: the reset gate acts after the candidate's matrix product."""
    w_r, w_z, w_n = weights

    def step(h, x):
        x_r, x_z, x_n = x
        r = jax.nn.sigmoid(w_r @ h + x_r)
        z = jax.nn.sigmoid(w_z @ h + x_z)
        n = jnp.tanh(x_n + r * (w_n @ h))
        return (1 - z) * n + z * h

    return step


def elman(weights):
    (w,) = weights

    def step(h, x):
        return jnp.tanh(w @ h + x[0])

    return step


class Problem(NamedTuple):
    """A cell and the scale of its random weights.

    **Arguments:** `cell` takes a tuple of `gates` weights and returns `f(h, x) -> h`,
    where `x` is a tuple of `gates` vectors.
    """

    name: str
    cell: Callable[[Any], Callable]
    width: int
    gates: int
    dense: bool
    scale: float

    def __str__(self) -> str:
        return f"{self.name} {self.width}"

    def input_bytes(self, steps: int, batch: int = 1, itemsize: int = 4) -> int:
        return self.gates * steps * batch * self.width * itemsize

    def make(self, steps: int, batch: int = 1, dtype=np.float32):
        """Parameters, inputs and initial state; one sequence has no batch axis."""
        rng = np.random.default_rng(0)
        lead = () if batch == 1 else (batch,)

        def normal(*shape, scale=1.0):
            values = rng.standard_normal(shape, np.float32) * np.float32(scale)
            return jnp.asarray(values, dtype)

        shape = (self.width,) * (1 + self.dense)
        weights = tuple(normal(*shape, scale=self.scale) for _ in range(self.gates))
        xs = tuple(normal(*lead, steps, self.width) for _ in range(self.gates))
        return weights, xs, normal(*lead, self.width, scale=0.5)


def make_diagonal_gru(width: int) -> Problem:
    return Problem("diagonal GRU", diagonal_gru, width, 3, False, 0.3)


def make_dense_gru(width: int) -> Problem:
    return Problem("dense GRU", dense_gru, width, 3, True, width**-0.5)


def make_elman(width: int, gain: float = 0.5) -> Problem:
    """`gain` scales the recurrent matrix; from about 1 on the cell is chaotic."""
    return Problem("dense Elman", elman, width, 1, True, gain * width**-0.5)


FIVE = (
    make_diagonal_gru(1),
    make_diagonal_gru(16),
    make_diagonal_gru(256),
    make_dense_gru(4),
    make_dense_gru(32),
)


def forward(problem: Problem, method, batch: int = 1):
    """`(weights, xs, h0) -> states` by `method(f, xs, h0)`, batched with `vmap`."""

    def run(weights, xs, h0):
        return method(problem.cell(weights), xs, h0)

    return run if batch == 1 else jax.vmap(run, in_axes=(None, 0, 0))


def loss_of(run):
    """The mean square of the states."""
    return lambda *args: jnp.mean(run(*args) ** 2)


def value_and_gradient(run):
    return jax.value_and_grad(loss_of(run), argnums=(0, 1, 2))


def hessian_product(run):
    """`(args, direction) -> H direction`, reverse over reverse."""
    gradient = jax.grad(loss_of(run), argnums=(0, 1, 2))

    def along(direction, args):
        products = jax.tree.map(jnp.vdot, gradient(*args), direction)
        return sum(jax.tree.leaves(products))

    return lambda args, direction: jax.grad(along, argnums=1)(direction, args)
