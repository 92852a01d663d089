"""A reconstruction, and its training by forcing it along observations.

A reconstruction is a cell without inputs, some of whose units are observed variables.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._parameters import check_key, check_number, check_positive, check_size, uniform
from ..cells import AbstractCell
from ..solver import AbstractSolver, Auto, Solution, check_solver, solve
from ._systems import Series

# The number of points of the curves over training.
POINTS = 20
# An exponential does not reach zero.
LEAST = 1e-6


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


class Forcing(Protocol):
    """Teacher forcing: how far a state is moved to the observation before each step.

    A strength of 0 is a free step, and 1 a step from the observation.
    """

    def strengths(self, steps: int, progress: Float[Array, ""]) -> Float[Array, " T"]:
        """Return `[steps]` strengths, in the dtype of `progress`: the fraction of
        training that is over."""
        ...


class SparseForcing(eqx.Module):
    r"""Set the observed part of the state to the observation every `interval` steps.

    In between, the network runs freely: it has to predict, and gradients grow over at
    most `interval` steps along the observed variables.

    ??? cite "Source"

        Mikhaeil et al., "On the difficulty of learning chaotic dynamics with RNNs"
        (2110.07238); 16 steps for the systems here as in Brenner et al. (2410.14240).

    **Raises:** `ValueError` for an interval that is not a whole number from 1.
    """

    interval: int = eqx.field(static=True, default=16)

    def __check_init__(self):
        check_size("SparseForcing", "interval", self.interval)

    def strengths(self, steps: int, progress: Float[Array, ""]) -> Float[Array, " T"]:
        """Return one every `interval` steps, from the first on, and zero in between."""
        forced = jnp.arange(steps, dtype=jnp.int32) % self.interval == 0
        return forced.astype(progress.dtype)


class GeneralisedForcing(eqx.Module):
    r"""Move the state part of the way to the observation before every step.

    $$\tilde z_t = (1 - \alpha)\, z_t + \alpha\, \hat z_t$$

    With $\alpha \ge 1 - 1 / \sigma$, where $\sigma$ is the largest norm of a Jacobian,
    the forced recurrence does not expand: no gradient grows, and Newton's method needs
    few steps at any length. (Only observed units are forced here, so this holds if the
    whole state is observed.) During training $\alpha$ falls exponentially from `start`
    to `end`: the network learns the next observation first, then the long run.

    ??? cite "Source"

        Hess et al., "Generalized Teacher Forcing for Learning Chaotic Dynamics"
        (2306.04406), with $\alpha$ annealed over training.

    **Raises:** `ValueError` for strengths outside of 1e-6 to 1.
    """

    start: float = eqx.field(static=True, default=0.5)
    end: float = eqx.field(static=True, default=0.1)

    def __check_init__(self):
        for name in ("start", "end"):
            value = check_number("GeneralisedForcing", name, getattr(self, name))
            if not LEAST <= value <= 1:
                raise ValueError(
                    f"GeneralisedForcing: `{name}` is {value!r}, expected a number "
                    f"from {LEAST:g} to 1: the fraction of the way to the observation."
                )

    def strengths(self, steps: int, progress: Float[Array, ""]) -> Float[Array, " T"]:
        """Return one strength for all steps, from `start` to `end` over training."""
        strength = self.start * (self.end / self.start) ** progress
        return jnp.full(steps, strength, progress.dtype)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How long, and on what, a reconstruction is trained.

    Lengths and batch are those of Brenner et al. (2410.14240), whose rates fall from
    1e-3 to 1e-5 and whose noise is 0.05. Over few steps, higher rates came further
    here; from 1e-2, two of three AL-RNNs diverged.

    **Raises:** `ValueError` on a value outside of its range.
    """

    steps: int = 60_000
    """Steps of the optimiser, RAdam."""
    batch: int = 16
    """Sequences in a step."""
    length: int = 200
    """Predictions in a sequence."""
    noise: float = 0.01
    """Standard deviation of the noise that is added to the observations that force."""
    learning_rate: float = 5e-3
    """The first learning rate; it falls exponentially."""
    final_rate: float = 2e-4
    """The last learning rate."""

    def __post_init__(self):
        for name in ("steps", "batch", "length"):
            check_size("Recipe", name, getattr(self, name))
        for name in ("learning_rate", "final_rate"):
            check_positive("Recipe", name, getattr(self, name))
        if check_number("Recipe", "noise", self.noise) < 0:
            raise ValueError(
                f"Recipe: `noise` is {self.noise!r}, expected a standard deviation, 0 "
                "for none."
            )


