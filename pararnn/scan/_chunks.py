r"""Chunks of a matrix-valued recurrence, each summarised by matrix products.

Within a chunk of C steps, $S_t = (D_t - w_t r_t^\top) S_{t-1} + k_t v_t^\top$ is a
recurrence that only decays, with the writes $k_t v_t^\top$ and $w_t e_t^\top$, where
$e_t = -S_{t-1}^\top r_t$ is what the erasure takes away. The $e_t$ solve a unit lower
triangular system, whose right side contains the state $S_0$ that the chunk starts from.
So $e = U - W S_0$ (the WY form of a product of Householder-like factors), and the chunk
is an affine map of $S_0$.

Products of decays are built by doubling, never as quotients of cumulative products
or differences of their logarithms: they may underflow, be zero or be negative.

Arrays are `[..., C, n]`, or `[..., C, C]` for what step t (rows) takes from step s.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._arithmetic import matmul

# Vectors `[..., C / every, K]` at the last of every so many steps; that number; and
# whether they find the state before their step.
Rows = tuple[Float[Array, "*batch rows K"], int, bool]


class HeadDecay(NamedTuple):
    r"""One decay per step, $a_1, \dots, a_C$: products of neighbours, time last.

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

    def scores(self, found: list[Rows], writes: list[Array]) -> Array:
        r"""Return $l_t^\top (a_{s+1} \cdots a_t) r_s$ for $s \le t$.

        It does so for every row $l_t$ of `found` and $r_s$ of `writes`. Rows that find
        the state before their step have $l_t^\top (a_{s+1} \cdots a_{t-1}) r_s$ for
        $s < t$.
        """
        before = _shift(self.between, 0)
        between = [
            _of_queries(before if early else self.between, every)
            for _, every, early in found
        ]
        left = jnp.concatenate([rows for rows, _, _ in found], -2)
        right = jnp.concatenate(writes, -2)
        between = jnp.concatenate(between, -2)
        between = jnp.concatenate([between] * len(writes), -1)
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

    def scores(self, found: list[Rows], writes: list[Array]) -> Array:
        """Return the same as `HeadDecay.scores`."""
        rows = []
        for left, every, before in found:
            asked = _spread(left, every)
            scores = [self._scores(asked, right, before) for right in writes]
            rows.append(_of_queries(jnp.concatenate(scores, -1), every))
        return jnp.concatenate(rows, -2)

    def _scores(self, left: Array, right: Array, before: bool) -> Array:
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
    """Merge `(since, to)` of two neighbouring blocks into that of one."""
    (since1, to1), (since2, to2) = first, second
    last = lax.slice_in_dim(since1, -1, None, axis=since1.ndim + axis)
    whole = lax.slice_in_dim(since2, -1, None, axis=since2.ndim + axis)
    return (
        jnp.concatenate([since1, last * since2], axis),
        jnp.concatenate([to1 * whole, to2], axis),
    )


def _pad_steps(v: Array, axis: int, fill: float) -> Array:
    """Fill up to a power of two steps."""
    steps = v.shape[axis]
    pads = [(0, 0)] * v.ndim
    pads[axis] = (0, (1 << (steps - 1).bit_length()) - steps)
    return jnp.pad(v, pads, constant_values=fill)


def _join(top: Array, lower: Array, bottom: Array) -> Array:
    """Return `[[top, 0], [lower, bottom]]`."""
    above = jnp.concatenate([top, jnp.zeros_like(top)], -1)
    return jnp.concatenate([above, jnp.concatenate([lower, bottom], -1)], -2)


@jax.custom_jvp
def invert_unit_lower(lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """Return `(I + lower)⁻¹` for strictly lower triangular matrices.

    Small blocks are inverted by substitution, then merged into blocks of twice the
    size, and so on. The series `I - lower + lower² ...` has terms that can overflow.
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
    """Return the blocks `[..., n, size, size]` on the diagonal, or `below` it."""
    ends = range(size, m.shape[-1] + 1, size)
    return jnp.stack(
        [
            m[..., end - size : end, end - (1 + below) * size : end - below * size]
            for end in ends[below:]
        ],
        axis=-3,
    )


def _substitute(lower: Array) -> Array:
    """Do `invert_unit_lower` for small blocks: one row at a time, batch axes last."""
    size = lower.shape[-1]
    given = jnp.moveaxis(lower, (-2, -1), (0, 1))
    inverse = []
    for i in range(size):
        row = jnp.zeros_like(given[0]).at[i].set(1)
        for j in range(i):
            row = row - given[i, j][None] * inverse[j]
        # XLA would fuse it with the rows after it, and compute it again for each.
        inverse.append(lax.optimization_barrier(row))
    return jnp.moveaxis(jnp.stack(inverse), (0, 1), (-2, -1))


class AffineMap(NamedTuple):
    """A chunk of C steps, as an affine map of the state S, `[K, V]`, it starts from.

    The steps write W rows u, `[W, V]`: the values; or e, what is written in place of
    what is erased; or first the values and then e. The state at the end is
    `kept * S + written @ u`. The first Q rows of `reach @ S + scores @ u` are the
    outputs. If something is erased, what each step finds of the state follows them.
    """

    kept: Float[Array, "*batch K"]
    written: Float[Array, "*batch K W"]
    reach: Float[Array, "*batch rows K"]
    scores: Float[Array, "*batch rows W"]

    def found(self, state: Array, writes: Array) -> Array:
        return matmul(self.reach, state) + matmul(self.scores, writes)

    def end(self, state: Array, writes: Array) -> Array:
        return self.kept[..., None] * state + matmul(self.written, writes)


def summarise(queries, keys, values, decay, read, write, *, before: bool) -> AffineMap:
    r"""Return the affine map of one chunk.

    `decay` is `[..., C]` for one factor per step, or `[..., C, K]` for one per key.
    `queries` belong to the last of every `C / Q` steps. `read` is `None` where nothing
    is erased. `write` is `None` where the erasure writes along `keys`, so that it and
    $k_t v_t^\top$ are one write.
    """
    every = keys.shape[-2] // queries.shape[-2]
    decay = HeadDecay.of(decay) if decay.ndim < keys.ndim else KeyDecay.of(decay)
    found = [(queries, every, before)]
    if read is not None:
        found.append((read, 1, True))
    writes = [keys] if write is None else [keys, write]
    since = decay.from_start
    earlier = _shift(since, 1)
    reach = [
        rows * _of_queries(earlier if before else since, every)
        for rows, every, before in found
    ]
    written = jnp.concatenate([w * decay.until_end for w in writes], -2)
    return AffineMap(
        jnp.broadcast_to(since[..., -1, :], (*keys.shape[:-2], keys.shape[-1])),
        _transpose(written),
        jnp.concatenate(reach, -2),
        decay.scores(found, writes),
    )


def _of_queries(v: Array, every: int) -> Array:
    """Return the steps, last axis but one, after which there is a query."""
    return v[..., every - 1 :: every, :]


def _spread(queries: Array, every: int) -> Array:
    """Return queries at every step: zeros where there are none."""
    if every == 1:
        return queries
    *batch, count, size = queries.shape
    gaps = jnp.zeros((*batch, count, every - 1, size), queries.dtype)
    spread = jnp.concatenate([gaps, queries[..., None, :]], -2)
    return spread.reshape(*batch, count * every, size)


def _shift(v: Array, fill: float) -> Array:
    """Shift by one step, along the last axis but one."""
    return jnp.concatenate([jnp.full_like(v[..., :1, :], fill), v[..., :-1, :]], -2)


def _transpose(v: Array) -> Array:
    return jnp.swapaxes(v, -1, -2)
