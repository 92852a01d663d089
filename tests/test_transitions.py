"""The laws of every transition; a new transition is a line or two in `STRUCTURES`."""

from typing import Any, NamedTuple

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pararnn import BlockDiagonal, Dense, Diagonal, Scalar


class Structure(NamedTuple):
    """A class, the shape of one step of its values, and a state it acts on."""

    cls: Any
    values: tuple[int, ...]
    state: tuple[int, ...]


STRUCTURES = {
    "diagonal": Structure(Diagonal, (3,), (3,)),
    "diagonal, further axis": Structure(Diagonal, (3,), (3, 2)),
    "diagonal, two axes": Structure(Diagonal, (2, 3), (2, 3)),
    "scalar": Structure(Scalar, (), (2, 3)),
    "scalar, one number": Structure(Scalar, (), ()),
    "blocks": Structure(BlockDiagonal, (2, 2, 2), (4,)),
    "blocks, further axis": Structure(BlockDiagonal, (2, 2, 2), (4, 2)),
    "blocks of one": Structure(BlockDiagonal, (3, 1, 1), (3,)),
    "dense": Structure(Dense, (3, 3), (3,)),
    "dense, further axes": Structure(Dense, (2, 2), (2, 3, 1)),
    # Above the size up to which products are unrolled.
    "dense, wide": Structure(Dense, (17, 17), (17,)),
}
DTYPES = (np.float32, np.float64, np.complex64, np.complex128)


each_structure = pytest.mark.parametrize(
    "structure", STRUCTURES.values(), ids=list(STRUCTURES)
)


def arrays(shape, dtype):
    """Small whole numbers, for which every product is exact, and so is every law."""
    whole = hnp.arrays(np.int64, shape, elements=st.integers(-3, 3))
    if np.issubdtype(dtype, np.complexfloating):
        return st.tuples(whole, whole).map(lambda v: (v[0] + 1j * v[1]).astype(dtype))
    return whole.map(lambda v: v.astype(dtype))


@jax.jit(static_argnums=0)
def sides(structure: Structure, a, b, c, x):
    """Left- and right-hand side of each law."""
    first, second, third = map(structure.cls, (a, b, c))
    both = first.compose(second)
    matrix, dense = first.as_matrix(structure.state), second.as_matrix(structure.state)
    flat = x.reshape(x.shape[0], -1)

    def apply(matrices):
        return jnp.einsum("tij,tj->ti", matrices, flat).reshape(x.shape)

    return {
        "mv of the composition": (both.mv(x), second.mv(first.mv(x))),
        "associativity": (
            both.compose(third).values,
            first.compose(second.compose(third)).values,
        ),
        "transpose of transpose": (first.transpose().transpose().values, a),
        "matrix of the transpose": (
            first.transpose().as_matrix(structure.state),
            jnp.swapaxes(matrix, 1, 2),
        ),
        "transpose of the composition": (
            both.transpose().values,
            second.transpose().compose(first.transpose()).values,
        ),
        "matrix against mv": (first.mv(x), apply(matrix)),
        "matrix of the composition": (
            both.as_matrix(structure.state),
            jnp.einsum("tij,tjk->tik", dense, matrix),
        ),
    }


@each_structure
@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.settings(max_examples=8)
@hypothesis.given(data=st.data())
def test_laws(structure, dtype, data):
    a, b, c = (data.draw(arrays((2, *structure.values), dtype)) for _ in range(3))
    x = data.draw(arrays((2, *structure.state), dtype))
    for law, (left, right) in sides(structure, a, b, c, x).items():
        assert left.dtype == right.dtype == dtype, law
        np.testing.assert_array_equal(left, right, err_msg=law)


@each_structure
def test_engine_layout(structure):
    """The engine's factors times a state in the engine's layout are `mv`."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, *structure.values))
    x = rng.normal(size=(2, *structure.state))

    @jax.jit
    def run(values, x):
        transition = structure.cls(values)
        kind, shape = transition.layout(structure.state)
        factors, stored = transition.factors(), x.reshape(2, *shape)
        assert factors.ndim == stored.ndim
        if kind == "elementwise":
            product = jnp.multiply(*jnp.broadcast_arrays(factors, stored))
        else:
            product = jnp.einsum("tbij,tbjk->tbik", factors, stored)
        return product.reshape(x.shape), transition.mv(x)

    np.testing.assert_allclose(*run(values, x), rtol=1e-13)


@each_structure
def test_real_transition_of_a_complex_state(structure):
    values = jnp.ones((2, *structure.values), jnp.float32)
    x = jnp.ones((2, *structure.state), jnp.complex64)
    assert jax.eval_shape(structure.cls(values).mv, x).dtype == jnp.complex64


ONES = np.ones


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: Diagonal([1.0]), ValueError, r"Diagonal: .* \[T, \*n\], .* got list"),
        (lambda: Diagonal(jnp.ones(())), ValueError, r"Diagonal: .* got \(\)"),
        (lambda: Diagonal(ONES((2, 3), int)), TypeError, r"got int64.*astype"),
        (lambda: Scalar(ONES((2, 3))), ValueError, r"Scalar: .* is a `Diagonal`"),
        (lambda: BlockDiagonal(ONES((2, 2, 2))), ValueError, r"\[T, blocks, size"),
        (lambda: BlockDiagonal(ONES((2, 1, 2, 3))), ValueError, r"square blocks"),
        (lambda: Dense(ONES((2, 2))), ValueError, r"\[T, n, n\]"),
        (lambda: Dense(ONES((2, 2, 3))), ValueError, r"square matrices"),
        (lambda: Dense(ONES((1, 2, 2, 2))), ValueError, r"square matrices"),
        (
            lambda: Diagonal(ONES((2, 3))).compose(Dense(ONES((2, 3, 3)))),
            TypeError,
            r"Cannot compose a Diagonal with a Dense.*as_matrix",
        ),
        (lambda: Diagonal(ONES((2, 3))).layout((4,)), ValueError, r"shape \(4,\)"),
        (lambda: Diagonal(ONES((2, 3))).layout(()), ValueError, r"Likely causes: \(a"),
        (
            lambda: BlockDiagonal(ONES((2, 2, 2, 2))).layout((5,)),
            ValueError,
            r"BlockDiagonal: .* \(4, \.\.\.\)",
        ),
        (lambda: BlockDiagonal(ONES((2, 2, 2, 2))).layout(()), ValueError, r"cannot"),
        (lambda: Dense(ONES((2, 3, 3))).layout((2, 3)), ValueError, r"cannot act"),
        # The message names the user's class.
        (
            lambda: Dense(ONES((2, 3, 3))).layout((4,)),
            ValueError,
            r"Dense: .*\(2, 3, 3",
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
