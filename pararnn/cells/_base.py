"""The interface of cells: one step of a recurrence, in two parts."""

import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Bool, Float, PyTree

# One array for each gate. Slicing a single array in `update` is five times slower on
# CPU, where XLA does not vectorise slices inside a loop.
Gates = tuple[Float[Array, "*time _"], ...]


class AbstractCell(eqx.Module):
    r"""One step $h_t = f(h_{t-1}, x_t)$, unbatched, called as `cell(state, x)`.

    The step is split in two, `update(state, gates(x))`, because the matrix products
    with the input need no state. A solver finds them in any cell and computes them for
    many steps at once. Subclassing is a convenience, not a requirement: the solvers
    take any callable `f(h, x) -> h`.

    **Attributes:** `d_input` and `d_state`, the sizes of the input and of each array of
    the state.
    """

    d_input: eqx.AbstractVar[int]
    d_state: eqx.AbstractVar[int]

    @abc.abstractmethod
    def gates(self, x: Float[Array, "*time d_input"]) -> Gates:
        """Compute the part of the step that depends only on the input.

        Law: it acts on the last axis alone, so `gates(xs)[t] == gates(xs[t])`.

        **Arguments:** `x`, `[..., d_input]`, floating point, with any leading axes.

        **Returns:** a tuple with an array for each gate, `[..., d_state]` unless the
        cell says otherwise, in the promoted dtype of `x` and the parameters, and at
        least float32.

        **Raises:** `ValueError` if the last axis or the dtype of `x` does not fit.
        """

    @abc.abstractmethod
    def update(
        self, state: PyTree[Float[Array, " d_state"]], gates: Gates
    ) -> PyTree[Float[Array, " d_state"]]:
        """Return the next state, from the state and the gates of one input.

        **Arguments:** `state`, of the structure of `init_state()`; `gates`, of one
        input.

        **Returns:** the next state, in the dtype of `state`. The arithmetic is in the
        promoted dtype of everything involved, and at least float32.
        """

    @abc.abstractmethod
    def init_state(self) -> PyTree[Float[Array, " d_state"]]:
        """Return the fresh state: zeros in the parameters' dtype, at least float32."""

    @abc.abstractmethod
    def output(
        self, state: PyTree[Float[Array, " d_state"]]
    ) -> Float[Array, " d_state"]:
        """Return what a layer emits for a state, `[d_state]`."""

    def guess(
        self,
        gates: Gates,
        state: PyTree[Float[Array, " d_state"]],
        reset: Bool[Array, " T"] | None = None,
    ) -> PyTree[Float[Array, "T d_state"]] | None:
        """Return a trajectory for a parallel solve to start from, or `None`.

        [`pararnn.RNN`][] calls it, and only speed depends on it. Override it if parts
        of the state are linear, or can be solved by a scan, once the rest is known.

        **Arguments:** `gates`, of all inputs, arrays `[T, ...]`; `state`, before
        the first step; `reset`, bool `[T]`: where true, a step starts from
        `init_state()`.

        **Returns:** states `[T, d_state]` of the structure and dtypes of `state`; or
        `None`, the default, with which the solver makes its own guess.
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
