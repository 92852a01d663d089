"""`backend="auto"`: which schedule, and the measurements behind the rule.

CPU (2 cores of an AMD EPYC with AVX-512, jax 0.10.2, float32, microseconds for the
whole scan, median of 7; `python -m benchmarks linear_scan` measures it again):

| T      | channels | sequential | associative | chunked, best of 16..1024 segments |
|--------|----------|------------|-------------|------------------------------------|
| 1024   | 1        | 14         | 128         | 49                                 |
| 1024   | 256      | 126        | 495         | 422                                |
| 16384  | 1        | 68         | 189         | 168                                |
| 16384  | 16       | 293        | 500         | 872                                |
| 16384  | 256      | 2524       | 34249       | 24499                              |
| 131072 | 1        | 501        | 465         | 946                                |
| 131072 | 256      | 67120      | 312455      | 231717                             |

XLA compiles a loop this small into straight machine code at 4 to 500 ns a step, while
the parallel forms stream the sequence through memory several times. So: sequential.

GPU: not measured yet. There each step of a `lax.scan` is several kernel launches, so
the parallel forms are taken; `chunked` where the `size**3` products of dense matrices
over log2(T) rounds would outweigh its serial inner loop.
"""

import functools as ft
import math
from typing import Literal, NamedTuple

import jax

from ._checks import is_symbolic, refuse_symbolic

Backend = Literal["auto", "sequential", "associative", "chunked"]
BACKENDS = ("auto", "sequential", "associative", "chunked")


class Choice(NamedTuple):
    backend: Literal["sequential", "associative", "chunked"]
    segments: int


def choose_backend(backend: Backend, kind: str, steps: int, size: int) -> Choice:
    """Settle `"auto"` and the number of segments, from what is known while tracing.

    **Arguments:** `kind` is the engine's layout, `steps` the length in time, `size` the
    width of one block (1 for elementwise transitions).
    """
    if is_symbolic(steps):
        if backend in ("associative", "chunked"):
            remedy = "Pass 'sequential', or leave it out"
            refuse_symbolic("linear_scan", f"`backend` {backend!r}", remedy, steps)
        return Choice("sequential", 1)
    # Two levels cost steps / segments + segments serial steps.
    segments = max(1, math.isqrt(steps))
    if backend != "auto":
        return Choice(backend, segments)
    if jax.default_backend() == "cpu" or steps < 32:
        return Choice("sequential", segments)
    if kind == "matrix" and size > 16:
        return Choice("chunked", segments)
    return Choice("associative", segments)


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


