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

import math
from typing import Literal, NamedTuple

import jax

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
    # Two levels cost steps / segments + segments serial steps.
    segments = max(1, math.isqrt(steps))
    if backend != "auto":
        return Choice(backend, segments)
    if jax.default_backend() == "cpu" or steps < 32:
        return Choice("sequential", segments)
    if kind == "matrix" and size > 16:
        return Choice("chunked", segments)
    return Choice("associative", segments)
