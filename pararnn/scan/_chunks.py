r"""Stretches of a matrix-valued recurrence, each summarised by matrix products.

Within a chunk of C steps, $S_t = (D_t - w_t r_t^\top) S_{t-1} + k_t v_t^\top$ is a
recurrence that only decays, with the writes $k_t v_t^\top$ and $w_t e_t^\top$, where
$e_t = -S_{t-1}^\top r_t$ is what the erasure takes away. The $e_t$ solve a unit lower
triangular system with the state $S_0$ that the chunk starts from on its right side, so
$e = U - W S_0$ (the WY form of a product of Householder-like factors), and all that
the chunk does is affine in $S_0$.

Products of decays are built by doubling, never as quotients of cumulative products
or differences of their logarithms: they may underflow, be zero or be negative.

Arrays are `[..., C, n]`, or `[..., C, C]` for what step t (rows) takes from step s.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._arithmetic import multiply


class HeadDecay(NamedTuple):
    r"""One decay a step, $a_1, \dots, a_C$: products of neighbours, time last.

    `between[t, s]` is $a_{s+1} \cdots a_t$ for $s \le t$ and zero above.
    """

    between: Float[Array, "*batch C C"]
    since_start: Float[Array, "*batch C"]
    to_end: Float[Array, "*batch C"]

    @classmethod
    def of(cls, a: Float[Array, "*batch C"]) -> "HeadDecay":
        whole, a = a.shape[-1], _pad_steps(a, -1, 1)
        between = jnp.ones((*a.shape, 1, 1), a.dtype)
        since, to = a[..., None], jnp.ones((*a.shape, 1), a.dtype)
        while between.shape[-1] < a.shape[-1]:
            first, second = (
                [v[..., i::2, :] for v in (since, to)] + [between[..., i::2, :, :]]
                for i in (0, 1)
            )
            across = second[0][..., :, None] * first[1][..., None, :]
            between = _join(first[2], across, second[2])
            since, to = _merge(first[:2], second[:2], -1)
        return cls(
            between[..., 0, :whole, :whole], since[..., 0, :whole], to[..., 0, :whole]
        )

    @property
    def from_start(self) -> Float[Array, "*batch C 1"]:
        r"""$a_1 \cdots a_t$, to multiply `[..., C, K]`."""
        return self.since_start[..., None]

    @property
    def until_end(self) -> Float[Array, "*batch C 1"]:
        r"""$a_{s+1} \cdots a_C$, to multiply `[..., C, K]`."""
        return self.to_end[..., None]

    def scores(self, left: Array, right: Array, *, before: bool) -> Array:
        r"""$l_t^\top (a_{s+1} \cdots a_t) r_s$ for $s \le t$; if `before`, what step t
        finds: $l_t^\top (a_{s+1} \cdots a_{t-1}) r_s$ for $s < t$."""
        between = _shift(self.between, 0) if before else self.between
        return matmul(left, _transpose(right)) * between


class KeyDecay(NamedTuple):
    r"""A decay for each key and step, as products in blocks of 1, 2, 4, ... steps.

    Each pair `(since, to)` is `[..., blocks, size, K]`, the products from the start of
    a block and to its end, as in `HeadDecay`. Scores over a pair of blocks are then
    one matrix product, and no array is larger than the keys times log C.
    """

    levels: tuple[tuple[Array, Array], ...]
    steps: int

    @classmethod
    def of(cls, a: Float[Array, "*batch C K"]) -> "KeyDecay":
        whole, a = a.shape[-2], _pad_steps(a, -2, 1)
        levels = [(a[..., None, :], jnp.ones_like(a)[..., None, :])]
        while levels[-1][0].shape[-2] < a.shape[-2]:
            first, second = ([v[..., i::2, :, :] for v in levels[-1]] for i in (0, 1))
            levels.append(_merge(first, second, -2))
        return cls(tuple(levels), whole)

    @property
    def from_start(self) -> Float[Array, "*batch C K"]:
        return self.levels[-1][0][..., 0, : self.steps, :]

    @property
    def until_end(self) -> Float[Array, "*batch C K"]:
        return self.levels[-1][1][..., 0, : self.steps, :]

    def scores(self, left: Array, right: Array, *, before: bool) -> Array:
        whole = left.shape[-2]
        left, right = _pad_steps(left, -2, 0), _pad_steps(right, -2, 0)
        own = jnp.sum(left * right, -1)[..., None, None]
        scores = jnp.zeros_like(own) if before else own
        for since, to in self.levels[:-1]:
            since = since[..., 1::2, :, :]
            if before:
                since = _shift(since, 1)
            size = since.shape[-2]
            pairs = (left.shape[-2] // (2 * size), 2, size, left.shape[-1])
            later = left.reshape(*left.shape[:-2], *pairs)[..., 1, :, :] * since
            earlier = right.reshape(*right.shape[:-2], *pairs)[..., 0, :, :]
            across = matmul(later, _transpose(earlier * to[..., ::2, :, :]))
            scores = _join(scores[..., ::2, :, :], across, scores[..., 1::2, :, :])
        return scores[..., 0, :whole, :whole]


def _merge(first, second, axis: int) -> tuple[Array, Array]:
    """`(since, to)` of two neighbouring blocks as of one."""
    (since1, to1), (since2, to2) = first, second
    last = lax.slice_in_dim(since1, -1, None, axis=since1.ndim + axis)
    whole = lax.slice_in_dim(since2, -1, None, axis=since2.ndim + axis)
    return (
        jnp.concatenate([since1, last * since2], axis),
        jnp.concatenate([to1 * whole, to2], axis),
    )


def _pad_steps(v: Array, axis: int, fill: float) -> Array:
    """Up to a power of two steps."""
    steps = v.shape[axis]
    pads = [(0, 0)] * v.ndim
    pads[axis] = (0, (1 << (steps - 1).bit_length()) - steps)
    return jnp.pad(v, pads, constant_values=fill)


def _join(top: Array, lower: Array, bottom: Array) -> Array:
    """`[[top, 0], [lower, bottom]]`."""
    above = jnp.concatenate([top, jnp.zeros_like(top)], -1)
    return jnp.concatenate([above, jnp.concatenate([lower, bottom], -1)], -2)


@jax.custom_jvp
def invert_unit_lower(lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """`(I + lower)⁻¹` of strictly lower triangular matrices.

    Substitution within small blocks, then blocks of twice the size at a time. The
    series `I - lower + lower² ...` would do, but its terms can overflow.
    """
    whole = lower.shape[-1]
    lower = _pad_steps(_pad_steps(lower, -1, 0), -2, 0)
    steps = lower.shape[-1]
    size = min(steps, _SUBSTITUTED)
    inverse = _substitute(_tiles(lower, size, 0))
    while inverse.shape[-1] < steps:
        first, second = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        below = _tiles(lower, inverse.shape[-1], 1)[..., ::2, :, :]
        inverse = _join(first, -matmul(second, matmul(below, first)), second)
    return inverse[..., 0, :whole, :whole]


@invert_unit_lower.defjvp
def _(primals, tangents):
    inverse = invert_unit_lower(*primals)
    return inverse, -matmul(inverse, matmul(tangents[0], inverse))


# Blocks up to this size are inverted row by row, all of them side by side.
_SUBSTITUTED = 8


def _tiles(m: Array, size: int, below: int) -> Array:
    """The blocks `[..., n, size, size]` on a diagonal of blocks, or one below it."""
    ends = range(size, m.shape[-1] + 1, size)
    return jnp.stack(
        [
            m[..., end - size : end, end - (1 + below) * size : end - below * size]
            for end in ends[below:]
        ],
        axis=-3,
    )


def _substitute(lower: Array) -> Array:
    """`invert_unit_lower` of small blocks: one row at a time, batch axes last."""
    size = lower.shape[-1]
    given = jnp.moveaxis(lower, (-2, -1), (0, 1))
    inverse = []
    for i in range(size):
        row = jnp.zeros_like(given[0]).at[i].set(1)
        for j in range(i):
            row = row - given[i, j][None] * inverse[j]
        # Fused with the rows after it, XLA would compute it anew for each of them.
        inverse.append(lax.optimization_barrier(row))
    return jnp.moveaxis(jnp.stack(inverse), (0, 1), (-2, -1))


def matmul(a: Array, b: Array) -> Array:
    """At full float32 precision."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


