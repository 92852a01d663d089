"""Cells that project their input within the step, as most are written."""

import functools as ft
import itertools
from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import pararnn

from ._case import Case, Settings
from ._peers import scan_states
from ._timing import (
    compile_all,
    megabytes,
    memory_ratio,
    relative_error,
    time_in_turn,
)

TABLES = {
    "projections": "`pararnn.solve` with its defaults against `lax.scan` of the same "
    "cell, which projects its input, as wide as the state, within the step: `gated` is "
    "`z * tanh(a h + W x) + (1 - z) * h` with `z` like the tanh, `GRU` is "
    "`equinox.nn.GRUCell`. float32; batches by `vmap`. `v&g`: value and gradient of "
    "the mean of the squares with respect to parameters and inputs; its memory is what "
    "XLA allocates beside arguments and results."
}


class Gated(eqx.Module):
    """An elementwise recurrence of inputs that a dense matrix projects."""

    a: jax.Array
    W: jax.Array

    def __init__(self, width: int, *, key: jax.Array):
        self.a = 0.5 * jr.normal(key, (2, width))
        self.W = jr.normal(key, (2, width, width)) / width**0.5

    def __call__(self, x, h):
        z = jax.nn.sigmoid(self.a[0] * h + self.W[0] @ x)
        return z * jnp.tanh(self.a[1] * h + self.W[1] @ x) + (1 - z) * h


def cases(settings: Settings) -> Iterator[Case]:
    cells = ("gated", 16), ("gated", 256), ("GRU", 32), ("GRU", 256)
    for (name, width), steps, batch in itertools.product(
        cells, settings.steps(1024, 16384), (1, 16)
    ):
        # Beyond it, the gradient of `lax.scan` takes gigabytes.
        if width * steps * batch <= 2**24:
            yield Case(
                "projections",
                {"cell": f"{name} {width}", "T": steps, "batch": batch},
                ft.partial(_measure, name, width, steps, batch, settings),
            )


def _measure(name: str, width: int, steps: int, batch: int, settings: Settings):
    one, two = jr.split(jr.key(0))
    if name == "gated":
        cell = Gated(width, key=one)
    else:
        cell = eqx.nn.GRUCell(width, width, key=one)
    arrays, static = eqx.partition(cell, eqx.is_inexact_array)
    xs = jr.normal(two, (batch, steps, width))
    h0 = jnp.zeros(width)

    def states_by(method):
        def one(cell, xs):
            return method(lambda h, x: cell(x, h), xs, h0)

        def run(arrays, xs):
            cell = eqx.combine(arrays, static)
            if batch == 1:
                return one(cell, xs[0])
            return jax.vmap(lambda xs: one(cell, xs))(xs)

        return run

    def solve(f, xs, h0):
        return pararnn.solve(f, xs, h0).states

    runs = {"scan": states_by(scan_states), "solve": states_by(solve)}
    programs = compile_all(runs, arrays, xs)
    error = relative_error(programs["solve"](arrays, xs), programs["scan"](arrays, xs))
    times = time_in_turn(programs, arrays, xs, quick=settings.quick)
    losses = {
        key: lambda *args, run=run: jnp.mean(run(*args) ** 2)
        for key, run in runs.items()
    }
    gradients = {
        key: jax.value_and_grad(loss, argnums=(0, 1)) for key, loss in losses.items()
    }
    programs = compile_all(gradients, arrays, xs)
    gradient_times = time_in_turn(programs, arrays, xs, quick=settings.quick)
    return {
        "scan ms": times.ms("scan"),
        "ratio": times.ratio("solve", "scan"),
        "v&g scan ms": gradient_times.ms("scan"),
        "v&g ratio": gradient_times.ratio("solve", "scan"),
        "v&g scan MB": megabytes(programs["scan"]),
        "v&g memory ratio": memory_ratio(programs["solve"], programs["scan"]),
        "max rel. error": error,
    }
