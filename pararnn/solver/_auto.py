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
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from ._newton import Newton, check_tolerances


class Auto(eqx.Module):
    """Chooses the method by platform and size, and always returns the right answer.

    Where parallel time is faster, a few steps of [`pararnn.Newton`][] on segments are
    tried. If any sequence is not certified by then, the sequential loop runs, and
    `stats["sequential"]` says so.

    **Arguments:** `rtol`, `atol`, as for [`pararnn.Newton`][].

    **Raises:** `ValueError` for negative tolerances.
    """

    rtol: float | None = eqx.field(static=True, default=None)
    atol: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        check_tolerances("Auto", self.rtol, self.atol)


class Attempt(NamedTuple):
    segments: int
    max_steps: int


def choose_attempt(steps: int, channels: int, differentiated: bool) -> Attempt | None:
    """Newton's segments and steps, or `None` for the sequential loop at once.

    **Arguments:** `channels` counts the numbers in one step's state, batch included;
    `differentiated`, whether a derivative is taken of this solve.
    """
    if jax.default_backend() == "cpu":
        # Newton's segments are copies of the inputs. Beside a gradient, where the
        # forward pass is the smaller part, they would be half of the memory.
        if channels > 1 or steps < 4096 or differentiated:
            return None
        return Attempt(segments=256, max_steps=3)
    if steps < 64:
        return None
    return Attempt(segments=steps // 16, max_steps=8)


def with_fallback(newton, sequential):
    """Newton's answer where it is certified for all, the sequential one otherwise."""
    states, stats = newton
    shared = {k: jnp.asarray(v) for k, v in stats.items() if k != "certified"}

    def fall_back():
        states, stats = sequential()
        replaced = {
            k: jnp.broadcast_to(jnp.asarray(stats.get(k, v), v.dtype), v.shape)
            for k, v in shared.items()
        }
        # The steps that were tried remain part of the story.
        return states, replaced | {k: shared[k] for k in ("num_steps", "nonfinite")} | {
            "certified": jnp.ones_like(certified)
        }

    certified = stats["certified"]
    return lax.cond(
        jnp.all(certified),
        lambda: (states, shared | {"certified": certified}),
        fall_back,
    )


def as_newton(solver: Auto, attempt: Attempt) -> Newton:
    return Newton(attempt.segments, rtol=solver.rtol, atol=solver.atol)
