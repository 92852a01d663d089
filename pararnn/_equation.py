"""Equations `F(z, inputs) = 0` and the derivative of their solutions.

The derivative of a solution follows from the implicit function theorem, however the
solution was found. It never passes through iterations, and is NaN after a failure.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from .recurrence import (
    Recurrence,
    find_structure,
    from_blocks,
    split_by_tangents,
    to_blocks,
    transition_factors,
)
from .scan import invert_matrices, multiply_matrices


class Equation:
    """`F(z, inputs) = 0` for z, as data: a recurrence in z, driven by the inputs.

    `F` is traced, and its structure found, like those of a cell: a "step" goes from z
    to the residual. States are real vectors `v`, inputs are leaves, and `constants` are
    the values that `F` closes over.
    """

    def __init__(self, recurrence: Recurrence):
        self.recurrence = recurrence
        self.structure = find_structure(recurrence)

    def residual(self, constants, v: Array, inputs) -> Array:
        return self.recurrence.vector_step((constants, None), v, (inputs, None))

    def residual_and_inverse(self, constants, v: Array, inputs) -> tuple[Array, Array]:
        """Return `F` at v, and the inverse of its Jacobian there, block by block."""

        def at(v):
            return self.residual(constants, v, inputs)

        seeds = jnp.asarray(self.structure.seeds, v.dtype)
        value, push = jax.linearize(at, v)
        kind, blocks = transition_factors(self.structure, jax.vmap(push)(seeds))
        if kind == "elementwise":
            return value, 1 / blocks
        empty = self.structure.blocks == self.structure.width
        if np.any(empty):
            # Empty places of small blocks get the equation 1 * 0 = 0.
            filler = empty[:, :, None] & np.eye(self.structure.size, dtype=bool)
            blocks = jnp.where(filler, 1, blocks)
        return value, _inverse(blocks)

    def apply(self, inverse: Array, v: Array) -> Array:
        v = to_blocks(self.structure, v)
        diagonal = self.structure.kind == "diagonal"
        v = inverse * v if diagonal else multiply_matrices(inverse, v)
        return from_blocks(self.structure, v)

    def state(self, v: Array) -> PyTree[Array]:
        leaves = self.recurrence.unravel(v)
        return jtu.tree_unflatten(self.recurrence.state_tree, leaves)


# Takes an equation, its constants, inputs and a start; returns the solution `v`.
Search = Callable[[Equation, list[Array], tuple[Array, ...], Array], Array]


@eqx.filter_custom_jvp
def solution(constants, inputs, start, *, equation: Equation, search: Search):
    """Return the solution that the search finds, as a real vector; NaN if it fails."""
    return search(equation, constants, inputs, start)


@solution.def_jvp
def _(primals, tangents, *, equation: Equation, search: Search):
    """Apply the implicit function theorem.

    The rule calls `solution` again, whose derivative is this rule. So the rule itself
    can be differentiated, to any order.
    """
    v = solution(*primals, equation=equation, search=search)
    # The start has no derivative.
    arguments, tangents = primals[:2], tangents[:2]
    moved, held = split_by_tangents(arguments, tangents)
    if not jtu.tree_leaves(moved):
        return v, None

    def at_solution(moved):
        constants, inputs = eqx.combine(held, moved)
        return equation.residual(constants, v, inputs)

    # `moved` and `tangents` have the same leaves.
    _, pushed = jax.jvp(at_solution, (moved,), (tangents,))
    constants, inputs = arguments
    _, inverse = equation.residual_and_inverse(constants, v, inputs)
    return v, -equation.apply(inverse, pushed)


def attach_derivative(F: Callable[[PyTree, PyTree], PyTree], z: PyTree, inputs: PyTree):
    """Return a function `(z, inputs) -> z` with the derivative of `F(z, inputs) = 0`.

    Its value is the given z, a solution found elsewhere. The arguments here are
    examples of shapes and dtypes.
    """
    # The recurrence drops a time axis, so one equation needs one.
    series = jtu.tree_map(lambda leaf: jnp.asarray(leaf)[None], inputs)
    recurrence = Recurrence(F, series, z)
    equation = Equation(recurrence)
    constants = recurrence.take_constants()

    def known(z, inputs):
        v = lax.stop_gradient(recurrence.ravel(jtu.tree_leaves(z)))
        leaves = tuple(jnp.asarray(leaf) for leaf in jtu.tree_leaves(inputs))
        v = solution(constants, leaves, v, equation=equation, search=_return_start)
        return equation.state(v)

    return known


def _return_start(equation: Equation, constants, inputs, start: Array) -> Array:
    del equation, constants, inputs
    return start


@jax.custom_jvp
def _inverse(blocks: Float[Array, "n size size"]) -> Float[Array, "n size size"]:
    """Return the inverses of blocks; not finite where a block is singular.

    With inverses, the columns of a Jacobian are one matrix product. Several blocks are
    usually small, and are eliminated side by side.
    """
    if len(blocks) > 1:
        return invert_matrices(blocks)
    factors, _, order = lax.linalg.lu(blocks[0])
    permuted = order[:, None] == lax.broadcasted_iota(order.dtype, factors.shape, 1)
    half = lax.linalg.triangular_solve(
        factors,
        permuted.astype(factors.dtype),
        left_side=True,
        lower=True,
        unit_diagonal=True,
    )
    return lax.linalg.triangular_solve(factors, half, left_side=True)[None]


@_inverse.defjvp
def _(primals, tangents):
    inverse = _inverse(*primals)
    moved = multiply_matrices(multiply_matrices(inverse, tangents[0]), inverse)
    return inverse, -moved
