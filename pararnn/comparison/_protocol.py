"""What is the same for all layers: the conditions of training, and the examples."""

import dataclasses
import functools
import hashlib
import json
import operator
import zlib
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from .._checks import is_count
from .tasks import Example, Lengths, Task, draw_batch


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is the same for every layer and task of a comparison.

    **Raises:** `ValueError` on a value outside its range.
    """

    parameters: int = 16_000
    """Parameters of a model, maps in and out included."""
    state: int | None = None
    """Real numbers that the recurrence of each layer carries, without the last inputs
    for convolutions. Defaults to what follows from the width of the model."""
    depth: int = 1
    """Number of blocks."""
    steps: int = 1_500
    """Steps of the optimiser."""
    batch: int = 32
    """Sequences in a step."""
    learning_rates: tuple[float, ...] = (1e-2, 3e-2)
    """Each layer is trained with all of them; the report shows the one whose validation
    loss has the lowest median."""
    weight_decay: float = 0.01
    """Weight decay of matrices."""
    seeds: int = 3
    """Independent runs."""
    side_by_side: bool = True
    """Train all seeds at once, by `jax.vmap`, rather than one after the other."""
    short: bool = True
    """Use the shorter lengths of a task if it has some."""
    test_sequences: int = 256
    """Sequences in the test, for each length."""
    points: int = 20
    """Points of the curves over training."""
    cost_lengths: tuple[int, ...] = (128, 512, 2048)
    """Lengths at which time and memory are measured."""
    cost_batch: int = 8
    """Sequences in the measurement of time and memory."""
    seed: int = 0
    """Seed of everything that is drawn."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), LEAST.get(field.name)
            if value is None and field.default is None:
                continue
            values = value if isinstance(value, tuple) else (value,)
            if least is not None and (
                not values or not all(_fits(v, least) for v in values)
            ):
                kind = "a number above" if least == 0.0 else "whole numbers from"
                raise ValueError(
                    f"Protocol: `{field.name}` is {value!r}, expected {kind} {least}."
                )
        if not 0 <= self.weight_decay < 1:
            raise ValueError(
                f"Protocol: `weight_decay` is {self.weight_decay!r}, expected a number "
                "in [0, 1)."
            )

    def lengths(self, task: Task) -> Lengths:
        """Return the lengths of a task under this protocol."""
        return task.short if self.short and task.short else task.lengths

    def fingerprint(self, task: Task | None = None) -> str:
        """Hash all that results depend on: this, the lengths, JAX and the device."""
        values = dataclasses.asdict(self)
        if task is None:
            values = {k: v for k, v in values.items() if k in COST}
        else:
            values = {k: v for k, v in values.items() if k not in ONLY_COST}
            values["lengths"] = dataclasses.asdict(self.lengths(task))
        # A run with one rate does not depend on which others there are.
        values.pop("learning_rates", None)
        values["jax"] = jax.__version__
        values["device"] = jax.devices()[0].device_kind
        text = json.dumps(values, sort_keys=True, default=operator.index)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# Lower bounds: 0.0 is excluded, and for numbers; the others are for whole numbers.
LEAST = {
    "parameters": 1,
    "state": 1,
    "depth": 1,
    "steps": 2,
    "batch": 1,
    "learning_rates": 0.0,
    "seeds": 1,
    "test_sequences": 1,
    "points": 1,
    "cost_lengths": 1,
    "cost_batch": 1,
    "seed": 0,
}
ONLY_COST = ("cost_lengths", "cost_batch")
COST = ("parameters", "state", "depth", "seed", *ONLY_COST)


def _fits(value, least: float) -> bool:
    if isinstance(least, float):
        return isinstance(value, int | float) and least < value < float("inf")
    return is_count(value, int(least))


BUDGETS: MappingProxyType[str, Protocol] = MappingProxyType(
    {
        "small": Protocol(),
        "medium": Protocol(
            parameters=50_000,
            steps=3_000,
            batch=64,
            learning_rates=(1e-3, 3e-3, 1e-2),
            short=False,
            test_sequences=512,
            points=30,
            cost_lengths=(128, 512, 2048, 8192),
        ),
        "full": Protocol(
            parameters=200_000,
            depth=2,
            steps=20_000,
            batch=128,
            learning_rates=(3e-4, 1e-3, 3e-3, 1e-2),
            seeds=5,
            short=False,
            test_sequences=1024,
            points=50,
            cost_lengths=(128, 512, 2048, 8192, 32768),
        ),
    }
)


# Sequences on which Newton's steps are counted: for wide dense cells, such as an sLSTM,
# a whole batch took ten times as long as the training.
COUNTED_SEQUENCES = 4


