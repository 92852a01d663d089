"""A graph of dependencies between entries of arrays, and its connected components."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, connected_components


class Graph:
    """Nodes 1 to `inputs` are the inputs, 0 stands for none; edges lead to effects."""

    def __init__(self, inputs: int):
        self.inputs, self.count = inputs, inputs + 1
        self._edges: list[tuple[np.ndarray, np.ndarray]] = []

    def new(self, shape) -> np.ndarray:
        """Add nodes, and return their numbers."""
        start, self.count = self.count, self.count + math.prod(shape)
        return np.arange(start, self.count).reshape(shape)

    def connect(self, causes: np.ndarray, effects: np.ndarray) -> None:
        """Add edges between the entries of two arrays that broadcast."""
        causes, effects = np.broadcast_arrays(causes, effects)
        self._edges.append((causes[causes != 0], effects[causes != 0]))

    def merge(self, nodes: np.ndarray) -> np.ndarray:
        """Merge all along the last axis into one node; a single node stays itself."""
        out = np.array(nodes.max(-1, initial=0))
        mixed = ((nodes != out[..., None]) & (nodes != 0)).any(-1)
        effects = self.new((np.count_nonzero(mixed),))
        self.connect(nodes[mixed], effects[:, None])
        out[mixed] = effects
        return out

    def join(self, shape, *many: np.ndarray | None) -> np.ndarray | None:
        """Merge several arrays entry by entry."""
        arrays = [np.broadcast_to(a, shape) for a in many if a is not None]
        if len(arrays) < 2:
            return arrays[0] if arrays else None
        once = unbroadcast_index(*arrays)
        merged = self.merge(np.stack([a[once] for a in arrays], -1))
        return np.broadcast_to(merged, shape)

    def sum(self, nodes: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """Merge all along some axes into one node; the axes get length 1."""
        axes = sorted(axis % nodes.ndim for axis in axes)
        few = np.moveaxis(nodes[unbroadcast_index(nodes)], axes, range(-len(axes), 0))
        merged = self.merge(few.reshape(*few.shape[: nodes.ndim - len(axes)], -1))
        kept = [1 if i in axes else n for i, n in enumerate(nodes.shape)]
        return np.broadcast_to(np.expand_dims(merged, axes), kept)

    def merge_along(self, nodes: np.ndarray, axes: Sequence[int]) -> np.ndarray:
        """Merge all along some axes, and broadcast back: any of them may be meant."""
        return np.broadcast_to(self.sum(nodes, axes), nodes.shape) if axes else nodes

    def components(self, out: np.ndarray | None) -> np.ndarray:
        """Label the inputs that paths from inputs to outputs connect."""
        if out is None:
            return np.arange(self.inputs)
        out = np.broadcast_to(out, (self.inputs,))
        first, ends = np.arange(1, self.inputs + 1), out[out != 0]
        # The source leads to all inputs, and all outputs lead to the sink.
        source, sink = 0, self.count
        edges = [*self._edges, (0 * first + source, first), (ends, 0 * ends + sink)]
        rows, columns = (np.concatenate(part) for part in zip(*edges, strict=True))
        size = (sink + 1, sink + 1)
        forward = csr_array((np.ones(len(rows), bool), (rows, columns)), size)
        between = np.zeros(sink + 1, int)
        for start, matrix in ((source, forward), (sink, forward.T.tocsr())):
            between[breadth_first_order(matrix, start, True, False)] += 1
        between[[source, sink]] = 0
        kept = (between[rows] == 2) & (between[columns] == 2)
        reached = between[out] == 2
        rows = np.concatenate([rows[kept], first[reached]])
        columns = np.concatenate([columns[kept], out[reached]])
        same = csr_array((np.ones(len(rows), bool), (rows, columns)), size)
        label = connected_components(same, directed=False)[1][first]
        return np.unique(label, return_inverse=True)[1]


def unbroadcast_index(*arrays: np.ndarray):
    """Return an index that drops repetitions: axes along which all strides are 0."""
    strides = zip(*(a.strides for a in arrays), strict=True)
    return tuple(slice(None) if any(s) else slice(0, 1) for s in strides)
