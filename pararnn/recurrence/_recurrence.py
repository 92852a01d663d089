"""A recurrence: a cell traced once, as a pure step on leaves or on vectors."""

import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, PyTree

from ..jaxprs import (
    JITTED,
    consts_to_args,
    evaluate,
    evaluate_inlined,
    inline_jit,
    is_index,
    jit_has_consts,
    primitives_of,
)
from ..scan import promote, shift, struct, varying_axes


class Recurrence:
    r"""`h_t = f(h_{t-1}, x_t)` as data: what `f` computes, and what it closes over.

    `f` is traced once. Everything that it closes over becomes part of the explicit
    `parameters`, so that derivatives and `vmap` reach it. A problem then consists of

    - `step(parameters, h, x)`, unbatched, on tuples of leaves;
    - `parameters = (constants, fresh)`, where resets select the state `fresh`;
    - `inputs = (leaves of xs, reset)`, time first.

    A reset is part of the step: it replaces the state before the step by `fresh`. So
    resets work with every solver and every derivative, and none has to handle them.

    The step of a cell may be an iteration itself. The cell may then provide one round
    of it, `refine(z, h, x)`, from z towards `f(h, x)`.
    """

    def __init__(
        self, f: Callable, xs: PyTree, h0: PyTree, refine: Callable | None = None
    ):
        h_leaves, self.state_tree = jtu.tree_flatten(h0)
        x_leaves, x_tree = jtu.tree_flatten(xs)
        x_structs = [shape_dtype(x, drop_time=True) for x in x_leaves]
        state_tree = self.state_tree

        def flat(*leaves):
            count = state_tree.num_leaves
            h = jtu.tree_unflatten(state_tree, leaves[:count])
            return f(h, jtu.tree_unflatten(x_tree, leaves[count:]))

        def trace(axes):
            h = [struct(jnp.shape(h), jnp.result_type(h), axes) for h in h_leaves]
            return h, *jax.make_jaxpr(flat, return_shape=True)(*h, *x_structs)

        # Within a `shard_map` a state varies along all axes that its step varies along.
        axes = varying_axes((h_leaves, x_structs))
        self.state_leaves, closed, out = trace(axes)
        wider = axes | varying_axes(closed.out_avals)
        if wider != axes:
            self.state_leaves, closed, out = trace(wider)
        if jit_has_consts(closed.jaxpr):
            # Inlined, the cell closes over them itself, and they become parameters.
            closed = inline_jit(closed)
        self.refinement: jex.core.Jaxpr | None = None
        refining = []
        if refine is not None:

            def flat_refine(z, h, x):
                z, h = (jtu.tree_unflatten(state_tree, leaves) for leaves in (z, h))
                return refine(z, h, jtu.tree_unflatten(x_tree, x))

            traced = jax.make_jaxpr(flat_refine)(
                self.state_leaves, self.state_leaves, x_structs
            )
            self.refinement = consts_to_args(traced)
            # No derivative depends on these: they only speed up the solve.
            refining = [jax.lax.stop_gradient(jnp.asarray(c)) for c in traced.consts]
        self.jaxpr: jex.core.Jaxpr = consts_to_args(closed)
        constants = [jnp.asarray(c) for c in closed.consts]
        self.constant_structs = [shape_dtype(c) for c in constants]
        # Known integer constants (mostly index tables) sharpen the sparsity pattern;
        # floating-point values never do.
        self.known = [known_index(c) for c in closed.consts]
        self._constants = [*constants, *refining]
        self.x_structs = x_structs
        # (`precompute_unbatchable` appends more inputs.)
        self.refined_inputs = len(x_leaves)
        self.output = out
        primitives = primitives_of(self.jaxpr)
        self.has_custom_vjp = "custom_vjp_call" in primitives
        # Set by `_stepwise.py` if these depend on the state: operations that `vmap`
        # changes, operations that differ at each call, and collectives' named axes.
        self.must_step = self.is_impure = False
        self.coupled_along: tuple = ()
        # Set by `merge_products`: the step for a derivative, and how many constants
        # come before those that only repeat others.
        self.derivative_form: Recurrence | None = None
        self.distinct_constants: int | None = None

    @property
    def for_derivative(self) -> "Recurrence":
        """The same step, in the form whose derivative is fastest."""
        return self.derivative_form or self

    @property
    def constants(self) -> list[Array]:
        """The values that the cell closes over, until they are taken."""
        return self._constants[: len(self.constant_structs)]

    def inlined(self) -> jex.core.Jaxpr:
        """Return the step's program with jitted functions inlined."""
        return inline_jit(jex.core.ClosedJaxpr(self.jaxpr, [])).jaxpr

    def add_constants(self, values, known) -> None:
        """Append more constants."""
        count = len(self.constant_structs)
        old = self._constants
        self._constants = [*old[:count], *values, *old[count:]]
        structs = [shape_dtype(v) for v in values]
        self.constant_structs = [*self.constant_structs, *structs]
        self.known = [*self.known, *known]

    def take_constants(self) -> tuple[Array, ...]:
        """Return the closed-over values and forget them.

        They may be tracers, which must not outlive this call.
        """
        constants, self._constants = self._constants, []
        return tuple(constants)

    def step(self, parameters, h, x):
        """Take one step on leaves, with the reset, as the cell computes it."""
        return self._evaluate(parameters, h, x, inline=False)

    def smooth_step(self, parameters, h, x):
        """Take one step whose JVP always exists, for the linearisation of a method.

        A `custom_vjp` rule has no JVP. The forward solve may use any Jacobian, since
        the residual certifies its answer. So the rule is dropped there, and the
        function itself is differentiated.
        """
        return self._evaluate(parameters, h, x, inline=self.has_custom_vjp)

    def _evaluate(self, parameters, h, x, *, inline):
        constants, fresh = parameters
        leaves, reset = x
        h = _select_fresh(reset, fresh, h)
        own = constants[: len(self.constant_structs)]
        if inline:
            calls = JITTED | {"custom_vjp_call"}
            ends = evaluate_inlined(self.jaxpr, *own, *h, *leaves, calls=calls)
        else:
            ends = evaluate(self.jaxpr, *own, *h, *leaves)
        return tuple(ends)

    def _refine(self, parameters, z, h, x):
        assert self.refinement is not None
        constants, fresh = parameters
        leaves, reset = x
        h = _select_fresh(reset, fresh, h)
        own = constants[len(self.constant_structs) :]
        leaves = leaves[: self.refined_inputs]
        return tuple(evaluate(self.refinement, *own, *z, *h, *leaves))

    # The vector view: to solvers that need a Jacobian, a state is one real vector.

    def vector_step(self, parameters, v: Array, x, *, smooth: bool = False) -> Array:
        """`step`, or `smooth_step`, from one real vector to the next."""
        step = self.smooth_step if smooth else self.step
        return self.ravel(step(parameters, self.unravel(v), x))

    def vector_refine(self, parameters, z: Array, v: Array, x) -> Array:
        """Take one round from z towards `vector_step(parameters, v, x)`."""
        end = self._refine(parameters, self.unravel(z), self.unravel(v), x)
        return self.ravel(end)

    @ft.cached_property
    def dtype(self):
        """Real dtype of the vector view, at least float32."""
        dtypes = [s.dtype for s in self.state_leaves]
        return jnp.finfo(promote(jnp.float32, *dtypes)).dtype

    @ft.cached_property
    def eps(self) -> float:
        """Rounding unit of the state's coarsest leaf: no residual can be below it."""
        return float(self.entry_eps.max(initial=0))

    @ft.cached_property
    def entry_eps(self) -> np.ndarray:
        """Rounding unit of each entry of the vector view, in its dtype, `[width]`."""
        parts = [
            np.full(
                s.size * (2 if _is_complex(s) else 1), float(jnp.finfo(s.dtype).eps)
            )
            for s in self.state_leaves
        ]
        return np.concatenate(parts)

    @ft.cached_property
    def width(self) -> int:
        return sum(s.size * (2 if _is_complex(s) else 1) for s in self.state_leaves)

    def ravel(self, h) -> Array:
        """Return the leaves of a state as one real vector `[width]`."""
        parts = []
        for leaf in h:
            halves = [leaf.real, leaf.imag] if _is_complex(leaf) else [leaf]
            parts += [half.reshape(-1).astype(self.dtype) for half in halves]
        if len(parts) == 1:
            return parts[0]
        return jnp.concatenate(parts)

    def unravel(self, v: Array) -> tuple[Array, ...]:
        leaves, at = [], 0
        for s in self.state_leaves:
            half = v[at : at + s.size].reshape(s.shape)
            at += s.size
            if _is_complex(s):
                imag = v[at : at + s.size].reshape(s.shape)
                at += s.size
                half = jax.lax.complex(half, imag)
            leaves.append(half.astype(s.dtype))
        return tuple(leaves)


