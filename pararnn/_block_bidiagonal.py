"""Linear recurrences as `lineax` operators."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Inexact

from .scan import (
    AbstractTransition,
    promote,
)


class BlockBidiagonalLinearOperator(lx.AbstractLinearOperator):
    r"""The linear system behind a linear recurrence, as a `lineax` operator.

    $$y_t = D_t x_t - A_t x_{t-1}, \qquad t = 1 \dots T, \quad x_0 = 0,$$

    or, with `upper=True`,

    $$y_t = D_t x_t - A_{t+1} x_{t+1}, \qquad t = 1 \dots T, \quad x_{T+1} = 0.$$

    In both, $A_t$ couples the steps t - 1 and t, and $A_1$ is not used. So the
    transpose of one is the other, with the same indices and each matrix transposed.
    ([`pararnn.linear_scan`][] with `reverse=True` instead calls the matrix between the
    steps t and t + 1 $A_t$.) Vectors are single arrays `[T, *state]`.

    Solve the system with [`pararnn.ParallelScan`][], or combine the operator with
    others by `+`, `-`, `@`, `.T` and products with scalars, like any `lineax` operator.

    **Arguments:**

    - `transition`: $A_t$, as a [`pararnn.Diagonal`][], [`pararnn.Scalar`][],
        [`pararnn.BlockDiagonal`][] or [`pararnn.Dense`][], leaves `[T, ...]`, or
        `[1, ...]` if constant in time.
    - `state`: the state of one step, `[*state]`, an array or a `jax.ShapeDtypeStruct`.
        Vectors have the dtype that holds this one and those of both transitions.
    - `diagonal`: $D_t$, of the same class as `transition`, leaves `[T, ...]` or
        `[1, ...]`. Defaults to the identity.
    - `steps`: T. Needed if everything given is constant in time; defaults to the length
        of what is not.
    - `upper`: whether the off-diagonal blocks are above the diagonal.

    **Raises:** `ValueError` or `TypeError` on classes, shapes and dtypes that do not
    fit.
    """

    transition: AbstractTransition
    diagonal: AbstractTransition | None
    # Static: a primitive of lineax would turn structures among the leaves into avals.
    state_shape: tuple[int, ...] = eqx.field(static=True)
    dtype: jnp.dtype = eqx.field(static=True)
    steps: int = eqx.field(static=True)
    upper: bool = eqx.field(static=True)

    def __init__(
        self,
        transition: AbstractTransition,
        state: jax.ShapeDtypeStruct | Inexact[Array, " *state"],
        diagonal: AbstractTransition | None = None,
        *,
        steps: int | None = None,
        upper: bool = False,
    ):
        _check_classes(transition, state, diagonal)
        _check_state(transition, tuple(state.shape))
        given = [transition] if diagonal is None else [transition, diagonal]
        self.transition = transition
        self.diagonal = diagonal
        self.state_shape = tuple(state.shape)
        self.dtype = promote(state.dtype, *(part.values.dtype for part in given))
        self.steps = _count_steps([part.values.shape[0] for part in given], steps)
        self.upper = upper

    def mv(self, vector: Inexact[Array, "T *state"]) -> Inexact[Array, "T *state"]:
        """Apply the equation above to `vector` as x.

        **Raises:** `ValueError` if `vector` has another shape.
        """
        structure = self.in_structure()
        if jnp.shape(vector) != structure.shape:
            raise ValueError(
                "BlockBidiagonalLinearOperator.mv: the vector has shape "
                f"{jnp.shape(vector)}, expected {structure.shape}: {self.steps} steps "
                f"(time first) of a state of shape {self.state_shape}. Likely causes: "
                "(a) a batch axis in front of time, which is for `jax.vmap`, (b) "
                "everything given is constant in time and `steps` was left out."
            )
        vector = jnp.asarray(vector).astype(promote(vector, self.dtype))
        own = vector if self.diagonal is None else self.diagonal.mv(vector)
        beside = without_first(self.transition, self.steps)
        outside = jnp.zeros_like(vector[:1])
        if self.upper:
            return own - jnp.concatenate([beside.mv(vector[1:]), outside])
        return own - jnp.concatenate([outside, beside.mv(vector[:-1])])

    def as_matrix(self) -> Inexact[Array, "n n"]:
        """Return the matrix for flat vectors; slow, for tests and small systems."""
        steps, size = self.steps, math.prod(self.state_shape)
        if steps == 0:
            return jnp.zeros((0, 0), self.dtype)

        def blocks(part):
            every = part.as_matrix(self.state_shape).astype(self.dtype)
            return jnp.broadcast_to(every, (steps, size, size))

        t = jnp.arange(steps)
        full = jnp.zeros((steps, size, steps, size), self.dtype)
        eye = jnp.broadcast_to(jnp.eye(size, dtype=self.dtype), (steps, size, size))
        # Advanced indices on both sides of a slice move to the front.
        full = full.at[t, :, t, :].set(
            eye if self.diagonal is None else blocks(self.diagonal)
        )
        rows, columns = (t[:-1], t[1:]) if self.upper else (t[1:], t[:-1])
        full = full.at[rows, :, columns, :].set(-blocks(self.transition)[1:])
        return full.reshape(steps * size, steps * size)

    def transpose(self) -> "BlockBidiagonalLinearOperator":
        """Return the transpose, not conjugated: the system of the other direction."""
        return BlockBidiagonalLinearOperator(
            self.transition.transpose(),
            jax.ShapeDtypeStruct(self.state_shape, self.dtype),
            None if self.diagonal is None else self.diagonal.transpose(),
            steps=self.steps,
            upper=not self.upper,
        )

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """Return the structure of all vectors of this operator, `[T, *state]`."""
        return jax.ShapeDtypeStruct((self.steps, *self.state_shape), self.dtype)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """Return the structure of all vectors of this operator, `[T, *state]`."""
        return self.in_structure()


def conjugate_arrays(tree):
    def conjugate(leaf):
        return leaf.conj() if jnp.iscomplexobj(leaf) else leaf

    return jax.tree.map(conjugate, tree)


def without_first(transition, steps: int):
    """Return the transitions of the steps 2 to T; a constant one is unchanged."""
    if transition.values.shape[0] == 1:
        return transition
    return eqx.tree_at(lambda part: part.values, transition, transition.values[1:])


# What lineax asks of an operator through functions instead of methods.
#


def _has_diagonal_blocks(operator: BlockBidiagonalLinearOperator) -> bool:
    if operator.diagonal is None:
        return True
    kind, shape = operator.diagonal.layout(operator.state_shape)
    return kind == "elementwise" or shape[1] == 1


@lx.linearise.register(BlockBidiagonalLinearOperator)
@lx.materialise.register(BlockBidiagonalLinearOperator)
def _unchanged(operator):
    return operator


@lx.conj.register(BlockBidiagonalLinearOperator)
def _conj(operator):
    return conjugate_arrays(operator)


@lx.diagonal.register(BlockBidiagonalLinearOperator)
def _diagonal(operator):
    ones = jnp.ones(operator.in_structure().shape, operator.dtype)
    if operator.diagonal is None:
        return ones.reshape(-1)
    kind, shape = operator.diagonal.layout(operator.state_shape)
    if kind == "elementwise":
        return operator.diagonal.mv(ones).reshape(-1)
    entries = jnp.diagonal(operator.diagonal.factors(), axis1=-2, axis2=-1)
    ones = ones.reshape(operator.steps, *shape)
    return (entries[..., None].astype(operator.dtype) * ones).reshape(-1)


@lx.tridiagonal.register(BlockBidiagonalLinearOperator)
def _tridiagonal(operator) -> tuple[Array, Array, Array]:
    """Return the main, the lower and the upper diagonal."""
    if operator.state_shape != ():
        matrix = operator.as_matrix()
        main, lower, upper = (jnp.diagonal(matrix, offset) for offset in (0, -1, 1))
        return main, lower, upper
    ones = jnp.ones(max(operator.steps - 1, 0), operator.dtype)
    beside = -without_first(operator.transition, operator.steps).mv(ones)
    lower, upper = beside, jnp.zeros_like(beside)
    if operator.upper:
        lower, upper = upper, lower
    return lx.diagonal(operator), lower, upper


@lx.has_unit_diagonal.register(BlockBidiagonalLinearOperator)
def _has_unit_diagonal(operator):
    return operator.diagonal is None


@lx.is_diagonal.register(BlockBidiagonalLinearOperator)
@lx.is_symmetric.register(BlockBidiagonalLinearOperator)
def _is_diagonal(operator):
    return operator.steps <= 1 and _has_diagonal_blocks(operator)


@lx.is_lower_triangular.register(BlockBidiagonalLinearOperator)
def _is_lower_triangular(operator):
    return _has_diagonal_blocks(operator) and not (
        operator.upper and operator.steps > 1
    )


@lx.is_upper_triangular.register(BlockBidiagonalLinearOperator)
def _is_upper_triangular(operator):
    return _has_diagonal_blocks(operator) and (operator.steps <= 1 or operator.upper)


@lx.is_tridiagonal.register(BlockBidiagonalLinearOperator)
def _is_tridiagonal(operator):
    # States of shape [1] would be tridiagonal too, but lineax would then replace this
    # operator by a tridiagonal one, which only takes vectors `[T]`.
    return operator.state_shape == () or lx.is_diagonal(operator)


@lx.is_positive_semidefinite.register(BlockBidiagonalLinearOperator)
@lx.is_negative_semidefinite.register(BlockBidiagonalLinearOperator)
def _is_semidefinite(operator):
    del operator
    return False


#
# Checks.
#


def _check_classes(transition, state, diagonal) -> None:
    name = "BlockBidiagonalLinearOperator"
    if not isinstance(transition, AbstractTransition):
        raise TypeError(
            f"{name}: `transition` is a {type(transition).__name__}, expected one of "
            "pararnn.Diagonal, Scalar, BlockDiagonal, Dense. Likely cause: a bare "
            "array; wrap it, for instance `pararnn.Diagonal(a)` for factors [T, n]."
        )
    if not (hasattr(state, "shape") and hasattr(state, "dtype")):
        raise TypeError(
            f"{name}: `state` is {state!r:.60}, expected an array or a "
            "`jax.ShapeDtypeStruct` of one step's state, for instance "
            "`jax.ShapeDtypeStruct((n,), jnp.float32)`."
        )
    if not jnp.issubdtype(state.dtype, jnp.inexact):
        raise TypeError(
            f"{name}: `state` is {state.dtype}; a recurrence needs floating point or "
            "complex numbers. Cast it, for instance with `state.astype(jnp.float32)`."
        )
    if diagonal is None:
        return
    if type(diagonal) is not type(transition):
        raise TypeError(
            f"{name}: `diagonal` is a {type(diagonal).__name__} and `transition` a "
            f"{type(transition).__name__}; expected one class for both. Wrap a bare "
            "array in that class; of two transitions, convert the narrower, for "
            "instance with `pararnn.Dense(diagonal.as_matrix(state_shape))`."
        )
    if diagonal.values.shape[1:] != transition.values.shape[1:]:
        raise ValueError(
            f"{name}: `diagonal` has shape {diagonal.values.shape} and `transition` "
            f"has shape {transition.values.shape}; after time, their leading axis, "
            "they must agree. Likely cause: the time axis is missing from one of them "
            "(a constant one has a leading axis of length 1)."
        )


def _check_state(transition: AbstractTransition, state_shape: tuple[int, ...]) -> None:
    try:
        transition.layout(state_shape)
    except ValueError as error:
        raise ValueError(
            f"BlockBidiagonalLinearOperator: `state` does not fit. {error} (c) `state` "
            "has a time axis; it is the state of one step."
        ) from error


def _count_steps(lengths: list[int], steps: int | None) -> int:
    if steps is not None and not (isinstance(steps, int) and steps >= 0):
        raise ValueError(
            f"BlockBidiagonalLinearOperator: `steps` is {steps!r}; expected a whole "
            "number >= 0, or None for the length of the transition and the diagonal."
        )
    if steps is None:
        varying = [length for length in lengths if length != 1]
        steps = varying[0] if varying else 1
    if all(length in (1, steps) for length in lengths):
        return steps
    found = " and ".join(map(str, lengths))
    raise ValueError(
        f"BlockBidiagonalLinearOperator: `transition` and `diagonal` have {found} "
        f"steps, which do not fit {steps} steps. Both have time as their leading axis; "
        "only those that are constant in time have a leading axis of length 1. Likely "
        "causes: (a) a batch axis in front of time, which is for `jax.vmap`, (b) "
        "`steps` is the length of another sequence."
    )
