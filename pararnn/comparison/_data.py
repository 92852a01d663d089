"""What all layers are trained and tested on, drawn once for a task."""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from ._protocol import Protocol
from .tasks import Example, Task, draw_batch

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
