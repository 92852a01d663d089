"""Mixers, the recurrent layers inside blocks, by name."""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, DTypeLike, Float, PRNGKeyArray, PyTree

from .._option_strings import parse_spec
from .._parameters import check_size, uniform
from .._registry import check_name, make_by_name
from .._rnn import RNN
from ..cells import CELLS, make_cell
from ..solver import AbstractSolver, Auto, check_solver
from ._block import project

# The entry points by which packages register their layers, each a mapping from names
# to constructors `(d_model, *, key, **options)`. `linear` does so in pyproject.toml;
# `pararnn` never imports it.
ENTRY_POINTS = "pararnn.layers"


class CellMixer(eqx.Module):
    r"""A cell as a layer from `d_model` features to `d_model` features.

    $$h_t = f(h_{t-1}, x_t), \qquad y_t = W \, \mathrm{output}(h_t)$$

    **Attributes:** `rnn`, the [`pararnn.RNN`][]; `W`, `[d_model, d_state]`.
    """

    rnn: RNN
    W: Float[Array, "d_model d_state"]
    d_model: int

    def __init__(
        self,
        d_model: int,
        cell: str = "paragru",
        *,
        d_state: int | None = None,
        solver: AbstractSolver = Auto(),
        throw: bool = True,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
        **options: Any,
    ):
        r"""**Arguments:**

        - `d_model`: size of an input and of an output.
        - `cell`: a name in [`pararnn.CELLS`][].
        - `d_state`: size of the cell's state. Defaults to `d_model`.
        - `solver`, `throw`: as for [`pararnn.RNN`][].
        - `dtype`: dtype of the parameters. Defaults to JAX's default floating-point
            dtype.
        - `key`: a key of `jax.random`. $W$ is drawn uniformly from
            $\pm 1 / \sqrt{d_\mathrm{state}}$.
        - `options`: further arguments of the cell.

        **Raises:** `ValueError` on an unknown cell or option, listing those that exist,
        and what the cell's constructor raises.
        """
        self.d_model = check_size("CellMixer", "d_model", d_model)
        inner, outer = jr.split(key)
        made = make_cell(cell, d_model, d_state, key=inner, dtype=dtype, **options)
        self.rnn = RNN(made, solver=solver, throw=throw)
        shape, bound = (self.d_model, made.d_state), made.d_state**-0.5
        (self.W,) = uniform(outer, 1, shape, bound, dtype or jnp.result_type(float))

    def init_state(self) -> PyTree[Array]:
        """Return the fresh state of the cell."""
        return self.rnn.init_state()

    def __call__(
        self,
        xs: Float[Array, "T d_model"],
        state: PyTree[Array] | None = None,
        *,
        reset: Bool[Array, " T"] | None = None,
    ) -> tuple[Float[Array, "T d_model"], PyTree[Array]]:
        """Return outputs `[T, d_model]` in the dtype of `xs`, and the last state.
        Arguments and errors as for [`pararnn.RNN`][]."""
        ys, state, _ = self.run(xs, state, reset=reset)
        return ys, state

    def run(
        self,
        xs: Float[Array, "T d_model"],
        state: PyTree[Array] | None = None,
        *,
        reset: Bool[Array, " T"] | None = None,
    ) -> tuple[Float[Array, "T d_model"], PyTree[Array], dict[str, Array]]:
        """Return what `__call__` does, and the statistics of [`pararnn.Solution`][]."""
        hs, state, stats = self.rnn.run(xs, state, reset=reset)
        return project(self.W, hs.astype(xs.dtype)), state, stats

    def step(
        self, x: Float[Array, " d_model"], state: PyTree[Array]
    ) -> tuple[Float[Array, " d_model"], PyTree[Array]]:
        """Take one step, for decoding; equals `__call__` up to rounding."""
        h, state = self.rnn.step(x, state)
        return project(self.W, h.astype(x.dtype)), state


def registered_layers(group: str = ENTRY_POINTS) -> dict[str, Mapping[str, type]]:
    """Return the layers in a group of entry points, by the name of their package."""
    found = entry_points(group=group)
    return {point.name: point.load() for point in found}


def list_mixers() -> tuple[str, ...]:
    """List the names for [`pararnn.make_mixer`][]: cells, then installed layers."""
    return (
        *CELLS,
        *(name for layers in registered_layers().values() for name in layers),
    )


def make_mixer(
    mixer: str,
    d_model: int,
    *,
    solver: AbstractSolver = Auto(),
    throw: bool = True,
    dtype: DTypeLike | None = None,
    key: PRNGKeyArray,
) -> Any:
    """Make a layer of `d_model` features by its name and options.

    **Arguments:**

    - `mixer`: the name of a cell in [`pararnn.CELLS`][], or of a layer that an
        installed package has registered (as `linear` does), and options after colons:
        `"mamba2"`, `"paragru:heads=4"`, `"deltanet:heads=4:eigenvalues=signed"`.
    - `d_model`: size of an input and of an output.
    - `solver`, `throw`: for cells, as for [`pararnn.RNN`][]; ignored for linear layers.
    - `dtype`: dtype of the parameters. Defaults to JAX's default floating-point dtype.
    - `key`: a key of `jax.random`.

    **Raises:** `ValueError` on an unknown name or option, listing those that exist, and
    what the layer's constructor raises; `TypeError` if `solver` is not a solver.
    """
    check_solver("make_mixer", solver)
    name, options = parse_spec("make_mixer", mixer)
    if name in CELLS:
        solving = {"solver": solver, "throw": throw}
        return CellMixer(d_model, name, dtype=dtype, key=key, **solving, **options)
    check_name("make_mixer", "mixer", name, list_mixers())
    layers = next(found for found in registered_layers().values() if name in found)
    if dtype is not None:
        options["dtype"] = dtype
    sizes = {"d_model": d_model, "key": key}
    return make_by_name("make_mixer", "mixer", layers, name, sizes, options)
