"""Reductions and prefixes by balanced binary trees, for any operation.

`prefix` may bracket in any way, because its operation is associative. Here the shape of
the tree is part of the result: neighbours are paired level by level, and an odd
leftover passes up one level. The tree of n elements is then that of a binary counter.
It has one full block of $2^l$ elements for every bit $l$ that is set in n, the largest
first in time, and the blocks are joined from the smallest, and newest, to the largest.

So the prefixes of a stream need one block for each level and a count, at most
$\\log_2 n + 1$ elements. Euan Ong and Petar Veličković, "Learnable Commutative Monoids
for Graph Neural Networks" (2212.08541), reduce by such a tree.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree

from .._checks import check_reset
from ._mesh_axes import vary

Element = TypeVar("Element")
# Blocks by level, leaves `[levels, ...]`, and how many elements they hold.
State = tuple[Any, Int[Array, ""]]


def tree_state(
    element: PyTree[Array, "Element"], max_length: int
) -> tuple[PyTree[Array, "Element"], Int[Array, ""]]:
    """Return a fresh state of `tree_prefix`: empty blocks, and a count of zero.

    **Arguments:** `element`, a pytree like one element, whose shapes and dtypes alone
    are used; `max_length`, how many elements the state must be able to count.

    **Returns:** blocks, leaves `[levels, ...]` of zeros with `levels` the bits of
    `max_length`, and an int32 count.

    **Raises:** `ValueError` on a `max_length` that is not positive or beyond int32.
    """
    if not 1 <= max_length < 2**30:
        raise ValueError(
            f"tree_state: `max_length` = {max_length!r} must be between 1 and 2**30. "
            "It is the number of elements that may follow one another without a reset."
        )
    levels = int(max_length).bit_length()
    blocks = jax.tree.map(lambda e: jnp.zeros((levels, *e.shape), e.dtype), element)
    return vary((blocks, jnp.zeros((), jnp.int32)), element)


def tree_prefix(
    op: Callable[[Element, Element], Element],
    elements: Element,
    state: State | None = None,
    *,
    reset: Bool[Array, " T"] | None = None,
    max_length: int | None = None,
) -> tuple[Element, State]:
    r"""Reduce every prefix by its own balanced tree, all prefixes at once.

    With $B_l[t]$ the reduction of the $2^l$ elements that end at t,

    $$B_0 = e, \qquad B_l[t] = \mathrm{op}(B_{l-1}[t - 2^{l-1}], B_{l-1}[t]),$$

    and the prefix of n elements joins the blocks that the bits of n select, smallest
    first, $r \leftarrow \mathrm{op}(B_l, r)$. A left half that ended before this call
    is the block of its level in `state`. Each level has two operations on all T steps
    side by side: $2 T \log_2 n$ operations at a depth of $2 \log_2 n$.

    **Arguments:**

    - `op`: `op(earlier, later)` on leaves `[n, ...]`, n pairs at once. It need be
        neither associative nor commutative, and is only ever called on elements and
        what it returned for them.
    - `elements`: a pytree of leaves `[T, ...]`, `T` at least 1.
    - `state`: what came before, from `tree_state` or an earlier call. Defaults to
        nothing.
    - `reset`: bool `[T]`. Where true, a new prefix starts with that element.
    - `max_length`: how many elements may follow one another without a reset. Defaults
        to what the levels of `state` hold, or `T`.

    **Returns:** the reductions of the prefixes that end at each step, leaves
    `[T, ...]`, and the state after the last. Its blocks that the count does not use
    are zeros.

    **Raises:** `ValueError` on an empty sequence, or a `max_length` that the state has
    no levels for; `TypeError` or `ValueError` on a `reset` that does not fit; an error
    at run time, by `equinox.error_if`, when more than `max_length` elements follow one
    another.
    """
    steps = _length("tree_prefix", elements)
    check_reset("tree_prefix", reset, None, steps)
    if state is None:
        first = jax.tree.map(lambda e: e[0], elements)
        state = tree_state(first, steps if max_length is None else max_length)
    slots, count = state
    levels = jax.tree.leaves(slots)[0].shape[0]
    limit = 2**levels - 1 if max_length is None else int(max_length)
    if limit.bit_length() > levels:
        raise ValueError(
            f"tree_prefix: `max_length` = {limit} needs {limit.bit_length()} "
            f"levels, and `state` has {levels}. Make it by `tree_state(element, "
            f"{limit})`."
        )

    index = jnp.arange(steps, dtype=jnp.int32)
    # The number of elements of each prefix.
    length = count.astype(jnp.int32) + index + 1
    if reset is not None:
        start = lax.cummax(jnp.where(reset, index, -1))
        length = jnp.where(start < 0, length, index - start + 1)
    length = eqx.error_if(
        length,
        (length > limit) | (length < 1),
        f"tree_prefix: more than `max_length` = {limit} elements follow one "
        "another without a reset, for which the state has no levels. Likely causes: "
        "(a) a longer sequence than planned for; make the state, or the layer, for a "
        "larger `max_length` (each doubling costs one level), (b) packed sequences "
        "without their `reset`, (c) one state carried on from sequence to sequence.",
    )

    def at(blocks, slot, where):
        """Return blocks `[T, ...]` at indices; before the first step, the state's."""
        return jax.tree.map(
            lambda b, s: _select(where >= 0, b[jnp.maximum(where, 0)], s[None]),
            blocks,
            slot,
        )

    def select(condition, a, b):
        return jax.tree.map(lambda a, b: _select(condition, a, b), a, b)

    def level(carry, at_level):
        blocks, result = carry
        bit, below, slot = at_level
        # Operations whose result is not used still get arguments of the same prefix: an
        # infinite derivative there would become NaN, not zero.
        half, low = bit >> 1, length & (bit - 1)
        left = select(low == 0, at(blocks, below, index - half), blocks)
        blocks = op(left, blocks)
        chosen = (length & bit) != 0
        block = at(blocks, slot, index - low)
        joined = op(select(chosen, block, result), result)
        joined = select(low == 0, block, joined)
        kept = jax.tree.map(lambda b: jnp.where(chosen[-1], b[-1], 0), block)
        return (blocks, select(chosen, joined, result)), kept

    bits = jnp.left_shift(1, jnp.arange(1, levels, dtype=jnp.int32))
    below = jax.tree.map(lambda s: s[:-1], slots)
    above = jax.tree.map(lambda s: s[1:], slots)
    (_, result), kept = lax.scan(level, (elements, elements), (bits, below, above))
    single = jax.tree.map(lambda e: jnp.where(length[-1] & 1 != 0, e[-1], 0), elements)
    slots = jax.tree.map(lambda s, k: jnp.concatenate([s[None], k]), single, kept)
    return result, (slots, length[-1])


