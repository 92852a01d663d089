"""What mixes over time inside a block: any layer of either package, by name."""

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

# Packages enter their layers here, each a mapping from name to a constructor
# `(d_model, *, key, **options)`. `linear` does so in pyproject.toml: `pararnn` itself
# never imports it.
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
        - `d_state`: size of the cell's state; `d_model` if not given.
        - `solver`, `throw`: as for [`pararnn.RNN`][].
        - `dtype`: of the parameters; JAX's default floating point if not given.
        - `key`: a key of `jax.random`. $W$ is uniform within
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
        """The fresh state of the cell."""
        return self.rnn.init_state()

    def __call__(
        self,
        xs: Float[Array, "T d_model"],
        state: PyTree[Array] | None = None,
        *,
        reset: Bool[Array, " T"] | None = None,
    ) -> tuple[Float[Array, "T d_model"], PyTree[Array]]:
        """Outputs `[T, d_model]` in the dtype of `xs`, and the last state; arguments
        and errors as of [`pararnn.RNN`][]."""
        ys, state, _ = self.run(xs, state, reset=reset)
        return ys, state

    def run(
        self,
        xs: Float[Array, "T d_model"],
        state: PyTree[Array] | None = None,
        *,
        reset: Bool[Array, " T"] | None = None,
    ) -> tuple[Float[Array, "T d_model"], PyTree[Array], dict[str, Array]]:
        """As `__call__`, and the solve's statistics, see [`pararnn.Solution`][]."""
        hs, state, stats = self.rnn.run(xs, state, reset=reset)
        return project(self.W, hs.astype(xs.dtype)), state, stats

    def step(
        self, x: Float[Array, " d_model"], state: PyTree[Array]
    ) -> tuple[Float[Array, " d_model"], PyTree[Array]]:
        """One step, for decoding: the numbers of `__call__`, up to rounding."""
        h, state = self.rnn.step(x, state)
        return project(self.W, h.astype(x.dtype)), state


def registered_layers(group: str = ENTRY_POINTS) -> dict[str, Mapping[str, type]]:
    """Every package's layers in a group of entry points, by the package's name."""
    found = entry_points(group=group)
    return {point.name: point.load() for point in found}


def list_mixers() -> tuple[str, ...]:
    """The names that [`pararnn.make_mixer`][] knows: cells, then installed layers."""
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
    """A layer of `d_model` features by its name and options.

    **Arguments:**

    - `mixer`: the name of a cell in [`pararnn.CELLS`][], or of a layer that an
        installed package has entered (those of `linear`), and options behind colons:
        `"mamba2"`, `"paragru:heads=4"`, `"deltanet:heads=4:eigenvalues=signed"`.
    - `d_model`: size of an input and of an output.
    - `solver`, `throw`: for cells, as for [`pararnn.RNN`][]; linear layers need none.
    - `dtype`: of the parameters; JAX's default floating point if not given.
    - `key`: a key of `jax.random`.

    **Raises:** `ValueError` on an unknown name or option, listing those that exist, and
    what the layer's constructor raises; `TypeError` for what is not a solver.
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
