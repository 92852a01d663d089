"""Layers by name, with the short forms of the field, and the model around them."""

import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray, PyTree

from .._parameters import uniform
from .._registry import check_name, make_by_name, parse_spec
from ..models import list_mixers, make_mixer, registered_layers
from ..models._blocks import Block, normalise
from ..solver import AbstractSolver, Auto
from .tasks import Task

# The entry points of layers on images, `[H, W, d_model]`; those of other layers are
# `pararnn.layers`.
IMAGES = "pararnn.images"
# Flags, and the option and value that each stands for.
FLAGS = {
    "neg": ("eigenvalues", "signed"),
    "pos": ("eigenvalues", "positive"),
    "real": ("eigenvalues", "positive"),
    "complex": ("eigenvalues", "complex"),
    "noconv": ("convolution", False),
}
# Short names of options.
SHORT = {"nh": "householders", "n": "d_state"}
# The width of the layers that are built to check a name and its options.
TRIAL_WIDTH = 48


def list_layers() -> tuple[str, ...]:
    """Return the names that [`pararnn.comparison.expand_layer`][] knows: those of
    `pararnn.list_mixers`, then layers on images."""
    return (*list_mixers(), *_image_layers())


def expand_layer(layer: str) -> str:
    """Write out the short forms in a layer's name with options.

    **Arguments:** `layer`, as for `pararnn.make_mixer`, or a layer on images
    (`"plstm_grid"`). Besides `option=value` there are `neg` (`eigenvalues=signed`),
    `pos` and `real` (`eigenvalues=positive`), `complex` (`eigenvalues=complex`),
    `noconv` (`convolution=False`), `nh=2` (`householders=2`) and `n=16`
    (`d_state=16`): `"deltanet:neg"`, `"lru:real"`, `"deltaproduct:nh=3"`.

    **Returns:** the name with every option written out.

    **Raises:** `ValueError` on an unknown name or option, listing those that exist, and
    what the layer's constructor raises.
    """
    name, options = parse_spec("expand_layer", layer, FLAGS, SHORT)
    check_name("expand_layer", "layer", name, list_layers())
    full = ":".join([name, *(f"{key}={value}" for key, value in options.items())])
    make_shapes(full, heads(full) * TRIAL_WIDTH)
    return full


def make_layer(
    layer: str,
    d_model: int,
    *,
    solver: AbstractSolver = Auto(),
    dtype: DTypeLike | None = None,
    key: PRNGKeyArray,
) -> Any:
    """Make the layer of a written-out name; one on images becomes an `ImageMixer`.

    **Arguments:** as for `pararnn.make_mixer`.
    """
    if not needs_images(layer):
        return make_mixer(layer, d_model, solver=solver, dtype=dtype, key=key)
    name, options = parse_spec("make_layer", layer)
    sizes = {"d_model": d_model, "key": key}
    options = options if dtype is None else options | {"dtype": dtype}
    made = make_by_name("make_layer", "layer", _image_layers(), name, sizes, options)
    return ImageMixer(made)


def needs_images(layer: str) -> bool:
    """Whether a layer takes only sequences that are images, row by row."""
    return layer.partition(":")[0] in _image_layers()


def heads(layer: str) -> int:
    """Return the number of heads in a layer's options, or 1."""
    count = parse_spec("heads", layer)[1].get("heads", 1)
    return count if isinstance(count, int) and count > 0 else 1


def make_shapes(layer: str, d_model: int) -> Any:
    """Return the layer with shapes for arrays, without computing anything."""
    return eqx.filter_eval_shape(lambda: make_layer(layer, d_model, key=jr.key(0)))


def _image_layers() -> Mapping[str, type]:
    found = registered_layers(IMAGES).values()
    return {name: made for layers in found for name, made in layers.items()}


class ImageMixer(eqx.Module):
    """Applies a layer of images `[H, W, d]` to a sequence: a square image, row by row.

    Each step may see all others, so it cannot decode step by step and cannot be used in
    a language model.

    **Attributes:** `layer`.
    """

    layer: Any

    def init_state(self) -> tuple[()]:
        """Return the empty state."""
        return ()

    def __call__(
        self, xs: Float[Array, "T d_model"], state: tuple[()] = (), *, reset=None
    ) -> tuple[Float[Array, "T d_model"], tuple[()]]:
        """Return outputs `[T, d_model]`; T is a square.

        **Raises:** `ValueError` if it is not, or with resets.
        """
        side = math.isqrt(xs.shape[0])
        if side * side != xs.shape[0]:
            raise ValueError(
                f"ImageMixer: a sequence of {xs.shape[0]} steps is not a square image, "
                f"row by row. The nearest would have {side * side}."
            )
        if reset is not None:
            raise ValueError("ImageMixer: an image has no resets.")
        image = self.layer(xs.reshape(side, side, -1))
        return image.reshape(xs.shape), state