def tree_reduce(
    op: Callable[[Element, Element], Element], elements: Element
) -> Element:
    """Reduce all elements to one, by the balanced tree.

    Neighbours are paired level by level, and an odd leftover passes up one level:
    `T - 1` operations in `log2(T)` rounds. The result is the last of `tree_prefix`.

    **Arguments:** `op` as in `tree_prefix`; `elements`, a pytree of leaves `[T, ...]`,
    `T` at least 1.

    **Returns:** one element, leaves `[...]`.

    **Raises:** `ValueError` on an empty set.
    """
    steps = _length("tree_reduce", elements)
    while steps > 1:
        even = steps - steps % 2
        earlier, later = (
            jax.tree.map(lambda e: e[first:even:2], elements) for first in (0, 1)
        )
        paired = op(earlier, later)
        if steps % 2:
            paired = jax.tree.map(
                lambda p, e: jnp.concatenate([p, e[-1:]]), paired, elements
            )
        elements, steps = paired, (steps + 1) // 2
    return jax.tree.map(lambda e: e[0], elements)


def _select(condition: Array, a: Array, b: Array) -> Array:
    shape = condition.shape + (1,) * (a.ndim - 1)
    return jnp.where(condition.reshape(shape), a, b)


def _length(where: str, elements) -> int:
    leaves = jax.tree.leaves(elements)
    sizes = {jnp.shape(leaf)[:1] for leaf in leaves}
    if len(sizes) != 1 or () in sizes or (0,) in sizes:
        raise ValueError(
            f"{where}: `elements` must be arrays with one leading axis in common, of "
            f"length at least 1, got shapes {[jnp.shape(leaf) for leaf in leaves]}. "
            "Likely causes: (a) an empty set, which has no reduction, as the operation "
            "has no neutral element, (b) a leaf without the axis of the elements."
        )
    return sizes.pop()[0]
