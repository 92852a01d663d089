"""Every choice by platform and size, beside the measurement it follows.

All of them were measured on CPUs. On a GPU every step of a loop is a kernel launch, so
parallel forms are taken there; this is reasoned, not measured. The whole tables, and
the machines, are in `docs/devdocs/scan.md`.
"""

import functools as ft
import math
from typing import Literal, NamedTuple

import jax

from .._checks import is_symbolic, refuse_symbolic

# Whole scan, float32, microseconds (2 cores of an AMD EPYC with AVX-512, jax 0.10.2,
# median of 7; `python -m benchmarks linear_scan`):
#
# | T      | channels | sequential | associative | chunked, best of 16..1024 chunks |
# |--------|----------|------------|-------------|----------------------------------|
# | 1024   | 256      | 126        | 495         | 422                              |
# | 16384  | 256      | 2524       | 34249       | 24499                            |
# | 131072 | 1        | 501        | 465         | 946                              |
#
# XLA compiles a loop this small into straight machine code at 4 to 500 ns a step, while
# the parallel forms stream the sequence through memory several times.
#
# On a GPU, `chunked` is for dense matrices whose `size**3` products over log2(T) rounds
# would outweigh its serial inner loop.
Backend = Literal["auto", "sequential", "associative", "chunked"]
BACKENDS = ("auto", "sequential", "associative", "chunked")


class Choice(NamedTuple):
    backend: Literal["sequential", "associative", "chunked"]
    chunks: int


def choose_backend(backend: Backend, kind: str, steps: int, size: int) -> Choice:
    """Settle `"auto"` and the number of chunks, from what is known while tracing.

    **Arguments:** `kind` is the engine's layout, `steps` the length in time, `size` the
    width of one block (1 for elementwise transitions).
    """
    if is_symbolic(steps):
        if backend in ("associative", "chunked"):
            remedy = "Pass 'sequential', or leave it out"
            refuse_symbolic("linear_scan", f"`backend` {backend!r}", remedy, steps)
        return Choice("sequential", 1)
    # Two levels cost steps / chunks + chunks serial steps.
    chunks = max(1, math.isqrt(steps))
    if backend != "auto":
        return Choice(backend, chunks)
    if jax.default_backend() == "cpu" or steps < 32:
        return Choice("sequential", chunks)
    if kind == "matrix" and size > 16:
        return Choice("chunked", chunks)
    return Choice("associative", chunks)


Form = Literal["auto", "recurrent", "chunkwise"]
FORMS = ("auto", "recurrent", "chunkwise")


class MatrixPlan(NamedTuple):
    """How `matrix_scan` computes its value and its derivative."""

    value: Literal["recurrent", "chunkwise"]
    derivative: Literal["recurrent", "chunkwise"]
    emit: Literal["after", "before"]
    steps_per_query: int
    # Steps of a chunk, a multiple of `steps_per_query`.
    chunk: int
    # Steps that a derivative takes together; all at once if `None`.
    window: int | None
    # Whether the sequences of a batch are taken one after the other.
    sequential_vmap: bool

    @property
    def stepped(self) -> bool:
        """Whether the states are found step by step, for a derivative by chunks too."""
        return self.value == "recurrent"

    @property
    def value_is_derivable(self) -> bool:
        """Whether the value is found in the form that is differentiated."""
        in_windows = self.stepped and self.window is not None
        return self.value == self.derivative and not in_windows

    @property
    def chunks_per_window(self) -> int | None:
        return None if self.window is None else self.window // self.chunk


