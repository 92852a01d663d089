"""Random cells whose entries are of very different or of difficult sizes.

Every cell keeps the dtypes of the state that it is given. So the same cell in float64
is the reference for one in float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Scaled(NamedTuple):
    """A cell with its sequence, in float32 or coarser."""

    cell: Callable
    xs: Any
    h0: Any


def _unit(rng, width: int):
    """A random dense cell whose states are of size 1, and its first state."""
    gain = rng.uniform(0.3, 1.5)
    W = gain * rng.standard_normal((width, width)) / width**0.5

    def step(h, x):
        return jnp.tanh(jnp.asarray(W, h.dtype) @ h + x)

    return step, 0.5 * rng.standard_normal(width)


def _inputs(rng, steps: int, width: int):
    return rng.standard_normal((steps, width))


def _of_size(size: Callable[[Any], Any]):
    """A unit cell in other units, for each entry or for all."""

    def make(rng, steps: int, width: int) -> Scaled:
        step, h0 = _unit(rng, width)
        u = np.broadcast_to(size(rng), (width,))

        def cell(h, x):
            own = jnp.asarray(u, h.dtype)
            return own * step(h / own, x)

        return Scaled(cell, _inputs(rng, steps, width), u * h0)

    return make


def _spread_out(rng, steps: int, width: int) -> Scaled:
    """Factors of 1e12 between the entries of one leaf."""
    return _of_size(lambda rng: np.logspace(-6, 6, width))(rng, steps, width)


def _denormal(rng, steps: int, width: int) -> Scaled:
    """Entries below the smallest normal number, which XLA may take for zero."""
    step, h0 = _unit(rng, width)
    size = float(rng.choice([1e-40, 1e-42]))

    def cell(h, x):
        return 0.7 * h[0] + jnp.asarray(size, h[0].dtype) * h[1], step(h[1], x)

    return Scaled(cell, _inputs(rng, steps, width), (size * h0, h0))


def _mixed(rng, steps: int, width: int) -> Scaled:
    """A leaf in bfloat16 beside one in float32; each feeds the other."""
    step, h0 = _unit(rng, width)

    def cell(h, x):
        coarse, fine = h
        ahead = step(fine, x + 0.3 * coarse.astype(fine.dtype))
        return (0.5 * coarse + 0.5 * ahead.astype(coarse.dtype)), ahead

    start = jnp.asarray(h0, jnp.bfloat16), jnp.asarray(h0, jnp.float32)
    return Scaled(cell, _inputs(rng, steps, width), start)


def _beside_a_clock(rng, steps: int, width: int) -> Scaled:
    """A counter at a million, and a cell that does not read it."""
    step, h0 = _unit(rng, width)

    def cell(h, x):
        return h[0] + 1, step(h[1], x)

    return Scaled(cell, _inputs(rng, steps, width), (np.float64(1e6), h0))


def _beside_constants(rng, steps: int, width: int) -> Scaled:
    """Entries that never change, of sizes 1e-20 to 1e20, and one that reads them."""
    step, h0 = _unit(rng, width)
    constants = np.logspace(-20, 20, 5)

    def cell(h, x):
        return h[0], step(h[1], x + 1e-20 * h[0][-1])

    return Scaled(cell, _inputs(rng, steps, width), (constants, h0))


def _beside_zeros(rng, steps: int, width: int) -> Scaled:
    """Entries that are exactly zero, by a product, a rectifier and a constant."""
    step, h0 = _unit(rng, width)

    def cell(h, x):
        zeros, own = h
        dead = jnp.stack([zeros[0] * own[0], jax.nn.relu(-(own[0] ** 2)), 0 * zeros[2]])
        return dead, step(own, x + zeros[0])

    return Scaled(cell, _inputs(rng, steps, width), (np.zeros(3), h0))


def _cancelling(rng, steps: int, width: int) -> Scaled:
    """Small entries as differences of larger numbers, with the rounding of those."""
    step, h0 = _unit(rng, width)

    def cell(h, x):
        big = step(h[1], x)
        return (3 + 1e-4 * jnp.sin(big)) - 3 + 0.5 * h[0], big

    return Scaled(cell, _inputs(rng, steps, width), (1e-4 * h0, h0))


def _fading(rng, steps: int, width: int) -> Scaled:
    """Entries that start at 1e30, or end at 1e-12, beside entries that stay."""
    step, h0 = _unit(rng, width)

    def cell(h, x):
        return 0.5 * h[0] + x[0], 0.8 * h[1], step(h[2], x)

    start = np.float64(1e30), 1 + np.abs(h0), h0
    return Scaled(cell, _inputs(rng, steps, width), start)


def _one_of(*sizes: float):
    return lambda rng: float(rng.choice(sizes))


SCALES: dict[str, Callable[[Any, int, int], Scaled]] = {
    "tiny": _of_size(_one_of(1e-30, 1e-20, 1e-9)),
    "huge": _of_size(_one_of(1e9, 1e20, 1e30)),
    "denormal": _denormal,
    "1e12 in a leaf": _spread_out,
    "mixed dtypes": _mixed,
    "clock": _beside_a_clock,
    "constants": _beside_constants,
    "zeros": _beside_zeros,
    "cancellation": _cancelling,
    "fading": _fading,
}


def draw_scaled(name: str, seed: int, steps: int) -> Scaled:
    """A cell of a kind, in float32 unless the kind says otherwise."""
    rng = np.random.default_rng(seed)
    cell, xs, h0 = SCALES[name](rng, steps, int(rng.integers(1, 6)))

    def to_single(leaf):
        return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf, jnp.float32)

    return Scaled(cell, to_single(xs), jax.tree.map(to_single, h0))
