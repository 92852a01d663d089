"""JAX's data movement primitives, and those of index tables, evaluated by NumPy.

`_dependencies.py` moves the numbers of nodes as a program moves the entries that they
represent. JAX would first compile each operation for each shape, which takes longer
than everything else there.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

_FILL_OR_DROP = jax.lax.GatherScatterMode.FILL_OR_DROP


def _broadcast_in_dim(eqn, a, *_):
    shape, axes = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    others = [axis for axis in range(len(shape)) if axis not in axes]
    return np.broadcast_to(np.expand_dims(a, others), shape)


def _slice(eqn, a):
    ends = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * a.ndim
    return a[tuple(map(slice, *ends, strides))]


def _reshape(eqn, a):
    # Some of JAX's own code still uses `dimensions`, such as the derivative of `prod`.
    if eqn.params.get("dimensions") and eqn.primitive.name == "reshape":
        a = a.transpose(eqn.params["dimensions"])
    return a.reshape(eqn.outvars[0].aval.shape)


def pad(a: np.ndarray, value, config) -> np.ndarray:
    """Pad `a` with `value`, by (low, high, gap) for each axis, like `lax.pad`."""
    shape, taken, places = [], [], []
    for length, (low, high, gap) in zip(a.shape, config, strict=True):
        at = low + (gap + 1) * np.arange(length)
        shape.append(max(0, low + high + length + gap * max(0, length - 1)))
        inside = (at >= 0) & (at < shape[-1])
        taken.append(np.flatnonzero(inside))
        places.append(at[inside])
    out = np.full(shape, value, a.dtype)
    out[np.ix_(*places)] = a[np.ix_(*taken)]
    return out


def _split(eqn, a):
    return np.split(a, np.cumsum(eqn.params["sizes"])[:-1], eqn.params["axis"])


# Each takes the equation and its operands, and returns an array or a list of them.
DATA_MOVEMENT: dict[str, Callable] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": lambda eqn, *many: np.concatenate(many, eqn.params["dimension"]),
    "copy": lambda eqn, a: a,
    # Within a `shard_map`, these only change what varies from device to device.
    "pvary": lambda eqn, a: a,
    "pcast": lambda eqn, a: a,
    "expand_dims": _reshape,
    "pad": lambda eqn, a, value: pad(a, value, eqn.params["padding_config"]),
    "reshape": _reshape,
    "rev": lambda eqn, a: np.flip(a, eqn.params["dimensions"]),
    "slice": _slice,
    "split": _split,
    "squeeze": _reshape,
    "stack": lambda eqn, *many: np.stack(many, eqn.params["axis"]),
    "tile": lambda eqn, a: np.tile(a, eqn.params["reps"]),
    "transpose": lambda eqn, a: a.transpose(eqn.params["permutation"]),
    "unstack": lambda eqn, a: list(np.moveaxis(a, eqn.params["axis"], 0)),
}


def _iota(eqn):
    shape, axis = eqn.params["shape"], eqn.params["dimension"]
    others = [a for a in range(len(shape)) if a != axis]
    along = np.arange(shape[axis], dtype=eqn.params["dtype"])
    return np.broadcast_to(np.expand_dims(along, others), shape)


def _select_n(eqn, which, *cases):
    return np.choose(which.astype(int), cases)


_ARITHMETIC = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "not": np.bitwise_not,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}
# The above, and the primitives that make index tables and masks.
NUMPY_RULES: dict[str, Callable] = {
    **DATA_MOVEMENT,
    **{
        name: lambda eqn, *arrays, function=function: function(*arrays)
        for name, function in _ARITHMETIC.items()
    },
    "iota": _iota,
    "select_n": _select_n,
    "convert_element_type": lambda eqn, a: a.astype(eqn.params["new_dtype"]),
}


class IndexedWindows(NamedTuple):
    """The windows that a gather reads or a scatter writes."""

    shape: tuple[int, ...]  # of the operand
    sizes: tuple[int, ...]  # of a window, by the operand's axes
    axes: tuple[int, ...]  # of the result, or the updates, that run within a window
    absent: tuple[int, ...]  # of the operand, along which a window has no axis
    batch: tuple[tuple[int, int], ...]  # axes of operand and indices that go together
    indexed: tuple[int, ...]  # of the operand, that the indices are of
    dropped: bool  # whether windows that reach outside are dropped, not moved inside

    def places(self, indices: np.ndarray) -> np.ndarray:
        """Return the index in the flat operand of each window entry, -1 for none."""
        rank = indices.ndim - 1 + len(self.axes)
        free = [axis for axis in range(rank) if axis not in self.axes]

        def along(values, axes):
            return np.expand_dims(values, [a for a in range(rank) if a not in axes])

        strides = np.cumprod([1, *self.shape[:0:-1]])[::-1]
        inside = np.ones((1,) * rank, bool)
        total = np.zeros((1,) * rank, int)
        for number, axis in enumerate(self.indexed):
            start, last = indices[..., number], self.shape[axis] - self.sizes[axis]
            fits = (start >= 0) & (start <= last)
            inside = inside & along(fits | (not self.dropped), free)
            total = total + along(np.clip(start, 0, last) * strides[axis], free)
        for axis, by in self.batch:
            steps = np.arange(self.shape[axis]) * strides[axis]
            total = total + along(steps, [free[by]])
        windowed = [a for a in range(len(self.shape)) if a not in self.absent]
        for axis, own in zip(windowed, sorted(self.axes), strict=True):
            total = total + along(np.arange(self.sizes[axis]) * strides[axis], [own])
        return np.where(inside, total, -1)


def gather_windows(eqn) -> IndexedWindows:
    """Return the windows that a `gather` reads."""
    numbers = eqn.params["dimension_numbers"]
    batch = numbers.operand_batching_dims
    return IndexedWindows(
        shape=eqn.invars[0].aval.shape,
        sizes=tuple(eqn.params["slice_sizes"]),
        axes=tuple(numbers.offset_dims),
        absent=(*numbers.collapsed_slice_dims, *batch),
        batch=tuple(zip(batch, numbers.start_indices_batching_dims, strict=True)),
        indexed=tuple(numbers.start_index_map),
        dropped=eqn.params["mode"] == _FILL_OR_DROP,
    )


def scatter_windows(eqn) -> IndexedWindows:
    """Return the windows that any kind of `scatter` writes."""
    numbers = eqn.params["dimension_numbers"]
    shape, updates = eqn.invars[0].aval.shape, eqn.invars[2].aval.shape
    batch = numbers.operand_batching_dims
    absent = *numbers.inserted_window_dims, *batch
    sizes = iter([updates[axis] for axis in sorted(numbers.update_window_dims)])
    return IndexedWindows(
        shape=shape,
        sizes=tuple(1 if a in absent else next(sizes) for a in range(len(shape))),
        axes=tuple(numbers.update_window_dims),
        absent=absent,
        batch=tuple(zip(batch, numbers.scatter_indices_batching_dims, strict=True)),
        indexed=tuple(numbers.scatter_dims_to_operand_dims),
        dropped=eqn.params["mode"] == _FILL_OR_DROP,
    )


def convolution_patches(eqn, images: np.ndarray) -> np.ndarray:
    """Return what each output of a convolution reads, `[batch, group, *at, read]`."""
    p = eqn.params
    lhs, rhs, _ = p["dimension_numbers"]
    kernel = eqn.invars[1].aval.shape
    window = [kernel[axis] for axis in rhs[2:]]
    gaps = [gap - 1 for gap in p["lhs_dilation"]]
    around = [(*ends, gap) for ends, gap in zip(p["padding"], gaps, strict=True)]
    images = pad(images.transpose(lhs), 0, [(0, 0, 0), (0, 0, 0), *around])
    groups = p["feature_group_count"]
    images = images.reshape(len(images), groups, -1, *images.shape[2:])

    def places(axis: int, offset: int) -> slice:
        step, stride = p["rhs_dilation"][axis], p["window_strides"][axis]
        last = images.shape[3 + axis] - (window[axis] - 1 - offset) * step
        return slice(offset * step, max(offset * step, last), stride)

    patches = [
        images[(..., *(places(*at) for at in enumerate(offset)))]
        for offset in np.ndindex(*window)
    ]
    read = np.stack(patches, -1)
    read = np.moveaxis(read, 2, -1)
    return read.reshape(*read.shape[:-2], math.prod(read.shape[-2:]))


def as_matrices(array: np.ndarray, batch, summed) -> np.ndarray:
    """Return an operand of `dot_general` as `[batch, free, summed]`."""
    free = [axis for axis in range(array.ndim) if axis not in (*batch, *summed)]
    array = array.transpose(*batch, *free, *summed)
    first, last = len(batch), len(batch) + len(free)
    parts = array.shape[:first], array.shape[first:last], array.shape[last:]
    return array.reshape(*map(math.prod, parts))