# `matrix_scan` with its gradient, float32, milliseconds, median of 5 (2 cores of an
# Intel Xeon, jax 0.10.2); B sequences of T steps, heads of K = V:
#
# | kind                | B, T, heads, K | recurrent | chunks of 16 | 32  | 64  |
# |---------------------|----------------|-----------|--------------|-----|-----|
# | delta rule          | 96, 40, 4, 8   | 6         | 27           | 32  | 49  |
# |                     | 1, 4096, 4, 16 | 27        | 44           | 47  | 48  |
# |                     | 1, 4096, 4, 32 | 79        | 84           | 48  | 60  |
# |                     | 1, 4096, 4, 64 | 175       | 129          | 88  | 103 |
# | decay for each head | 96, 40, 4, 8   | 6         | 12           | 15  | 40  |
# |                     | 1, 4096, 4, 16 | 17        | 15           | 13  | 17  |
# |                     | 1, 4096, 4, 32 | 67        | 19           | 18  | 19  |
# |                     | 1, 4096, 4, 64 | 185       | 69           | 45  | 46  |
#
# A decay for each key takes 10% less time in chunks of 32 than of 64. The value alone
# is as fast step by step, or faster: one fused loop over a state that stays in the
# cache, with a third of the multiplications.
_CHUNK, _SHORT = 64, 32
# Entries of a head's matrix, on a CPU. Up to `_SMALL`, a derivative steps too. Up to
# `_MEDIUM`, and always where something is erased, chunks are half as long.
_SMALL, _MEDIUM = 24 * 24, 32 * 32
# A derivative takes windows of chunks that fit into the cache. Value and gradient,
# T = 4096, 4 heads of K = V = 64, milliseconds, medians of 7 (2 cores of an AMD EPYC
# with 512 KiB of cache each), states by steps, chunks of 32:
#
# | kind                           | steps | at once | windows of 128 steps | 64  |
# |--------------------------------|-------|---------|----------------------|-----|
# | delta rule                     | 185   | 144     | 91                   | 88  |
# | decay for each head            | 135   | 100     | 63                   | 55  |
# | decay for each key, delta rule | 178   | 198     | 148                  | 129 |
#
# A window has at least two chunks: with one, XLA orders its factors differently, and
# takes 26 MB for 13 (decay for each head, chunks of 64). Stepping takes windows too:
# delta rule, 231 ms at once (281 MB) and 160 in windows of 32 steps (22 MB).
#
# `_WINDOW`: entries of a window of chunks, its steps times the entries of all heads.
# `_STEPPED`: steps of a window that is stepped through. `_LONG`: steps from which on
# there are windows. A shorter sequence fits the cache (one head of 32 x 64 took 1.3
# times as long in windows of 512), or is a window already (`linear` takes 2048 steps
# at a time of very long sequences).
_WINDOW, _STEPPED, _LONG = 64 * 4 * 64 * 64, 32, 4096
# Entries of all heads' matrices from which on the sequences of a batch are taken one
# after the other. As one batch, 8 sequences would be as large as a window of 8 times
# the steps, and the states of steps would leave the cache. Times relative to a `vmap`
# of loops, value and gradient:
#
# | B, T, heads, K  | delta rule | decay for each head | decay for each key |
# |-----------------|------------|---------------------|--------------------|
# | 32, 256, 1, 32  | 1.34       | 1.11                | 1.17               |
# | 256, 64, 2, 32  | 0.83       | 0.83                | 0.85               |
# | 8, 1024, 4, 64  | 0.83       | 0.70                | 0.72               |
MIN_ENTRIES_TO_UNBATCH = 2 * 32 * 32


