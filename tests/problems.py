"""Tables of recurrences and solvers for the tests, and their oracle.

The oracle is a plain `jax.lax.scan` of the same cell with the resets written out. It
uses nothing of the library.
"""

import functools as ft
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.nn import sigmoid

from pararnn import Auto, Newton, Sequential

N = 4
T = 33


class Cell(NamedTuple):
    make: Callable  # (key, dtype) -> parameters
    step: Callable  # (parameters, h, x) -> h
    xs: Callable  # (key, T, dtype) -> inputs
    h0: Callable  # (key, dtype) -> state
    structure: str
    dtype: str = "float64"

    def f(self, parameters):
        return lambda h, x: self.step(parameters, h, x)


SOLVERS = {
    "auto": Auto(),
    "sequential": Sequential(),
    "newton": Newton(),
    "newton-1": Newton(1),
    # 33 steps in segments of 5 leave a remainder; segments of 3 leave none.
    "newton-7": Newton(7),
    "newton-11": Newton(11),
}


def vectors(*shape):
    """Inputs `[T, *shape]` and a state of the same shape."""

    def xs(key, steps, dtype):
        return jr.normal(key, (steps, *shape), dtype)

    def h0(key, dtype):
        return 0.5 * jr.normal(key, shape, dtype)

    return xs, h0


def scaled(key, dtype, **shapes):
    """Named random parameters, matrices scaled by their width."""
    keys = jr.split(key, len(shapes))
    return {
        name: 0.9
        / max(1, shape[-1] if len(shape) > 1 else 1) ** 0.5
        * jr.normal(k, shape, dtype)
        for (name, shape), k in zip(shapes.items(), keys, strict=True)
    }


def parameters_of(**shapes):
    return lambda key, dtype: scaled(key, dtype, **shapes)


def tanh_diagonal(p, h, x):
    return jnp.tanh(p["a"] * h + x + p["b"])


def gru_diagonal(p, h, x):
    z = sigmoid(p["a_z"] * h + p["w_z"] * x)
    r = sigmoid(p["a_r"] * h + p["w_r"] * x)
    n = jnp.tanh(p["a_n"] * (r * h) + x + p["b"])
    return (1 - z) * n + z * h


def lstm_blocks(p, state, x):
    c, h = state
    f = sigmoid(p["a_f"] * h + p["p_f"] * c + x)
    c = f * c + (1 - f) * jnp.tanh(p["a_c"] * h + p["b"] + x)
    return c, sigmoid(p["a_o"] * h + x) * jnp.tanh(c)


def interleaved(p, h, x):
    """Two independent dense cells, on the even and on the odd entries."""
    even = jnp.tanh(p["U"] @ h[0::2])
    odd = jnp.tanh(p["V"] @ h[1::2])
    return jnp.stack([even, odd], axis=1).reshape(6) + 0.3 * x


def unequal(p, h, x):
    """Blocks of sizes 3, 1 and 2."""
    parts = [p["U"] @ h[:3], p["a"] * h[3:4], p["V"] @ h[4:]]
    return jnp.tanh(jnp.concatenate(parts) + x)


def elman(p, h, x):
    return jnp.tanh(p["W"] @ x + p["U"] @ h + p["b"])


def gru_dense(p, h, x):
    z = sigmoid(p["U_z"] @ h + p["W_z"] @ x)
    n = jnp.tanh(p["U_n"] @ h + x)
    return (1 - z) * n + z * h


def scalar(p, h, x):
    return jnp.sin(p["a"] * h) + x


def dict_state(p, state, x):
    """Row i of the matrix goes with entry i of the vector: blocks of 3 + 1."""
    S, n = state["S"], state["n"]
    matrix = jnp.tanh(p["a"][:, None] * S + n[:, None] * x["keys"][None, :])
    return {"S": matrix, "n": sigmoid(n + p["b"] * S.mean(1) + x["gate"])}


def dict_xs(key, steps, dtype):
    keys = jr.split(key)
    return {
        "keys": jr.normal(keys[0], (steps, 3), dtype),
        "gate": jr.normal(keys[1], (steps, 2), dtype),
    }


def dict_h0(key, dtype):
    return {"S": jr.normal(key, (2, 3), dtype), "n": jnp.ones(2, dtype)}


def holomorphic(p, z, x):
    turn = 0.7 * jnp.exp(1j * p["theta"].astype(z.dtype))
    return turn * jnp.sin(z) + 0.2 * x


def nonholomorphic(p, z, x):
    return (p["a"] / (1 + jnp.abs(z))).astype(z.dtype) * jnp.conj(z) + x


def complex_vectors(*shape):
    real_xs, real_h0 = vectors(*shape)

    def with_imaginary(make):
        def both(key, *arguments):
            real, imag = (make(k, *arguments) for k in jr.split(key))
            return lax.complex(real, imag)

        return both

    return with_imaginary(real_xs), with_imaginary(real_h0)


def contractive(p, h, x):
    return jnp.tanh(0.5 * (p["U"] @ h) + x)


NEIGHBOUR = np.array([1, 0, 3, 2])


def gathered(p, h, x):
    return jnp.tanh(p["a"] * h[jnp.asarray(NEIGHBOUR)] + x)


def with_control_flow(p, h, x):
    """A loop and a branch on the input; the program shows that it is elementwise."""

    def once(h, _):
        return h + 0.3 * (jnp.tanh(p["a"] * h + x) - h), None

    h, _ = lax.scan(once, h, None, length=3)
    return lax.cond(x[0] > 0, jnp.sin, lambda h: 0.5 * h, h)


