"""A cell without inputs, some of whose units are the observed variables."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from .._parameters import check_key, check_size, uniform
from ..cells import AbstractCell
from ..solver import AbstractSolver, Auto, Solution, solve


class Reconstruction(eqx.Module):
    r"""A dynamical system as a recurrent network.

    $$z_t = f(\tilde z_{t-1}), \qquad \hat x_t = (z_{t,1}, \dots, z_{t,N})$$

    where $\tilde z$ is the state, which training forces to the observations, and which
    is free afterwards. The first $N$ units are the observed variables. The first state
    is $(x, L x)$, with $L$ trained too.
    """

    cell: AbstractCell
    lift: Float[Array, "hidden N"]
    observed: int = eqx.field(static=True)

    def __init__(self, cell: AbstractCell, observed: int, *, key: PRNGKeyArray):
        """**Arguments:** `cell`, such as `pararnn.ALRNNCell(0, 20, key=...)`: without
        inputs, and with a single array as state; `observed`, N; `key`, of `jax.random`.

        **Raises:** `ValueError` for a cell with inputs, or with fewer units than are
        observed."""
        self.observed = check_size("Reconstruction", "observed", observed)
        check_key("Reconstruction", key)
        state = jax.eval_shape(cell.init_state)
        if cell.d_input or not hasattr(state, "shape"):
            raise ValueError(
                f"Reconstruction: the cell takes inputs of size {cell.d_input} and its "
                f"state is {state}; expected a cell without inputs and with a state "
                "`[d_state]`. Make it with `d_input=0`, for instance "
                "`ALRNNCell(0, 20, key=key)`."
            )
        if cell.d_state < self.observed:
            raise ValueError(
                f"Reconstruction: {self.observed} variables are observed, but the cell "
                f"has only `d_state` = {cell.d_state} units, the first of which are "
                "those variables. Give the cell at least as many."
            )
        self.cell = cell
        shape = (cell.d_state - self.observed, self.observed)
        (self.lift,) = uniform(key, 1, shape, self.observed**-0.5, state.dtype)

    def start(self, x: Float[Array, " N"]) -> Float[Array, " d_state"]:
        """Return the state `[d_state]` that follows an observation `[N]`."""
        x = self._check(x, 1)
        return jnp.concatenate([x, self.lift @ x])

    def force(
        self,
        state: Float[Array, " d_state"],
        x: Float[Array, " N"],
        strength: Float[Array, ""],
    ) -> Float[Array, " d_state"]:
        r"""Return $\tilde z$: observed units moved to `x` by `strength`, 0 to 1."""
        moved = (1 - strength) * state[: self.observed] + strength * x
        return jnp.concatenate([moved, state[self.observed :]])

    def step(self, state: Float[Array, " d_state"]) -> Float[Array, " d_state"]:
        """Take one step without forcing."""
        return self.cell(state, jnp.zeros(0, state.dtype))

    def follow(
        self,
        xs: Float[Array, "T N"],
        strengths: Float[Array, " T"],
        *,
        solver: AbstractSolver = Auto(),
        throw: bool = True,
    ) -> Solution:
        """Step along observations, and solve for all steps together.

        **Arguments:** `xs`, `[T, N]`, of which the first T - 1 force; `strengths`,
        `[T]`, from a [`pararnn.dynamics.Forcing`][]; `solver` and `throw`, as for
        [`pararnn.solve`][].

        **Returns:** a [`pararnn.Solution`][] whose states, `[T - 1, d_state]`, predict
        `xs[1:]` with their first N units.

        **Raises:** `ValueError` for shapes that do not fit; as `pararnn.solve`.
        """
        xs = self._check(xs, 2)
        if strengths.shape != xs.shape[:1]:
            raise ValueError(
                f"Reconstruction.follow: `strengths` has shape {strengths.shape}, "
                f"expected {xs.shape[:1]}: one for each observation."
            )

        def step(state, at_t):
            return self.step(self.force(state, *at_t))

        inputs = (xs[:-1], strengths[:-1])
        return solve(step, inputs, self.start(xs[0]), solver=solver, throw=throw)

    def generate(self, x: Float[Array, " N"], steps: int) -> Float[Array, "steps d"]:
        """Run freely after an observation `[N]`, and return states `[steps, d_state]`.

        It takes one step after the other: no method sees far ahead in a chaotic system.
        """
        steps = check_size("Reconstruction.generate", "steps", steps)

        def body(state, _):
            state = self.step(state)
            return state, state

        return lax.scan(body, self.start(x), length=steps)[1]

    def _check(self, x: Array, ndim: int) -> Array:
        if x.ndim != ndim or x.shape[-1] != self.observed:
            shape = f"[T, {self.observed}]" if ndim == 2 else f"[{self.observed}]"
            raise ValueError(
                f"Reconstruction: observations have shape {x.shape}, expected {shape}. "
                "Likely causes: (a) a batch; use `jax.vmap` for it, (b) states were "
                "passed rather than observations, (c) another system's observations."
            )
        return x.astype(self.lift.dtype)