def split_by_tangents(primals, tangents):
    """Split primals into those that have tangents, and the others."""
    fixed = jtu.tree_map(lambda t: t is None, tangents, is_leaf=lambda t: t is None)
    held, moved = eqx.partition(primals, fixed)
    return moved, held


def states_before(
    h0: PyTree[Array],
    states: PyTree[Array],
    reset: Bool[Array, " T"] | None = None,
    fresh: PyTree[Array] | None = None,
) -> PyTree[Array]:
    """Return the state before each step, `[T, ...]`; at resets, the fresh one."""

    def one(h0, states, fresh):
        if states.shape[0] == 0:
            return states
        before = shift(jnp.asarray(h0, states.dtype), states)
        if reset is None:
            return before
        mask = jnp.asarray(reset).reshape(-1, *(1,) * (before.ndim - 1))
        return jnp.where(mask, jnp.asarray(fresh)[None], before)

    return jtu.tree_map(one, h0, states, h0 if fresh is None else fresh)


def _select_fresh(reset, fresh, h):
    if reset is None:
        return h
    return tuple(jnp.where(reset, f, v) for f, v in zip(fresh, h, strict=True))


def shape_dtype(x, drop_time: bool = False):
    shape = jnp.shape(x)[1:] if drop_time else jnp.shape(x)
    return struct(shape, jnp.result_type(x), varying_axes(x))


def known_index(value) -> np.ndarray | None:
    """Return known whole numbers as a NumPy array, and `None` for anything else."""
    return np.asarray(value) if is_index(value) else None


def is_key(x) -> bool:
    """Return whether `x` holds typed random keys."""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _is_complex(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.complexfloating)
