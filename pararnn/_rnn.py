"""Layers: a cell over a sequence, in one direction or both, and stacks of layers."""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from ._adapters import FunctionCell, as_cell, emitting_cell
from ._checks import check_reset
from ._parameters import check_flag
from .cells import AbstractCell
from .recurrence import count_steps, states_before
from .scan import backwards
from .solver import AbstractSolver, Auto, check_solver, solve


class RNN(eqx.Module):
    r"""A cell as a layer: $h_t = f(h_{t-1}, x_t)$, $y_t = \mathrm{output}(h_t)$.

    **Arguments:**

    - `cell`: a cell of this library, `eqx.nn.GRUCell`, `eqx.nn.LSTMCell`, a Flax NNX
        cell, a module with `init_state()` and `output(state)`, or any function
        `f(h, x) -> h`. A Flax NNX cell, `cell(carry, x) -> (carry, y)`, emits its own
        y, as in `flax.nnx.RNN`; one that returns its carry alone emits that.
    - `solver`: as for [`pararnn.solve`][].
    - `init_state`: the fresh state, a pytree of arrays. Needed for a plain function,
        and for a Flax cell without `initialize_carry` or `in_features`. It is a
        parameter of the layer like any other.
    - `output`: a function from a state to the output. Defaults to the output of the
        cell, which for a plain function is the state itself.
    - `throw`: whether to raise if a solve fails, as for [`pararnn.solve`][]. Defaults
        to `True`. Use `False` for programs that are exported; `run` returns the
        statistics.

    **Raises:** `TypeError` or `ValueError` if the cell cannot be adapted, or the solver
    is not a solver. A call raises `NotImplementedError` if a step changes a variable of
    a Flax cell, as Dropout and BatchNorm do unless `cell.eval()` was called.
    """

    cell: Any
    solver: AbstractSolver
    throw: bool = eqx.field(static=True)

    def __init__(
        self,
        cell: Any,
        *,
        solver: AbstractSolver = Auto(),
        init_state: PyTree[Array] | None = None,
        output: Callable[[PyTree], Any] | None = None,
        throw: bool = True,
    ):
        check_solver("RNN", solver)
        self.cell = as_cell(cell, init_state, output)
        self.solver = solver
        self.throw = check_flag("RNN", "throw", throw)

    def init_state(self) -> PyTree[Array]:
        """Return the fresh state."""
        return self.cell.init_state()

    def __call__(
        self,
        xs: PyTree[Array],
        state: PyTree[Array] | None = None,
        *,
        reset: Bool[Array, " T"] | None = None,
        reverse: bool = False,
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """Run over a sequence; return all outputs and the last state.

        **Arguments:** `xs`, leaves `[T, ...]`; `state`, from `init_state()` (the
        default) or from an earlier call; `reset`, bool `[T]`, where true the state
        before that step is the fresh one; `reverse`, whether to run from the last step
        to the first (`reset` still marks the first step of a sequence).

        **Returns:** `(ys, state)`, outputs with leaves `[T, ...]` and the state after
        the last step that was taken (the given one for T = 0).

        **Raises:** as [`pararnn.solve`][]; `ValueError` if `reverse` is not True or
        False.
        """

        def forward(xs, state, *, reset):
            return self.run(xs, state, reset=reset)[:2]

        if check_flag("RNN", "reverse", reverse):
            check_reset("RNN", reset, None, count_steps("RNN", xs))
            return backwards(forward, xs, state, reset)
        return forward(xs, state, reset=reset)

    def run(
        self,
        xs: PyTree[Array],
        state: PyTree[Array] | None = None,
        *,
        reset: Bool[Array, " T"] | None = None,
    ) -> tuple[PyTree[Array], PyTree[Array], dict[str, Array]]:
        """Like `__call__`, but also return the statistics of [`pararnn.Solution`][]."""
        steps = count_steps("RNN", xs)
        fresh = self.init_state()
        state = fresh if state is None else state
        cell = self.cell
        guesses = isinstance(cell, AbstractCell)

        def guess(xs, state):
            return _without_derivative(_guess, cell, xs, state, reset)

        # A `FunctionCell` only adds a fresh state or an output, so step by its cell.
        step = cell.function if isinstance(cell, FunctionCell) else cell
        solution = solve(
            step,
            xs,
            state,
            solver=self.solver,
            reset=reset,
            reset_state=None if reset is None else fresh,
            # A function, so that `solve` checks everything before the cell is called.
            initial_guess=guess if guesses and steps else None,
            throw=self.throw,
        )
        flax = emitting_cell(cell)
        if flax is None:
            ys = jax.vmap(cell.output)(solution.states)
        else:

            def before():
                return states_before(state, solution.states, reset, fresh)

            ys = flax.outputs(before, xs, solution.states)
        if steps:
            state = jtu.tree_map(lambda s: s[-1], solution.states)
        return ys, state, solution.stats

    def step(
        self, x: PyTree[Array], state: PyTree[Array]
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """Take one step, for decoding: `(y, state)`, the same numbers as `__call__`."""
        flax = emitting_cell(self.cell)
        if flax is not None:
            state, y = flax.step(state, x)
            return y, state
        state = self.cell(state, x)
        return self.cell.output(state), state


def _guess(cell: AbstractCell, xs, state, reset):
    return cell.guess(cell.gates(xs), state, reset)


def _without_derivative(function: Callable, *arguments: Any) -> Any:
    """Call a method with its arrays and arguments as constants.

    `solve` does not differentiate a guess, but JAX would still trace its derivative.
    """
    arrays, rest = eqx.partition((function, arguments), eqx.is_array)
    function, arguments = eqx.combine(jax.lax.stop_gradient(arrays), rest)
    return function(*arguments)


class Bidirectional(eqx.Module):
    """Two layers over one sequence, the second backwards in time.

    **Arguments:** `forward`, `backward`: any layers, for instance two
    [`pararnn.RNN`][]s or two layers of `linear`.
    """

    forward: Any
    backward: Any

    def init_state(self) -> tuple[PyTree[Array], PyTree[Array]]:
        """Return the fresh states of both directions."""
        return self.forward.init_state(), self.backward.init_state()

    def __call__(
        self,
        xs: PyTree[Array],
        state: tuple[PyTree[Array], PyTree[Array]] | None = None,
        *,
        reset: Bool[Array, " T"] | None = None,
    ) -> tuple[Array, tuple[PyTree[Array], PyTree[Array]]]:
        """Run both directions; concatenate their outputs along the last axis.

        **Arguments:** as for [`pararnn.RNN`][]. `reset` marks the first step of each
        packed sequence. So backwards a sequence starts at the step before a mark.

        **Returns:** `(ys, (forward, backward))`, `[T, 2 * d]`; the backward state is
        the one after the first step.
        """
        ahead, behind = (None, None) if state is None else state
        ys, ahead = self.forward(xs, ahead, reset=reset)
        zs, behind = backwards(self.backward, xs, behind, reset)
        return jnp.concatenate([ys, zs], axis=-1), (ahead, behind)

    def step(self, x: PyTree[Array], state: Any) -> tuple[Any, Any]:
        """Raise: the backward direction needs the whole sequence.

        **Raises:** `NotImplementedError`, always.
        """
        raise NotImplementedError(
            "Bidirectional.step: a bidirectional layer cannot decode step by step, "
            "since its backward half starts at the end of the sequence. Call the layer "
            "on the whole sequence, or use its `forward` half."
        )


class Stack(eqx.Module):
    r"""Layers one after the other, each on the outputs of the one before.

    $$y^{(k)} = \mathrm{layer}_k(y^{(k-1)}), \quad y^{(0)} = x$$

    A stack is a layer itself. There is nothing between the layers: no dropout, no norm
    and no skip connection.

    **Arguments:** `layers`, one or more layers, for instance [`pararnn.RNN`][]s,
    [`pararnn.Bidirectional`][] ones and layers of `linear`.

    **Raises:** `ValueError` if there are none; `TypeError` if one of them lacks
    `init_state` or cannot be called.
    """

    layers: tuple[Any, ...]

    def __init__(self, layers: Iterable[Any]):
        self.layers = tuple(layers)
        if not self.layers:
            raise ValueError(
                "Stack: `layers` is empty. Pass at least one layer, for instance "
                "`Stack([pararnn.RNN(cell)])`."
            )
        for k, layer in enumerate(self.layers):
            if not callable(layer) or not hasattr(layer, "init_state"):
                raise TypeError(
                    f"Stack: `layers[{k}]` is a {type(layer).__name__}, which is not "
                    "a layer: it cannot be called or has no `init_state()`. Likely "
                    "cause: a cell or a function; wrap it, `pararnn.RNN(cell)`."
                )

    def init_state(self) -> tuple[PyTree[Array], ...]:
        """Return the fresh states of all layers."""
        return tuple(layer.init_state() for layer in self.layers)

    def __call__(
        self,
        xs: PyTree[Array],
        state: tuple[PyTree[Array], ...] | None = None,
        *,
        reset: Bool[Array, " T"] | None = None,
        reverse: bool = False,
    ) -> tuple[PyTree[Array], tuple[PyTree[Array], ...]]:
        """Run all layers; return the outputs of the last one, and all last states.

        **Arguments:** as for [`pararnn.RNN`][]; `state` is a tuple with the state of
        each layer, and `reset` and `reverse` apply to all of them.

        **Returns:** `(ys, state)`.

        **Raises:** `ValueError` if the numbers of states and layers differ, or if
        `reverse` is not True or False; whatever the layers raise.
        """
        if check_flag("Stack", "reverse", reverse):
            check_reset("Stack", reset, None, count_steps("Stack", xs))
            return backwards(self, xs, state, reset)
        states = []
        for layer, before in zip(self.layers, self._states(state), strict=True):
            xs, after = layer(xs, before, reset=reset)
            states.append(after)
        return xs, tuple(states)

    def step(
        self, x: PyTree[Array], state: tuple[PyTree[Array], ...]
    ) -> tuple[PyTree[Array], tuple[PyTree[Array], ...]]:
        """Take one step, for decoding: `(y, state)`, the same numbers as `__call__`.

        **Raises:** `ValueError` if the numbers of states and layers differ;
        `NotImplementedError` if a layer cannot decode.
        """
        states = []
        for layer, before in zip(self.layers, self._states(state), strict=True):
            x, after = layer.step(x, before)
            states.append(after)
        return x, tuple(states)

    def _states(self, state: Any) -> tuple[Any, ...]:
        if state is None:
            return self.init_state()
        several = isinstance(state, tuple | list)
        if not several or len(state) != len(self.layers):
            given = f"{len(state)} of them" if several else f"{state!r:.80}"
            raise ValueError(
                f"Stack: `state` must be a tuple with a state for each of the "
                f"{len(self.layers)} layers, got {given}. Likely cause: the state of "
                "one layer; pass what `init_state()` or an earlier call returned."
            )
        return tuple(state)
