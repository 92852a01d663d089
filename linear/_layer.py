"""What all layers share: the protocol, and the diagonal recurrence constant in time."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact, PyTree

from pararnn._checks import check_reset
from pararnn._parameters import check_flag, wide_dtype
from pararnn.scan import Diagonal, backwards, linear_scan

from ._windows import mix_in_windows


class AbstractLayer(eqx.Module):
    """A map from one sequence of features to another, with a state in between.

    A layer defines its fresh state (`init_state`) and what it does with a checked
    sequence (`mix`). Whole, continued and reversed sequences and single steps are all
    made of these two, so that they cannot disagree.

    **Attributes:** `d_model`, the size of an input and of an output.
    """

    d_model: eqx.AbstractVar[int]

    @abc.abstractmethod
    def init_state(self) -> PyTree[Array]:
        """Return the fresh state, in the parameters' precision, at least 32 bits."""

    @abc.abstractmethod
    def mix(
        self,
        xs: Float[Array, "T d_model"],
        state: PyTree[Array],
        reset: Bool[Array, " T"] | None,
    ) -> tuple[Float[Array, "T d_model"], PyTree[Array]]:
        """Run a checked sequence of at least one step from a given state."""

    def __call__(
        self,
        xs: Float[Array, "T d_model"],
        state: PyTree[Array] | None = None,
        *,
        reset: Bool[Array, " T"] | None = None,
        reverse: bool = False,
    ) -> tuple[Float[Array, "T d_model"], PyTree[Array]]:
        """Run a whole sequence, without a batch axis; use `jax.vmap` for a batch.

        **Arguments:**

        - `xs`: `[T, d_model]`, real floating point. `T` may be 0.
        - `state`: the state to continue from, shaped as that of `init_state()`.
            Defaults to the fresh state.
        - `reset`: bool `[T]`, the first step of each packed sequence. A step where it
            is true starts from the fresh state, regardless of earlier steps and of
            `state`. (A layer may also treat it as a beginning in other ways, and then
            documents that.) With resets, a step whose inputs are not finite turns all
            outputs from there to the next reset into NaN, and their derivatives too.
            Outputs after that reset have the derivatives of their own sequence alone,
            also with respect to parameters.
        - `reverse`: run from the last step to the first. `reset` still marks the first
            step of a sequence, which is then the last one that is run.

        **Returns:** outputs `[T, d_model]` in the dtype of `xs`, and the state after
        the last step that was run (`state` itself if `T = 0`). Computed in the
        parameters' precision, at least float32. On a CPU, 65536 steps or more (fewer
        for layers with large transitions) are run in windows, so that a gradient needs
        little more memory than its inputs.

        **Raises:** `ValueError` on a wrong shape, an `xs` that is not real floating
        point, or a `reverse` that is not True or False; `TypeError` on a `reset` that
        is not bool.
        """
        xs = _check_features(self, "xs", xs, 2)
        check_reset(type(self).__name__, reset, None, xs.shape[0])
        state = self._continue(state)
        if check_flag(type(self).__name__, "reverse", reverse):
            return backwards(self, xs, state, reset)
        if xs.shape[0] == 0:
            return xs, state
        inputs, precision = xs, self.precision()
        if jnp.finfo(xs.dtype).bits > jnp.finfo(precision).bits:
            inputs = xs.astype(precision)
        ys, last = mix_in_windows(
            self.mix, inputs, state, reset, self.numbers_per_step(), self.init_state
        )
        return ys.astype(xs.dtype), last

    def step(
        self, x: Float[Array, " d_model"], state: PyTree[Array]
    ) -> tuple[Float[Array, " d_model"], PyTree[Array]]:
        """Run one step, for decoding. Equal to `__call__` up to rounding.

        **Arguments:** `x`, `[d_model]`, real floating point; `state`, shaped as that of
        `init_state()`.

        **Returns:** the output `[d_model]` in the dtype of `x`, and the next state.

        **Raises:** `ValueError` on a wrong shape or an `x` that is not real floating
        point.
        """
        x = _check_features(self, "x", x, 1)
        ys, state = self(x[None], state)
        return ys[0], state

    def recurrent_state(self, state: PyTree[Array]) -> PyTree[Array]:
        """Return what the recurrence carries of a state: all of it, except for the
        windows of short convolutions, which hold the last inputs.

        **Arguments:** `state`, shaped as that of `init_state()`.
        """
        return state

    def numbers_per_step(self) -> int | None:
        """Return about how many numbers the derivative of `mix` stores for a step, or
        `None` if that is not many times `d_model`.

        On a CPU, a layer that returns a number runs in windows of time that store some
        millions of numbers each, and computes each window again for the derivative.
        """
        return None

    def precision(self) -> jnp.dtype:
        """Return the real dtype to compute in: the parameters', at least float32."""
        arrays = jax.tree.leaves(eqx.filter(self, eqx.is_inexact_array))
        return wide_dtype(*(jnp.finfo(array.dtype).dtype for array in arrays))

    def _continue(self, state) -> PyTree[Array]:
        fresh = self.init_state()
        if state is None:
            return fresh
        where = type(self).__name__
        given, expected = jax.tree.structure(state), jax.tree.structure(fresh)
        if given != expected:
            raise ValueError(
                f"{where}: `state` is {given}, expected {expected}, as from "
                "`init_state()`. Likely causes: (a) a list in place of a tuple, as "
                "after reading it from a file, (b) the state of another layer."
            )
        shapes, wanted = (jax.tree.map(jnp.shape, s) for s in (state, fresh))
        if shapes != wanted:
            raise ValueError(
                f"{where}: `state` has shape {shapes}, expected "
                f"{wanted}, as from `init_state()`. Likely causes: (a) a batch of "
                "states; pass it through the same `jax.vmap` as the inputs, (b) the "
                "state of another layer."
            )
        for s, f in zip(jax.tree.leaves(state), jax.tree.leaves(fresh), strict=True):
            if jnp.iscomplexobj(s) and not jnp.iscomplexobj(f):
                raise ValueError(
                    f"{where}: `state` is complex, but the state of this layer is "
                    f"{f.dtype}. Likely cause: the state of another layer."
                )
        return jax.tree.map(lambda s, f: jnp.asarray(s).astype(f.dtype), state, fresh)


