"""What people run: batches of GRUs and LSTMs, other cells, the price of the check."""

from collections.abc import Callable, Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax

import pararnn

from ._case import Case, Settings
from ._rnn_peers import PEERS, torch_programs, value_and_gradient
from ._timing import compile_all, memory_ratio, time_in_turn

TABLES = {
    "dense cells": "A batch through one layer of `pararnn.GRUCell` or `LSTMCell` "
    "under `jax.vmap`, H = D, float32: time of the forward pass, and of the mean "
    "square with its gradient in the parameters. Ratios are to the fastest of an "
    "Equinox cell under `lax.scan`, `nnx.RNN`, and a loop whose gradient is written by "
    "hand with stored gates (with resets: to a `lax.scan` of our cell). `memory` "
    "compares temporaries with those of the leanest of them, `torch` is our time over "
    "that of `torch.nn` on the same cores.",
    "other cells": "The same for cells that only we have, against a `lax.scan` of the "
    "same cell, batched by `vmap` and differentiated by JAX.",
    "checks": "What `throw=True` adds, in microseconds for each of so many solves in "
    "one program (each on the states of the one before; width 16); and, for 4 layers "
    "of a GRU with T = 256, a batch of 16 and width 64, the time of a training step "
    "over that with `throw=False`.",
}
SHAPES = (
    (1, 4096, 128),
    (8, 256, 512),
    (16, 512, 128),
    (32, 256, 256),
    (64, 128, 512),
    (128, 64, 256),
)
RESETS = (128, 128, 256)  # with a reset at 3% of the steps
DENSE = {"GRU": pararnn.GRUCell, "LSTM": pararnn.LSTMCell}
OTHER: dict[str, Callable] = {
    "ParaGRU": pararnn.ParaGRUCell,
    "ParaLSTM": pararnn.ParaLSTMCell,
    "sLSTM": pararnn.SLSTMCell,
    "Elman": pararnn.ElmanCell,
}


def cases(settings: Settings) -> Iterator[Case]:
    shapes = ((2, 64, 16),) if settings.quick else SHAPES
    for kind in ("GRU", "LSTM"):
        for shape in shapes:
            yield Case(
                "dense cells",
                _key(kind, shape),
                lambda k=kind, s=shape: _measure_dense(k, s, False, settings),
            )
        shape = (2, 64, 16) if settings.quick else RESETS
        yield Case(
            "dense cells",
            _key(kind, shape) | {"resets": "3%"},
            lambda k=kind, s=shape: _measure_dense(k, s, True, settings),
        )
    for name in OTHER:
        for shape in shapes:
            yield Case(
                "other cells",
                _key(name, shape),
                lambda n=name, s=shape: _measure_other(n, s, settings),
            )
    for steps in (1, 256):
        for solves in (1, 2, 4):
            yield Case(
                "checks",
                {"program": f"{solves} solves", "T": steps},
                lambda t=steps, n=solves: _measure_checks(t, n, settings),
            )
    yield Case(
        "checks",
        {"program": "training step", "T": 256},
        lambda: _measure_training_step(256, settings),
    )


def _key(cell: str, shape) -> dict[str, int | str]:
    return {"cell": cell, **dict(zip("BTH", shape, strict=True)), "resets": ""}


def _batch(shape):
    batch, steps, width = shape
    values = np.random.default_rng(1).standard_normal((batch, steps, width), np.float32)
    return jnp.asarray(values)


def _layer(cell, reset=None) -> tuple:
    """Our layer over a batch, as `(parameters, run)`."""
    arrays, static = eqx.partition(pararnn.RNN(cell), eqx.is_inexact_array)

    def run(arrays, xs):
        layer = eqx.combine(arrays, static)
        return jax.vmap(lambda x: layer(x, reset=reset)[0])(xs)

    return arrays, run


def _programs(layers: dict[str, tuple]) -> dict[str, Callable]:
    """The value, and value and gradient, of each layer; all take all parameters."""
    runs = {}
    for name, (_, run) in layers.items():
        both = value_and_gradient(run)
        runs[name] = lambda given, xs, r=run, n=name: r(given[n], xs)
        runs[f"{name} v&g"] = lambda given, xs, r=both, n=name: r(given[n], xs)
    return runs


