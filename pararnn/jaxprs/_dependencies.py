"""Find which states depend on which, from the program of the derivative.

The JVP of a step is traced as a function of the tangent. So JAX itself decides what has
a derivative (`stop_gradient`, `floor`, the rule of a `custom_jvp`). The rest is linear
in the tangent: data movement, sums, and products with other numbers.

Each entry of each array holds the number of a node in a graph, or 0 if it does not
depend on the tangent. Moving data moves these numbers. Where entries are combined, a
new node gets an edge from each of them. A sum of n entries has n edges, and a product
with a matrix one node for each row. So the graph is as large as the program's arrays,
never states times states. Two states are in one block if a chain of paths connects
them, each from an input to an output, where output i counts as input i.

A primitive without a rule here couples everything that it reads with everything that it
writes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import numpy as np

from ._graph import Graph, unbroadcast_index
from ._jaxpr import called_jaxpr, inner_jaxprs, is_index
from ._numpy_rules import (
    DATA_MOVEMENT,
    NUMPY_RULES,
    IndexedWindows,
    as_matrices,
    convolution_patches,
    gather_windows,
    scatter_windows,
)

# Loops of at most so many equations, over all iterations, are unrolled.
_MAX_UNROLLED = 10_000
# Known factors of at most so many entries are searched for zeros.
_MAX_SEARCHED = 2**22


class ArrayInfo(NamedTuple):
    """What is known of an array.

    `nodes` are the nodes of its entries, `None` if none depends on the tangent. `value`
    computes the array, and is `None` if the program alone does not determine it.
    """

    nodes: np.ndarray | None = None
    value: Callable[[], np.ndarray] | None = None


def find_blocks(program: jex.core.ClosedJaxpr) -> np.ndarray:
    """Find the block that each state belongs to.

    **Arguments:** `program`, a function of the tangent `[width]` and other arguments to
    the tangent `[width]` of the next state, linear in the tangent.

    **Returns:** int `[width]`, the numbers of the blocks, from 0.
    """
    tangent, *others = program.jaxpr.invars
    graph = Graph(tangent.aval.size)
    first = ArrayInfo(np.arange(1, graph.count).reshape(tangent.aval.shape))
    with jax.ensure_compile_time_eval():
        (out,) = propagate(graph, program, [first, *(ArrayInfo() for _ in others)])
    return graph.components(out.nodes)


def propagate(graph: Graph, closed: Any, given: Sequence[ArrayInfo]) -> list[ArrayInfo]:
    """Return what is known of a program's results, given that of its arguments."""
    program = getattr(closed, "jaxpr", closed)
    known = dict(zip(program.invars, given, strict=True))
    constants = getattr(closed, "consts", ())
    known |= zip(program.constvars, map(_constant, constants), strict=True)

    def read(atom) -> ArrayInfo:
        if isinstance(atom, jex.core.Literal):
            return ArrayInfo(value=lambda: np.asarray(atom.val))
        return known[atom]

    for eqn in program.eqns:
        values = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name in _CALLS:
            outs = propagate(graph, called_jaxpr(eqn), values)
        elif all(value.nodes is None for value in values):
            outs = _fold_lazily(eqn, values)
        else:
            rule = _RULES.get(eqn.primitive.name, _couple_all)
            outs = rule(graph, eqn, *values)
            outs = outs if isinstance(outs, list) else [outs]
            outs = [
                out if isinstance(out, ArrayInfo) else ArrayInfo(out) for out in outs
            ]
        known |= zip(eqn.outvars, outs, strict=True)
    return [read(atom) for atom in program.outvars]


def _constant(value: Any) -> ArrayInfo:
    if not is_index(value):
        return ArrayInfo()
    return ArrayInfo(value=lambda: np.asarray(value))


def _fold_lazily(eqn, values: Sequence[ArrayInfo]) -> list[ArrayInfo]:
    """Return results that do not depend on the tangent, to be computed on demand."""
    if any(v.value is None for v in values) or not _is_foldable(eqn):
        return [ArrayInfo() for _ in eqn.outvars]
    memory: list[np.ndarray] = []

    def result(i: int) -> np.ndarray:
        if not memory:
            memory.extend(_evaluate(eqn, [v.value() for v in values if v.value]))
        return memory[i]

    return [ArrayInfo(value=lambda i=i: result(i)) for i in range(len(eqn.outvars))]


def _is_foldable(eqn) -> bool:
    """Return whether an equation alone determines what it computes."""
    params = {k: v for k, v in eqn.params.items() if k != "update_jaxpr"}
    functions = any(map(callable, params.values()))
    return not (functions or eqn.effects or list(inner_jaxprs(params)))


