"""The matrices `A_t` of `h_t = A_t h_{t-1} + b_t`, by structure.

A transition is a small pytree that holds `A_t` for every step, time first. Each obeys
three laws, which `tests/test_transitions.py` checks for every class:

- `A.compose(B).mv(x) == B.mv(A.mv(x))`: compose reads left to right, in time;
- composition is associative;
- `A.transpose().transpose() == A`, and `as_matrix` of the transpose is transposed.

The engine works on one of two layouts, to which every transition maps: an elementwise
factor, or a batch of square matrices. A new structure is a class here.
"""

import abc
import math
from typing import Literal, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Inexact, Shaped

from ._arithmetic import multiply, multiply_matrices


class Layout(NamedTuple):
    """How the engine stores one step of a state: `rows` blocks of `size` by `columns`.

    Elementwise transitions store `[rows, 1]` factors for `[rows, columns]` states, or
    `[rows]` for `[rows]` if there is one column. Matrices store `[rows, size, size]`
    for `[rows, size, columns]`.
    """

    kind: Literal["elementwise", "matrix"]
    state_shape: tuple[int, ...]


class AbstractTransition(eqx.Module):
    """`A_t` for every step `t`, with the leading axis time.

    A leading axis of length 1 stands for a transition that is constant in time.
    """

    values: eqx.AbstractVar[Inexact[Array, "..."]]

    @abc.abstractmethod
    def mv(self, x: Shaped[Array, "T ..."]) -> Shaped[Array, "T ..."]:
        """Return `A_t x_t` for every t. `x` has the shape of the states, time first."""

    @abc.abstractmethod
    def compose(self, later: "AbstractTransition") -> "AbstractTransition":
        """Return the transition that applies `self` and then `later`."""

    @abc.abstractmethod
    def transpose(self) -> "AbstractTransition":
        """Return `A_t` transposed, without conjugation."""

    @abc.abstractmethod
    def as_matrix(self, state_shape: tuple[int, ...]) -> Inexact[Array, "T n n"]:
        """Return dense matrices that act on the flattened state: slow, for tests."""

    @abc.abstractmethod
    def layout(self, state_shape: tuple[int, ...]) -> Layout:
        """Return how the engine stores this transition for states of `state_shape`.

        **Raises:** `ValueError` if the transition cannot act on such a state.
        """

    @abc.abstractmethod
    def factors(self) -> Inexact[Array, "T ..."]:
        """Return the transition in the engine's layout, time first."""


def _same_class(first: AbstractTransition, later: AbstractTransition) -> None:
    if type(first) is not type(later):
        raise TypeError(
            f"Cannot compose a {type(first).__name__} with a {type(later).__name__}: "
            "only transitions of one class compose. Convert the narrower one first, "
            "for instance with `pararnn.Dense(transition.as_matrix(state_shape))`."
        )


def _same_blocks(first: AbstractTransition, later: AbstractTransition) -> None:
    _same_class(first, later)
    if first.values.shape[1:] != later.values.shape[1:]:
        raise ValueError(
            f"Cannot compose transitions of shapes {first.values.shape} and "
            f"{later.values.shape} (time first): they act on different states."
        )


def _reject(
    transition: AbstractTransition, state_shape: tuple[int, ...], expected: str
) -> ValueError:
    return ValueError(
        f"{type(transition).__name__}: a transition of shape "
        f"{transition.values.shape} (time first) cannot act on a state of shape "
        f"{state_shape}; it acts on states of shape {expected}. Likely causes: (a) the "
        "time axis is missing from the transition (a constant one has a leading axis "
        "of length 1), (b) the state's axes are in another order: those that the "
        "transition acts on come first, further ones after them."
    )


def _check_rank(name: str, values: Array, minimum: int, wanted: str) -> None:
    if not hasattr(values, "ndim") or values.ndim < minimum:
        raise ValueError(
            f"{name}: expected an array of shape {wanted}, time first, got "
            f"{getattr(values, 'shape', type(values).__name__)}."
        )
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        raise TypeError(
            f"{name}: expected floating-point or complex values, got {values.dtype}. "
            "Cast the transition, for instance with `.astype(jnp.float32)`."
        )


class Diagonal(AbstractTransition):
    r"""$A_t = \mathrm{diag}(a_t)$, real or complex.

    **Arguments:** `values` of shape `[T, *n]` (or `[1, *n]`: constant in time). It acts
    on states of shape `[*n, *further]`, the same factor along all further axes.
    """

    values: Inexact[Array, "T *n"]

    def __check_init__(self):
        _check_rank("Diagonal", self.values, 1, "[T, *n]")

    def mv(self, x):
        return multiply(_append_axes(self.values, x.ndim), x)

    def compose(self, later):
        _same_blocks(self, later)
        return Diagonal(later.values * self.values)

    def transpose(self):
        return self

    def as_matrix(self, state_shape):
        self.layout(state_shape)
        further = math.prod(state_shape[self.values.ndim - 1 :])
        flat = self.values.reshape(self.values.shape[0], -1)
        return (
            jnp.repeat(flat, further, axis=1)[:, :, None]
            * jnp.eye(math.prod(state_shape), dtype=flat.dtype)[None]
        )

    def layout(self, state_shape):
        n = self.values.shape[1:]
        if state_shape[: len(n)] != n:
            raise _reject(self, state_shape, f"{(*n, '...')}")
        return Layout("elementwise", (math.prod(n), math.prod(state_shape[len(n) :])))

    def factors(self):
        return self.values.reshape(self.values.shape[0], -1, 1)


