"""What the diagonal layers share: the protocol, its checks and its dtypes."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Complex, DTypeLike, Float

from pararnn.scan import Diagonal, linear_scan, promote


class AbstractDiagonalLayer(eqx.Module):
    r"""A layer with a diagonal complex transition that is constant in time.

    $$h_t = \bar{A} \odot h_{t-1} + \mathrm{drive}(x_t), \qquad
    y_t = \mathrm{readout}(h_t, x_t)$$

    A subclass says what the transition, the drive and the readout are, and the fresh
    state; the protocol of a layer, parallel and step by step, is made of these here.

    **Attributes:** `d_model`, the size of an input and of an output; `d_state`, the
    size of the state as the layer's paper counts it.
    """

    d_model: eqx.AbstractVar[int]
    d_state: eqx.AbstractVar[int]

    @abc.abstractmethod
    def transition(self) -> Complex[Array, " *state"]:
        r"""$\bar{A}$, one factor for each entry of the state, at least complex64."""

    @abc.abstractmethod
    def drive(
        self, xs: Float[Array, "*time d_model"]
    ) -> Complex[Array, "*time_and_state"]:
        """What inputs add to the state; leading axes are free."""

    @abc.abstractmethod
    def readout(
        self,
        states: Complex[Array, "*time_and_state"],
        xs: Float[Array, "*time d_model"],
    ) -> Float[Array, "*time d_model"]:
        """Outputs of states and inputs; leading axes are free."""

    @abc.abstractmethod
    def init_state(self) -> Complex[Array, " *state"]:
        """The fresh state: zeros, complex, in the parameters' precision and at least
        complex64."""

    def __call__(
        self,
        xs: Float[Array, "T d_model"],
        state: Complex[Array, " *state"] | None = None,
        *,
        reset: Bool[Array, " T"] | None = None,
    ) -> tuple[Float[Array, "T d_model"], Complex[Array, " *state"]]:
        """A whole sequence, unbatched; use `jax.vmap` for a batch.

        **Arguments:**

        - `xs`: `[T, d_model]`, real floating point. `T` may be 0.
        - `state`: the state to continue from, of the shape of `init_state()`; the fresh
            one if not given.
        - `reset`: bool `[T]`. Where true, that step starts from the fresh state,
            whatever came before, `state` included.

        **Returns:** outputs `[T, d_model]` in the dtype of `xs`, and the state after
        the last step (of `T = 0` steps: `state`), in the dtype of `init_state()`.
        Computed in the parameters' precision, at least float32.

        **Raises:** `ValueError` on a shape that does not fit or an `xs` that is not
        real floating point; `TypeError` on a `reset` that is not bool.
        """
        xs = _check_features(self, "xs", xs, 2)
        state = self._continue(state)
        wide = xs.astype(jnp.finfo(state.dtype).dtype)
        states = linear_scan(
            Diagonal(self.transition()[None]), self.drive(wide), state, reset=reset
        )
        ys = self.readout(states, wide).astype(xs.dtype)
        return ys, states[-1] if xs.shape[0] else state

    def step(
        self, x: Float[Array, " d_model"], state: Complex[Array, " *state"]
    ) -> tuple[Float[Array, " d_model"], Complex[Array, " *state"]]:
        """One step, for decoding: the numbers of `__call__`, up to rounding.

        **Arguments:** `x`, `[d_model]`, real floating point; `state`, of the shape of
        `init_state()`.

        **Returns:** the output `[d_model]` in the dtype of `x`, and the next state, in
        the dtype of `init_state()`.

        **Raises:** `ValueError` on a shape that does not fit or an `x` that is not real
        floating point.
        """
        x = _check_features(self, "x", x, 1)
        state = self._continue(state)
        wide = x.astype(jnp.finfo(state.dtype).dtype)
        state = self.transition() * state + self.drive(wide)
        return self.readout(state, wide).astype(x.dtype), state

    def _continue(self, state) -> Array:
        fresh = self.init_state()
        if state is None:
            return fresh
        if jnp.shape(state) != fresh.shape:
            raise ValueError(
                f"{type(self).__name__}: `state` has shape {jnp.shape(state)}, "
                f"expected {fresh.shape}, as of `init_state()`. Likely causes: (a) a "
                "batch of states; pass it through the same `jax.vmap` as the inputs, "
                "(b) the state of another layer."
            )
        return jnp.asarray(state).astype(fresh.dtype)


def _check_features(layer: AbstractDiagonalLayer, name: str, x, rank: int) -> Array:
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


def check_arguments(
    where: str, d_model, d_state, dtype: DTypeLike | None, key
) -> tuple[int, int, np.dtype]:
    """What the constructor of every layer checks: sizes, dtype and key."""
    for name, size in (("d_model", d_model), ("d_state", d_state)):
        integer = isinstance(size, int | np.integer) and not isinstance(size, bool)
        if not integer or size < 1:
            raise ValueError(
                f"{where}: `{name}` must be a positive integer, got {size!r}. Likely "
                "causes: (a) a size computed with `/` instead of `//`, (b) arguments "
                f"in another order. Pass a positive int for `{name}`."
            )
    if not isinstance(key, jax.Array | np.ndarray):
        raise ValueError(
            f"{where}: `key` must be a key of `jax.random`, got {key!r}. Likely "
            "causes: (a) it was left out, (b) a bare integer seed. Pass "
            "`key=jax.random.key(0)`."
        )
    dtype = jnp.dtype(jnp.result_type(float) if dtype is None else dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{where}: `dtype` must be real floating point, got {dtype}; complex "
            "parameters are stored as two real arrays. Pass for instance "
            "`jnp.float32`, or leave it out."
        )
    return int(d_model), int(d_state), dtype


def wide(dtype: DTypeLike) -> np.dtype:
    """The precision to compute in beside parameters of `dtype`: at least float32,
    also where promotion is strict."""
    return promote(jnp.float32, dtype)


def widen(*parameters: Array) -> tuple[Array, ...]:
    """Parameters in the precision to compute in."""
    return tuple(p.astype(wide(p.dtype)) for p in parameters)


def zeros(shape: tuple[int, ...], dtype: DTypeLike) -> Complex[Array, "..."]:
    """A fresh complex state beside parameters of `dtype`."""
    return lax.complex(jnp.zeros(shape, wide(dtype)), jnp.zeros(shape, wide(dtype)))


def append_to(values: Array, rank: int) -> Array:
    """`values` with leading axes up to `rank`, as rank promotion may be an error."""
    return values.reshape((1,) * (rank - values.ndim) + values.shape)
