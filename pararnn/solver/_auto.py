"""The default solver: which method, and the measurements behind the rule.

CPU (2 cores of an AMD EPYC with AVX-512, jax 0.10.2, diagonal GRU in float32; ms for
the forward solve, median of 7; Newton's method then started from three steps, now from
more, and takes fewer; `python -m benchmarks segments` has newer rows):

| T      | channels | sequential | Newton, 2 steps, best of 8..256 segments |
|--------|----------|------------|------------------------------------------|
| 16384  | 1        | 0.62       | 0.28                                     |
| 131072 | 1        | 4.94       | 2.27                                     |
| 16384  | 16       | 0.99       | 3.5                                      |
| 131072 | 16       | 7.3        | 39                                       |
| 16384  | 64       | 3.5        | 11                                       |

XLA turns a small sequential loop into straight machine code, and 16 channels already
fill its vector units: parallel time only helps a single narrow sequence. Its structure
is known: one number is diagonal. With blocks, Newton's method has still more to do per
step, and the loop has not.

GPU (a model of the cost; not measured yet): a step of the loop is a few kernel
launches, some 10 us whatever the cell. Three sweeps of Newton push `size` tangents
through blocks of `size`, 2 * 3 * 3 * channels * size^2 operations a step with three
gates; at 20 Tflop/s that is 10 us at channels * size^2 = 1e7. Beyond that the loop runs
at once: for a dense cell from a width of 200 on, for 16 of them from 80 on, for
diagonal ones hardly ever. Below it time is cut into segments of 16 steps, or longer
ones where the Jacobians of so many would take more than 1 GiB in float32.

No rung is damped. What a few steps of Newton's method cannot certify, a few damped ones
cannot either: they save steps only where Newton needs hundreds (dense Elman cell of
width 8, T = 512, full Newton against damped: gain 0.5, 1 to 1; gain 1.5, 3 to 6; gain
3, 260 to 47; on 16 segments 1 to 2, 3 to 4, 6 to 7; table `methods` of the benchmarks),
and there the loop is cheaper than either. A ladder with one is
`Ladder((Jacobi(64), Newton(64), DampedNewton(64)), (1, 8, 50))`.

Where time lies across devices, the loop would have one of them work at a time, so time
is always cut, on a CPU into one segment for each device.
"""

from collections.abc import Callable

import equinox as eqx
import jax

from ..scan import is_symbolic
from ._ladder import Ladder
from ._structure import Structure
from .methods import Jacobi, Newton
from .methods._base import check_tolerances

# On a GPU, per step: numbers times the square of a block's size; bytes of Jacobians.
_WORTH_CUTTING = 10**7
_LARGEST = 2**30


class Auto(eqx.Module):
    """Chooses the method by platform, size and structure; the answer is always right.

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
    find_structure: Callable[[], Structure],
    max_steps: int | None = None,
    shards: int = 1,
) -> Ladder:
    """The rungs to try; none for the sequential loop at once.

    **Arguments:** `channels` counts the numbers in one step's state, batch included;
    `differentiated`, whether a derivative is taken of this solve; `max_steps` is the
    limit on each rung that the user gave; `shards`, how many devices share time.
    """
    if is_symbolic(steps, channels) and shards == 1:
        return Ladder(())
    on_cpu = jax.default_backend() == "cpu"
    if shards > 1:
        segments = shards
        if not on_cpu:
            size = find_structure().size
            segments = max(shards, _count_segments(steps, channels, size, shards))
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
        size = find_structure().size
        segments, limits = _count_segments(steps, channels, size), (1, 8)
        if segments < 4 or channels * size**2 > _WORTH_CUTTING:
            return Ladder(())
    methods = (
        Jacobi(segments, rtol=auto.rtol, atol=auto.atol),
        Newton(segments, rtol=auto.rtol, atol=auto.atol),
    )
    return Ladder(methods, limits if max_steps is None else max_steps)


def _count_segments(steps: int, channels: int, size: int, devices: int = 1) -> int:
    """Of 16 steps each, or as many as have room for their Jacobians."""
    room = devices * _LARGEST // (4 * max(1, channels) * max(1, size))
    return min(steps // 16, room)
