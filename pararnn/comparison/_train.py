"""All seeds of a layer on a task, with one learning rate."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..solver import Ladder, Newton
from ..training import OptimiserConfig
from ..training._build import make_optimiser
from ._model import SequenceModel, has_solver, with_solver
from ._protocol import Data, map_over_seeds, named_key, run_once
from ._sizes import Size
from .tasks import Example, Metric

# The most steps of Newton's method that are counted.
NEWTON_LIMIT = 32
# The most batches that are drawn, and steps that are taken, by one call.
MOST_STEPS = 50


class _State(NamedTuple):
    """The state of one seed; `diverged` is the step at which it diverged, or -1."""

    model: SequenceModel
    moments: PyTree
    step: Int[Array, ""]
    diverged: Int[Array, ""]


class Training(NamedTuple):
    """The result of a training run; lists inside lists have an entry for each seed.

    **Attributes:** `models`, arrays stacked over the seeds; `diverged`, the step at
    which each seed diverged, or `None`; `steps`, `losses`, `seconds` and
    `newton_steps`, the points of the curves: a loss is a mean since the last point;
    Newton's steps are those that full Newton needs on some sequences, up to a limit,
    and empty for linear layers.
    """

    models: PyTree
    diverged: list[int | None]
    steps: list[int]
    losses: list[list[float | None]]
    seconds: list[float]
    newton_steps: list[list[float]]
    compile_seconds: float


class Trainer:
    """Trains; compiled once for a layer and a task, for any learning rate."""

    def __init__(self, data: Data, size: Size):
        self.data, self.task, self.protocol = data, data.task, data.protocol
        key = named_key(self.protocol.seed, self.task.name, "model")

        @eqx.filter_vmap
        def make(key):
            layer, d_model, d_hidden, *_ = size
            depth = self.protocol.depth
            return SequenceModel(self.task, layer, d_model, d_hidden, depth, key=key)

        self.models = run_once(make, jr.split(key, self.protocol.seeds))
        # The schedule and the step are proportional to the rate, so one program, with
        # a rate of one, serves all rates.
        self._optimiser = make_optimiser(
            OptimiserConfig(
                learning_rate=1.0,
                warmup=self.protocol.steps // 20,
                weight_decay=self.protocol.weight_decay,
            ),
            self.protocol.steps,
        )
        self._programs: dict[int, Any] = {}
        self._newton = eqx.filter_jit(self._count_newton_steps)

    def run(self, rate: float, on_point: Callable[[int, float], None]) -> Training:
        """Train; `on_point(step, loss)` is called at the points of the curves.

        **Raises:** `RuntimeError` if a layer's solver fails.
        """
        state, trained, spent, compiling = self._fresh(), [], 0.0, 0.0
        for calls in self._intervals():
            losses = []
            for start, stop in calls:
                batches = self.data.training(start, stop - start)
                program, seconds = self._program(state, batches)
                compiling += seconds
                begin = time.perf_counter()
                state, found = jax.block_until_ready(
                    program(state, batches, jnp.asarray(rate, float))
                )
                spent += time.perf_counter() - begin
                losses.append(np.asarray(found))
            mean = np.concatenate(losses, 1).mean(1)
            step = calls[-1][1]
            trained.append((step, _numbers(mean), spent, self._newton_steps(state)))
            on_point(step, float(mean.min()))
        steps, losses, seconds, newton = map(list, zip(*trained, strict=True))
        diverged = [None if n < 0 else n for n in np.asarray(state.diverged).tolist()]
        return Training(
            state.model,
            diverged,
            steps,
            losses,
            seconds,
            newton if newton[0] else [],
            compiling,
        )

    def _intervals(self) -> list[list[tuple[int, int]]]:
        """Return, for each point of the curves, the calls `(start, stop)` up to it."""
        steps = self.protocol.steps
        interval = -(-steps // self.protocol.points)
        call = -(-interval // -(-interval // MOST_STEPS))
        return [
            [
                (n, min(n + call, start + interval, steps))
                for n in range(start, min(start + interval, steps), call)
            ]
            for start in range(0, steps, interval)
        ]

    def _fresh(self) -> _State:
        zeros = jnp.zeros(self.protocol.seeds, jnp.int32)
        parameters = eqx.filter(self.models, eqx.is_inexact_array)
        moments = run_once(eqx.filter_vmap(self._optimiser.init), parameters)
        return _State(self.models, moments, zeros, zeros - 1)

    def _program(self, state: _State, batches: Example) -> tuple[Any, float]:
        """Return the program of a step for each batch, and the time to compile it."""
        count = batches.mask.shape[1]
        if count in self._programs:
            return self._programs[count], 0.0
        begin, rate = time.perf_counter(), jnp.asarray(1.0, float)
        several = eqx.filter_jit(self._several)
        self._programs[count] = several.lower(state, batches, rate).compile()
        return self._programs[count], time.perf_counter() - begin

    def _several(self, state: _State, batches: Example, rate: Float[Array, ""]):
        """Return the state after all batches, and losses `[seeds, count]`."""
        arrays, static = eqx.partition(state, eqx.is_array)

        def train(inputs):
            def body(arrays, batch):
                state = eqx.combine(arrays, static)
                state, loss = self._step(state, batch, rate)
                return eqx.filter(state, eqx.is_array), loss

            return lax.scan(body, *inputs)

        arrays, losses = map_over_seeds(
            train, (arrays, batches), self.protocol.side_by_side
        )
        return eqx.combine(arrays, static), losses

    def _step(self, state: _State, batch: Example, rate: Float[Array, ""]):
        value_and_grad = eqx.filter_value_and_grad(_mean_loss)
        loss, gradient = value_and_grad(state.model, self.task.metric, batch)
        parameters = eqx.filter(state.model, eqx.is_inexact_array)
        # optax relies on implicit promotion, which the user may have disabled.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = self._optimiser.update(
                gradient, state.moments, parameters
            )
            norm = optax.tree.norm(gradient)
        updates = jax.tree.map(lambda u: u * rate.astype(u.dtype), updates)
        model = eqx.apply_updates(state.model, updates)
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & (state.diverged < 0)
        # A seed that diverged keeps its model, so that the others can continue: a
        # solver raises on states that are not finite, for all seeds at once.
        model, moments = _select(good, (model, moments), (state.model, state.moments))
        first = ~good & (state.diverged < 0)
        diverged = jnp.where(first, state.step, state.diverged)
        loss = jnp.where(diverged < 0, loss, jnp.nan)
        return _State(model, moments, state.step + 1, diverged), loss

    def _newton_steps(self, state: _State) -> list[float]:
        """Return the mean of Newton's steps for each seed; empty for linear layers."""
        if not has_solver(self.models):
            return []
        return np.asarray(
            self._newton(state.model, self.data.newton_sample.inputs)
        ).tolist()

    def _count_newton_steps(self, models, inputs) -> Float[Array, " seeds"]:
        newton = Ladder((Newton(),), max_steps=NEWTON_LIMIT)

        def count(model):
            _, stats = jax.vmap(with_solver(model, newton))(inputs)
            return jnp.mean(stats["num_steps"].astype(jnp.float32))

        return map_over_seeds(count, models, self.protocol.side_by_side)


def _mean_loss(
    model: SequenceModel, metric: Metric, batch: Example
) -> Float[Array, ""]:
    """Return the mean over all answers in a batch."""
    outputs, _ = jax.vmap(model)(batch.inputs)
    losses = metric.losses(outputs, batch.targets)
    count = jnp.sum(batch.mask.astype(losses.dtype))
    return jnp.sum(jnp.where(batch.mask, losses, 0)) / jnp.maximum(count, 1)


def _select(condition: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    def choose(new, old):
        return jnp.where(condition, new, old) if eqx.is_array(new) else new

    return jax.tree.map(choose, new, old)


def _numbers(values: Array) -> list[float | None]:
    """Write NaN, which JSON does not have, as `None`."""
    return [v if np.isfinite(v) else None for v in np.asarray(values).tolist()]
