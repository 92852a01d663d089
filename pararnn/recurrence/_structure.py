"""The structure of `∂f/∂h`: its blocks, found from the cell's program.

The blocks are the connected components of the dependencies. So a Jacobian that is
block-diagonal after a permutation is recognised in any order of the state.
"""

import hashlib
import itertools
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..jaxprs import find_blocks, is_index
from ..scan import struct, varying_axes
from ._inputs import make_recurrence
from ._recurrence import Recurrence

_cache: dict[tuple[int, str], np.ndarray] = {}
_CACHE_SIZE = 256
_counter = itertools.count()


class Structure:
    """The blocks of a Jacobian `∂f/∂h`.

    **Attributes:**

    - `blocks`: int `[number, size]`, for each block its indices into the flattened
        state. This has the leaves in pytree order; a complex leaf has its real parts
        first, then the imaginary ones. Smaller blocks are filled up with `width`.
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
                f"empty places; got {blocks!r:.200}. Anything else would give wrong "
                "Jacobians."
            )
        self.blocks = blocks
        self.width = width

    @property
    def size(self) -> int:
        """Size of the largest block: this many JVPs give the whole Jacobian."""
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
    """Find the structure of `∂f/∂h` of a cell `f(h, x) -> h` from its program.

    **Arguments:** `f`, a cell as for [`pararnn.solve`][]; `x`, the input of one step
    (no time axis); `h`, a state. Only shapes and dtypes of both are used.

    **Returns:** a [`pararnn.Structure`][]; it prints as `Diagonal`,
    `BlockDiagonal(n)` or `Dense`. No dependency is missed: unless the program shows
    that two states are independent, they count as dependent.

    **Raises:** as [`pararnn.solve`][] for a cell that does not map states to states.
    """
    xs = jtu.tree_map(lambda v: jnp.asarray(v)[None], x)
    return find_structure(make_recurrence("jacobian_structure", f, xs, h))


def find_structure(recurrence: Recurrence) -> Structure:
    """Find the structure of a recurrence's Jacobian; equal programs share a cache."""
    width = recurrence.width
    if width <= 1:
        return Structure(np.zeros((width, 1), int), width)
    if recurrence.coupled_along:
        # States may depend on each other through the other sequences.
        return Structure(np.arange(width)[None], width)
    program = _trace_jvp(recurrence)
    key = width, _fingerprint(program)
    if key not in _cache:
        while len(_cache) >= _CACHE_SIZE:
            _cache.pop(next(iter(_cache)))
        _cache[key] = _list_blocks(program, width)
    return Structure(_cache[key], width)


def declared_structure(declared: Any, recurrence: Recurrence) -> Structure:
    """Return the structure that a user declared; refuse it unless it covers the found.

    **Raises:** `ValueError`.
    """
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


def _trace_jvp(recurrence: Recurrence) -> jex.core.ClosedJaxpr | None:
    """Trace the JVP of a step on vectors, with the tangent as its first argument.

    Its constants are the known whole numbers that the cell closes over. It is `None` if
    JAX has no JVP of the cell: then nothing is known about its derivative.
    """
    known = recurrence.known
    constants = zip(recurrence.constant_structs, known, strict=True)
    unknown = [like for like, value in constants if value is None]

    def tangent(dv, v, x, unknown):
        rest = iter(unknown)
        constants = [next(rest) if value is None else value for value in known]

        def step(v):
            return recurrence.vector_step((constants, None), v, (x, None), smooth=True)

        return jax.jvp(step, (v,), (dv,))[1]

    axes = varying_axes(recurrence.state_leaves)
    v = struct((recurrence.width,), recurrence.dtype, axes)
    try:
        return jax.make_jaxpr(tangent)(v, v, recurrence.x_structs, unknown)
    except (NotImplementedError, TypeError, ValueError):
        return None


def _list_blocks(program: jex.core.ClosedJaxpr | None, width: int) -> np.ndarray:
    """Return the blocks as [`Structure`][pararnn.Structure] lists them."""
    if program is None:
        return np.arange(width)[None]
    label = find_blocks(program)
    sizes = np.bincount(label)
    blocks = np.full((len(sizes), sizes.max()), width)
    place = np.arange(width) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    members = np.argsort(label, kind="stable")
    blocks[label[members], place] = members
    return blocks


