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
from ._data import Data, key_of, over_seeds, run_once
from ._model import SequenceModel, has_solver, with_solver
from ._sizes import Size
from .tasks import Example, Metric

# Newton's method is watched up to so many steps.
NEWTON_LIMIT = 32
# Batches that are drawn, and steps that are taken, by one call.
MOST_STEPS = 50


class _State(NamedTuple):
    """Of one seed; `diverged` is the step at which it did, or -1."""

    model: SequenceModel
    moments: PyTree
    step: Int[Array, ""]
    diverged: Int[Array, ""]


class Training(NamedTuple):
    """What a training run leaves; lists along its points have an entry for each seed.

    **Attributes:** `models`, arrays stacked over the seeds; `diverged`, the step at
    which a seed did, or `None`; `steps`, `losses`, `seconds` and `newton_steps`, the
    points of the curves: the loss is a mean since the point before, Newton's steps are
    those that full Newton needs on a batch, up to a limit, empty for linear layers.
    """

    models: PyTree
    diverged: list[int | None]
    steps: list[int]
    losses: list[list[float | None]]
    seconds: list[float]
    newton_steps: list[list[float]]
    compile_seconds: float


class Trainer:
    """Compiled once for a layer and a task, for any learning rate."""

    def __init__(self, data: Data, size: Size):
        self.data, self.task, self.protocol = data, data.task, data.protocol
        key = key_of(self.protocol.seed, self.task.name, "model")

        @eqx.filter_vmap
        def make(key):
            layer, d_model, d_hidden, *_ = size
            depth = self.protocol.depth
            return SequenceModel(self.task, layer, d_model, d_hidden, depth, key=key)

        self.models = run_once(make, jr.split(key, self.protocol.seeds))
        # The schedule is proportional to the rate, and so is the step: with a rate of
        # one, one program serves them all.
        self._optimiser = make_optimiser(
            OptimiserConfig(
                learning_rate=1.0,
                warmup=self.protocol.steps // 20,
                weight_decay=self.protocol.weight_decay,
            ),
            self.protocol.steps,
        )
        self._programs: dict[int, Any] = {}
        self._watch = eqx.filter_jit(self._count_newton_steps)

    def run(self, rate: float, on_point: Callable[[int, float], None]) -> Training:
        """Train; `on_point(step, loss)` is called at the points of the curves.

        **Raises:** `RuntimeError` if a layer's solver refuses what it is given.
        """
        state, trained, spent, compiling = self._fresh(), [], 0.0, 0.0
        for pieces in self._stretches():
            losses = []
            for start, stop in pieces:
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
            step = pieces[-1][1]
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

    def _stretches(self) -> list[list[tuple[int, int]]]:
        """For each point of the curves the pieces of training that lead up to it."""
        steps = self.protocol.steps
        stretch = -(-steps // self.protocol.points)
        piece = -(-stretch // -(-stretch // MOST_STEPS))
        return [
            [
                (n, min(n + piece, start + stretch, steps))
                for n in range(start, min(start + stretch, steps), piece)
            ]
            for start in range(0, steps, stretch)
        ]

    def _fresh(self) -> _State:
        zeros = jnp.zeros(self.protocol.seeds, jnp.int32)
        parameters = eqx.filter(self.models, eqx.is_inexact_array)
        moments = run_once(eqx.filter_vmap(self._optimiser.init), parameters)
        return _State(self.models, moments, zeros, zeros - 1)

    def _program(self, state: _State, batches: Example) -> tuple[Any, float]:
        """As many steps as there are batches, and how long compiling them took."""
        count = batches.mask.shape[1]
        if count in self._programs:
            return self._programs[count], 0.0
        begin, rate = time.perf_counter(), jnp.asarray(1.0, float)
        several = eqx.filter_jit(self._several)
        self._programs[count] = several.lower(state, batches, rate).compile()
        return self._programs[count], time.perf_counter() - begin

    def _several(self, state: _State, batches: Example, rate: Float[Array, ""]):
        """The state after all batches, and losses `[seeds, count]`."""
        arrays, static = eqx.partition(state, eqx.is_array)

        def train(inputs):
            def body(arrays, batch):
                state = eqx.combine(arrays, static)
                state, loss = self._step(state, batch, rate)
                return eqx.filter(state, eqx.is_array), loss

            return lax.scan(body, *inputs)

        arrays, losses = over_seeds(
            train, (arrays, batches), self.protocol.side_by_side
        )
        return eqx.combine(arrays, static), losses

    def _step(self, state: _State, batch: Example, rate: Float[Array, ""]):
        value_and_grad = eqx.filter_value_and_grad(_mean_loss)
        loss, gradient = value_and_grad(state.model, self.task.metric, batch)
        parameters = eqx.filter(state.model, eqx.is_inexact_array)
        # optax relies on implicit promotion, which may be an error elsewhere.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = self._optimiser.update(
                gradient, state.moments, parameters
            )
            norm = optax.tree.norm(gradient)
        updates = jax.tree.map(lambda u: u * rate.astype(u.dtype), updates)
        model = eqx.apply_updates(state.model, updates)
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & (state.diverged < 0)
        # A seed that diverged stays where it was, so that the others can go on: a
        # solver refuses states that are not finite, for all of them at once.
        model, moments = _select(good, (model, moments), (state.model, state.moments))
        first = ~good & (state.diverged < 0)
        diverged = jnp.where(first, state.step, state.diverged)
        loss = jnp.where(diverged < 0, loss, jnp.nan)
        return _State(model, moments, state.step + 1, diverged), loss

    def _newton_steps(self, state: _State) -> list[float]:
        """For each seed the mean of Newton's steps on a batch; none if linear."""
        if not has_solver(self.models):
            return []
        return np.asarray(self._watch(state.model, self.data.watched.inputs)).tolist()

    def _count_newton_steps(self, models, inputs) -> Float[Array, " seeds"]:
        newton = Ladder((Newton(),), max_steps=NEWTON_LIMIT)

        def count(model):
            _, stats = jax.vmap(with_solver(model, newton))(inputs)
            return jnp.mean(stats["num_steps"].astype(jnp.float32))

        return over_seeds(count, models, self.protocol.side_by_side)


def _mean_loss(
    model: SequenceModel, metric: Metric, batch: Example
) -> Float[Array, ""]:
    """Over all answers in a batch."""
    outputs, _ = jax.vmap(model)(batch.inputs)
    losses = metric.losses(outputs, batch.targets)
    count = jnp.sum(batch.mask.astype(losses.dtype))
    return jnp.sum(jnp.where(batch.mask, losses, 0)) / jnp.maximum(count, 1)


def _select(condition: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    def choose(new, old):
        return jnp.where(condition, new, old) if eqx.is_array(new) else new

    return jax.tree.map(choose, new, old)


def _numbers(values: Array) -> list[float | None]:
    """JSON knows no NaN."""
    return [v if np.isfinite(v) else None for v in np.asarray(values).tolist()]
