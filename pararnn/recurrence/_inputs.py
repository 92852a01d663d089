"""Check what a user passes to a solver, and adapt the cell to `f(h, x) -> h`."""

import abc
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._adapters import as_step
from .._checks import check_bits, check_reset
from ._recurrence import Recurrence


class AbstractImplicitCell(eqx.Module):
    """A cell whose step `f(h, x)` is the limit of an iteration."""

    @abc.abstractmethod
    def __call__(self, h: PyTree[Array], x: PyTree) -> PyTree[Array]:
        """Return the limit of the iteration."""

    @abc.abstractmethod
    def refine(self, z: PyTree[Array], h: PyTree[Array], x: PyTree) -> PyTree[Array]:
        """Take one round of the iteration, from z towards `f(h, x)`.

        At z = `f(h, x)`, its derivative with respect to h is that of the cell.
        """


def make_recurrence(
    where: str, f: Callable, xs: PyTree, h0: PyTree, *, refine: bool = False
) -> Recurrence:
    """Trace the cell, and refuse one that does not map states to states.

    With `refine`, one round of an implicit cell's iteration is traced too.
    """
    if not callable(f):
        raise TypeError(
            f"{where}: the cell is a {type(f).__name__}, which cannot be called; "
            "expected a function `f(h, x) -> h` or a cell module. Likely cause: the "
            "arguments are in another order (cell first, then inputs, then state)."
        )
    steps = count_steps(where, xs)
    _check_state(where, h0)
    implicit = refine and isinstance(f, AbstractImplicitCell)
    step = as_step(f)
    try:
        recurrence = Recurrence(step, xs, h0, f.refine if implicit else None)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{where}: the cell could not be traced on one step: state "
            f"{_describe(h0)}, input {_describe(xs, drop_time=True)} (one entry of a "
            f"sequence of {steps}). Likely causes: (a) `xs` is not time first, "
            "[T, ...]; a batch belongs under `jax.vmap`; (b) the cell takes (input, "
            "state) rather than (state, input): pass `lambda h, x: cell(x, h)`; "
            f"(c) the sizes do not fit the cell. The cell said: {error}"
        ) from error
    _check_output(where, recurrence)
    return recurrence


def count_steps(where: str, xs: PyTree) -> int:
    """Return the length of the inputs' common leading axis."""
    lengths = {}
    for path, leaf in jtu.tree_leaves_with_path(xs):
        name = "xs" + jtu.keystr(path)
        if not eqx.is_array_like(leaf) or jnp.ndim(leaf) == 0:
            raise ValueError(
                f"{where}: `{name}` has no time axis ({leaf!r:.80}); every leaf of "
                "`xs` is an array [T, ...]. A value that is the same at all steps "
                "belongs in the cell, which may close over it."
            )
        lengths[name] = jnp.shape(leaf)[0]
    if not lengths:
        raise ValueError(
            f"{where}: `xs` holds no arrays, so the number of steps is unknown. "
            "For a cell without inputs pass something that has a length, for "
            "instance `xs=jnp.arange(T)`, and ignore it in the cell."
        )
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{where}: the leaves of `xs` differ in their leading (time) axis: "
            f"{lengths}. Likely cause: a leaf with a batch axis in front of time, or "
            "one shifted against the others by slicing."
        )
    return next(iter(lengths.values()))


def _check_state(where: str, h0: PyTree) -> None:
    for path, leaf in jtu.tree_leaves_with_path(h0):
        name = "h0" + jtu.keystr(path)
        if not eqx.is_array_like(leaf):
            raise TypeError(f"{where}: `{name}` is not an array but {leaf!r:.80}.")
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"{where}: `{name}` is {jnp.result_type(leaf)}; a state must be "
                "floating point or complex, since the solver differentiates with "
                "respect to it. Cast it, for instance `h0.astype(jnp.float32)`; a "
                "counter belongs in `xs`."
            )
        check_bits(where, name, leaf)
    if not jtu.tree_leaves(h0):
        raise ValueError(
            f"{where}: `h0` holds no arrays: there is no state to solve for."
        )


def _check_output(where: str, recurrence: Recurrence) -> None:
    out_leaves, out_tree = jtu.tree_flatten(recurrence.output)
    if out_tree != recurrence.state_tree:
        raise ValueError(
            f"{where}: the cell changes the structure of the state: it was given "
            f"{recurrence.state_tree} and returned {out_tree}. Likely cause: the cell "
            "returns `(state, output)` as for `jax.lax.scan`; return the state alone "
            "(outputs can be computed from all states afterwards, in parallel)."
        )
    for i, (given, got) in enumerate(
        zip(recurrence.state_leaves, out_leaves, strict=True)
    ):
        if given.shape != got.shape or given.dtype != got.dtype:
            raise ValueError(
                f"{where}: the cell changes leaf {i} of the state from "
                f"{given.dtype}{list(given.shape)} to {got.dtype}{list(got.shape)}. "
                "Likely causes: (a) `h0` and the parameters have different dtypes "
                "(float32 against bfloat16 or float64): create `h0` in the dtype that "
                "the cell returns; (b) the input broadcasts against the state, for "
                "instance because it has a batch axis."
            )


def check_like(where: str, name: str, value: PyTree, like: PyTree, what: str) -> None:
    """Refuse a pytree that differs in structure, shapes or dtypes from `like`."""
    same = jtu.tree_structure(value) == jtu.tree_structure(like) and all(
        jnp.shape(a) == b.shape and jnp.result_type(a) == b.dtype
        for a, b in zip(jtu.tree_leaves(value), jtu.tree_leaves(like), strict=True)
    )
    if not same:
        raise ValueError(
            f"{where}: `{name}` is {_describe(value)}, expected {_describe(like)}: "
            f"{what}."
        )


def check_resets(where: str, recurrence: Recurrence, reset, reset_state, steps):
    """Return the state that resets select, as leaves; defaults to zeros."""
    check_reset(where, reset, reset_state, steps)
    if reset is None:
        return None
    if reset_state is None:
        return tuple(jnp.zeros(s.shape, s.dtype) for s in recurrence.state_leaves)
    like = jtu.tree_unflatten(recurrence.state_tree, recurrence.state_leaves)
    check_like(where, "reset_state", reset_state, like, "the structure of `h0`")
    return tuple(jnp.asarray(leaf) for leaf in jtu.tree_leaves(reset_state))


def _describe(tree: PyTree, drop_time: bool = False) -> str:
    def one(leaf):
        shape = (
            list(jnp.shape(leaf))
            if not isinstance(leaf, jax.ShapeDtypeStruct)
            else list(leaf.shape)
        )
        dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
        return f"{dtype}{shape[1:] if drop_time else shape}"

    tree = jtu.tree_map(one, tree)
    return str(tree).replace("'", "")
