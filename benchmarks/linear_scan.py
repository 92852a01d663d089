"""`pararnn.linear_scan` against `lax.scan` and `lax.associative_scan` by hand."""

import functools as ft
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

import pararnn

from ._case import Case, Settings, too_large
from ._peers import associative_linear, scan_linear
from ._timing import compile_all, relative_error, time_in_turn

TABLES = {
    "linear_scan": '`pararnn.linear_scan` with `backend="auto"` against `lax.scan` and '
    "`lax.associative_scan` written by hand; `ratio` is to the faster of the two, and "
    "so is that of the time to trace and compile."
}


class Kind(NamedTuple):
    """A structure, and the plain arithmetic for it."""

    transition: Callable
    multiply: Callable
    compose: Callable
    block: int | None = None
    dtype: type = np.float32
    reverse: bool = False

    def shapes(self, steps: int, channels: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of the factors and of the terms."""
        if self.block is None:
            return (steps, channels), (steps, channels)
        blocks = channels // self.block
        return (steps, blocks, self.block, self.block), (steps, blocks, self.block)

    def make(self, steps: int, channels: int):
        rng = np.random.default_rng(0)

        def normal(shape):
            values = rng.standard_normal(shape, np.float32)
            if np.issubdtype(self.dtype, np.complexfloating):
                values = values + 1j * rng.standard_normal(shape, np.float32)
            return values

        factors, terms = map(normal, self.shapes(steps, channels))
        # Norms below 1, so that nothing overflows.
        if self.block is None:
            factors = factors / (1 + np.abs(factors))
        else:
            norms = np.linalg.norm(factors, axis=(-2, -1), keepdims=True)
            factors = factors / (1 + norms)
        return jnp.asarray(factors, self.dtype), jnp.asarray(terms, self.dtype)

    def size(self, steps: int, channels: int) -> int:
        count = sum(map(int, map(np.prod, self.shapes(steps, channels))))
        return count * np.dtype(self.dtype).itemsize


def _apply_blocks(a, x):
    return jnp.einsum("...ij,...j->...i", a, x)


_diagonal = ft.partial(Kind, pararnn.Diagonal, operator.mul, operator.mul)
_blocks = ft.partial(Kind, pararnn.BlockDiagonal, _apply_blocks, jnp.matmul)
KINDS = {
    "diagonal": (_diagonal(), (1, 16, 256)),
    "diagonal, complex64": (_diagonal(dtype=np.complex64), (1, 16, 256)),
    "diagonal, reversed": (_diagonal(reverse=True), (1, 16, 256)),
    "block diagonal 2x2": (_blocks(block=2), (16,)),
    "dense": (
        # The one block of a dense matrix has no axis of its own.
        _blocks(block=4)._replace(transition=lambda a: pararnn.Dense(a[:, 0])),
        (4,),
    ),
}


def cases(settings: Settings) -> Iterator[Case]:
    for name, (kind, widths) in KINDS.items():
        for steps in settings.steps(1024, 16384, 131072):
            for channels in widths:
                yield Case(
                    "linear_scan",
                    {"structure": name, "T": steps, "channels": channels},
                    lambda k=kind, t=steps, c=channels: _measure(k, t, c, settings),
                    left_out=too_large(kind.size(steps, channels)),
                )


def _measure(kind: Kind, steps, channels, settings):
    a, b = kind.make(steps, channels)

    def auto(a, b):
        terms = b.reshape(b.shape[0], -1)
        return pararnn.linear_scan(kind.transition(a), terms, reverse=kind.reverse)

    def scan(a, b):
        return scan_linear(kind.multiply, a, b, kind.reverse)

    def associative(a, b):
        return associative_linear(kind.multiply, kind.compose, a, b, kind.reverse)

    programs = compile_all(
        {"scan": scan, "associative": associative, "auto": auto}, a, b
    )
    expected = programs["scan"](a, b).reshape(steps, -1)
    error = relative_error(programs["auto"](a, b), expected)
    times = time_in_turn(programs, a, b, quick=settings.quick)
    compiling = {name: program.compile_seconds for name, program in programs.items()}
    fastest = min("scan", "associative", key=times.ms)
    return {
        "scan ms": times.ms("scan"),
        "associative ms": times.ms("associative"),
        "auto ms": times.ms("auto"),
        "ratio": times.ratio("auto", "scan", "associative"),
        "auto compile s": compiling["auto"],
        "compile ratio": compiling["auto"] / compiling[fastest],
        "max rel. error": error,
    }