# `matrix_scan` with its gradient on 2 cores of an Intel Xeon, jax 0.10.2, float32,
# milliseconds, median of 5; B sequences of T steps, heads of K = V:
#
# | kind                | B, T, heads, K | recurrent | chunks of 16 | 32  | 64  |
# |---------------------|----------------|-----------|--------------|-----|-----|
# | delta rule          | 96, 40, 4, 8   | 6         | 27           | 32  | 49  |
# |                     | 32, 256, 1, 16 | 9         | 14           | 11  | 13  |
# |                     | 32, 256, 1, 32 | 34        | 22           | 25  | 25  |
# |                     | 1, 4096, 4, 16 | 27        | 44           | 47  | 48  |
# |                     | 1, 4096, 4, 32 | 79        | 84           | 48  | 60  |
# |                     | 1, 4096, 4, 64 | 175       | 129          | 88  | 103 |
# | decay for each head | 96, 40, 4, 8   | 6         | 12           | 15  | 40  |
# |                     | 32, 256, 1, 16 | 11        | 8            | 11  | 14  |
# |                     | 32, 256, 1, 32 | 38        | 20           | 11  | 15  |
# |                     | 1, 4096, 4, 16 | 17        | 15           | 13  | 17  |
# |                     | 1, 4096, 4, 32 | 67        | 19           | 18  | 19  |
# |                     | 1, 4096, 4, 64 | 185       | 69           | 45  | 46  |
# | decay for each key  | 96, 40, 4, 8   | 5         | 15           | 16  | 47  |
# |                     | 32, 256, 1, 16 | 12        | 17           | 21  | 23  |
# |                     | 32, 256, 1, 32 | 42        | 28           | 37  | 49  |
# |                     | 1, 4096, 4, 16 | 20        | 36           | 26  | 37  |
# |                     | 1, 4096, 4, 32 | 74        | 39           | 35  | 42  |
# |                     | 1, 4096, 4, 64 | 169       | 101          | 97  | 74  |
#
# The value alone is as fast step by step or faster (`python -m benchmarks layers`): one
# fused loop over a state that stays in the cache, with a third of the multiplications.
# A GPU, where a step is a launch, takes the products of matrices; not measured.
#
# The chunks above went through the sequence by chunks for the sake of the derivative
# alone. Since then single steps find the states before them, in 0.72 to 0.89 of the
# time (T = 4096, 4 heads of K = V = 64, four kinds), and a decay for each key takes a
# tenth less in chunks of 32 than of 64.
#
# A derivative takes windows of chunks that fit into the cache. Value and gradient,
# T = 4096, 4 heads of K = V = 64, on 2 cores of an AMD EPYC without AVX-512 with
# 512 KiB of cache each, milliseconds, medians of 7, states by steps, chunks of 32:
#
# | kind                           | steps | at once | windows of 512 | 128 | 64  |
# |--------------------------------|-------|---------|----------------|-----|-----|
# | delta rule                     | 185   | 144     | 111            | 91  | 88  |
# | gated delta rule               | 180   | 136     | 111            | 107 | 105 |
# | decay for each head            | 135   | 100     | 62             | 63  | 55  |
# | decay for each key             | 134   | 146     | 101            | 93  | 93  |
# | decay for each key, delta rule | 178   | 198     | 174            | 148 | 129 |
#
# In windows of a single chunk XLA holds its factors in another order too, at 26 MB for
# 13 (decay for each head, chunks of 64).
#
# Sequences of a batch go one after the other, or 8 of them would be as large as a
# window of 8 times the steps, and the states of steps leave the cache. Ratios to all
# at once (by a `vmap` of loops), value and gradient, medians of 7:
#
# | B, T, heads, K  | delta rule | decay for each head | decay for each key |
# |-----------------|------------|---------------------|--------------------|
# | 32, 256, 1, 32  | 1.34       | 1.11                | 1.17               |
# | 8, 512, 4, 32   | 0.94       | 0.88                | 0.82               |
# | 96, 40, 4, 32   | 0.79       | 1.05                | 0.77               |
# | 256, 64, 2, 32  | 0.83       | 0.83                | 0.85               |
# | 8, 1024, 4, 64  | 0.83       | 0.70                | 0.72               |
# | 4, 1024, 16, 64 | 0.83       | 0.97                | 0.87               |
#
# Values alone, B = 8, T = 4096, 4 heads of 64 x 64: 0.54 to 0.65 over five kinds.
#
# Steps with windows, as above, another day: 231 ms at once (281 MB), 160 in windows of
# 32 steps (22 MB) for the delta rule, 209 and 120 with a decay for each head.
_CHUNK, _SHORT = 64, 32
# Entries of a head's matrix: on a CPU, up to so many a derivative steps too, and up to
# so many chunks are half as long; where something is erased, always.
_SMALL, _MEDIUM = 24 * 24, 32 * 32
# Entries, steps times those of all heads' matrices, of a window of chunks; steps of one
# that is stepped through, and how many there must be. Of fewer all fits (chunks of one
# head of 32 x 64 took 1.3 of the time in windows of 512), or is a window of something
# else (`linear` takes 2048 steps at a time of very long sequences).
_WINDOW, _STEPPED, _LONG = 64 * 4 * 64 * 64, 32, 4096
# Entries of all heads' matrices from which on sequences of a batch go one by one: not
# those of the first row.
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


# Mamba's recurrence, 16 states for each channel, float32, on 2 cores of an Intel Xeon
# (jax 0.10.2), milliseconds (and MB of temporaries), median of 7:
#
# | B, T, channels | value: stored | fused   | with gradient: stored | fused    |
# |----------------|---------------|---------|-----------------------|----------|
# | 96, 40, 64     | 36 (60)       | 4 (4)   | 126 (180)             | 22 (21)  |
# | 1, 4096, 128   | 143 (128)     | 8 (7)   | 1206 (384)            | 61 (41)  |
# | 8, 1024, 128   | 176 (256)     | 14 (13) | 565 (768)             | 121 (77) |
#
# Since then the fused form stores a state for every window only, where there are many:
# the recurrence of the second row by itself takes 31 for 49 ms, and 5 for 38 MB.
#
# On a GPU, where a step is a launch, states are stored; not measured.
FusedForm = Literal["auto", "fused", "stored"]
FUSED_FORMS = ("auto", "fused", "stored")


def choose_fused(form: FusedForm, shards: int, state: int, output: int) -> bool:
    """Whether `fused_scan` makes factors and states one step at a time.

    On a CPU, where states of `state` numbers are larger than the `output` numbers that
    are read of each. `linear.Mamba`, 64 channels, without its convolution: time of the
    stored form over that of the fused one, value and value with gradient,

    | states of a channel | T = 512 | T = 4096 | T = 1024, 8 sequences |
    |--------------------:|--------:|---------:|----------------------:|
    |                   1 | 1.0 0.7 |  0.8 0.8 |               1.0 1.0 |
    |                   2 | 1.6 1.3 |  1.4 1.3 |               2.3 1.4 |
    |                   4 | 2.1 2.4 |  2.1 2.9 |               3.9 1.7 |
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
