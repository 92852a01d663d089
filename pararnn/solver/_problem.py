"""The problem: a cell as a pure step, and this step together with its data."""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

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
from ..scan import promote, shift, split_time, struct, varying_axes


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
        x_structs = [_shape_dtype(x, drop_time=True) for x in x_leaves]
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
        self.constant_structs = [_shape_dtype(c) for c in constants]
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
        # Set by `merge_products`.
        self.derivative_form: Recurrence | None = None

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
        structs = [_shape_dtype(v) for v in values]
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


class Structure:
    """The blocks of a Jacobian `∂f/∂h`.

    **Attributes:**

    - `blocks`: int `[number, size]`, for each block its indices into the flattened
        state. This has the leaves in pytree order; a complex leaf has its real parts
        first, then the imaginary ones. Smaller blocks are filled up with `width`.
    - `width`: the length of the flattened state.
    - `kind`: `"diagonal"`, `"block_diagonal"` or `"dense"`.
    """

    def __init__(self, blocks: np.ndarray, width: int):
        blocks = np.asarray(blocks)
        listed = np.sort(blocks[blocks != width])
        if blocks.ndim != 2 or not np.array_equal(listed, np.arange(width)):
            raise ValueError(
                f"Structure: `blocks` must be an integer array [number, size] that "
                f"holds each of 0 .. {width - 1} exactly once, and {width} in the "
                f"empty places; got {blocks!r:.200}. Anything else would give wrong "
                "Jacobians."
            )
        self.blocks = blocks
        self.width = width

    @property
    def size(self) -> int:
        """Size of the largest block: this many JVPs give the whole Jacobian."""
        return self.blocks.shape[1]

    @property
    def kind(self) -> Literal["diagonal", "block_diagonal", "dense"]:
        if self.size <= 1:
            return "diagonal"
        return "dense" if len(self.blocks) == 1 else "block_diagonal"

    def __repr__(self):
        if self.kind == "block_diagonal":
            return f"BlockDiagonal({self.size})"
        return {"diagonal": "Diagonal", "dense": "Dense"}[self.kind]

    def __eq__(self, other):
        return (
            isinstance(other, Structure)
            and self.width == other.width
            and np.array_equal(self.blocks, other.blocks)
        )

    def __hash__(self):
        return hash((self.width, self.blocks.tobytes()))

    @property
    def seeds(self) -> np.ndarray:
        """Bool `[size, width]`: JVPs along them hold all columns."""
        seeds = np.zeros((self.size, self.width + 1), bool)
        for column in range(self.size):
            seeds[column, self.blocks[:, column]] = True
        return seeds[:, :-1]


class SplitStep(NamedTuple):
    """A step as `advance(h, kept, prepare(x))`; both also take the cell's constants.

    `kept` are the positions of the leaves of x that `advance` reads itself.
    """

    prepare: jex.core.Jaxpr
    kept: tuple[int, ...]
    advance: Recurrence


class BoundProblem(eqx.Module):
    """A recurrence with its data: all that a solver needs to know.

    Under `vmap` the data has batch axes, which a solver handles itself: `lift` maps a
    step over all of them, and everything else is array operations.

    **Attributes:**

    - `recurrence`: the step.
    - `parameters`: what the cell closes over, and the state that resets select.
    - `inputs`: the leaves of `xs`, `[T, *batch, ...]`, and the resets.
    - `h0`: leaves `[*batch, ...]`.
    - `find_structure()`: the structure of the Jacobian, found at the first call.
    - `split`: the step in two parts, if one of them needs no state; see `hoist`.
    - `axes`: the batch axes, innermost first. For each: which parameters and inputs
        have it, and its name if the cell communicates along it.
    """

    recurrence: Recurrence = eqx.field(static=True)
    parameters: PyTree[Array]
    inputs: PyTree[Array]
    h0: tuple[Array, ...]
    find_structure: Callable[[], Structure] = eqx.field(static=True)
    split: SplitStep | None = eqx.field(static=True, default=None)
    axes: tuple = eqx.field(static=True, default=())

    @property
    def steps(self) -> int:
        return jtu.tree_leaves(self.inputs)[0].shape[0]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.h0[0].shape[: len(self.axes)]

    @property
    def rank(self) -> int:
        """The number of batch axes."""
        return len(self.axes)

    @property
    def arrays(self) -> tuple:
        return self.parameters, self.inputs, self.h0

    def with_arrays(self, arrays: tuple) -> "BoundProblem":
        parameters, inputs, h0 = arrays
        return self.replace(parameters=parameters, inputs=inputs, h0=h0)

    def without_arrays(self) -> "BoundProblem":
        """Return what is static of the problem, to be kept in a closure."""
        return self.with_arrays((None, None, ()))

    def replace(self, **changes: Any) -> "BoundProblem":
        return dataclasses.replace(self, **changes)

    def under(self, parameters_axes, inputs_axes, name=None) -> "BoundProblem":
        """Return the problem with one more batch axis, in front of the others."""
        axis = parameters_axes, inputs_axes, name
        return self.replace(axes=(*self.axes, axis))

    def segmented(self, count: int) -> "BoundProblem":
        """Cut time into segments, which become one more batch axis.

        Inputs `[T, ...]` become `[length, count, ...]`; the last segment repeats the
        last input. `h0` is unchanged.
        """
        split = jtu.tree_map(lambda x: split_time(x, count), self.inputs)
        fixed, moving = (
            jtu.tree_map(lambda _: axis, tree)
            for axis, tree in ((None, self.parameters), (0, split))
        )
        return self.under(fixed, moving).replace(inputs=split)

    def lift(self, fn: Callable, *, extra: tuple = (), out: Any = 0) -> Callable:
        """Map `fn(parameters, state, inputs, *extra)` over all batch axes.

        `extra` and `out` are the positions of the batch axes in further arguments and
        in the result.
        """
        for parameters_axes, inputs_axes, name in self.axes:
            axes = (parameters_axes, 0, inputs_axes, *extra)
            fn = jax.vmap(fn, in_axes=axes, out_axes=out, axis_name=name)
        return fn

    def step(self, h, x):
        """Take one step of states `[*batch, ...]`, by leaf."""
        return self.lift(self.recurrence.step)(self.parameters, h, x)

    def ravel(self, h) -> Array:
        """Return states `[*batch, ...]` by leaf as real vectors `[*batch, width]`."""
        return self._over_batch(self.recurrence.ravel)(h)

    def unravel(self, v: Array) -> tuple[Array, ...]:
        """Return real vectors `[*batch, width]` as states, by leaf."""
        return self._over_batch(self.recurrence.unravel)(v)

    def _over_batch(self, fn: Callable) -> Callable:
        for _ in self.axes:
            fn = jax.vmap(fn)
        return fn


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


def _shape_dtype(x, drop_time: bool = False):
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
