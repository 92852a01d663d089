"""GRU and LSTM layers as people have them: Equinox, Flax NNX, by hand, and torch.

Each is `(parameters, run)`, with `run(parameters, xs)` from a batch `[B, T, D]` to the
outputs `[B, T, H]`. The time of a layer does not depend on its weights, so each draws
its own.
"""

import functools as ft
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from flax import nnx
from jax import lax
from jax.nn import sigmoid

from ._timing import Program

Layer = tuple[Any, Callable]


def _time_first(x):
    return jnp.moveaxis(x, 1, 0)


def _fresh(kind: str, batch: int, width: int):
    zeros = jnp.zeros((batch, width))
    return zeros if kind == "GRU" else (zeros, zeros)


def equinox_scan(kind: str, width: int) -> Layer:
    """A cell of Equinox, batched by `vmap`, under one `lax.scan`."""
    cls = {"GRU": eqx.nn.GRUCell, "LSTM": eqx.nn.LSTMCell}[kind]
    arrays, static = eqx.partition(cls(width, width, key=jr.key(0)), eqx.is_array)

    def run(arrays, xs):
        cell = jax.vmap(eqx.combine(arrays, static))

        def step(state, x):
            state = cell(x, state)
            return state, state if kind == "GRU" else state[0]

        start = _fresh(kind, xs.shape[0], width)
        return _time_first(lax.scan(step, start, _time_first(xs))[1])

    return arrays, run


def flax_rnn(kind: str, width: int) -> Layer:
    """A cell of Flax under `nnx.RNN`."""
    cls = {"GRU": nnx.GRUCell, "LSTM": nnx.OptimizedLSTMCell}[kind]
    layer = nnx.RNN(cls(width, width, rngs=nnx.Rngs(0)))
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)

    def run(parameters, xs):
        start = _fresh(kind, xs.shape[0], width)
        return nnx.merge(graph, parameters, rest)(xs, initial_carry=start)

    return parameters, run


def by_hand(kind: str, width: int) -> Layer:
    """A loop whose gradient stores gates, and does that of the weights at the end."""
    gates = {"GRU": 3, "LSTM": 4}[kind]
    shapes = (width, gates * width), (width, gates * width), (gates * width,)
    rng, bound = np.random.default_rng(0), width**-0.5
    parameters = tuple(
        jnp.asarray(rng.uniform(-bound, bound, shape).astype(np.float32))
        for shape in shapes
    )
    forward, backward = {
        "GRU": (_gru_forward, _gru_backward),
        "LSTM": (_lstm_forward, _lstm_backward),
    }[kind]

    @jax.custom_vjp
    def run(parameters, xs):
        return _time_first(forward(parameters, _time_first(xs))[0])

    def keep(parameters, xs):
        x = _time_first(xs)
        kept = forward(parameters, x)
        return _time_first(kept[0]), (parameters, x, kept)

    def differentiate(kept, cotangents):
        parameters, x, stored = kept
        return backward(parameters, x, stored, _time_first(cotangents)), None

    run.defvjp(keep, differentiate)
    return parameters, run


def _before(states):
    return jnp.concatenate([jnp.zeros_like(states[:1]), states[:-1]])


def _flat(x):
    return x.reshape(-1, x.shape[-1])


def _gru_forward(parameters, xs):
    W, U, b = parameters

    def step(h, x):
        x_r, x_z, x_n = jnp.split(x @ W + b, 3, -1)
        h_r, h_z, h_n = jnp.split(h @ U, 3, -1)
        r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + r * h_n)
        h = (1 - z) * n + z * h
        return h, (h, r, z, n, h_n)

    return lax.scan(step, jnp.zeros((xs.shape[1], len(U))), xs)[1]


def _gru_backward(parameters, xs, kept, cotangents):
    U = parameters[1]
    h, *gates = kept
    before = _before(h)

    def step(d_h, at_t):
        cotangent, h, r, z, n, h_n = at_t
        d_h = d_h + cotangent
        d_n = d_h * (1 - z) * (1 - n * n)
        d_z, d_r = d_h * (h - n) * z * (1 - z), d_n * h_n * r * (1 - r)
        back = jnp.concatenate([d_r, d_z, d_n * r], -1) @ U.T
        return d_h * z + back, (d_r, d_z, d_n, d_n * r)

    given = (cotangents, before, *gates)
    start = jnp.zeros_like(h[0])
    d_r, d_z, d_n, d_hn = lax.scan(step, start, given, reverse=True)[1]
    of_x = _flat(jnp.concatenate([d_r, d_z, d_n], -1))
    of_h = _flat(jnp.concatenate([d_r, d_z, d_hn], -1))
    return _flat(xs).T @ of_x, _flat(before).T @ of_h, of_x.sum(0)


def _lstm_forward(parameters, xs):
    W, U, b = parameters

    def step(state, x):
        c, h = state
        i, f, g, o = jnp.split(x @ W + h @ U + b, 4, -1)
        i, f, g, o = sigmoid(i), sigmoid(f), jnp.tanh(g), sigmoid(o)
        c = f * c + i * g
        t = jnp.tanh(c)
        return (c, o * t), (o * t, c, i, f, g, o, t)

    return lax.scan(step, _fresh("LSTM", xs.shape[1], len(U)), xs)[1]


def _lstm_backward(parameters, xs, kept, cotangents):
    U = parameters[1]
    h, c, *gates = kept
    before = _before(h)

    def step(ahead, at_t):
        d_c, d_h = ahead
        cotangent, c, i, f, g, o, t = at_t
        d_h = d_h + cotangent
        d_c = d_c + d_h * o * (1 - t * t)
        of_gates = (
            d_c * g * i * (1 - i),
            d_c * c * f * (1 - f),
            d_c * i * (1 - g * g),
            d_h * t * o * (1 - o),
        )
        ends = jnp.concatenate(of_gates, -1)
        return (d_c * f, ends @ U.T), ends

    start = jnp.zeros_like(h[0]), jnp.zeros_like(h[0])
    given = (cotangents, _before(c), *gates)
    ends = _flat(lax.scan(step, start, given, reverse=True)[1])
    return _flat(xs).T @ ends, _flat(before).T @ ends, ends.sum(0)


PEERS = {"eqx + lax.scan": equinox_scan, "nnx.RNN": flax_rnn, "by hand": by_hand}


def torch_programs(kind: str, width: int, xs) -> dict[str, Program]:
    """`torch.nn` on the CPU: value, and value and gradient; empty without torch."""
    if importlib.util.find_spec("torch") is None:
        return {}
    torch = importlib.import_module("torch")
    layer = getattr(torch.nn, kind)(width, width, batch_first=True)
    inputs = torch.from_numpy(np.array(xs))

    def value(*_):
        with torch.no_grad():
            return layer(inputs)[0]

    def with_gradient(*_):
        layer.zero_grad()
        torch.mean(layer(inputs)[0] ** 2).backward()
        return layer.weight_hh_l0.grad

    runs = {"torch": value, "torch v&g": with_gradient}
    return {name: Program(run, 0.0, 0) for name, run in runs.items()}


def value_and_gradient(run: Callable) -> Callable:
    """The mean square of the outputs, with its gradient in the parameters."""
    return jax.value_and_grad(ft.partial(_mean_square, run))


def _mean_square(run, parameters, xs):
    return jnp.mean(run(parameters, xs) ** 2)