class SequenceModel(eqx.Module):
    r"""Residual blocks of one recurrent layer between a map in and a map out.

    $$x^0_t = E_{\mathrm{token}_t} \ \text{or} \ W u_t + b, \qquad
      x^l = \mathrm{block}_l(x^{l-1}), \qquad
      y_t = H \, \mathrm{norm}(x^L_t) + c$$

    The blocks are those of [`pararnn.LanguageModel`][]: a mixer over time and a gated
    MLP, each after an RMSNorm. Everything except the mixer is the same for all layers.
    """

    embedding: Float[Array, "inputs d_model"]
    bias: Float[Array, " d_model"] | None
    blocks: Block  # leaves stacked over the depth
    norm: Float[Array, " d_model"]
    head: Float[Array, "outputs d_model"]
    offset: Float[Array, " outputs"]

    def __init__(
        self,
        task: Task,
        layer: str,
        d_model: int,
        d_hidden: int,
        depth: int,
        *,
        solver: AbstractSolver = Auto(),
        key: PRNGKeyArray,
    ):
        """**Arguments:** `task`, for the kinds of inputs and outputs; `layer`, as from
        `expand_layer`; `d_model`, `d_hidden` and `depth`, width, width of the
        MLPs and number of blocks; `solver`, for nonlinear layers; `key`, a key of
        `jax.random`. Embeddings are drawn from $\\mathcal{N}(0, 1)$, maps uniformly
        within $\\pm 1 / \\sqrt{\\text{fan-in}}$.

        **Raises:** what the layer's constructor raises."""
        dtype = jnp.result_type(float)
        inwards, shift, within, outwards = jr.split(key, 4)
        if task.vocabulary is not None:
            self.embedding = jr.normal(inwards, (task.vocabulary, d_model), dtype)
            self.bias = None
        else:
            shape = (task.features or 1, d_model)
            (self.embedding,) = uniform(inwards, 1, shape, shape[0] ** -0.5, dtype)
            # Without a bias, the norm would map all numbers of one sign to one value.
            (self.bias,) = uniform(shift, 1, (d_model,), 1.0, dtype)

        def make(key: PRNGKeyArray) -> Block:
            inner, outer = jr.split(key)
            mixer = make_layer(layer, d_model, solver=solver, dtype=dtype, key=inner)
            return Block(mixer, d_model, d_hidden, dtype=dtype, key=outer)

        self.blocks = eqx.filter_vmap(make)(jr.split(within, depth))
        self.norm = jnp.ones(d_model, dtype)
        shape, bound = (task.outputs, d_model), d_model**-0.5
        (self.head,) = uniform(outwards, 1, shape, bound, dtype)
        self.offset = jnp.zeros(task.outputs, dtype)

    def init_state(self) -> PyTree[Array]:
        """Return the fresh state of all mixers, stacked over the depth."""
        return eqx.filter_vmap(lambda block: block.mixer.init_state())(self.blocks)

    def __call__(
        self, inputs: Array
    ) -> tuple[Float[Array, "T outputs"], dict[str, Array]]:
        """Return answers at every step, `[T, outputs]`, and statistics of the solves,
        if there were any, stacked over the depth.

        **Arguments:** `inputs`, int `[T]` or real `[T, features]`, as in the task; use
        `jax.vmap` for a batch.
        """
        blocks, static = eqx.partition(self.blocks, eqx.is_array)

        def apply(xs, arrays):
            block = eqx.combine(arrays, static)
            xs, _, stats = block.run(xs, block.mixer.init_state(), None)
            return xs, stats

        xs, stats = lax.scan(apply, self._embed(inputs), blocks)
        xs = normalise(xs, self.norm)
        return xs @ self.head.T + self.offset.reshape(1, -1), stats

    def _embed(self, inputs: Array) -> Float[Array, "T d_model"]:
        if self.bias is None:
            return self.embedding[inputs]
        dtype = self.embedding.dtype
        return inputs.astype(dtype) @ self.embedding + self.bias.reshape(1, -1)


def with_solver(model: SequenceModel, solver: AbstractSolver) -> SequenceModel:
    """Replace the solver of the cells, which the model must have."""
    return eqx.tree_at(
        lambda m: m.blocks.mixer.rnn.solver,
        model,
        solver,
        is_leaf=lambda x: x is model.blocks.mixer.rnn.solver,
    )


def has_solver(model: SequenceModel) -> bool:
    """Whether the layer is a cell, whose states are solved for."""
    return hasattr(model.blocks.mixer, "rnn")


def count_parameters(model: PyTree) -> int:
    """Count the real numbers that are learned."""
    leaves = jax.tree.leaves(eqx.filter(model, _is_learned))
    return sum(leaf.size * (1 + jnp.iscomplexobj(leaf)) for leaf in leaves)


def count_state(model: SequenceModel) -> int:
    """Count the real numbers that the recurrences carry for one sequence."""
    shapes = eqx.filter_eval_shape(lambda m: m.init_state(), model)
    return _count_recurrent(model.blocks.mixer, shapes)


def count_layer_state(layer: Any) -> int:
    """Count the real numbers that the recurrence of a layer carries."""
    shapes = eqx.filter_eval_shape(lambda m: m.init_state(), layer)
    return _count_recurrent(layer, shapes)


def _count_recurrent(layer: Any, state: PyTree) -> int:
    # The last inputs, for convolutions, are left out if a layer tells them apart.
    if hasattr(layer, "recurrent_state"):
        state = layer.recurrent_state(state)
    return sum(
        leaf.size * (1 + jnp.issubdtype(leaf.dtype, jnp.complexfloating))
        for leaf in jax.tree.leaves(state)
    )


def _is_learned(leaf) -> bool:
    struct = isinstance(leaf, jax.ShapeDtypeStruct | jax.Array)
    return struct and jnp.issubdtype(leaf.dtype, jnp.inexact)
