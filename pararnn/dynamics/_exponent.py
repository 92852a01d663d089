"""How fast neighbouring trajectories part."""

from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float

from .._parameters import check_size
from ._systems import System


def largest_exponent(
    step: Callable[[Float[Array, " d"]], Float[Array, " d"]],
    start: Float[Array, " d"],
    steps: int,
    *,
    settle: int = 1_000,
) -> float:
    r"""The largest Lyapunov exponent of $u_t = g(u_{t-1})$, in nats per step.

    The mean growth of a tangent that is pushed along the trajectory and brought back to
    length one after every step. The tangent starts in a random direction, the same in
    every call. Divide by the time between steps for a rate.

    **Arguments:** `step`, $g$; `start`, `[d]`; `steps`, to average over; `settle`,
    steps before those, in which the tangent turns to the direction that grows most.

    **Returns:** a number; -inf if all tangents vanish, as those of a map onto one
    point; NaN if the trajectory does not stay finite.

    **Raises:** `ValueError` for numbers of steps that are not whole, or negative.
    """
    steps = check_size("largest_exponent", "steps", steps)
    settle = check_size("largest_exponent", "settle", settle, least=0)

    def body(carry, _):
        state, tangent = carry
        state, pushed = jax.jvp(step, (state,), (tangent,))
        # The largest entry first: squares may leave the range.
        largest = jnp.max(jnp.abs(pushed))
        scaled = pushed / jnp.where(largest == 0, 1, largest)
        norm = jnp.linalg.norm(scaled)
        tangent = scaled / jnp.where(norm == 0, 1, norm)
        return (state, tangent), jnp.log(largest) + jnp.log(norm)

    @jax.jit
    def run(start):
        # With any chosen direction, some map would turn just that one to zero.
        tangent = jr.normal(jr.key(0), start.shape, start.dtype)
        tangent = tangent / jnp.linalg.norm(tangent)
        (last, _), growth = lax.scan(body, (start, tangent), length=settle + steps)
        finite = jnp.all(jnp.isfinite(last))
        return jnp.where(finite, jnp.mean(growth[settle:]), jnp.nan)

    return float(run(jnp.asarray(start)))


def flow_map(system: System, *, substeps: int = 4) -> Callable[[Array], Array]:
    """One interval of a system as a step: Tsit5 with so many equal substeps."""
    term = diffrax.ODETerm(lambda t, u, _: system.field(u))
    # The default loop over stages has no forward-mode derivative.
    solver = diffrax.Tsit5(scan_kind="lax")
    length = system.interval / substeps

    def step(u: Float[Array, " N"]) -> Float[Array, " N"]:
        t = jnp.zeros((), u.dtype)
        for _ in range(substeps):
            slope = solver.init(term, t, t + length, u, None)
            u, *_ = solver.step(term, t, t + length, u, None, slope, made_jump=False)
        return u

    return step