def _evaluate(eqn, arrays: list) -> list:
    if eqn.primitive.name in NUMPY_RULES:
        outs = NUMPY_RULES[eqn.primitive.name](eqn, *arrays)
        return outs if isinstance(outs, list) else [outs]
    outs = eqn.primitive.bind(*arrays, **eqn.params)
    outs = outs if eqn.primitive.multiple_results else [outs]
    # NumPy has no array of random keys.
    keys = jax.dtypes.extended
    return [o if jax.dtypes.issubdtype(o.dtype, keys) else np.asarray(o) for o in outs]


def _nodes(value: ArrayInfo, var) -> np.ndarray:
    return np.broadcast_to(0 if value.nodes is None else value.nodes, var.aval.shape)


def _couple_all(graph, eqn, *values: ArrayInfo):
    reached = [
        v.nodes[unbroadcast_index(v.nodes)].reshape(-1)
        for v in values
        if v.nodes is not None
    ]
    node = graph.merge(np.concatenate(reached))
    return [np.broadcast_to(node, var.aval.shape) for var in eqn.outvars]


# Data movement.


def _move(graph, eqn, *values: ArrayInfo):
    return DATA_MOVEMENT[eqn.primitive.name](eqn, *map(_nodes, values, eqn.invars))


def _select(graph, eqn, which: ArrayInfo, *cases: ArrayInfo):
    shape = eqn.outvars[0].aval.shape
    if which.value is None:
        return graph.join(shape, *(case.nodes for case in cases))
    chosen = np.broadcast_to(which.value(), shape)
    nodes = map(_nodes, cases, eqn.invars[1:])
    return graph.join(
        shape, *(np.where(chosen == i, c, 0) for i, c in enumerate(nodes))
    )


