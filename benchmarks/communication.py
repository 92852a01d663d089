"""`python -m benchmarks.communication`: what devices exchange, read from the programs.

Eight virtual CPU devices: two shards of the batch, four of time. Nothing is run. The
instructions of the compiled programs and the bytes of their results are counted, so the
table is the same on any machine. It is printed and stored beside the other results.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# Before JAX is imported: it reads them once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax

import linear
import pararnn

BATCH, WIDTH, LENGTHS = 4, 64, (2048, 8192)
SEGMENTS = 4
PATH = Path(__file__).parent / "results" / "cpu" / "communication.md"


class Candidate(NamedTuple):
    """A layer `layer(xs [T, WIDTH]) -> [T, WIDTH]`, made from a key."""

    name: str
    make: Callable[[jax.Array], Any]


class _Loop(eqx.Module):
    """`lax.scan`, which XLA shards as it likes."""

    cell: pararnn.ParaGRUCell

    def __call__(self, xs):
        def step(h, x):
            h = self.cell(h, x)
            return h, h

        return lax.scan(step, self.cell.init_state(), xs)[1], None


class _Scan(eqx.Module):
    """One linear recurrence with factors that depend on the inputs."""

    weight: jax.Array

    def __call__(self, xs):
        factors = jax.nn.sigmoid(xs @ self.weight)
        return pararnn.linear_scan(pararnn.Diagonal(factors), xs), None


def _scan(key):
    return _Scan(jr.normal(key, (WIDTH, WIDTH)) / 8)


def _rnn(cell, **options):
    return lambda key: pararnn.RNN(cell(WIDTH, key=key), **options)


CANDIDATES = (
    Candidate("`linear_scan`, `Diagonal`", _scan),
    Candidate("`linear.DeltaNet`", lambda key: linear.DeltaNet(WIDTH, key=key)),
    Candidate("`RNN(ParaGRUCell)`", _rnn(pararnn.ParaGRUCell)),
    Candidate(
        f"`RNN(ParaGRUCell)`, `Newton({SEGMENTS})`",
        _rnn(pararnn.ParaGRUCell, solver=pararnn.Newton(SEGMENTS)),
    ),
    Candidate(
        f"`RNN(GRUCell)`, `Newton({SEGMENTS})`",
        _rnn(pararnn.GRUCell, solver=pararnn.Newton(SEGMENTS)),
    ),
    Candidate(
        "`lax.scan` of `ParaGRUCell`",
        lambda key: _Loop(pararnn.ParaGRUCell(WIDTH, key=key)),
    ),
)


def exchanged(candidate: Candidate, steps: int, *, gradient: bool):
    """[`pararnn.communication`][] of a layer, or of its gradient, over a batch."""
    mesh = pararnn.make_mesh(data=2, time=4)
    layer = candidate.make(jr.key(0))
    parameters, static = eqx.partition(layer, eqx.is_inexact_array)

    def run(parameters, xs):
        return jax.vmap(lambda x: eqx.combine(parameters, static)(x)[0])(xs)

    def loss(parameters, xs):
        return jnp.sum(run(parameters, xs) ** 2)

    with jax.set_mesh(mesh):
        xs = pararnn.shard_batch(jnp.ones((BATCH, steps, WIDTH)), mesh)
        parameters = pararnn.shard_parameters(parameters, mesh)
        fn = jax.jit(jax.grad(loss, argnums=(0, 1)) if gradient else run)
        return pararnn.communication(fn.lower(parameters, xs).compile())


def table() -> str:
    lines = [
        "| | | instructions | KiB, T = " + " | KiB, T = ".join(map(str, LENGTHS)),
        "|---|---|---|" + "---|" * len(LENGTHS),
    ]
    lines[0] += " |"
    for candidate in CANDIDATES:
        for gradient in (False, True):
            found = [exchanged(candidate, T, gradient=gradient) for T in LENGTHS]
            kinds = ", ".join(
                f"{exchange.count} {kind}"
                for kind, exchange in sorted(found[0].items())
            )
            sizes = (sum(e.bytes for e in one.values()) / 1024 for one in found)
            cells = (
                candidate.name,
                "gradient" if gradient else "value",
                kinds,
                *(f"{size:.1f}" for size in sizes),
            )
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PATH.write_text(table())
    print(PATH.read_text())
