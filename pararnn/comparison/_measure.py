"""Scores of trained models by length, and the time and memory of a layer."""

import itertools
import math
import time
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from ._model import make_layer, needs_images
from ._protocol import Data, Protocol, map_over_seeds, named_key, run_once
from .tasks import Example, Metric

# The number of points of a curve over lengths.
BINS = 64

Scores = list[float | None]


class Evaluation(NamedTuple):
    """Scores of every seed; `None` where a seed diverged or nothing was asked.

    **Attributes:** `validation`, mean losses at the lengths of training; `score`, that
    of all lengths beyond training (of the last length, if there are none); `lengths`,
    those of the test, and `by_length`, their scores `[lengths][seeds]`;
    `curve_lengths` and `curve`, finer, if every prefix of a sequence is an instance of
    the task.
    """

    validation: Scores
    score: Scores
    lengths: list[int]
    by_length: list[Scores]
    curve_lengths: list[float]
    curve: list[Scores]


class _Sums(NamedTuple):
    """Sums over sequences, for every step: `Metric.values`, losses, and answers."""

    values: Float[np.ndarray, "seeds size"]
    losses: Float[np.ndarray, "seeds size"]
    answers: Float[np.ndarray, " size"]


class Evaluator:
    """Computes scores; compiled once for a layer and a task."""

    def __init__(self, data: Data):
        self.data, self.metric = data, data.task.metric
        self._sum = eqx.filter_jit(_sum)

    def run(self, models: PyTree, diverged: list[int | None]) -> Evaluation:
        """Return the scores of models whose arrays are stacked over the seeds."""
        lost = np.array([step is not None for step in diverged])
        sums = self._collect(models, self.data.validation)
        validation = sums.losses.sum(1) / max(sums.answers.sum(), 1)
        tests = [self._collect(models, test) for test in self.data.tests]
        find = (
            self._score_lengths
            if self.data.task.scored_alone()
            else self._score_prefixes
        )
        score, by_length, curve_lengths, curve = find(tests)
        return Evaluation(
            _known(validation, lost),
            _known(score, lost),
            list(self.data.lengths.test),
            [_known(row, lost) for row in by_length],
            curve_lengths,
            [_known(row, lost) for row in curve],
        )

    def _score_lengths(self, tests: list[_Sums]):
        """Score sequences of every length; the result is the mean over longer ones."""
        lengths = self.data.lengths.test
        rows = [self._score(sums, slice(None)) for sums in tests]
        beyond = [
            row for n, row in zip(lengths, rows, strict=True) if self._is_beyond(n)
        ]
        return np.mean(beyond or rows[-1:], 0), rows, [float(n) for n in lengths], rows

    def _score_prefixes(self, tests: list[_Sums]):
        """Score sequences of the greatest length, whose prefixes have all lengths."""
        lengths, (sums,) = self.data.lengths, tests
        size, edges = lengths.test[-1], [0, *lengths.test]
        rows = [self._score(sums, slice(*pair)) for pair in itertools.pairwise(edges)]
        first = lengths.train[1] if self._is_beyond(size) else edges[-2]
        parts = np.array_split(np.arange(size), min(BINS, size))
        curve = [self._score(sums, slice(p[0], p[-1] + 1)) for p in parts]
        middles = [float(np.mean(p) + 1) for p in parts]
        return self._score(sums, slice(first, None)), rows, middles, curve

    def _is_beyond(self, length: int) -> bool:
        return length > self.data.lengths.train[1]

    def _score(self, sums: _Sums, where: slice) -> Float[np.ndarray, " seeds"]:
        answers = sums.answers[where].sum()
        if not answers:
            return np.full(len(sums.values), np.nan)
        means = sums.values[:, where].sum(1) / answers
        return np.array([self.metric.score(float(mean)) for mean in means])

    def _collect(self, models: PyTree, batches: Example) -> _Sums:
        values, losses = self._sum(models, self.metric, batches)
        answers = np.asarray(batches.mask).sum((0, 1))
        return _Sums(*(np.asarray(a, np.float64) for a in (values, losses, answers)))


def _sum(models: PyTree, metric: Metric, batches: Example) -> tuple[Array, Array]:
    """Sum values and losses over all sequences, `[seeds, T]`."""

    def of_seed(model):
        def of_batch(batch):
            inputs, targets, mask = batch
            outputs, _ = jax.vmap(model)(inputs)
            found = metric.values(outputs, targets), metric.losses(outputs, targets)
            return tuple(jnp.sum(jnp.where(mask, f, 0), 0) for f in found)

        return tuple(jnp.sum(f, 0) for f in lax.map(of_batch, batches))

    # One seed after the other: tests take little of the time, and long sequences of
    # all seeds at once would need much memory.
    return map_over_seeds(of_seed, models, False)


def _known(values: Any, lost: np.ndarray) -> Scores:
    values = np.where(lost, np.nan, np.asarray(values, np.float64))
    return [v if np.isfinite(v) else None for v in values.tolist()]


# A time is the least of this many calls, or of those that fit into this many seconds.
REPEATS, SECONDS = 5, 1.0


def measure_costs(layer: str, d_model: int, protocol: Protocol) -> dict[str, Any]:
    """Measure time and memory of a layer alone, at every length of the protocol.

    **Arguments:** `layer`, as from `expand_layer`; `d_model`; `protocol`, for its
    lengths and batch. Images have the largest squares up to the lengths.

    **Returns:** `lengths`, and lists along them: `forward_seconds`, `backward_seconds`
    (the gradient with respect to the parameters, including the forward pass),
    `forward_bytes` and `backward_bytes` (what the compiled program allocates besides
    its arguments). Bytes are `None` if the platform does not report them.
    """
    key = named_key(protocol.seed, "costs")
    model = run_once(lambda key: make_layer(layer, d_model, key=key), key)
    found: dict[str, list] = {f"{n}_{unit}": [] for n in PROGRAMS for unit in UNITS}
    lengths = list(protocol.cost_lengths)
    if needs_images(layer):
        lengths = [math.isqrt(length) ** 2 for length in lengths]
    for length in lengths:
        shape = (protocol.cost_batch, length, d_model)
        xs = run_once(lambda key, shape=shape: jr.normal(key, shape, float), key)
        for name, program in PROGRAMS.items():
            compiled = eqx.filter_jit(program).lower(model, xs).compile()
            found[f"{name}_seconds"].append(_time(compiled, model, xs))
            found[f"{name}_bytes"].append(_temporary_bytes(compiled))
    return {"lengths": lengths, **found}


def _forward(model, xs):
    return jax.vmap(lambda x: model(x)[0])(xs)


def _backward(model, xs):
    return eqx.filter_grad(lambda m: jnp.mean(_forward(m, xs) ** 2))(model)


PROGRAMS = {"forward": _forward, "backward": _backward}
UNITS = ("seconds", "bytes")


def _time(compiled, *inputs) -> float:
    # The first call may be slower: memory is touched for the first time.
    jax.block_until_ready(compiled(*inputs))
    times = []
    while len(times) < REPEATS and sum(times) < SECONDS:
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - begin)
    return min(times)


def _temporary_bytes(compiled) -> int | None:
    analysis = compiled.compiled.memory_analysis()
    return getattr(analysis, "temp_size_in_bytes", None)