def plan_matrix_scan(
    form: Form,
    chunk: int | None,
    steps: int,
    steps_per_query: int,
    entries: int,
    *,
    emit: Literal["after", "before"] = "after",
    heads: int,
    each_key: bool,
    erases: bool,
    shards: int = 1,
) -> MatrixPlan:
    """Settle how `matrix_scan` runs, from what is known while tracing.

    **Arguments:** `steps_per_query` divides a chunk; `entries` of the matrix of each of
    the `heads`; `each_key`, whether each key has a decay; `erases`, whether what is
    written depends on the state; `shards`, how many devices share time, each of which
    has whole chunks.

    **Raises:** `ValueError` for the recurrent form where devices share time.
    """
    if shards > 1 and form == "recurrent":
        raise ValueError(
            "matrix_scan: `form` is 'recurrent', one step after the other, but time "
            'lies across devices (the mesh in context has an axis "time"), each of '
            "which would wait for the one before. Pass 'chunkwise', or leave it out."
        )
    plan = ft.partial(MatrixPlan, emit=emit, steps_per_query=steps_per_query)
    if is_symbolic(steps):
        if form == "chunkwise":
            remedy = "Pass 'recurrent', or leave it out"
            refuse_symbolic("matrix_scan", f"`form` {form!r}", remedy, steps)
        return plan(
            "recurrent",
            "recurrent",
            chunk=steps_per_query,
            window=None,
            sequential_vmap=False,
        )
    steps = -(-steps // shards)
    on_cpu = shards == 1 and jax.default_backend() == "cpu"
    # A loop over a batch that lies across devices would move every sequence to all, and
    # JAX refuses one over an axis that a mesh knows of.
    alone = jax.device_count() == 1 and jax.sharding.get_abstract_mesh().empty
    large = heads * entries >= MIN_ENTRIES_TO_UNBATCH
    one_by_one = on_cpu and alone and large
    if chunk is None:
        # Several devices have fewer steps each, and every chunk exchanges a little.
        halved = on_cpu and (each_key or erases or entries <= _MEDIUM)
        chunk = _CHUNK // 2 if halved else _CHUNK
        chunk = steps_per_query * max(1, chunk // steps_per_query)
        longest = max(0, steps // steps_per_query - 1).bit_length()
        chunk = min(chunk, steps_per_query << longest)
    plan = ft.partial(plan, chunk=chunk, sequential_vmap=one_by_one)
    small = (shards == 1 and steps < _SHORT) or (on_cpu and entries <= _SMALL)
    if form == "recurrent" or (form == "auto" and small):
        return plan("recurrent", "recurrent", window=choose_window(steps))
    # At least two chunks, of as many steps as together hold so many entries.
    window = max(2, _WINDOW // (heads * entries * chunk)) * chunk
    several = on_cpu and steps >= max(_LONG, 8 * window)
    stepped = on_cpu and form == "auto"
    return plan(
        "recurrent" if stepped else "chunkwise",
        "chunkwise",
        window=window if several else None,
    )


def choose_window(steps: int) -> int | None:
    """Steps between two states that the derivative of a loop stores; all if `None`."""
    return None if is_symbolic(steps) or steps < _LONG else _STEPPED


# Mamba's recurrence, 16 states a channel, float32, milliseconds (and MB of
# temporaries), median of 7 (2 cores of an Intel Xeon, jax 0.10.2):
#
# | B, T, channels | value: stored | fused   | with gradient: stored | fused    |
# |----------------|---------------|---------|-----------------------|----------|
# | 96, 40, 64     | 36 (60)       | 4 (4)   | 126 (180)             | 22 (21)  |
# | 1, 4096, 128   | 143 (128)     | 8 (7)   | 1206 (384)            | 61 (41)  |
# | 8, 1024, 128   | 176 (256)     | 14 (13) | 565 (768)             | 121 (77) |
FusedForm = Literal["auto", "fused", "stored"]
FUSED_FORMS = ("auto", "fused", "stored")


def choose_fused(form: FusedForm, shards: int, state: int, output: int) -> bool:
    """Whether `fused_scan` makes factors and states one step at a time.

    It does on a CPU if a state has more numbers, `state`, than are read of it,
    `output`. `linear.Mamba`, 64 channels, without its convolution: the stored form's
    time divided by the fused form's, value and value with gradient,

    | states of a channel | T = 512 | T = 4096 | T = 1024, 8 sequences |
    |--------------------:|--------:|---------:|----------------------:|
    |                   1 | 1.0 0.7 |  0.8 0.8 |               1.0 1.0 |
    |                   2 | 1.6 1.3 |  1.4 1.3 |               2.3 1.4 |
    |                   8 | 2.6 3.0 |  4.0 4.2 |               5.0 2.3 |

    **Raises:** `ValueError` on an unknown form, or the fused one where devices share
    time.
    """
    if form not in FUSED_FORMS:
        raise ValueError(
            f"fused_scan: unknown `form` {form!r}; there are {', '.join(FUSED_FORMS)}."
        )
    if form == "fused" and shards > 1:
        raise ValueError(
            "fused_scan: `form` is 'fused', one step after the other, but time lies "
            'across devices (the mesh in context has an axis "time"), each of which '
            "would wait for the one before. Pass 'stored', or leave it out."
        )
    if form != "auto":
        return form == "fused"
    return shards == 1 and jax.default_backend() == "cpu" and state > output