class Scalar(AbstractTransition):
    r"""$A_t = a_t I$: one factor per step, for states of any shape.

    **Arguments:** `values` of shape `[T]` (or `[1]`: constant in time).
    """

    values: Inexact[Array, " T"]

    def __check_init__(self):
        _check_rank("Scalar", self.values, 1, "[T]")
        if self.values.ndim != 1:
            raise ValueError(
                f"Scalar: expected one factor a step, shape [T], got "
                f"{self.values.shape}. A factor for each channel is a `Diagonal`."
            )

    def mv(self, x):
        return multiply(_append_axes(self.values, x.ndim), x)

    def compose(self, later):
        _same_blocks(self, later)
        return Scalar(later.values * self.values)

    def transpose(self):
        return self

    def as_matrix(self, state_shape):
        return (
            self.values[:, None, None]
            * jnp.eye(math.prod(state_shape), dtype=self.values.dtype)[None]
        )

    def layout(self, state_shape):
        return Layout("elementwise", (1, math.prod(state_shape)))

    def factors(self):
        return self.values[:, None, None]


class BlockDiagonal(AbstractTransition):
    """Square blocks of any size along the diagonal.

    **Arguments:** `values` of shape `[T, blocks, size, size]` (or `[1, ...]`: constant
    in time). It acts on states of shape `[blocks * size, *further]`.
    """

    values: Inexact[Array, "T blocks size size"]

    def __check_init__(self):
        _check_rank("BlockDiagonal", self.values, 4, "[T, blocks, size, size]")
        if self.values.ndim != 4 or self.values.shape[-1] != self.values.shape[-2]:
            raise ValueError(
                "BlockDiagonal: expected square blocks, shape [T, blocks, size, size], "
                f"got {self.values.shape}."
            )

    def mv(self, x):
        _, blocks, size, _ = self.values.shape
        split = x.reshape(x.shape[0], blocks, size, math.prod(x.shape[2:]))
        return multiply_matrices(self.values, split).reshape(x.shape)

    def compose(self, later):
        _same_blocks(self, later)
        return BlockDiagonal(multiply_matrices(later.values, self.values))

    def transpose(self):
        return BlockDiagonal(jnp.swapaxes(self.values, -1, -2))

    def as_matrix(self, state_shape):
        self.layout(state_shape)
        steps, blocks, size, _ = self.values.shape
        full = jnp.zeros((steps, blocks, size, blocks, size), self.values.dtype)
        index = jnp.arange(blocks)
        # Advanced indices on both sides of a slice move to the front.
        full = full.at[:, index, :, index, :].set(jnp.swapaxes(self.values, 0, 1))
        full = full.reshape(steps, blocks * size, blocks * size)
        further = jnp.eye(math.prod(state_shape[1:]), dtype=full.dtype)
        return jnp.stack([jnp.kron(step, further) for step in full])

    def layout(self, state_shape):
        _, blocks, size, _ = self.values.shape
        if not state_shape or state_shape[0] != blocks * size:
            raise _reject(self, state_shape, f"({blocks * size}, ...)")
        return Layout("matrix", (blocks, size, math.prod(state_shape[1:])))

    def factors(self):
        return self.values


class Dense(AbstractTransition):
    """One full matrix per step.

    **Arguments:** `values` of shape `[T, n, n]` (or `[1, n, n]`: constant in time). It
    acts on states of shape `[n, *further]`.
    """

    values: Inexact[Array, "T n n"]

    def __check_init__(self):
        _check_rank("Dense", self.values, 3, "[T, n, n]")
        if self.values.ndim != 3 or self.values.shape[-1] != self.values.shape[-2]:
            raise ValueError(
                f"Dense: expected square matrices, shape [T, n, n], got "
                f"{self.values.shape}."
            )

    def mv(self, x):
        return BlockDiagonal(self.values[:, None]).mv(x)

    def compose(self, later):
        _same_blocks(self, later)
        return Dense(multiply_matrices(later.values, self.values))

    def transpose(self):
        return Dense(jnp.swapaxes(self.values, -1, -2))

    def as_matrix(self, state_shape):
        return BlockDiagonal(self.values[:, None]).as_matrix(state_shape)

    def layout(self, state_shape):
        n = self.values.shape[-1]
        if not state_shape or state_shape[0] != n:
            raise _reject(self, state_shape, f"({n}, ...)")
        return Layout("matrix", (1, n, math.prod(state_shape[1:])))

    def factors(self):
        return self.values[:, None]


def _append_axes(values: Array, ndim: int) -> Array:
    return values.reshape(values.shape + (1,) * (ndim - values.ndim))
