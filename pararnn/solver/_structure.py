"""Which states depend on which: the structure of `∂f/∂h`, found from the program.

The exact sparsity pattern comes from `asdex`, which follows the indices through the
cell's jaxpr without evaluating it. Its connected components are the blocks: a pattern
that is block-diagonal after some permutation is found whatever the order of the state.
"""

import hashlib
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import asdex
import jax
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from ..scan import vary, varying_axes
from ._inputs import make_recurrence
from ._program import (
    JITTED,
    evaluate_inlined,
    inner_programs,
    opened,
    primitives_of,
)
from ._recurrence import Recurrence, _is_inexact, is_key

# From this width on, a dense cell is recognised by two numerical derivatives before
# the pattern is worked out: asdex takes 0.04 s for a dense GRU at width 64, 0.9 s at
# 256 and 12.5 s at 1024.
_PROBE_FROM = 64

# Primitives of JAX 0.11 that asdex 0.5 has no rule for, in terms of others.
_UNKNOWN = {"one_minus_square": lambda x: 1 - x * x, "pvary": lambda x: x}

_cache: dict[str, np.ndarray] = {}
_unique = itertools.count()


class Structure:
    """The blocks of a Jacobian `∂f/∂h`.

    **Attributes:**

    - `blocks`: int `[number, size]`, the indices into the flattened state (leaves in
        pytree order; of a complex leaf the real parts, then the imaginary ones) that
        form each block. Blocks smaller than the largest are filled with `width`.
    - `width`: the length of the flattened state.
    - `kind`: `"diagonal"`, `"block_diagonal"` or `"dense"`.
    """

    def __init__(self, blocks: np.ndarray, width: int):
        blocks = np.asarray(blocks)
        listed = np.sort(blocks[blocks != width])
        if blocks.ndim != 2 or not np.array_equal(listed, np.arange(width)):
            raise ValueError(
                f"Structure: `blocks` must be an integer array [number, size] that "
                f"holds each of 0 .. {width - 1} exactly once, and {width} in the "
                f"empty places; got {blocks!r:.200}. Another would give wrong "
                "Jacobians."
            )
        self.blocks = blocks
        self.width = width

    @property
    def size(self) -> int:
        """Size of the largest block: as many JVPs give the whole Jacobian."""
        return self.blocks.shape[1]

    @property
    def kind(self) -> Literal["diagonal", "block_diagonal", "dense"]:
        if self.size <= 1:
            return "diagonal"
        return "dense" if len(self.blocks) == 1 else "block_diagonal"

    def __repr__(self):
        if self.kind == "block_diagonal":
            return f"BlockDiagonal({self.size})"
        return {"diagonal": "Diagonal", "dense": "Dense"}[self.kind]

    def __eq__(self, other):
        return (
            isinstance(other, Structure)
            and self.width == other.width
            and np.array_equal(self.blocks, other.blocks)
        )

    def __hash__(self):
        return hash((self.width, self.blocks.tobytes()))

    @property
    def seeds(self) -> np.ndarray:
        """Bool `[size, width]`: JVPs along them hold all columns."""
        seeds = np.zeros((self.size, self.width + 1), bool)
        for column in range(self.size):
            seeds[column, self.blocks[:, column]] = True
        return seeds[:, :-1]


def jacobian_structure(f: Callable, x: PyTree, h: PyTree) -> Structure:
    """The structure of `∂f/∂h` of a cell `f(h, x) -> h`, found from its program.

    **Arguments:** `f`, a cell as for [`pararnn.solve`][]; `x`, the input of one step
    (no time axis); `h`, a state. Only shapes and dtypes of both are used.

    **Returns:** a [`pararnn.Structure`][]; it prints as `Diagonal`,
    `BlockDiagonal(n)` or `Dense`. Dependencies are never missed; where the program
    does not show that two states are independent, they count as dependent.

    **Raises:** as [`pararnn.solve`][] for a cell that does not map states to states.
    """
    xs = jtu.tree_map(lambda v: jnp.asarray(v)[None], x)
    return find_structure(make_recurrence("jacobian_structure", f, xs, h))


def find_structure(recurrence: Recurrence) -> Structure:
    """The structure of a recurrence's Jacobian, remembered by its program's text."""
    width = recurrence.width
    if width <= 1:
        return Structure(np.zeros((width, 1), int), width)
    if recurrence.coupled_along:
        # A state may depend on all of its own, by way of the other sequences'.
        return Structure(np.arange(width)[None], width)
    key = _fingerprint(recurrence)
    if key not in _cache:
        with jax.ensure_compile_time_eval():
            if width >= _PROBE_FROM and _is_dense(recurrence):
                _cache[key] = np.arange(width)[None]
            else:
                _cache[key] = _blocks(recurrence)
    return Structure(_cache[key], width)