class Fit(NamedTuple):
    """Trained reconstructions, and the course of training.

    Lists have an entry for each point of the curves; those of `losses` and
    `solver_steps` have an entry for each run.

    **Attributes:**

    - `models`: a [`pararnn.dynamics.Reconstruction`][], leaves stacked over the runs.
    - `steps`: the optimiser's steps, at each point.
    - `losses`: mean squared errors, averaged since the previous point.
    - `solver_steps`: steps of the solver, averaged likewise; 0 where it stepped
        through.
    - `skipped`: for each run, how many of the optimiser's steps were left out because
        their gradient was not finite.
    - `seconds`: the time of all training, without compilation.
    """

    models: Reconstruction
    steps: list[int]
    losses: list[list[float]]
    solver_steps: list[list[float]]
    skipped: list[int]
    seconds: float


def fit(
    models: Reconstruction,
    series: Series,
    forcing: Forcing,
    recipe: Recipe = Recipe(),
    *,
    solver: AbstractSolver = Auto(),
    key: PRNGKeyArray,
    on_point: Callable[[int, float], None] = lambda step, loss: None,
) -> Fit:
    """Train reconstructions on a series, side by side.

    **Arguments:**

    - `models`: leaves stacked over independent runs, as by
        `eqx.filter_vmap(make)(jr.split(key, runs))`.
    - `series`: observations, from which sequences are drawn.
    - `forcing`: a [`pararnn.dynamics.SparseForcing`][] or
        [`pararnn.dynamics.GeneralisedForcing`][], or anything with their method.
    - `recipe`: how long, and on what, to train.
    - `solver`: the solver of the forced recurrence, see [`pararnn.solve`][].
    - `key`: a key of `jax.random`, for sequences and noise, split into one a run.
    - `on_point`: called with the step and the mean loss at each point of the curves.

    **Returns:** a [`pararnn.dynamics.Fit`][].

    **Raises:** `ValueError` for a series that is too short for one sequence, or models
    that are not stacked; as `pararnn.solve` while tracing.
    """
    check_key("fit", key)
    check_solver("fit", solver)
    _check_length(series, recipe)
    _check_stacked(models)
    arrays, static = eqx.partition(models, eqx.is_inexact_array)
    optimiser = _make_optimiser(recipe)
    keys = jr.split(key, models.lift.shape[0])
    state = _State(arrays, jax.vmap(optimiser.init)(arrays), keys)
    trainer = _Trainer(static, optimiser, forcing, recipe, solver)
    values = jnp.asarray(series.values, models.lift.dtype)
    found, seconds = [], 0.0
    steps_per_point = -(-recipe.steps // POINTS)
    for first in range(0, recipe.steps, steps_per_point):
        last = min(first + steps_per_point, recipe.steps)
        program = trainer.compiled(state, values, last - first)
        begin = time.perf_counter()
        numbers = jnp.arange(first, last, dtype=jnp.int32)
        state, losses, iterations = jax.block_until_ready(
            program(state, values, numbers)
        )
        seconds += time.perf_counter() - begin
        losses = np.asarray(losses).mean(1)
        found.append((last, losses.tolist(), np.asarray(iterations).tolist()))
        on_point(last, float(losses.mean()))
    steps, losses, iterations = map(list, zip(*found, strict=True))
    skipped = np.asarray(state.moments.total_notfinite).tolist()
    models = eqx.combine(state.arrays, static)
    return Fit(models, steps, losses, iterations, skipped, seconds)


def _check_length(series: Series, recipe: Recipe) -> None:
    if series.values.shape[0] < recipe.length + 1:
        raise ValueError(
            f"fit: the series has {series.values.shape[0]} observations, but a "
            f"sequence of {recipe.length} predictions takes {recipe.length + 1}. "
            "Observe for longer, or shorten `Recipe.length`."
        )


def _check_stacked(models: Reconstruction) -> None:
    if models.lift.ndim != 3:
        raise ValueError(
            "fit: `models` is one reconstruction; expected several, with leaves "
            "stacked over independent runs. Make them with "
            "`eqx.filter_vmap(make)(jr.split(key, runs))`."
        )


def _make_optimiser(recipe: Recipe) -> optax.GradientTransformation:
    rate = optax.exponential_decay(
        recipe.learning_rate,
        transition_steps=recipe.steps,
        decay_rate=recipe.final_rate / recipe.learning_rate,
    )
    # Steps with a gradient that is not finite are left out, and counted.
    return optax.apply_if_finite(optax.radam(rate), max_consecutive_errors=recipe.steps)


class _State(NamedTuple):
    """The state of all runs."""

    arrays: PyTree
    moments: Any
    key: PRNGKeyArray


class _Trainer:
    """Takes steps of the optimiser, for all runs."""

    def __init__(self, static: PyTree, optimiser, forcing, recipe, solver):
        self.static, self.optimiser = static, optimiser
        self.forcing, self.recipe, self.solver = forcing, recipe, solver
        self._programs: dict[int, Any] = {}

    def compiled(self, state: _State, values, count: int):
        """Return `_several` compiled for `count` steps."""
        if count not in self._programs:
            numbers = jax.ShapeDtypeStruct((count,), jnp.int32)
            lowered = jax.jit(self._several).lower(state, values, numbers)
            self._programs[count] = lowered.compile()
        return self._programs[count]

    def _several(self, state: _State, values, numbers):
        """Return the state after the steps, losses `[runs, count]` and solver steps."""

        def one_run(state):
            def body(state, number):
                return self._step(state, values, number)

            state, (losses, iterations) = lax.scan(body, state, numbers)
            return state, losses, jnp.mean(iterations)

        return jax.vmap(one_run)(state)

    def _step(self, state: _State, values, number):
        key, places, added = jr.split(state.key, 3)
        sequences = self._draw(places, values)
        noise = jr.normal(added, sequences.shape, sequences.dtype)
        forced = sequences + self.recipe.noise * noise
        progress = number.astype(sequences.dtype) / self.recipe.steps
        strengths = self.forcing.strengths(sequences.shape[1], progress)

        def loss_of(arrays):
            model = eqx.combine(arrays, self.static)
            return _loss(model, forced, sequences, strengths, self.solver)

        value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
        (loss, iterations), gradient = value_and_grad(state.arrays)
        # optax relies on implicit promotion, which may be an error elsewhere.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = self.optimiser.update(
                gradient, state.moments, state.arrays
            )
        arrays = eqx.apply_updates(state.arrays, updates)
        return _State(arrays, moments, key), (loss, iterations)

    def _draw(self, key, values: Float[Array, "S N"]) -> Float[Array, "batch T N"]:
        length = self.recipe.length + 1
        last = values.shape[0] - length + 1
        starts = jr.randint(key, (self.recipe.batch,), 0, last)
        return jax.vmap(
            lambda start: lax.dynamic_slice_in_dim(values, start, length, axis=0)
        )(starts)


def _loss(model: Reconstruction, forced, sequences, strengths, solver):
    """Return the mean squared error of all predictions, and the solver's mean steps."""

    def follow(xs):
        # A failed solve gives a gradient that is not finite, which is left out.
        return model.follow(xs, strengths, solver=solver, throw=False)

    found = jax.vmap(follow)(forced)
    predicted = found.states[..., : model.observed]
    loss = jnp.mean((predicted - sequences[:, 1:]) ** 2)
    return loss, jnp.mean(found.stats["num_steps"].astype(loss.dtype))