def relu(p, h, x):
    return jax.nn.relu(0.7 * (p["U"] @ h) + x)


def empty_subtree(p, h, x):
    assert x["nothing"] == () and x["none"] is None
    return jnp.tanh(p["a"] * h + x["signal"])


def empty_subtree_xs(key, steps, dtype):
    signal = jr.normal(key, (steps, N), dtype)
    return {"signal": signal, "nothing": (), "none": None}


CELLS = {
    "tanh-diagonal": Cell(
        parameters_of(a=(N,), b=(N,)), tanh_diagonal, *vectors(N), "Diagonal"
    ),
    "gru-diagonal": Cell(
        parameters_of(a_z=(N,), a_r=(N,), a_n=(N,), w_z=(N,), w_r=(N,), b=(N,)),
        gru_diagonal,
        *vectors(N),
        "Diagonal",
    ),
    "lstm-blocks": Cell(
        parameters_of(a_f=(N,), p_f=(N,), a_c=(N,), a_o=(N,), b=(N,)),
        lstm_blocks,
        vectors(N)[0],
        lambda key, dtype: tuple(jr.normal(key, (2, N), dtype)),
        "BlockDiagonal(2)",
    ),
    "interleaved": Cell(
        parameters_of(U=(3, 3), V=(3, 3)), interleaved, *vectors(6), "BlockDiagonal(3)"
    ),
    "unequal-blocks": Cell(
        parameters_of(U=(3, 3), a=(1,), V=(2, 2)),
        unequal,
        *vectors(6),
        "BlockDiagonal(3)",
    ),
    "elman": Cell(
        parameters_of(W=(N, N), U=(N, N), b=(N,)), elman, *vectors(N), "Dense"
    ),
    "gru-dense": Cell(
        parameters_of(U_z=(N, N), W_z=(N, N), U_n=(N, N)),
        gru_dense,
        *vectors(N),
        "Dense",
    ),
    "scalar": Cell(parameters_of(a=()), scalar, *vectors(), "Diagonal"),
    "width-1": Cell(parameters_of(a=(1,)), scalar, *vectors(1), "Diagonal"),
    "dict-state": Cell(
        parameters_of(a=(2,), b=(2,)), dict_state, dict_xs, dict_h0, "BlockDiagonal(4)"
    ),
    "holomorphic": Cell(
        parameters_of(theta=(N,)), holomorphic, *complex_vectors(N), "BlockDiagonal(2)"
    ),
    "nonholomorphic": Cell(
        parameters_of(a=(N,)), nonholomorphic, *complex_vectors(N), "BlockDiagonal(2)"
    ),
    "bfloat16": Cell(
        parameters_of(a=(N,), b=(N,)),
        tanh_diagonal,
        *vectors(N),
        "Diagonal",
        "bfloat16",
    ),
    "float32": Cell(
        parameters_of(U=(N, N)), contractive, *vectors(N), "Dense", "float32"
    ),
    "index-table": Cell(
        parameters_of(a=(N,)), gathered, *vectors(N), "BlockDiagonal(2)"
    ),
    "control-flow": Cell(
        parameters_of(a=(N,)), with_control_flow, *vectors(N), "Diagonal"
    ),
    "relu": Cell(parameters_of(U=(N, N)), relu, *vectors(N), "Dense"),
    "empty-subtree": Cell(
        parameters_of(a=(N,)),
        empty_subtree,
        empty_subtree_xs,
        vectors(N)[1],
        "Diagonal",
    ),
}

# Relative to the largest number of a leaf.
TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 0.02}


def instance(name, steps=T, seed=0):
    """Parameters, inputs and an initial state of a cell of the table."""
    cell = CELLS[name]
    dtype = jnp.dtype(cell.dtype)
    keys = jr.split(jr.key(seed), 3)
    return (
        cell.make(keys[0], dtype),
        cell.xs(keys[1], steps, dtype),
        cell.h0(keys[2], dtype),
    )


def scan(f, xs, h0, reset=None, reset_state=None):
    """The states `[T, ...]` by `lax.scan`."""
    h0 = jax.tree.map(jnp.asarray, h0)
    if reset_state is None:
        reset_state = jax.tree.map(jnp.zeros_like, h0)

    def step(h, at_t):
        x, restart = at_t
        if restart is not None:
            h = jax.tree.map(ft.partial(jnp.where, restart), reset_state, h)
        h = f(h, x)
        return h, h

    return lax.scan(step, h0, (xs, reset))[1]


def some_resets(steps, every=7):
    """A reset every few steps, not at the first one."""
    return jnp.arange(steps) % every == every - 2


def residual_of(f, xs, h0, states, reset=None, reset_state=None):
    """`max |f(h_{t-1}, x_t) - h_t|` over time and state, real and imaginary parts."""
    before = jax.tree.map(lambda h, s: jnp.concatenate([h[None], s[:-1]]), h0, states)
    if reset is not None:
        before = jax.tree.map(
            lambda r, h: jnp.where(reset.reshape(-1, *(1,) * (h.ndim - 1)), r[None], h),
            jax.tree.map(jnp.zeros_like, h0) if reset_state is None else reset_state,
            before,
        )
    after = jax.jit(jax.vmap(f))(before, xs)

    def gap(a, b):
        d = np.asarray(a, complex) - np.asarray(b, complex)
        return max(np.abs(d.real).max(), np.abs(d.imag).max())

    return max(jax.tree.leaves(jax.tree.map(gap, after, states)))