def _look_up(places: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    return np.append(nodes.reshape(-1), 0)[places]


def _indices(
    windows: IndexedWindows, known: ArrayInfo, var
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Return the indices, and the axes along which they are not known."""
    if known.value is None:
        return np.zeros(var.aval.shape, int), windows.indexed
    return np.asarray(known.value()), ()


def _gather(graph, eqn, operand: ArrayInfo, indices: ArrayInfo):
    windows, nodes = gather_windows(eqn), _nodes(operand, eqn.invars[0])
    at, anywhere = _indices(windows, indices, eqn.invars[1])
    return _look_up(windows.places(at), graph.merge_along(nodes, anywhere))


def _scatter(graph, eqn, operand: ArrayInfo, indices: ArrayInfo, updates: ArrayInfo):
    windows = scatter_windows(eqn)
    at, anywhere = _indices(windows, indices, eqn.invars[1])
    places = windows.places(at)
    old, new = _nodes(operand, eqn.invars[0]), _nodes(updates, eqn.invars[2])
    places, new = np.broadcast_arrays(places, new)
    inside = places >= 0
    if anywhere or eqn.primitive.name != "scatter":
        kept = old
    else:
        kept = old.reshape(-1).copy()
        kept[places[inside]] = 0
        kept = kept.reshape(old.shape)
    landed = graph.new((old.size,))
    graph.connect(new[inside], landed[places[inside]])
    hit = np.zeros(old.size, bool)
    hit[places[inside & (new != 0)]] = True
    landed = np.where(hit, landed, 0).reshape(old.shape)
    return graph.join(old.shape, kept, graph.merge_along(landed, anywhere))


def _slice_window(starts: Sequence[ArrayInfo], sizes, shape):
    """Return the slices of a dynamic slice, and the axes whose start is not known."""
    slices, anywhere = [], []
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        known = 0 if start.value is None else int(start.value())
        if start.value is None and size < shape[axis]:
            anywhere.append(axis)
        first = min(max(known, 0), shape[axis] - size)
        slices.append(slice(first, first + size))
    return tuple(slices), anywhere


def _dynamic_slice(graph, eqn, operand: ArrayInfo, *starts: ArrayInfo):
    nodes = _nodes(operand, eqn.invars[0])
    window, anywhere = _slice_window(starts, eqn.params["slice_sizes"], nodes.shape)
    return graph.merge_along(nodes, anywhere)[window]


def _dynamic_update_slice(
    graph, eqn, operand: ArrayInfo, update: ArrayInfo, *starts: ArrayInfo
):
    old, new = map(_nodes, (operand, update), eqn.invars)
    window, anywhere = _slice_window(starts, new.shape, old.shape)
    kept, landed = old.copy(), np.zeros(old.shape, int)
    if not anywhere:
        kept[window] = 0
    landed[window] = new if not anywhere else graph.merge_along(new, anywhere)
    return graph.join(old.shape, kept, graph.merge_along(landed, anywhere))


# Sums and products.


def _elementwise(graph, eqn, *values: ArrayInfo):
    return graph.join(eqn.outvars[0].aval.shape, *(v.nodes for v in values))


def _mul(graph, eqn, *values: ArrayInfo):
    """Multiply entry by entry; a product with a known zero is zero."""
    out = _elementwise(graph, eqn, *values)
    for value in values:
        if value.value and out.size <= _MAX_SEARCHED:
            out = np.where(value.value() == 0, 0, out)
    return out


def _reduce_sum(graph, eqn, operand: ArrayInfo):
    axes = eqn.params["axes"]
    return graph.sum(operand.nodes, axes).squeeze(tuple(axes))


def _cumsum(graph, eqn, operand: ArrayInfo):
    axis, back = eqn.params["axis"], eqn.params["reverse"]
    nodes = _nodes(operand, eqn.invars[0])
    nodes = np.flip(nodes, axis) if back else nodes
    out = graph.new(nodes.shape)
    graph.connect(nodes, out)
    along = np.moveaxis(out, axis, 0)
    graph.connect(along[:-1], along[1:])
    return np.flip(out, axis) if back else out


def _dot_general(graph, eqn, *values: ArrayInfo):
    """Make one node for all products with a row, unless zeros are known."""
    summed, batch = eqn.params["dimension_numbers"]
    shape, parts = eqn.outvars[0].aval.shape, []
    for side, (mine, other) in enumerate((values, values[::-1])):
        if mine.nodes is None:
            continue
        rows = as_matrices(mine.nodes, batch[side], summed[side])
        count = math.prod(rows.shape[:2])
        size = (*rows.shape[:2], math.prod(shape) // max(1, count))
        nodes, theirs = None, eqn.invars[1 - side].aval
        if other.value and theirs.size <= _MAX_SEARCHED:
            factors = as_matrices(other.value(), batch[1 - side], summed[1 - side])
            b, column, k = np.nonzero(factors)
            if len(b) < factors.size and len(b) * size[1] <= _MAX_SEARCHED:
                nodes = graph.new(size)
                graph.connect(rows[b, :, k], nodes[b, :, column])
        if nodes is None:
            nodes = np.broadcast_to(graph.sum(rows, (2,)), size)
        parts.append((nodes.swapaxes(1, 2) if side else nodes).reshape(shape))
    return graph.join(shape, *parts)


def _conv(graph, eqn, images: ArrayInfo, kernel: ArrayInfo):
    if kernel.nodes is not None or eqn.params["batch_group_count"] > 1:
        return _couple_all(graph, eqn, images, kernel)
    read = graph.merge(convolution_patches(eqn, _nodes(images, eqn.invars[0])))
    out, spec = eqn.outvars[0].aval.shape, eqn.params["dimension_numbers"].out_spec
    each = np.repeat(read, out[spec[1]] // read.shape[1], axis=1)
    return each.transpose(np.argsort(spec))


def _fft(graph, eqn, operand: ArrayInfo):
    axes = range(-len(eqn.params["fft_lengths"]), 0)
    summed = graph.sum(operand.nodes, axes)
    return np.broadcast_to(summed, eqn.outvars[0].aval.shape)


def _batched_linalg(graph, eqn, *values: ArrayInfo):
    """Couple the entries of each matrix in a stack, but not those of two matrices."""
    summed = [graph.sum(v.nodes, (-2, -1)) for v in values if v.nodes is not None]
    return graph.join(eqn.outvars[0].aval.shape, *summed)


# Programs within the program.


def _count_equations(program) -> int:
    """Count the equations; those of a loop count for each iteration."""
    return sum(
        1
        + eqn.params.get("length", 1)
        * sum(map(_count_equations, inner_jaxprs(eqn.params)))
        for eqn in program.eqns
    )


def _cond(graph, eqn, index: ArrayInfo, *values: ArrayInfo):
    branches = eqn.params["branches"]
    if index.value:
        branches = [branches[min(max(int(index.value()), 0), len(branches) - 1)]]
    outs = [propagate(graph, branch, values) for branch in branches]
    if len(outs) == 1:
        return outs[0]
    return [
        graph.join(var.aval.shape, *(out.nodes for out in several))
        for var, several in zip(eqn.outvars, zip(*outs, strict=True), strict=True)
    ]


def _loop_to_fixed_point(graph, body, constants, carry, others):
    """Cover any number of iterations: nodes of the carry lead back to themselves.

    **Returns:** what is known of the carry, and of the body's results.
    """
    variables = body.jaxpr.invars[len(constants) :][: len(carry)]
    ends = body.jaxpr.outvars[: len(carry)]
    reached = [value.nodes is not None for value in carry]
    while True:
        inside = [
            ArrayInfo(
                graph.new(var.aval.shape) if is_reached else None,
                # Known before the loop, and changed by no iteration.
                value.value if var is end else None,
            )
            for value, is_reached, var, end in zip(
                carry, reached, variables, ends, strict=True
            )
        ]
        outs = propagate(graph, body, [*constants, *inside, *others])
        also = [
            r or out.nodes is not None for r, out in zip(reached, outs, strict=False)
        ]
        if also == reached:
            break
        reached = also
    for before, node, after in zip(carry, inside, outs, strict=False):
        for nodes in (before.nodes, after.nodes):
            if nodes is not None:
                graph.connect(nodes, node.nodes)
    return inside, outs


def _while(graph, eqn, *values: ArrayInfo):
    # Not all versions of JAX give the number of constants, so it is computed.
    body, carried = eqn.params["body_jaxpr"], len(eqn.outvars)
    values = values[len(values) - len(body.jaxpr.invars) :]
    constants = len(values) - carried
    return _loop_to_fixed_point(
        graph, body, values[:constants], values[constants:], []
    )[0]


def _scan(graph, eqn, *values: ArrayInfo):
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    # In the body, the carry has the same rank, and the scanned inputs one axis less.
    inside = body.jaxpr.invars, body.jaxpr.outvars
    alike = [
        sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(*pair, strict=True))
        for pair in zip((eqn.invars, eqn.outvars), inside, strict=True)
    ]
    end, start = alike[0], alike[0] - alike[1]
    parts = values[:start], values[start:end], values[end:]
    if length * _count_equations(body.jaxpr) <= _MAX_UNROLLED:
        return _unroll(graph, eqn, *parts)
    if start == end:
        # Nothing is carried, so all iterations can be propagated at once.
        mapped = jax.vmap(
            jex.core.jaxpr_as_fun(body),
            (None,) * start + (0,) * len(parts[2]),
            axis_size=length,
        )
        structs = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
        return propagate(graph, jax.make_jaxpr(mapped)(*structs), values)
    constants, carry, xs = parts
    any_x = [
        ArrayInfo(None if x.nodes is None else graph.sum(x.nodes, (0,))[0]) for x in xs
    ]
    carried, outs = _loop_to_fixed_point(graph, body, constants, carry, any_x)
    stacked = [
        ArrayInfo(
            None if out.nodes is None else np.broadcast_to(out.nodes, var.aval.shape)
        )
        for out, var in zip(outs[len(carry) :], eqn.outvars[len(carry) :], strict=True)
    ]
    return [*(ArrayInfo(c.nodes) for c in carried), *stacked]


def _unroll(graph, eqn, constants, carry, xs):
    length = eqn.params["length"]
    rounds = range(length)

    def at(x: ArrayInfo, t: int) -> ArrayInfo:
        nodes, value = x
        return ArrayInfo(
            None if nodes is None else nodes[t], value and (lambda: value()[t])
        )

    made: list = [[]] * length
    for t in reversed(rounds) if eqn.params["reverse"] else rounds:
        given = [*constants, *carry, *(at(x, t) for x in xs)]
        outs = propagate(graph, eqn.params["jaxpr"], given)
        carry, made[t] = outs[: len(carry)], outs[len(carry) :]
    inside = eqn.params["jaxpr"].jaxpr.outvars[len(carry) :]
    stacked = [
        np.stack([_nodes(out[i], var) for out in made]) if made else None
        for i, var in enumerate(inside)
    ]
    return [*carry, *stacked]


def _solve_linear(graph, eqn, *values: ArrayInfo):
    """Propagate through the solver of `lax.custom_linear_solve`."""
    lengths = eqn.params["const_lengths"]
    before = lengths.matvec + lengths.vecmat
    constants = values[before : before + lengths.solve]
    right = values[sum(lengths) :]
    return propagate(graph, eqn.params["jaxprs"].solve, [*constants, *right])


_CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"),
    *("custom_jvp_call", "custom_vjp_call"),
}
_ELEMENTWISE = (
    *(
        "add",
        "add_any",
        "sub",
        "neg",
        "div",
        "convert_element_type",
        "reduce_precision",
    ),
    *("real", "imag", "complex", "conj"),
)
_SCATTERS = ("scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter_mul")
_RULES: dict[str, Callable] = {
    **dict.fromkeys(DATA_MOVEMENT, _move),
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_SCATTERS, _scatter),
    "cond": _cond,
    "conv_general_dilated": _conv,
    "cumsum": _cumsum,
    "custom_linear_solve": _solve_linear,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "fft": _fft,
    "gather": _gather,
    "mul": _mul,
    "reduce_sum": _reduce_sum,
    "scan": _scan,
    "select_n": _select,
    "triangular_solve": _batched_linalg,
    "while": _while,
}