class Chunk(NamedTuple):
    """A chunk as an affine map of the state that it starts from, `[K, V]`.

    The state at its end is `transition @ state + term` (elementwise along K where
    nothing is erased), its outputs are `reading @ state + outputs`.
    """

    transition: Float[Array, "*batch K K"] | Float[Array, "*batch K"]
    term: Float[Array, "*batch K V"]
    reading: Float[Array, "*batch Q K"]
    outputs: Float[Array, "*batch Q V"]

    def read(self, state: Array) -> Array:
        return matmul(self.reading, state) + self.outputs


class ErasingChunk(NamedTuple):
    """A chunk that takes something away of the state that it starts from.

    With `e = wanted - found @ state`, the state at its end is
    `kept * state + term + written @ e` (`kept` along K), its outputs are
    `reading @ state + outputs + seen @ e`. `term` and `outputs` are `None` where all
    that is written is part of e.
    """

    kept: Float[Array, "*batch K"]
    term: Float[Array, "*batch K V"] | None
    reading: Float[Array, "*batch Q K"]
    outputs: Float[Array, "*batch Q V"] | None
    wanted: Float[Array, "*batch C V"]
    found: Float[Array, "*batch C K"]
    written: Float[Array, "*batch K C"]
    seen: Float[Array, "*batch Q C"]

    def erase(self, state: Array) -> Array:
        """e"""
        return self.wanted - matmul(self.found, state)

    def advance(self, state: Array, e: Array) -> Array:
        """The state at the end of the chunk."""
        ahead = self.kept[..., None] * state + matmul(self.written, e)
        return _plus(self.term, ahead)

    def read(self, state: Array, e: Array) -> Array:
        outputs = matmul(self.reading, state) + matmul(self.seen, e)
        return _plus(self.outputs, outputs)

    def multiply_out(self) -> Chunk:
        """The same, as a map of the state alone."""
        eye = jnp.eye(self.kept.shape[-1], dtype=self.kept.dtype)
        kept = multiply(self.kept[..., None], eye)
        return Chunk(
            kept - matmul(self.written, self.found),
            _plus(self.term, matmul(self.written, self.wanted)),
            self.reading - matmul(self.seen, self.found),
            _plus(self.outputs, matmul(self.seen, self.wanted)),
        )