class AbstractConstantDiagonal(AbstractLayer):
    r"""A layer whose diagonal transition is constant in time.

    $$h_t = \bar{A} \odot h_{t-1} + \mathrm{drive}(x_t), \qquad
    y_t = \mathrm{readout}(h_t, x_t)$$
    """

    @abc.abstractmethod
    def transition(self) -> Inexact[Array, " *state"]:
        r"""Return $\bar{A}$, one factor for each entry of the state."""

    @abc.abstractmethod
    def drive(
        self, xs: Float[Array, "*time d_model"]
    ) -> Inexact[Array, "*time_and_state"]:
        """Return what inputs add to the state; leading axes are free."""

    @abc.abstractmethod
    def readout(
        self,
        states: Inexact[Array, "*time_and_state"],
        xs: Float[Array, "*time d_model"],
    ) -> Float[Array, "*time d_model"]:
        """Return the outputs for states and inputs; leading axes are free."""

    def mix(self, xs, state, reset):
        xs = xs.astype(self.precision())
        transition = Diagonal(self.transition()[None])
        states = linear_scan(transition, self.drive(xs), state, reset=reset)
        return self.readout(states, xs), states[-1]


def _check_features(layer: AbstractLayer, name: str, x, rank: int) -> Array:
    where, x = type(layer).__name__, jnp.asarray(x)
    if x.ndim != rank or x.shape[-1] != layer.d_model:
        wanted = "[T, {}]" if rank == 2 else "[{}]"
        raise ValueError(
            f"{where}: `{name}` has shape {x.shape}, expected "
            f"{wanted.format(layer.d_model)}, as `d_model` is {layer.d_model}. Likely "
            "causes: (a) a batch axis; use `jax.vmap` for it, (b) the axes are in "
            "another order (time first, features last), (c) one step given to "
            "`layer(xs)`, or a sequence to `layer.step(x, state)`, (d) the layer was "
            "built for another `d_model`."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{where}: `{name}` is {x.dtype}, expected real floating point. Likely "
            "causes: (a) token indices; embed them first, (b) integer or boolean "
            "features; cast them, for instance with `.astype(jnp.float32)`."
        )
    return x
