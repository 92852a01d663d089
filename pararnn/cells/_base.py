"""What a cell of this library is: one step of a recurrence, in two parts."""

import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Bool, Float, PyTree

# One array for each gate. A single array that `update` slices measured five times
# slower on CPU: XLA does not vectorise the slices inside a loop.
Gates = tuple[Float[Array, "*time _"], ...]


class AbstractCell(eqx.Module):
    r"""One step $h_t = f(h_{t-1}, x_t)$, unbatched, called as `cell(state, x)`.

    The step is cut in two, `update(state, gates(x))`, because the matrix products with
    the input need no state: a layer does them for the whole sequence at once, and only
    the rest is stepped, or solved for. A subclass of this is a convenience, not a
    requirement: any callable `f(h, x) -> h` is a cell to the solvers.

    **Attributes:** `d_input` and `d_state`, the sizes of the input and of each array of
    the state.
    """

    d_input: eqx.AbstractVar[int]
    d_state: eqx.AbstractVar[int]

    @abc.abstractmethod
    def gates(self, x: Float[Array, "*time d_input"]) -> Gates:
        """The part of the step that depends on the input only.

        Law: it acts on the last axis alone, so `gates(xs)[t] == gates(xs[t])`.

        **Arguments:** `x`, `[..., d_input]`, floating point; leading axes are free.

        **Returns:** a tuple with an array for each gate, `[..., d_state]` unless the
        cell says otherwise, in the promoted dtype of `x` and the parameters, and at
        least float32.

        **Raises:** `ValueError` if the last axis or the dtype of `x` does not fit.
        """

    @abc.abstractmethod
    def update(
        self, state: PyTree[Float[Array, " d_state"]], gates: Gates
    ) -> PyTree[Float[Array, " d_state"]]:
        """The next state, from the state and what `gates` made of one input.

        **Arguments:** `state`, of the structure of `init_state()`; `gates`, of one
        input.

        **Returns:** the next state, in the dtype of `state`. The arithmetic between is
        in the promoted dtype of everything involved, and at least float32.
        """

    @abc.abstractmethod
    def init_state(self) -> PyTree[Float[Array, " d_state"]]:
        """The fresh state: zeros, in the parameters' dtype, and at least float32."""

    @abc.abstractmethod
    def output(
        self, state: PyTree[Float[Array, " d_state"]]
    ) -> Float[Array, " d_state"]:
        """What a layer emits of a state, `[d_state]`."""

    def guess(
        self,
        gates: Gates,
        state: PyTree[Float[Array, " d_state"]],
        reset: Bool[Array, " T"] | None = None,
    ) -> PyTree[Float[Array, "T d_state"]] | None:
        """A trajectory for a parallel solve to start from, if the cell knows one.

        Only speed depends on it, and [`pararnn.RNN`][] calls it. A cell whose state has
        parts that are linear, or otherwise solved by a scan, once the rest is known
        overrides it.

        **Arguments:** `gates`, of all inputs, arrays `[T, ...]`; `state`, before
        the first step; `reset`, bool `[T]`, where true a step starts from
        `init_state()`.

        **Returns:** states `[T, d_state]` of the structure and dtypes of `state`; or
        `None`, the default, with which a solver starts as it likes.
        """
        del gates, state, reset
        return None

    def __call__(
        self, state: PyTree[Float[Array, " d_state"]], x: Float[Array, " d_input"]
    ) -> Any:
        """One step: `update(state, gates(x))`.

        **Arguments:** `state`, of the structure of `init_state()`; `x`, `[d_input]`.

        **Returns:** the next state, in the dtype of `state`.

        **Raises:** `ValueError` if the last axis or the dtype of `x` does not fit.
        """
        return self.update(state, self.gates(x))
