"""Chaotic flows as recurrences, and observers that follow them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._peers import scan_states

# Steps until a trajectory has reached its attractor.
BURN_IN = 5000
# A difference that grows to this, relative to the largest state, shows chaos.
VISIBLE = 1e-8

Field = Callable[[jax.Array], jax.Array]


def lorenz(h):
    """Lorenz 1963, "Deterministic nonperiodic flow", J. Atmos. Sci. 20."""
    x, y, z = h
    return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


def roessler(h):
    """Rössler 1976, "An equation for continuous chaos", Phys. Lett. A 57."""
    x, y, z = h
    return jnp.stack([-y - z, x + 0.2 * y, 0.2 + z * (x - 5.7)])


def chua(h):
    """Chua, Komuro and Matsumoto 1986, "The double scroll family", IEEE Trans.
    Circuits Syst. 33: α = 9, β = 100/7, slopes -1/7 inside and 2/7 outside."""
    x, y, z = h
    resistor = 2 / 7 * x - 3 / 14 * (jnp.abs(x + 1) - jnp.abs(x - 1))
    return jnp.stack([9 * (y - resistor), x - y + z, -100 / 7 * y])


def thomas(h):
    """Thomas 1999, "Deterministic chaos seen in terms of feedback circuits", Int. J.
    Bifurcation Chaos 9: b = 0.18."""
    x, y, z = h
    return jnp.sin(jnp.stack([y, z, x])) - 0.18 * h


def halvorsen(h):
    """Halvorsen's cyclic flow in Sprott 2003, "Chaos and Time-Series Analysis":
    a = 1.27."""
    x, y, z = h
    after = jnp.stack([y, z, x])
    return -1.27 * h - 4 * (after + jnp.stack([z, x, y])) - after**2


def sprott_b(h):
    """Case B of Sprott 1994, "Some simple chaotic flows", Phys. Rev. E 50."""
    x, y, z = h
    return jnp.stack([y * z, x - y, 1 - x * y])


def aizawa(h):
    """The flow named after Aizawa, from Langford 1984, "Numerical studies of torus
    bifurcations", ISNM 70: (0.95, 0.7, 0.6, 3.5, 0.25, 0.1)."""
    x, y, z = h
    square = x**2 + y**2
    return jnp.stack(
        [
            (z - 0.7) * x - 3.5 * y,
            3.5 * x + (z - 0.7) * y,
            0.6 + 0.95 * z - z**3 / 3 - square * (1 + 0.25 * z) + 0.1 * z * x**3,
        ]
    )


def chen(h):
    """Chen and Ueta 1999, "Yet another chaotic attractor", Int. J. Bifurcation Chaos
    9: (35, 3, 28)."""
    x, y, z = h
    return jnp.stack([35 * (y - x), -7 * x - x * z + 28 * y, x * y - 3 * z])


def hindmarsh_rose(h):
    """Hindmarsh and Rose 1984, "A model of neuronal bursting using three coupled first
    order differential equations", Proc. R. Soc. B 221; r = 0.006, I = 3.25."""
    x, y, z = h
    return jnp.stack(
        [
            y - x**3 + 3 * x**2 - z + 3.25,
            1 - 5 * x**2 - y,
            0.006 * (4 * (x + 1.6) - z),
        ]
    )