def _plus(a: Array | None, b: Array) -> Array:
    return b if a is None else a + b


def summarise(
    queries, keys, values, decay, read, write, *, before: bool
) -> Chunk | ErasingChunk:
    r"""The affine map of one chunk.

    `decay` is `[..., C]` for one factor a step or `[..., C, K]` for one each key;
    `queries` are the last of every `C / Q` steps. `read` is `None` where nothing is
    erased, `write` is `None` where the erasure writes along `keys`, so that
    $k_t v_t^\top$ and it are one write.
    """
    every = keys.shape[-2] // queries.shape[-2]
    decay = HeadDecay.of(decay) if decay.ndim < keys.ndim else KeyDecay.of(decay)
    since, since_before = decay.from_start, _shift(decay.from_start, 1)

    def seen_by_queries(right):
        return _of_queries(decay.scores(asked, right, before=before), every)

    asked = _spread(queries, every)
    reading = queries * _of_queries(since_before if before else since, every)
    kept = jnp.broadcast_to(since[..., -1, :], (*keys.shape[:-2], keys.shape[-1]))
    attention, end = seen_by_queries(keys), _transpose(keys * decay.until_end)
    if read is None:
        term, outputs = matmul(end, values), matmul(attention, values)
        return Chunk(kept, term, reading, outputs)
    found = read * since_before
    if write is None:
        # e + v is written along the keys, and both are one solution of the system.
        inverse = invert_unit_lower(decay.scores(read, keys, before=True))
        wanted, term, outputs = matmul(inverse, values), None, None
        written, seen = end, attention
    else:
        inverse = invert_unit_lower(decay.scores(read, write, before=True))
        taken = matmul(decay.scores(read, keys, before=True), values)
        wanted = -matmul(inverse, taken)
        term, outputs = matmul(end, values), matmul(attention, values)
        written = _transpose(write * decay.until_end)
        seen = seen_by_queries(write)
    found = matmul(inverse, found)
    return ErasingChunk(kept, term, reading, outputs, wanted, found, written, seen)


def _of_queries(v: Array, every: int) -> Array:
    """The steps, last axis but one, after which there is a query."""
    return v[..., every - 1 :: every, :]


def _spread(queries: Array, every: int) -> Array:
    """Queries at every step: zeros where there is none."""
    if every == 1:
        return queries
    *batch, count, size = queries.shape
    gaps = jnp.zeros((*batch, count, every - 1, size), queries.dtype)
    spread = jnp.concatenate([gaps, queries[..., None, :]], -2)
    return spread.reshape(*batch, count * every, size)


def _shift(v: Array, fill: float) -> Array:
    """One step later, over the last axis but one."""
    return jnp.concatenate([jnp.full_like(v[..., :1, :], fill), v[..., :-1, :]], -2)


def _transpose(v: Array) -> Array:
    return jnp.swapaxes(v, -1, -2)
