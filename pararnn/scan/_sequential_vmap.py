"""A batch, one sequence after the other, also where derivatives are transposed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, PyTree

from ._linear_scan import fake_dependency


def sequential_linear_call(
    apply: Callable[[PyTree[Array], PyTree[Array]], PyTree[Array]],
    known: PyTree[Array],
    given: PyTree[Array],
) -> PyTree[Array]:
    r"""Return `apply(known, given)`, which is linear in `given`.

    It takes a batch one sequence at a time, and so does its transpose. Writing T for
    `apply`, it is y in the linear system

    $$\begin{pmatrix} 1 & 0 \\ -T & 1 \end{pmatrix}
    \begin{pmatrix} x \\ y \end{pmatrix} = \begin{pmatrix} x \\ 0 \end{pmatrix},$$

    because `lax.custom_linear_solve` is given the solvers of a system and of its
    transpose, whereas JAX cannot transpose a loop of `sequential_vmap`. Derivatives in
    `known` are those of the matrix, that is, of `apply` as it is written.

    `apply` is used by all three; wrap it in `jax.jit`, so that it is traced only once.
    """
    out = jax.eval_shape(apply, known, given)
    nothing = jtu.tree_map(lambda v: jnp.zeros(v.shape, v.dtype), out)
    example = jtu.tree_map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), given)

    def matrix(both):
        given, out = both
        return given, jtu.tree_map(jnp.subtract, out, apply(known, given))

    def solve(_, both):
        given, out = both
        more = sequential_vmap(apply)(known, given)
        return given, jtu.tree_map(jnp.add, out, more)

    @sequential_vmap
    def transposed(known, out):
        (given,) = jax.linear_transpose(lambda x: apply(known, x), example)(out)
        return given

    def transpose_solve(_, both):
        given, out = both
        return jtu.tree_map(jnp.add, given, transposed(known, out)), out

    terms = _depend_on_all((given, nothing))
    _, out = lax.custom_linear_solve(matrix, terms, solve, transpose_solve)
    return _depend_on_all(out)


def _depend_on_all(tree: PyTree[Array]) -> PyTree[Array]:
    """Make all tangents unknown if one of them is; see `fake_dependency`."""
    every = jnp.stack([jnp.sum(v) for v in jtu.tree_leaves(tree)])
    return jtu.tree_map(lambda v: fake_dependency(v, jnp.sum(every)), tree)