class Flow(NamedTuple):
    """A flow in three dimensions, and one Runge-Kutta step of it as a cell.

    **Arguments:**

    - `dt`: small enough that the step stays on the attractor, and large enough that
        chaos shows within 4096 steps.
    - `start`: a state in the attractor's basin (off the planes of symmetry).
    - `measured`: the coordinates that an observer sees, see `observe`.
    """

    name: str
    field: Field
    dt: float
    start: tuple[float, float, float]
    measured: tuple[int, ...]

    def __str__(self) -> str:
        return self.name

    def step(self, h):
        """The classical fourth-order Runge-Kutta method."""
        a = self.field(h)
        b = self.field(h + self.dt / 2 * a)
        c = self.field(h + self.dt / 2 * b)
        d = self.field(h + self.dt * c)
        return h + self.dt / 6 * (a + 2 * b + 2 * c + d)

    def cell(self, h, x):
        """The step as a recurrence; there is no input."""
        del x
        return self.step(h)

    def observe(self, h, x):
        """Return the step with the measured coordinates taken from `x`.

        The error obeys the flow of the other coordinates alone: the complete
        replacement of Pecora and Carroll 1990, "Synchronization in chaotic systems",
        Phys. Rev. Lett. 64; or a Luenberger observer `p + K (x - C p)` of the
        prediction `p = step(h)`, with a gain of 1.
        """
        seen = np.isin(np.arange(3), self.measured)
        return jnp.where(seen, x, self.step(h))

    def coupling(self) -> str:
        return ", ".join("xyz"[i] for i in self.measured)


FLOWS = {
    flow.name: flow
    for flow in (
        Flow("Lorenz", lorenz, 0.02, (0.1, 0.1, 0.1), (1,)),
        Flow("Rössler", roessler, 0.15, (0.1, 0.1, 0.1), (0, 1)),
        Flow("Chua", chua, 0.05, (0.1, 0.1, 0.1), (0,)),
        Flow("Thomas", thomas, 0.3, (1.0, 0.0, 0.0), (0, 1)),
        Flow("Halvorsen", halvorsen, 0.02, (-1.48, -1.51, 2.04), (0, 1)),
        Flow("Sprott B", sprott_b, 0.1, (0.1, 0.1, 0.1), (0,)),
        Flow("Aizawa", aizawa, 0.1, (0.1, 0.1, 0.1), (0, 2)),
        Flow("Chen", chen, 0.005, (0.1, 0.1, 0.1), (1,)),
        Flow("Hindmarsh-Rose", hindmarsh_rose, 0.1, (0.1, 0.1, 0.1), (0, 2)),
    )
}


def make_trajectory(flow: Flow, steps: int):
    """Return empty inputs `[T]`, a state on the attractor, and the states after it."""
    start = jnp.asarray(flow.start, np.float64)
    xs = jnp.zeros(steps)

    @jax.jit
    def settle(h):
        return lax.fori_loop(0, BURN_IN, lambda _, h: flow.step(h), h)

    h0 = settle(start)
    return xs, h0, jax.jit(lambda h0: scan_states(flow.cell, xs, h0))(h0)


def find_horizon(flow: Flow, xs, h0, states) -> int:
    """Return after how many steps one more rounding at each step is visible.

    T if it never is.
    """
    signs = np.random.default_rng(0).choice((-1.0, 1.0), len(xs))
    # A change of `h0` alone may be rounded away before it grows.
    kicks = jnp.asarray(np.finfo(np.float64).eps * signs)

    def kicked(h, kick):
        return flow.step(h) * (1 + kick)

    other = np.asarray(jax.jit(lambda h0: scan_states(kicked, kicks, h0))(h0))
    states = np.asarray(states)
    seen = np.abs(other - states).max(1) > VISIBLE * np.abs(states).max()
    return int(np.argmax(seen)) if seen.any() else len(seen)


def find_exponent(flow: Flow, h0, steps: int = 50_000) -> float:
    """Return the largest Lyapunov exponent, per unit of time (Benettin et al. 1980)."""

    def body(carry, _):
        h, tangent = carry
        h, tangent = jax.jvp(flow.step, (h,), (tangent,))
        size = jnp.linalg.norm(tangent)
        return (h, tangent / size), jnp.log(size)

    @jax.jit
    def growth(h0):
        tangent = jnp.asarray([1.0, 0.0, 0.0])
        return jnp.mean(lax.scan(body, (h0, tangent), None, length=steps)[1])

    return float(growth(h0)) / flow.dt
