"""Mixers (recurrent layers, by name), gated MLPs, and residual blocks of both."""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, DTypeLike, Float, PRNGKeyArray, PyTree

from .._parameters import check_size, rms_norm, uniform
from .._registry import check_name, make_by_name, parse_spec
from .._rnn import RNN
from ..cells import CELLS, make_cell
from ..solver import AbstractSolver, Auto, check_solver

# The entry points by which packages register their layers, each a mapping from names
# to constructors `(d_model, *, key, **options)`. `linear` does so in pyproject.toml;
# `pararnn` never imports it.
ENTRY_POINTS = "pararnn.layers"

# The statistics of a solve that every block keeps.
STATISTICS = ("num_steps", "residual", "sequential")


def project(weight: Float[Array, "out in"], x: Float[Array, "... in"]) -> Array:
    """Compute `W x` in the precision of the activations `x`."""
    # At the platform's default precision, unlike the products inside a solve: no
    # iteration amplifies a rounding error here.
    return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))


def normalise(x: Float[Array, "... d"], weight: Float[Array, " d"]) -> Array:
    """Apply RMSNorm in at least float32, and cast to the dtype of `x`."""
    return rms_norm(x, weight).astype(x.dtype)


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


class GatedMLP(eqx.Module):
    r"""$W_\mathrm{down} (\mathrm{silu}(W_\mathrm{gate} x) \odot W_\mathrm{up} x)$.

    ??? cite "Source"

        Shazeer, "GLU Variants Improve Transformer" (2002.05202): SwiGLU.
    """

    W_gate: Float[Array, "hidden d_model"]
    W_up: Float[Array, "hidden d_model"]
    W_down: Float[Array, "d_model hidden"]

    def __init__(
        self, d_model: int, hidden: int, *, dtype: DTypeLike, key: PRNGKeyArray
    ):
        inwards, outwards = jr.split(key)
        self.W_gate, self.W_up = uniform(
            inwards, 2, (hidden, d_model), d_model**-0.5, dtype
        )
        (self.W_down,) = uniform(outwards, 1, (d_model, hidden), hidden**-0.5, dtype)

    def __call__(self, xs: Float[Array, "... d_model"]) -> Float[Array, "... d_model"]:
        gate = jax.nn.silu(project(self.W_gate, xs))
        return project(self.W_down, gate * project(self.W_up, xs))


class Block(eqx.Module):
    r"""A mixer and an MLP, each after a norm and added to its input.

    $$u = x + \mathrm{mixer}(\mathrm{norm}(x)), \qquad
      y = u + \mathrm{MLP}(\mathrm{norm}(u))$$

    The state is that of the mixer. Without an `mlp`, $y = u$.
    """

    mixer: Any
    mlp: GatedMLP | None
    mixer_norm: Float[Array, " d_model"]
    mlp_norm: Float[Array, " d_model"] | None

    def __init__(
        self,
        mixer: Any,
        d_model: int,
        hidden: int,
        *,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ):
        self.mixer = mixer
        self.mixer_norm = jnp.ones(d_model, dtype)
        self.mlp = GatedMLP(d_model, hidden, dtype=dtype, key=key) if hidden else None
        self.mlp_norm = jnp.ones(d_model, dtype) if hidden else None

    def run(
        self,
        xs: Float[Array, "T d_model"],
        state: PyTree[Array],
        reset: Bool[Array, " T"] | None,
    ) -> tuple[Float[Array, "T d_model"], PyTree[Array], dict[str, Array]]:
        """Return outputs, the last state, and the statistics of a solve, if any."""
        inputs = normalise(xs, self.mixer_norm)
        if hasattr(self.mixer, "run"):
            mixed, state, stats = self.mixer.run(inputs, state, reset=reset)
        else:
            mixed, state = self.mixer(inputs, state, reset=reset)
            stats = {}
        stats = {name: stats[name] for name in STATISTICS if name in stats}
        return self._transform(xs + mixed), state, stats

    def step(
        self, x: Float[Array, " d_model"], state: PyTree[Array]
    ) -> tuple[Float[Array, " d_model"], PyTree[Array]]:
        """One step, for decoding."""
        mixed, state = self.mixer.step(normalise(x, self.mixer_norm), state)
        return self._transform(x + mixed), state

    def _transform(self, xs: Float[Array, "... d_model"]) -> Array:
        if self.mlp is None or self.mlp_norm is None:
            return xs
        return xs + self.mlp(normalise(xs, self.mlp_norm))