def _fingerprint(closed: jex.core.ClosedJaxpr | None) -> str:
    """Return a hash that two programs share only if their dependencies are equal."""
    digest = hashlib.sha256()

    def add(*items):
        text = repr(items)
        # An object's address may be reused after the object is gone.
        digest.update((text + str(next(_counter) if " at 0x" in text else "")).encode())

    def add_array(value):
        content = np.asarray(value).tobytes() if is_index(value) else None
        add(jnp.shape(value), str(jnp.result_type(value)), content)

    def add_parameter(value):
        if isinstance(value, jex.core.ClosedJaxpr | jex.core.Jaxpr):
            add_program(value)
        elif isinstance(value, tuple | list):
            for item in value:
                add_parameter(item)
        elif eqx.is_array(value):
            add_array(value)
        # Functions are derivative rules of custom calls, and are not looked at.
        elif not callable(value):
            add(value)

    def add_program(program):
        for constant in getattr(program, "consts", ()):
            add_array(constant)
        program = getattr(program, "jaxpr", program)
        number: dict[Any, int] = {}

        def name(v):
            if isinstance(v, jex.core.Literal):
                return "literal", np.asarray(v.val).tobytes(), str(v.aval)
            return number.setdefault(v, len(number)), str(v.aval)

        add([name(v) for v in (*program.constvars, *program.invars)])
        for eqn in program.eqns:
            add(eqn.primitive.name, [name(v) for v in (*eqn.invars, *eqn.outvars)])
            for key in sorted(eqn.params):
                add(key)
                add_parameter(eqn.params[key])
        add([name(v) for v in program.outvars])

    if closed is not None:
        add_program(closed)
    return digest.hexdigest()


def transition_factors(structure: Structure, tangents: Float[Array, "size *n width"]):
    """Return the engine's kind and factors for a Jacobian's compressed columns.

    `tangents[j]` holds column j of every block, at the indices of that block.
    """
    if structure.kind == "diagonal":
        return "elementwise", tangents[0]
    return "matrix", jnp.moveaxis(_gather(structure, tangents), 0, -1)


def to_blocks(structure: Structure, v: Float[Array, "*n width"]):
    """Return a vector in the engine's layout, with one column."""
    if structure.kind == "diagonal":
        return v
    return _gather(structure, v)[..., None]


def from_blocks(structure: Structure, x: Float[Array, "*n blocks size 1"]):
    """Return a flat vector, the inverse of `to_blocks`."""
    if structure.kind == "diagonal":
        return x
    x = x[..., 0]
    order = _order(structure)
    if order == "leaves":
        x = x.swapaxes(-1, -2)
    flat = x.reshape(*x.shape[:-2], structure.blocks.size)
    if order != "any":
        return flat
    # Empty places of small blocks sort last.
    places = np.argsort(structure.blocks.reshape(-1), kind="stable")
    return flat[..., places[: structure.width]]


def _gather(structure: Structure, v: Array) -> Array:
    blocks = structure.blocks
    order = _order(structure)
    if order == "blocks":
        return v.reshape(*v.shape[:-1], *blocks.shape)
    if order == "leaves":
        return v.reshape(*v.shape[:-1], *blocks.shape[::-1]).swapaxes(-1, -2)
    # The extra column fills the empty places of small blocks.
    padded = jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, 1)])
    return padded[..., blocks]


def _order(structure: Structure) -> Literal["blocks", "leaves", "any"]:
    """Return whether blocks are contiguous, or run across leaves of equal size.

    The latter need only a transposition. A gather works for all, but is ten times
    slower on a CPU.
    """
    blocks = structure.blocks
    if np.array_equal(blocks.reshape(-1), np.arange(structure.width)):
        return "blocks"
    if np.array_equal(blocks.T.reshape(-1), np.arange(structure.width)):
        return "leaves"
    return "any"
