"""Chaotic systems to reconstruct, and observations of them."""

import dataclasses
from collections.abc import Callable
from types import MappingProxyType

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._parameters import check_key, check_positive, check_size


@dataclasses.dataclass(frozen=True)
class System:
    """An autonomous differential equation, $u' = v(u)$.

    **Arguments:**

    - `name`: for pictures and records.
    - `field`: $v$, from `[N]` to `[N]`.
    - `start`: a point near its attractor, `N` numbers.
    - `interval`: time between observations.
    - `settle`: time until the attractor is reached from near `start`.
    - `source`: where the system comes from.
    - `plane`: the two variables that a picture shows.
    """

    name: str
    field: Callable[[Float[Array, " N"]], Float[Array, " N"]]
    start: tuple[float, ...]
    interval: float
    settle: float
    source: str
    plane: tuple[int, int] = (0, 1)


@dataclasses.dataclass(frozen=True)
class Series:
    """Observations at equal intervals, standardised.

    **Attributes:** `values`, `[T, N]`, with mean zero and variance one over time,
    unless another series gave the scale; `mean` and `scale`, `[N]`, to return to the
    units of the system: `values * scale + mean`; `interval`, the time between
    observations.
    """

    values: Float[np.ndarray, "T N"]
    mean: Float[np.ndarray, " N"]
    scale: Float[np.ndarray, " N"]
    interval: float


def _lorenz63(u: Float[Array, "3"]) -> Float[Array, "3"]:
    x, y, z = u
    return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])


def _roessler(u: Float[Array, "3"]) -> Float[Array, "3"]:
    x, y, z = u
    return jnp.stack([-y - z, x + 0.2 * y, 0.2 + z * (x - 5.7)])


SYSTEMS: MappingProxyType[str, System] = MappingProxyType(
    {
        "lorenz63": System(
            "lorenz63",
            _lorenz63,
            start=(1.0, 1.0, 25.0),
            interval=0.01,
            settle=50.0,
            source="Lorenz, Deterministic nonperiodic flow, 1963; sigma = 10, "
            "rho = 28, beta = 8/3",
            plane=(0, 2),
        ),
        "roessler": System(
            "roessler",
            _roessler,
            start=(1.0, 1.0, 0.0),
            interval=0.08,
            settle=200.0,
            source="Rössler, An equation for continuous chaos, 1976; a = b = 0.2, "
            "c = 5.7",
        ),
    }
)


def simulate(
    system: System,
    steps: int,
    *,
    noise: float = 0.0,
    like: Series | None = None,
    key: PRNGKeyArray,
) -> Series:
    """Observe a system on its attractor, integrated by diffrax (Tsit5, adaptive).

    **Arguments:**

    - `system`: such as `SYSTEMS["lorenz63"]`.
    - `steps`: T, the number of observations.
    - `noise`: standard deviation of the normal noise that is added to each variable,
        in units of that variable's standard deviation over time.
    - `like`: a series to take mean and scale from. Defaults to those of this series.
    - `key`: a key of `jax.random`, for the start and the noise.

    **Returns:** a [`pararnn.dynamics.Series`][].

    **Raises:** `ValueError` for steps that are not a whole number from 2, negative
    noise, or an invalid key; `RuntimeError` if the integration fails.
    """
    steps = check_size("simulate", "steps", steps, least=2)
    if noise:
        check_positive("simulate", "noise", noise)
    check_key("simulate", key)
    near, added = jr.split(key)
    start = jnp.asarray(system.start, float)
    start = start + 0.1 * jr.normal(near, start.shape, start.dtype)
    states = np.asarray(_integrate(system, steps, start), np.float64)
    mean = states.mean(0) if like is None else like.mean
    scale = states.std(0) if like is None else like.scale
    values = (states - mean) / scale
    if noise:
        values = values + noise * np.asarray(jr.normal(added, values.shape, float))
    return Series(values, mean, scale, system.interval)


def _integrate(system: System, steps: int, start: Array) -> Array:
    accuracy = 1e-6 if start.dtype == jnp.float32 else 1e-10
    times = system.settle + system.interval * np.arange(steps)
    times = jnp.asarray(times, start.dtype)

    @jax.jit
    def run(start):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, u, _: system.field(u)),
            diffrax.Tsit5(),
            t0=jnp.zeros_like(times[0]),
            t1=times[-1],
            dt0=None,
            y0=start,
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=diffrax.PIDController(rtol=accuracy, atol=accuracy),
            max_steps=None,
        ).ys

    return run(start)


def flow_map(system: System, *, substeps: int = 4) -> Callable[[Array], Array]:
    """Return a step over one interval of a system: Tsit5 with equal substeps."""
    term = diffrax.ODETerm(lambda t, u, _: system.field(u))
    # The default `scan_kind` has no forward-mode derivative.
    solver = diffrax.Tsit5(scan_kind="lax")
    length = system.interval / substeps

    def step(u: Float[Array, " N"]) -> Float[Array, " N"]:
        t = jnp.zeros((), u.dtype)
        for _ in range(substeps):
            slope = solver.init(term, t, t + length, u, None)
            u, *_ = solver.step(term, t, t + length, u, None, slope, made_jump=False)
        return u

    return step
