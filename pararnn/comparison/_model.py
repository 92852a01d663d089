"""The model of the comparison: tokens or features in, blocks, an answer a step."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._parameters import uniform
from ..models._blocks import Block, normalise
from ..solver import AbstractSolver, Auto
from ._layers import make_layer
from .tasks import Task


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
