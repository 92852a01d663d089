"""Windows, shuffled and batched by grain, with a position that can be restored."""

import functools
from typing import Any

import numpy as np

from ..._checks import check_whole_count
from ._packed import Packed, Window

try:
    import grain
except ImportError as error:
    raise ImportError(
        f"pararnn.training needs grain, which could not be imported ({error}). "
        "Likely cause: the extra is not installed: `pip install 'pararnn[train]'`."
    ) from error

# More windows than any run reads, and that a float still counts exactly.
MAX_WINDOWS = 2**52


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
    """Make batches of windows, read ahead by threads, the same in every run.

    `iterator = iter(make_batches(...))` gives a grain iterator: `next(iterator)` is a
    [`Window`][pararnn.training.Window] of arrays `[batch_size, T]`,
    `iterator.get_state()` is its position, for JSON, and `iterator.set_state(state)`
    restores it: the batches that follow are the same bit for bit.
    `grain.checkpoint.CheckpointHandler` lets Orbax save and restore such an iterator.

    Every epoch has each window once, in another order. All batches have the same
    shape: if `epochs` is given, the last one is filled up with zeros, of weight 0. So a
    mean loss is the sum of weighted losses divided by the sum of weights.

    **Arguments:**

    - `packed`: the windows.
    - `batch_size`: windows in a batch, on each host.
    - `seed`: seed of the order of windows.
    - `shuffle`: if false, windows keep the order of the stream, for validation.
    - `epochs`: how often to go through all windows. Defaults to no end.
    - `shard`: `(index, count)` of this host, `(jax.process_index(),
        jax.process_count())` for all hosts that JAX knows. This host gets every
        `count`-th window. All hosts get the same number of batches: if the number of
        windows is not divisible, blank ones of weight 0 are added.
    - `threads`: how many threads read ahead; 0 to read when asked.
    - `prefetch`: how many batches to read ahead.

    **Returns:** a `grain.IterDataset`, to which more steps can be added.

    **Raises:** `TypeError`, `ValueError` for wrong arguments. `set_state` raises
    `ValueError` for the state of other windows or batches, and lists what differs.
    `next` raises what `packed[i]` raises.
    """
    if not isinstance(packed, Packed):
        raise TypeError(
            f"make_batches: `packed` is {packed!r:.80}, expected "
            "`Packed(corpus, tokenizer, length)`."
        )
    check_whole_count("make_batches", "batch_size", batch_size, least=1)
    check_whole_count("make_batches", "threads", threads)
    check_whole_count("make_batches", "prefetch", prefetch)
    if epochs is not None:
        check_whole_count("make_batches", "epochs", epochs, least=1)
    _check_seed(seed)
    index, count = _check_shard(shard)
    windows = grain.MapDataset.source(_PaddedForHosts(packed, count))[index::count]
    if shuffle:
        windows = windows.shuffle(seed=seed)
    # Grain's own endless repetition counts `sys.maxsize` windows, which for batches of
    # one window is too many for Python's `len` (an OverflowError in grain 0.2.18).
    epochs = epochs or MAX_WINDOWS // len(windows)
    # Repeated before it is batched, so that no epoch ends in an incomplete batch.
    pad = functools.partial(grain.experimental.batch_and_pad, batch_size=batch_size)
    batches = windows.repeat(epochs).batch(batch_size, batch_fn=pad)
    options = grain.ReadOptions(
        # More threads than batches ahead would be idle.
        num_threads=min(threads, prefetch),
        prefetch_buffer_size=prefetch,
    )
    identity = {
        **packed.identity,
        "batch_size": batch_size,
        "order of windows": seed if shuffle else None,
        "hosts": count,
    }
    return _DatasetWithIdentity(batches.to_iter_dataset(options), identity)


def _check_seed(seed: int) -> None:
    check_whole_count("make_batches", "seed", seed)
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
    check_whole_count("make_batches", "shard[1]", count, least=1)
    check_whole_count("make_batches", "shard[0]", index)
    if index >= count:
        raise ValueError(
            f"make_batches: `shard` is {shard}: of {count} hosts the last has index "
            f"{count - 1}. Likely cause: the order is (index, count), index from 0."
        )
    return index, count


class _PaddedForHosts:
    """The windows, and blank ones up to a multiple of `count`."""

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


class _DatasetWithIdentity(grain.IterDataset):
    """A dataset whose iterators store the identity of the data with their position."""

    def __init__(self, parent: grain.IterDataset, identity: dict[str, Any]):
        super().__init__(parent)
        self._identity = identity

    def __iter__(self) -> "_IteratorWithIdentity":
        return _IteratorWithIdentity(iter(self._parent), self._identity)


class _IteratorWithIdentity(grain.DatasetIterator):
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
            f"make_batches: the state is a position in other data: {listed}. Likely "
            "causes: (a) the run is resumed with other arguments; (b) files of the "
            "corpus were added, removed or changed since."
        )