def declared_structure(declared: Any, recurrence: Recurrence) -> Structure:
    """A structure that the user stated, refused unless it covers the one found."""
    if declared == "dense":
        return Structure(np.arange(recurrence.width)[None], recurrence.width)
    found = find_structure(recurrence)
    if isinstance(declared, Structure):
        if declared.width != recurrence.width:
            raise ValueError(
                f"`structure` is of a state with {declared.width} numbers, but this "
                f"cell's state has {recurrence.width}. Likely cause: it was found for "
                "another cell or another width. Leave it out to have it found."
            )
        blocks = declared.blocks
    elif declared == "diagonal":
        blocks = np.arange(recurrence.width)[:, None]
    else:
        raise ValueError(
            f"`structure` is {declared!r}; it may be 'diagonal', 'dense', or a "
            "`pararnn.Structure` as returned by `pararnn.jacobian_structure`. Leave it "
            "out to have it found."
        )
    owner = np.full(recurrence.width + 1, -1)
    owner[blocks] = np.arange(len(blocks))[:, None]
    for block in found.blocks:
        block = block[block < recurrence.width]
        if len(set(owner[block])) > 1 or -1 in owner[block]:
            raise ValueError(
                f"The cell's Jacobian was declared {declared!r}, but its program "
                f"couples the states {block[:8].tolist()}"
                f"{'...' if len(block) > 8 else ''} of its flattened state (width "
                f"{recurrence.width}): the structure found is {found!r}. A solver that "
                "believed the declaration would return wrong Jacobians. Remove "
                f"`structure=`, or declare one that contains these blocks."
                f"\n\n{_picture(found, recurrence.width)}"
            )
    return Structure(blocks, recurrence.width)


def _picture(structure: Structure, width: int) -> str:
    shown = min(width, 16)
    owner = np.full(width + 1, -1)
    owner[structure.blocks] = np.arange(len(structure.blocks))[:, None]
    rows = [
        "".join("x" if owner[i] == owner[j] else "." for j in range(shown))
        for i in range(shown)
    ]
    return f"Pattern found (first {shown} states):\n" + "\n".join(rows)


def _blocks(recurrence: Recurrence) -> np.ndarray:
    width = recurrence.width
    try:
        rows, columns = _pattern(recurrence)
    except NotImplementedError:
        # A primitive that asdex has no rule for: everything may depend on everything.
        return np.arange(width)[None]
    except (TypeError, ValueError):
        # Loops of values that vary within a `shard_map` cannot be told not to.
        if not varying_axes(recurrence.state_leaves):
            raise
        return np.arange(width)[None]
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), (width, width))
    count, label = connected_components(graph, directed=False)
    sizes = np.bincount(label, minlength=count)
    blocks = np.full((count, sizes.max()), width)
    place = np.arange(width) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    members = np.argsort(label, kind="stable")
    blocks[label[members], place] = members
    return blocks


def _real_step(recurrence: Recurrence):
    """The step on the real vector view, with constants and inputs as arguments."""

    kinds = recurrence.key_kinds

    def restore(value, kind):
        return value if kind is None else jax.random.wrap_key_data(value, impl=kind)

    def step(v, x_leaves, unknown):
        unknown = iter(unknown)
        constants = [
            restore(next(unknown), kind) if known is None else known
            for known, kind in zip(recurrence.known, kinds, strict=False)
        ]
        x_kinds = kinds[len(constants) :]
        x_leaves = [restore(x, kind) for x, kind in zip(x_leaves, x_kinds, strict=True)]
        # Within a `shard_map` they are as the cell was traced for.
        constants = vary_each(constants, recurrence.constant_structs)
        x_leaves = vary_each(x_leaves, recurrence.x_structs)
        h = recurrence.unravel(vary(v, recurrence.state_leaves))
        out = recurrence.smooth_step((constants, None), h, (x_leaves, None))
        return recurrence.ravel(out)

    return step


def vary_each(values, structs):
    return [vary(v, struct) for v, struct in zip(values, structs, strict=True)]


