"""What the operator and the solver for lineax refuse, and with which message."""

from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from pararnn import BlockDiagonal, Dense, Diagonal
from pararnn._lineax import BlockBidiagonalLinearOperator, ParallelScan
from tests.helpers import refusal

STATE = jax.ShapeDtypeStruct((3,), jnp.float64)
ONES = np.ones


def build(transition, state: Any = STATE, *args, **options):
    return lambda: BlockBidiagonalLinearOperator(transition, state, *args, **options)


def operator():
    return build(Diagonal(ONES((5, 3))))()


def unknown_backend() -> Any:
    return "parallel"


# name: (call, exception, parts of the message)
WRONG = {
    "a bare array": (
        build(ONES((5, 3))),
        TypeError,
        ["`transition` is a ndarray", "pararnn.Diagonal(a)"],
    ),
    "a state that is not an array": (
        build(Diagonal(ONES((5, 3))), 3),
        TypeError,
        ["`state` is 3", "jax.ShapeDtypeStruct((n,)"],
    ),
    "a state of integers": (
        build(Diagonal(ONES((5, 3))), ONES(3, int)),
        TypeError,
        ["`state` is int64", "astype(jnp.float32)"],
    ),
    "a state with a time axis": (
        build(Dense(ONES((5, 3, 3))), ONES((5, 3))),
        ValueError,
        ["`state` does not fit", "Dense: a transition of shape (5, 3, 3)", "(c)"],
    ),
    "a transition without time": (
        build(BlockDiagonal(ONES((1, 2, 2, 2)))),
        ValueError,
        ["BlockDiagonal", "state of shape (3,)", "(4, ...)"],
    ),
    "a diagonal of another class": (
        build(Dense(ONES((5, 3, 3))), STATE, Diagonal(ONES((5, 3)))),
        TypeError,
        ["`diagonal` is a Diagonal", "`transition` a Dense", "as_matrix"],
    ),
    "a bare array as diagonal": (
        build(Dense(ONES((5, 3, 3))), STATE, ONES((5, 3, 3))),
        TypeError,
        ["`diagonal` is a ndarray", "expected one class", "Wrap a bare"],
    ),
    "a diagonal of another shape": (
        build(Diagonal(ONES((5, 3))), STATE, Diagonal(ONES((3,)))),
        ValueError,
        ["`diagonal` has shape (3,)", "(5, 3)", "time axis is missing"],
    ),
    "lengths that differ": (
        build(Diagonal(ONES((5, 3))), STATE, Diagonal(ONES((4, 3)))),
        ValueError,
        ["5 and 4 steps", "jax.vmap"],
    ),
    "another number of steps": (
        build(Diagonal(ONES((5, 3))), steps=6),
        ValueError,
        ["5 steps", "fit 6 steps"],
    ),
    "half a step": (
        build(Diagonal(ONES((1, 3))), steps=2.5),
        ValueError,
        ["`steps` is 2.5", "whole number"],
    ),
    "a vector of another shape": (
        lambda: operator().mv(ONES((2, 5, 3))),
        ValueError,
        ["mv: the vector has shape (2, 5, 3)", "expected (5, 3)", "jax.vmap", "steps"],
    ),
    "an unknown backend": (
        lambda: ParallelScan(unknown_backend()),
        ValueError,
        ["`backend` 'parallel'", "sequential, associative, chunked"],
    ),
    "another operator": (
        lambda: lx.linear_solve(
            lx.MatrixLinearOperator(jnp.eye(3)), jnp.ones(3), ParallelScan()
        ),
        TypeError,
        ["MatrixLinearOperator", "BlockBidiagonalLinearOperator", "AutoLinearSolver"],
    ),
    "a sum of operators": (
        lambda: lx.linear_solve(operator() + operator(), ONES((5, 3)), ParallelScan()),
        TypeError,
        ["AddLinearOperator", "lineax.invert(part, ParallelScan())"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    wrong, exception, parts = WRONG[name]
    with refusal(exception, parts):
        wrong()
