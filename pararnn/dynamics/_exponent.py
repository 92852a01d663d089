"""How fast neighbouring trajectories part."""

from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
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
    length one after every step. Divide by the time between steps for a rate.

    **Arguments:** `step`, $g$; `start`, `[d]`; `steps`, to average over; `settle`,
    steps before those, in which the tangent turns to the direction that grows most.

    **Returns:** a number, NaN if the trajectory does not stay finite.

    **Raises:** `ValueError` for numbers of steps that are not whole, or negative.
    """
    steps = check_size("largest_exponent", "steps", steps)
    settle = check_size("largest_exponent", "settle", settle, least=0)

    def body(carry, _):
        state, tangent = carry
        state, pushed = jax.jvp(step, (state,), (tangent,))
        norm = jnp.linalg.norm(pushed)
        return (state, pushed / norm), jnp.log(norm)

    @jax.jit
    def run(start):
        tangent = jnp.full_like(start, start.size**-0.5)
        return lax.scan(body, (start, tangent), length=settle + steps)[1]

    return float(jnp.mean(run(jnp.asarray(start))[settle:]))


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
