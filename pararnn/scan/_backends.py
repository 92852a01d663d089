"""The schedules that solve a linear recurrence, on the engine's own layout.

All take factors `a` `[T or 1, *batch, ...]`, terms `b` `[T, *batch, ...]`, the first
carry `u` `[*batch, ...]`, and `reset`, bool `[T, *batch, 1...]` or `None`. They return
`(x, u)`, the emitted states `[T, *batch, ...]` and the last carry. Batch axes come
after time and broadcast, so that a factor shared by a batch is stored once.

Two orders of the same step are needed, and the second is the transpose of the first:

- `emit="after"`:  `x_t = a_t u + b_t`, then `u = x_t`;
- `emit="before"`: `x_t = u + b_t`, then `u = a_t x_t`.

At a reset, the product with `a_t` is dropped by selection, never by a factor of zero:
an infinity or a NaN in the dropped state must not survive as `0 * inf`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from ._arithmetic import multiply, multiply_matrices


class Schedule(NamedTuple):
    """Everything about a scan that is known before its arrays are."""

    kind: Literal["elementwise", "matrix"]
    emit: Literal["after", "before"]
    reverse: bool

    @property
    def product(self) -> Callable[[Array, Array], Array]:
        return multiply if self.kind == "elementwise" else multiply_matrices


def _select(reset: Bool[Array, " ..."] | None, fresh, kept):
    return kept if reset is None else jnp.where(reset, fresh, kept)


def _forget(reset, kept):
    return kept if reset is None else jnp.where(reset, jnp.zeros_like(kept), kept)


def sequential(schedule: Schedule, a, b, u, reset):
    """Take one step after the other, by `lax.scan`."""
    constant = a.shape[0] == 1 != b.shape[0]

    def step(u, at_t):
        a_t, b_t, reset_t = at_t
        a_t = a[0] if constant else a_t
        if schedule.emit == "after":
            x = _forget(reset_t, schedule.product(a_t, u)) + b_t
            return x, x
        x = u + b_t
        return _forget(reset_t, schedule.product(a_t, x)), x

    u, x = lax.scan(
        step, u, (None if constant else a, b, reset), reverse=schedule.reverse
    )
    return x, u


def identity(schedule: Schedule, like: Array) -> Array:
    """Return the factor that leaves a state unchanged, in the shape of `like`."""
    if schedule.kind == "elementwise":
        return jnp.ones_like(like)
    return jnp.broadcast_to(jnp.eye(like.shape[-1], dtype=like.dtype), like.shape)


def chunked(schedule: Schedule, a, b, u, reset, *, chunks: int):
    """Step through all of the `chunks` of time side by side, then join them.

    Within a chunk, the product of the factors is carried along with a state that starts
    from zero. The ends of the chunks form a recurrence of length `chunks`, whose
    solution is then added to all steps of each chunk.
    """
    steps = b.shape[0]
    length = steps // chunks
    if length < 2 or chunks < 2:
        return sequential(schedule, a, b, u, reset)
    if schedule.reverse:
        a, b, reset = jax.tree.map(lambda v: jnp.flip(v, 0), (a, b, reset))
        x, u = chunked(schedule._replace(reverse=False), a, b, u, reset, chunks=chunks)
        return jnp.flip(x, 0), u
    if steps % chunks:
        whole = length * chunks
        head, tail = (
            jax.tree.map(
                lambda v, part=part: v if v.shape[0] == 1 != steps else v[part],
                (a, b, reset),
            )
            for part in (slice(None, whole), slice(whole, None))
        )
        x, u = chunked(schedule, head[0], head[1], u, head[2], chunks=chunks)
        rest, u = sequential(schedule, tail[0], tail[1], u, tail[2])
        return jnp.concatenate([x, rest]), u

    constant = a.shape[0] == 1

    def split(v):
        return v.reshape(chunks, length, *v.shape[1:]).swapaxes(0, 1)

    b, reset = split(b), None if reset is None else split(reset)
    a = a[None] if constant else split(a)

    def step(carry, at_t):
        product, partial, seen = carry
        a_t, b_t, reset_t = at_t
        a_t = a[0] if constant else a_t
        later = _forget(reset_t, schedule.product(a_t, product))
        seen_now = None if reset_t is None else seen | reset_t
        if schedule.emit == "after":
            partial = _forget(reset_t, schedule.product(a_t, partial)) + b_t
            return (later, partial, seen_now), (later, partial, seen_now)
        x = partial + b_t
        partial = _forget(reset_t, schedule.product(a_t, x))
        return (later, partial, seen_now), (product, x, seen)

    zeros = jnp.zeros_like(b[0])
    # The product needs the reset's batch axes as well as its own.
    unit = a[0] if reset is None else a[0] + jnp.zeros_like(reset[0], a.dtype)
    unit = jnp.broadcast_to(unit, (chunks, *unit.shape[1:]))
    seen = None if reset is None else jnp.zeros_like(reset[0])
    (product, partial, seen), (spread, x, seen_at) = lax.scan(
        step,
        (identity(schedule, unit), zeros, seen),
        (None if constant else a, b, reset),
    )

    def join(u, chunk):
        product, partial, seen = chunk
        return _forget(seen, schedule.product(product, u)) + partial, u

    u, starts = lax.scan(join, u, (product, partial, seen))
    x = x + _forget(seen_at, schedule.product(spread, starts))
    return x.swapaxes(0, 1).reshape(steps, *x.shape[2:]), u


def associative(schedule: Schedule, a, b, u, reset):
    """Scan pairs (factor, term) by `lax.associative_scan`, in log2(T) rounds."""
    if schedule.emit == "before":
        # u_{t+1} = a_t u_t + a_t b_t is of the other form; x_t = u_t + b_t.
        term = _forget(reset, schedule.product(a, b))
        after, last = associative(schedule._replace(emit="after"), a, term, u, reset)
        if schedule.reverse:
            before = jnp.concatenate([after[1:], u[None]])
        else:
            before = jnp.concatenate([u[None], after[:-1]])
        return before + b, last

    first = -1 if schedule.reverse else 0
    a_first = a[0] if a.shape[0] == 1 else a[first]
    entering = _forget(
        None if reset is None else reset[first], schedule.product(a_first, u)
    )
    b = b.at[first].add(entering)
    a = jnp.broadcast_to(a, (b.shape[0], *a.shape[1:]))

    def combine(earlier, later):
        a1, b1, r1 = earlier
        a2, b2, r2 = later
        product = _forget(r2, schedule.product(a2, a1))
        term = _forget(r2, schedule.product(a2, b1)) + b2
        return product, term, None if r2 is None else r1 | r2

    if reset is not None:
        # Every element of the scan has one shape, batch axes included.
        a = a + jnp.zeros_like(reset, a.dtype)
    _, x, _ = lax.associative_scan(combine, (a, b, reset), reverse=schedule.reverse)
    return x, x[0] if schedule.reverse else x[-1]