class Data:
    """The examples of a task: others for each seed, the same for all layers.

    Drawing is a separate program, so that it is compiled once for all layers.
    """

    def __init__(self, task: Task, protocol: Protocol):
        self.task, self.protocol = task, protocol
        self.lengths = protocol.lengths(task)
        self._draw = eqx.filter_jit(_draw)
        keys = named_key(protocol.seed, task.name, "train")
        self._keys = jr.split(keys, protocol.seeds)

    def training(self, start: int, count: int) -> Example:
        """Draw batches for `count` steps from `start`, `[seeds, count, batch, T]`."""
        steps = jnp.arange(start, start + count, dtype=jnp.uint32)
        keys = jax.vmap(lambda k: jax.vmap(lambda n: jr.fold_in(k, n))(steps))(
            self._keys
        )
        limits, size = _limits(self.lengths.train), self.lengths.train[1]
        return self._draw(self.task.train, keys, limits, self.protocol.batch, size)

    @functools.cached_property
    def newton_sample(self) -> Example:
        """Sequences as in training, to count Newton's steps on, `[n, T]`."""
        key = named_key(self.protocol.seed, self.task.name, "watched")
        batch = self._batches(self.task.train, key, self.lengths.train)
        return Example(*(leaf[:COUNTED_SEQUENCES] for leaf in batch))

    @functools.cached_property
    def validation(self) -> Example:
        """Batches with the lengths of training, `[n, batch, T]`."""
        sampler = self.task.validation or self.task.train
        return self._several(sampler, "validation", self.lengths.train)

    @functools.cached_property
    def tests(self) -> tuple[Example, ...]:
        """Batches `[n, batch, T]` for each length of the test; only for the greatest if
        every prefix is an instance of the task."""
        sampler, lengths = self.task.test or self.task.train, self.lengths.test
        if not self.task.scored_alone():
            lengths = lengths[-1:]
        drawn = [self._several(sampler, f"test {n}", (n, n)) for n in lengths]
        if self.task.scored == "last":
            drawn = [d._replace(mask=_only_last(d.mask)) for d in drawn]
        return tuple(drawn)

    def _several(self, sampler, purpose: str, lengths: tuple[int, int]) -> Example:
        count = -(-self.protocol.test_sequences // self.protocol.batch)
        key = named_key(self.protocol.seed, self.task.name, purpose)
        return self._batches(sampler, jr.split(key, count), lengths)

    def _batches(self, sampler, keys, lengths: tuple[int, int]) -> Example:
        inputs = sampler, keys, _limits(lengths)
        return run_once(_draw, *inputs, self.protocol.batch, lengths[1])


def _limits(lengths: tuple[int, int]) -> Int[Array, "2"]:
    return jnp.asarray([lengths[0], lengths[1] + 1], jnp.int32)


def _draw(sampler, keys, limits, batch: int, size: int) -> Example:
    """Draw a batch for each key; the axes of the keys come first."""

    def one(key):
        lengths, examples = jr.split(key)
        each = jr.randint(lengths, (batch,), limits[0], limits[1], jnp.int32)
        return draw_batch(sampler, examples, batch, size, each)

    draw = one
    for _ in range(keys.ndim):
        draw = jax.vmap(draw)
    return draw(keys)


def _only_last(mask: Bool[Array, "*batch T"]) -> Bool[Array, "*batch T"]:
    """Keep only the last step that is asked for in every sequence."""
    remaining = jnp.cumsum(mask[..., ::-1].astype(jnp.int32), -1)[..., ::-1]
    return mask & (remaining == 1)


# Compiling the random draws of a small model took 9 s of one core with optimisation,
# more than all of its training steps, and 2 s without.
NO_OPTIMISATION = {"xla_backend_optimization_level": 0}


def run_once(function: Callable[..., Any], *inputs: Any) -> Any:
    """Return `function(*inputs)`, compiled without optimisation, for programs that run
    only once.

    **Arguments:** `function`, of pytrees; `inputs`, whose arrays are traced.
    """
    arrays, static = eqx.partition(inputs, eqx.is_array)
    rest = None

    def program(arrays):
        nonlocal rest
        found, rest = eqx.partition(
            function(*eqx.combine(arrays, static)), eqx.is_array
        )
        return found

    found = jax.jit(program, compiler_options=NO_OPTIMISATION)(arrays)
    return eqx.combine(found, rest)


def named_key(seed: int, *names: str) -> PRNGKeyArray:
    """Return the key of a purpose, whatever else is drawn and in whatever order."""
    return jr.fold_in(jr.key(seed), zlib.crc32("\0".join(names).encode()))


def map_over_seeds(
    function: Callable[[Any], PyTree], stacked: PyTree, side_by_side: bool
) -> PyTree:
    """Map `function` over the first axis of the arrays of a pytree."""
    arrays, static = eqx.partition(stacked, eqx.is_array)

    def one(arrays):
        return function(eqx.combine(arrays, static))

    return jax.vmap(one)(arrays) if side_by_side else lax.map(one, arrays)
