"""Make what a configuration asks for: model, optimiser, state on devices, batches."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.random as jr
import jax.tree_util as jtu
import optax
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import PyTree

from .._devices import make_mesh, parameter_sharding, shard_batch, shard_parameters
from ..models import LanguageModel
from ..solver import AbstractSolver, Auto, Newton, Sequential
from ._config import Config, MeshConfig, ModelConfig, OptimiserConfig
from ._step import TrainState, fresh_state
from .data import (
    ByteTokenizer,
    FileTokenizer,
    Packed,
    Tokenizer,
    Window,
    find_corpus,
    make_batches,
)


def make_solver(config: ModelConfig) -> AbstractSolver:
    """Return the solver of nonlinear mixers."""
    if config.solver == "newton":
        return Newton(segments=config.segments)
    return Sequential() if config.solver == "sequential" else Auto()


def make_model(config: ModelConfig, vocab_size: int, seed: int) -> LanguageModel:
    """Make the model. **Raises:** as [`pararnn.LanguageModel`][]."""
    return LanguageModel(
        vocab_size,
        config.d_model,
        config.depth,
        mixer=config.mixer,
        d_hidden=config.d_hidden,
        solver=make_solver(config),
        tied=config.tied,
        rematerialise=config.rematerialise,
        key=jr.key(seed),
    )


def abstract_state(config: Config, vocab_size: int) -> TrainState:
    """Return the shapes and dtypes of `new_state`."""
    return eqx.filter_eval_shape(lambda: new_state(config, vocab_size))


def new_state(config: Config, vocab_size: int) -> TrainState:
    """Make the state before the first step."""
    model = make_model(config.model, vocab_size, config.seed)
    return fresh_state(model, make_optimiser(config.optimiser, config.steps))


def make_optimiser(
    config: OptimiserConfig, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Make AdamW with clipping; the rate rises linearly, then falls as a cosine to a
    tenth at `steps`.

    **Raises:** `ValueError` if the warm-up is not shorter than the run.
    """
    if config.warmup >= steps:
        raise ValueError(
            f"make_optimiser: a warm-up of {config.warmup} steps does not end within "
            f"{steps} steps. Shorten `warmup`, or train for longer."
        )
    rate = optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup,
        decay_steps=steps,
        end_value=config.learning_rate / 10,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            rate,
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decays,
        ),
    )


def decays(parameters: PyTree) -> PyTree[bool]:
    """Mark the leaves that decay: matrices, but neither vectors nor the embedding.

    Biases, norms, decay rates and the like are vectors in each block. Blocks are
    stacked, which adds an axis.
    """

    def one(path, leaf):
        if not eqx.is_array(leaf):
            return False
        names = [key.name for key in path if isinstance(key, jtu.GetAttrKey)]
        stacked = "blocks" in names
        return leaf.ndim - stacked >= 2 and not {"embedding", "head"} & set(names)

    return jax.tree_util.tree_map_with_path(one, parameters)


Tree = TypeVar("Tree")


class Placement:
    """Puts states and batches onto the mesh of a configuration.

    **Raises:** `ValueError` if the mesh needs another number of devices than there are.
    """

    def __init__(self, config: MeshConfig):
        divided = max(config.data, config.fsdp, config.time) > 1
        self.mesh: Mesh | None = None
        if divided:
            self.mesh = make_mesh(data=config.data, fsdp=config.fsdp, time=config.time)

    def context(self) -> contextlib.AbstractContextManager:
        """The context in which programs are traced and run."""
        return (
            contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
        )

    def state(self, state: Tree) -> Tree:
        """Shard the state; also within `jit`."""
        return state if self.mesh is None else shard_parameters(state, self.mesh)

    def batch(self, batch: Mapping[str, Any], batch_axis: int) -> Mapping[str, Any]:
        """Shard the batch: sequences along `batch_axis`, time along the next axis."""
        if self.mesh is None:
            return batch
        axes = {"batch_axis": batch_axis, "time_axis": batch_axis + 1}
        return shard_batch(dict(batch), self.mesh, **axes)

    def with_shardings(self, shapes: PyTree) -> PyTree:
        """Add shardings to shapes and dtypes, for a state that is read from a file."""

        def one(leaf):
            if not isinstance(leaf, jax.ShapeDtypeStruct):
                return leaf
            if self.mesh is None:
                place = SingleDeviceSharding(jax.local_devices()[0])
            else:
                place = parameter_sharding(leaf.shape, self.mesh)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        return jax.tree.map(one, shapes)


def make_sharded(make, placement: Placement):
    """Return `make()`, which is never whole on one device."""
    with placement.context():
        return eqx.filter_jit(lambda: placement.state(make()))()


class Data(NamedTuple):
    """Training and validation windows of one corpus."""

    tokenizer: Tokenizer
    training: Packed
    validation: Packed


def make_tokenizer(config: Config) -> Tokenizer:
    """Make the tokenizer. **Raises:** as `FileTokenizer`."""
    file = config.data.tokenizer
    return ByteTokenizer() if file is None else FileTokenizer(file)


def open_data(config: Config) -> Data:
    """Find the corpus and split it by documents.

    **Raises:** as `find_corpus`, `Corpus.split`, `Packed` and `FileTokenizer`.
    """
    tokenizer = make_tokenizer(config)
    corpus = find_corpus(config.data.corpus)
    parts = corpus.split(config.data.validation, seed=config.seed)
    training, validation = (
        Packed(part, tokenizer, config.data.length, seed=config.seed) for part in parts
    )
    return Data(tokenizer, training, validation)


def training_batches(config: Config, data: Data):
    """Return an endless iterator of windows `[microbatches * batch, T]`, whose position
    can be saved.

    Every host reads all of them and gives its devices their shards: reading is about a
    thousand times faster than training, and batch and time can be sharded in any way.
    """
    size = config.data.batch * config.optimiser.accumulate
    return iter(make_batches(data.training, size, seed=config.seed))


def validation_batches(config: Config, data: Data) -> Iterator[Window]:
    """Yield the same windows at every call, `[batch, T]`, at most
    `validation_batches` batches."""
    batches = make_batches(
        data.validation,
        config.data.batch,
        seed=config.seed,
        epochs=1,
    )
    for _, batch in zip(range(config.data.validation_batches), batches, strict=False):
        yield batch