def _plain(struct: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Random keys as the integers they are made of."""
    if is_key(struct):
        return jax.eval_shape(jax.random.key_data, struct)
    return struct


def _unknown(recurrence: Recurrence):
    return [
        _plain(struct)
        for struct, known in zip(
            recurrence.constant_structs, recurrence.known, strict=True
        )
        if known is None
    ]


def _traced(recurrence: Recurrence):
    """The function whose pattern is sought, of its first argument, and its arguments.

    asdex reads the body of a `custom_jvp` function, but its derivative is the rule: a
    spike with a surrogate gradient depends on nothing by the one and on its argument by
    the other. In the JVP, as a function of the tangent, the rule stands in its place.
    """
    step = _real_step(recurrence)
    zeros = jtu.tree_map(
        lambda s: np.zeros(s.shape, s.dtype),
        (
            jax.ShapeDtypeStruct((recurrence.width,), recurrence.dtype),
            [_plain(s) for s in recurrence.x_structs],
            _unknown(recurrence),
        ),
    )
    if not recurrence.has_custom_jvp:
        return step, zeros

    def tangent(dv, v, x, unknown):
        return jax.jvp(lambda v: step(v, x, unknown), (v,), (dv,))[1]

    return tangent, (zeros[0], *zeros)


def _pattern(recurrence: Recurrence) -> tuple[np.ndarray, np.ndarray]:
    function, zeros = _traced(recurrence)
    function = _in_known_terms(function, zeros)
    pattern = asdex.jacobian_sparsity(function, *zeros, argnums=0)
    return np.asarray(pattern.rows), np.asarray(pattern.cols)


def _in_known_terms(function: Callable, zeros) -> Callable:
    """The function, without the primitives that asdex does not know."""
    closed = jax.make_jaxpr(function)(*zeros)
    if primitives_of(closed.jaxpr).isdisjoint(_UNKNOWN):
        return function

    def rewritten(*args):
        leaves = (*closed.consts, *jtu.tree_leaves(args))
        program = opened(closed)
        return evaluate_inlined(program, *leaves, calls=JITTED, instead=_UNKNOWN)[0]

    return rewritten


def _is_dense(recurrence: Recurrence) -> bool:
    """Whether one state provably reaches all others, so that there is one block.

    At random numbers a nonzero derivative proves a dependency. If a column or a row of
    the Jacobian has no zero, every state is connected to that one state.
    """
    rng = np.random.default_rng(0)

    def random(s):
        if _is_inexact(s):
            return (
                rng.standard_normal(s.shape)
                / math.sqrt(max(1, s.shape[-1] if s.shape else 1))
            ).astype(s.dtype)
        return np.zeros(s.shape, s.dtype)

    x_structs = [_plain(s) for s in recurrence.x_structs]
    if any(not _is_inexact(s) for s in (*_unknown(recurrence), *x_structs)):
        return False
    v = rng.standard_normal(recurrence.width).astype(recurrence.dtype)
    x = [random(s) for s in x_structs]
    constants = [random(s) for s in _unknown(recurrence)]
    step = _real_step(recurrence)
    last = np.zeros_like(v)
    last[-1] = 1

    @jax.jit
    def probe(v, x, constants):
        out, pull = jax.vjp(lambda v: step(v, x, constants), v)
        _, column = jax.jvp(lambda v: step(v, x, constants), (v,), (last,))
        return pull(jnp.asarray(last, out.dtype))[0], column

    row, column = probe(v, x, constants)

    def full(d):
        return bool(np.all(np.isfinite(d) & (np.asarray(d) != 0)))

    return full(row) or full(column)


def _fingerprint(recurrence: Recurrence) -> str:
    """A text that two programs share only if they compute the same dependencies."""
    digest = hashlib.sha256()

    def add(*items):
        digest.update(repr(items).encode())

    def parameter(value):
        if isinstance(value, jex.core.ClosedJaxpr):
            jaxpr(value.jaxpr)
            for c in value.consts:
                if isinstance(c, Tracer):
                    add("unknown", next(_unique))
                else:
                    add(np.shape(c), np.asarray(c).tobytes())
        elif isinstance(value, jex.core.Jaxpr):
            jaxpr(value)
        elif isinstance(value, tuple | list):
            for item in value:
                parameter(item)
        elif isinstance(value, np.ndarray | jax.Array):
            add(value.shape, str(value.dtype), np.asarray(value).tobytes())
        elif callable(value):
            add(id(value))
        else:
            add(value)

    def jaxpr(program):
        number: dict[Any, int] = {}

        def name(v):
            if isinstance(v, jex.core.Literal):
                return "literal", np.asarray(v.val).tobytes(), str(v.aval)
            return number.setdefault(v, len(number)), str(v.aval)

        add([name(v) for v in (*program.constvars, *program.invars)])
        for eqn in program.eqns:
            add(eqn.primitive.name, [name(v) for v in eqn.invars])
            add([name(v) for v in eqn.outvars])
            for key in sorted(eqn.params):
                # Functions are the derivative rules of custom calls: they take no part.
                if not callable(eqn.params[key]) or list(
                    inner_programs({"": eqn.params[key]})
                ):
                    add(key)
                    parameter(eqn.params[key])
        add([name(v) for v in program.outvars])

    if recurrence.has_custom_jvp:
        # The rules take part in the pattern, so they must in the text.
        function, zeros = _traced(recurrence)
        parameter(jax.make_jaxpr(function)(*zeros))
    jaxpr(recurrence.jaxpr)
    for known in recurrence.known:
        add(None if known is None else (known.shape, str(known.dtype), known.tobytes()))
    add(str(recurrence.state_leaves))
    return digest.hexdigest()
