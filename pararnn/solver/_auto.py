"""The default solver: which method, and the measurements behind the rule.

CPU (2 cores of an AMD EPYC with AVX-512, jax 0.10.2, diagonal GRU in float32; ms for
the forward solve, median of 7):

| T      | channels | sequential | Newton, 2 steps, best of 8..256 segments |
|--------|----------|------------|------------------------------------------|
| 16384  | 1        | 0.62       | 0.28                                     |
| 131072 | 1        | 4.94       | 2.27                                     |
| 16384  | 16       | 0.99       | 3.5                                      |
| 131072 | 16       | 7.3        | 39                                       |
| 16384  | 64       | 3.5        | 11                                       |

XLA turns a small sequential loop into straight machine code, and 16 channels already
fill its vector units: parallel time only helps a single narrow sequence. On a GPU
(not measured yet) each sequential step is several kernel launches, so time is
always cut, into segments of 16 steps.

No rung is damped. What a few steps of Newton's method cannot certify, a few damped ones
cannot either: they save steps only where both need a hundred (dense Elman cell of width
8, T = 512, full Newton against damped: gain 0.5, 4 to 6; gain 1.5, 11 to 18; gain 3,
300 to 100; on 16 segments 2 to 2, 4 to 4, 6 to 7; `python -m benchmarks methods`), and
there the loop is cheaper than either. A ladder with one is
`Ladder((Jacobi(64), Newton(64), DampedNewton(64)), (1, 8, 100))`.

Where time lies across devices, the loop would have one of them work at a time, so time
is always cut, on a CPU into one segment for each device.
"""

import equinox as eqx
import jax

from ._ladder import Ladder
from .methods import Jacobi, Newton
from .methods._base import check_tolerances


class Auto(eqx.Module):
    """Chooses the method by platform and size, and always returns the right answer.

    Where parallel time is faster, a [`pararnn.Ladder`][] of a few cheap steps is tried,
    on segments. If any sequence is not certified by then, the sequential loop runs, and
    `stats["sequential"]` says so. Where devices share time, the ladder is tried on any
    platform.

    **Arguments:** `rtol`, `atol`, as for [`pararnn.Newton`][].

    **Raises:** `ValueError` for negative tolerances.
    """

    rtol: float | None = eqx.field(static=True, default=None)
    atol: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_tolerances("Auto", self.rtol, self.atol)


def choose_ladder(
    auto: Auto,
    steps: int,
    channels: int,
    differentiated: bool,
    max_steps: int | None = None,
    shards: int = 1,
) -> Ladder:
    """The rungs to try; none for the sequential loop at once.

    **Arguments:** `channels` counts the numbers in one step's state, batch included;
    `differentiated`, whether a derivative is taken of this solve; `max_steps` is the
    limit on each rung that the user gave; `shards`, how many devices share time.
    """
    on_cpu = jax.default_backend() == "cpu"
    if shards > 1:
        segments = shards if on_cpu else max(shards, steps // 16)
        limits = (1, 3) if on_cpu else (1, 8)
    elif on_cpu:
        # Segments are copies of the inputs. Beside a gradient, where the forward pass
        # is the smaller part, they would be half of the memory.
        if channels > 1 or steps < 4096 or differentiated:
            return Ladder(())
        segments, limits = 256, (1, 3)
    elif steps < 64:
        return Ladder(())
    else:
        segments, limits = steps // 16, (1, 8)
    methods = (
        Jacobi(segments, rtol=auto.rtol, atol=auto.atol),
        Newton(segments, rtol=auto.rtol, atol=auto.atol),
    )
    return Ladder(methods, limits if max_steps is None else max_steps)
