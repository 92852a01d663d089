"""One step of training, and validation: compiled, on batches of sequences."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Int32, PyTree

from .._parameters import wide_dtype
from ..models import LanguageModel, cast
from .data import Packed, make_batches

# Leaves [microbatches, batch, T]; see `Window`.
Batch = Mapping[str, Any]

# Metrics over the solves of all blocks, sequences and microbatches: the statistic of a
# solve, and the reduction.
OVER_SOLVES = {
    "newton_steps": ("num_steps", jnp.max),
    "mean_newton_steps": ("num_steps", jnp.mean),
    "residual": ("residual", jnp.max),
    "sequential": ("sequential", jnp.mean),
}


class TrainState(eqx.Module):
    """What a step updates: the model, the optimiser's state, and the steps so far."""

    model: LanguageModel
    optimiser: PyTree
    step: Int32[Array, ""]


def fresh_state(
    model: LanguageModel, optimiser: optax.GradientTransformation
) -> TrainState:
    """Return the state before the first step."""
    moments = optimiser.init(eqx.filter(model, eqx.is_inexact_array))
    return TrainState(model, moments, jnp.zeros((), jnp.int32))


def summed_loss(
    model: LanguageModel, batch: Batch, precision: DTypeLike
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Return the summed loss of scored tokens in nats, and statistics of the solves.

    **Arguments:** `batch`, leaves `[batch, T]`: `tokens` and `targets` (integer),
    `reset` (bool), `weights` (real: 1 for a target that is scored, else 0);
    `precision`, the dtype of activations and of the parameters in their products.
    """
    lower = cast(model, precision)

    def run(tokens, reset):
        logits, _, stats = lower.run(tokens, reset=reset)
        return logits, stats

    logits, stats = jax.vmap(run)(batch["tokens"], batch["reset"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    weights = batch["weights"].astype(losses.dtype)
    return jnp.sum(jnp.where(weights > 0, losses * weights, 0)), _summarise(stats)


def _summarise(stats: tuple[dict[str, Array], ...]) -> dict[str, Array]:
    """Reduce over the solves of all blocks and sequences; empty if there were none."""
    solves = [s for s in stats if s]
    if not solves:
        return {}

    def gather(name):
        return jnp.concatenate([jnp.ravel(s[name]).astype(jnp.float32) for s in solves])

    return {name: over(gather(stat)) for name, (stat, over) in OVER_SOLVES.items()}


def make_train_step(
    optimiser: optax.GradientTransformation,
    precision: DTypeLike,
    place: Callable[[TrainState], TrainState] = lambda state: state,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Make a compiled `(state, batch) -> (state, metrics)` that donates its arguments.

    The gradient is that of the mean loss over all scored tokens of all microbatches,
    which are processed one after the other. `place` shards the new state.
    """

    @eqx.filter_jit(donate="all")
    def train_step(state: TrainState, batch: Batch):
        model = state.model
        value_and_grad = eqx.filter_value_and_grad(summed_loss, has_aux=True)
        count = jnp.sum(batch["weights"].astype(wide_dtype(precision)))

        def accumulate(total, microbatch):
            (loss, stats), grads = value_and_grad(model, microbatch, precision)
            return jax.tree.map(jnp.add, total, (loss, grads)), stats

        zeros = jax.tree.map(
            jnp.zeros_like, (count, eqx.filter(model, eqx.is_inexact_array))
        )
        (loss, grads), stats = lax.scan(accumulate, zeros, batch)
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
        # optax relies on implicit promotion, which the user may have disabled.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = optimiser.update(
                grads, state.optimiser, eqx.filter(model, eqx.is_inexact_array)
            )
        metrics = {"loss": loss / count, "gradient_norm": optax.tree.norm(grads)}
        metrics |= {name: OVER_SOLVES[name][1](value) for name, value in stats.items()}
        model = eqx.apply_updates(model, updates)
        return place(TrainState(model, moments, state.step + 1)), metrics

    return train_step


def make_validation(precision: DTypeLike) -> Callable[[Any, Batch], tuple]:
    """Make a compiled `(model, batch) -> (summed loss, number of scored tokens)`."""

    @eqx.filter_jit
    def validate(model: LanguageModel, batch: Batch):
        loss, _ = summed_loss(model, batch, precision)
        return loss, jnp.sum(batch["weights"].astype(jnp.float32))

    return validate


def evaluate(
    model: LanguageModel,
    packed: Packed,
    *,
    batch_size: int = 8,
    precision: DTypeLike = "float32",
) -> float:
    """Return the bits per byte of all windows, each read from a fresh state.

    **Arguments:** `model`; `packed`, the windows, such as those of validation;
    `batch_size`, how many to read at once; `precision`, dtype of the activations.

    **Raises:** `ValueError` if the model knows fewer tokens than the tokenizer has, and
    what `make_batches` raises.
    """
    if packed.tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"evaluate: the tokenizer has {packed.tokenizer.vocab_size} tokens, the "
            f"model knows {model.vocab_size}. Likely cause: the model was trained with "
            "another tokenizer."
        )
    batches = make_batches(packed, batch_size, shuffle=False, epochs=1)
    return bits_per_byte(make_validation(precision), model, batches, packed)


def bits_per_byte(
    validate: Callable[[Any, Batch], tuple],
    model: LanguageModel,
    batches: Iterable[Any],
    packed: Packed,
) -> float:
    """Return the mean over the scored tokens of batches of `packed`."""
    # Fetched at the end, so that a batch is read while the previous one is computed.
    sums = [validate(model, batch) for batch in batches]
    losses, counts = np.asarray(sums, np.float64).sum(0)
    return float(losses / counts) * bits_per_nat(packed)


def bits_per_nat(packed: Packed) -> float:
    """Return the factor from a mean loss in nats to bits per byte."""
    return 1 / (math.log(2) * packed.bytes_per_target)