def _measure(layers: dict[str, tuple], shape, settings: Settings, torch_kind=None):
    xs = _batch(shape)
    given = {name: parameters for name, (parameters, _) in layers.items()}
    programs = compile_all(_programs(layers), given, xs)
    torch = torch_programs(torch_kind, shape[-1], xs) if torch_kind else {}
    times = time_in_turn(programs | torch, given, xs, quick=settings.quick)
    peers = [name for name in layers if name != "ours"]
    both = [f"{name} v&g" for name in peers]
    leanest = min((programs[name] for name in both), key=lambda p: p.temp_bytes)
    values = {
        "ours ms": times.ms("ours"),
        "ratio": times.ratio("ours", *peers),
        "fastest": min(peers, key=times.ms),
        "ours v&g ms": times.ms("ours v&g"),
        "v&g ratio": times.ratio("ours v&g", *both),
        "v&g fastest": min(both, key=times.ms).removesuffix(" v&g"),
        "v&g memory": memory_ratio(programs["ours v&g"], leanest),
    }
    if torch:
        values["torch ratio"] = times.ratio("ours", "torch")
        values["torch v&g ratio"] = times.ratio("ours v&g", "torch v&g")
    return values


def _measure_dense(kind: str, shape, with_resets: bool, settings: Settings):
    steps, width = shape[1:]
    cell = DENSE[kind](width, width, key=jr.key(0))
    if not with_resets:
        layers = {"ours": _layer(cell)}
        layers |= {name: make(kind, width) for name, make in PEERS.items()}
        return _measure(layers, shape, settings, kind)
    reset = jnp.arange(steps) % 32 == 31
    layers = {"ours": _layer(cell, reset), "scan": _plain(cell, reset)}
    return _measure(layers, shape, settings)


def _plain(cell, reset=None) -> tuple:
    """A `lax.scan` of the cell as it is."""
    arrays, static = eqx.partition(cell, eqx.is_inexact_array)

    def one(cell, xs):
        fresh = cell.init_state()

        def step(state, at_t):
            x, restart = at_t
            if restart is not None:
                state = jax.tree.map(
                    lambda s, f: jnp.where(restart, f, s), state, fresh
                )
            state = cell(state, x)
            return state, cell.output(state)

        return lax.scan(step, fresh, (xs, reset))[1]

    def run(arrays, xs):
        return jax.vmap(one, in_axes=(None, 0))(eqx.combine(arrays, static), xs)

    return arrays, run


def _measure_other(name: str, shape, settings: Settings):
    width = shape[-1]
    cell = OTHER[name](width, width, key=jr.key(0))
    layers = {"ours": _layer(cell), "scan": _plain(cell)}
    return _measure(layers, shape, settings)


def _measure_checks(steps: int, solves: int, settings: Settings):
    width = 16
    decay, xs = jnp.linspace(0.1, 0.9, width), jnp.ones((steps, width))

    def run(throw):
        def program(xs):
            for _ in range(solves):
                xs = pararnn.solve(
                    lambda h, x: jnp.tanh(decay * h + x),
                    xs,
                    jnp.zeros(width),
                    throw=throw,
                ).states
            return xs

        return program

    programs = compile_all({"checked": run(True), "unchecked": run(False)}, xs)
    times = time_in_turn(programs, xs, quick=settings.quick)
    added = 1e3 * (times.ms("checked") - times.ms("unchecked"))
    return {
        "unchecked us": 1e3 * times.ms("unchecked"),
        "added us a solve": added / solves,
        "ratio": times.ratio("checked", "unchecked"),
    }


def _measure_training_step(steps: int, settings: Settings):
    width, batch = 64, 16
    cells = [pararnn.GRUCell(width, width, key=key) for key in jr.split(jr.key(0), 4)]
    xs = _batch((batch, steps, width))

    def step(throw):
        stack = pararnn.Stack([pararnn.RNN(cell, throw=throw) for cell in cells])
        arrays, static = eqx.partition(stack, eqx.is_inexact_array)

        def loss(arrays, xs):
            layer = eqx.combine(arrays, static)
            return jnp.mean(jax.vmap(lambda x: layer(x)[0])(xs) ** 2)

        def descend(xs):
            gradient = jax.grad(loss)(arrays, xs)
            return jax.tree.map(lambda p, g: p - 1e-3 * g, arrays, gradient)

        return descend

    programs = compile_all({"checked": step(True), "unchecked": step(False)}, xs)
    times = time_in_turn(programs, xs, quick=settings.quick)
    return {
        "unchecked us": 1e3 * times.ms("unchecked"),
        "ratio": times.ratio("checked", "unchecked"),
    }
