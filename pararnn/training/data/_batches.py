"""Windows, shuffled and batched by grain, with a place that can be gone back to."""

import functools
from typing import Any

import numpy as np

from ..._checks import check_count
from ._packed import Packed, Window

try:
    import grain
except ImportError as error:
    raise ImportError(
        f"pararnn.training needs grain, which could not be imported ({error}). "
        "Likely cause: the extra is not installed: `pip install 'pararnn[train]'`."
    ) from error

# Windows that no run ever reads, and that a float still counts exactly.
ENDLESS = 2**52


def make_batches(
    packed: Packed,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    epochs: int | None = None,
    shard: tuple[int, int] = (0, 1),
    threads: int = 2,
    prefetch: int = 16,
) -> grain.IterDataset[Window]:
    """Batches of windows, read ahead by threads, the same at every run.

    `iterator = iter(make_batches(...))` gives a grain iterator: `next(iterator)` is a
    [`Window`][pararnn.training.Window] of arrays `[batch_size, T]`,
    `iterator.get_state()` its place, for JSON, and `iterator.set_state(state)` goes
    there, so that the batches from there on are bit for bit those that would have come.
    `grain.checkpoint.CheckpointHandler` lets Orbax save and restore such an iterator.

    Every epoch has each window once, in an order of its own. All batches have the same
    shape: what the last one of finitely many epochs lacks is filled with zeros, of
    weight 0. So a mean loss is the sum of weighted losses by the sum of weights.

    **Arguments:**

    - `packed`: the windows.
    - `batch_size`: windows in a batch, on each host.
    - `seed`: of the order of windows.
    - `shuffle`: if false, windows come in the order of the stream, for validation.
    - `epochs`: how often to go through all windows; without end if not given.
    - `shard`: `(index, count)` of this host, `(jax.process_index(),
        jax.process_count())` for all that JAX knows. Every `count`-th window is this
        host's. Hosts get the same number of batches: blank windows of weight 0 make up
        for what does not divide.
    - `threads`: that read ahead; 0 to read when asked.
    - `prefetch`: how many batches to read ahead.

    **Returns:** a `grain.IterDataset`, to which more steps can be added.

    **Raises:** `TypeError`, `ValueError` for wrong arguments. `set_state` raises
    `ValueError` for the state of other windows or batches, naming what differs;
    `next` what `packed[i]` raises.
    """
    if not isinstance(packed, Packed):
        raise TypeError(
            f"make_batches: `packed` is {packed!r:.80}, expected "
            "`Packed(corpus, tokenizer, length)`."
        )
    check_count("make_batches", "batch_size", batch_size, least=1)
    check_count("make_batches", "threads", threads)
    check_count("make_batches", "prefetch", prefetch)
    if epochs is not None:
        check_count("make_batches", "epochs", epochs, least=1)
    _check_seed(seed)
    index, count = _check_shard(shard)
    windows = grain.MapDataset.source(_Divisible(packed, count))[index::count]
    if shuffle:
        windows = windows.shuffle(seed=seed)
    # Grain repeats without end as `sys.maxsize` windows; batches of one window are then
    # too many for Python's `len` (an OverflowError in grain 0.2.18).
    epochs = epochs or ENDLESS // len(windows)
    # Repeated before it is batched, so that no epoch ends in a part of a batch.
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    batches = windows.repeat(epochs).batch(batch_size, batch_fn=pad)
    options = grain.ReadOptions(
        # More threads than batches ahead would find nothing to do.
        num_threads=min(threads, prefetch),
        prefetch_buffer_size=prefetch,
    )
    identity = {
        **packed.identity,
        "batch_size": batch_size,
        "order of windows": seed if shuffle else None,
        "hosts": count,
    }
    return _Identified(batches.to_iter_dataset(options), identity)


def _check_seed(seed: int) -> None:
    check_count("make_batches", "seed", seed)
    if seed >= 2**32:
        raise ValueError(
            f"make_batches: `seed` is {seed}, expected less than 2**32: grain draws "
            "the order of windows from 32 bits."
        )


def _check_shard(shard: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(shard, tuple) or len(shard) != 2:
        raise TypeError(
            f"make_batches: `shard` is {shard!r:.80}, expected `(index, count)`, for "
            "instance `(jax.process_index(), jax.process_count())`."
        )
    index, count = shard
    check_count("make_batches", "shard[1]", count, least=1)
    check_count("make_batches", "shard[0]", index)
    if index >= count:
        raise ValueError(
            f"make_batches: `shard` is {shard}: of {count} hosts the last has index "
            f"{count - 1}. Likely cause: the order is (index, count), index from 0."
        )
    return index, count


class _Divisible:
    """Windows, with blank ones at the end up to a multiple of `count`."""

    def __init__(self, packed: Packed, count: int):
        self.packed = packed
        self.length = -(-len(packed) // count) * count

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Window:
        if index < len(self.packed):
            return self.packed[index]
        length = self.packed.length
        return {
            "tokens": np.zeros(length, np.int32),
            "targets": np.zeros(length, np.int32),
            "reset": np.zeros(length, bool),
            "weights": np.zeros(length, np.float32),
        }


class _Identified(grain.IterDataset):
    """A dataset whose iterators remember of what data their place is one."""

    def __init__(self, parent: grain.IterDataset, identity: dict[str, Any]):
        super().__init__(parent)
        self._identity = identity

    def __iter__(self) -> "_IdentifiedIterator":
        return _IdentifiedIterator(iter(self._parent), self._identity)


class _IdentifiedIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, identity: dict[str, Any]):
        super().__init__(parent)
        self._identity = identity

    def __next__(self) -> Window:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return {"place": self._parent.get_state(), "of": self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        _check_identity(self._identity, state.get("of", {}))
        self._parent.set_state(state["place"])


def _check_identity(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    differ = {
        name: f"{theirs.get(name)!r} then, {value!r} now"
        for name, value in ours.items()
        if theirs.get(name) != value
    }
    if differ:
        listed = "; ".join(f"{name}: {values}" for name, values in differ.items())
        raise ValueError(
            f"make_batches: the state is a place in other data: {listed}. It would "
            "mean other windows here. Likely causes: (a) the run is resumed with other "
            "arguments; (b) files of the corpus were added, removed or changed since."
        )
