"""Layers one after the other."""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Bool, PyTree

from ._parameters import check_flag
from ._reverse import backwards
from .scan import check_reset
from .solver import count_steps


class Stack(eqx.Module):
    r"""Layers one after the other, each on the outputs of the one before.

    $$y^{(k)} = \mathrm{layer}_k(y^{(k-1)}), \quad y^{(0)} = x$$

    It is a layer itself. Nothing stands between the layers: no dropout, no norm, no
    skip connection.

    **Arguments:** `layers`, one or more layers of the common protocol, for instance
    [`pararnn.RNN`][]s, [`pararnn.Bidirectional`][] ones and layers of `linear`.

    **Raises:** `ValueError` if there are none; `TypeError` on one that lacks
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
                    f"Stack: `layers[{k}]` is a {type(layer).__name__}, which is no "
                    "layer: it cannot be called or has no `init_state()`. Likely "
                    "cause: a cell or a function; wrap it, `pararnn.RNN(cell)`."
                )

    def init_state(self) -> tuple[PyTree[Array], ...]:
        """The fresh states of all layers."""
        return tuple(layer.init_state() for layer in self.layers)

    def __call__(
        self,
        xs: PyTree[Array],
        state: tuple[PyTree[Array], ...] | None = None,
        *,
        reset: Bool[Array, " T"] | None = None,
        reverse: bool = False,
    ) -> tuple[PyTree[Array], tuple[PyTree[Array], ...]]:
        """The outputs of the last layer, and the last states of all.

        **Arguments:** as [`pararnn.RNN`][]; `state` is a tuple with the state of each
        layer, and `reset` and `reverse` apply to all of them.

        **Returns:** `(ys, state)`.

        **Raises:** `ValueError` on another number of states than of layers, or a
        `reverse` that is not True or False; as the layers.
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
        """One step, for decoding: `(y, state)`, the same numbers as `__call__`.

        **Raises:** `ValueError` on another number of states than of layers;
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
