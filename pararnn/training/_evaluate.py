"""How good a model is on windows that it was not trained on."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import DTypeLike

from ..models import LanguageModel
from ._data import bits_per_nat
from ._step import Batch, make_validation
from .data import Packed, make_batches


def evaluate(
    model: LanguageModel,
    packed: Packed,
    *,
    batch_size: int = 8,
    precision: DTypeLike = "float32",
) -> float:
    """Bits per byte of all windows, each read from a fresh state.

    **Arguments:** `model`; `packed`, the windows, such as those of validation;
    `batch_size`, how many to read at once; `precision`, of the activations.

    **Raises:** `ValueError` if the model knows fewer tokens than the tokenizer has, and
    what `make_batches` raises.
    """
    if packed.tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"evaluate: the tokenizer has {packed.tokenizer.vocab_size} tokens, the "
            f"model knows {model.vocab_size}. Likely cause: another tokenizer than the "
            "model was trained with."
        )
    batches = make_batches(packed, batch_size, shuffle=False, epochs=1)
    return bits_per_byte(make_validation(precision), model, batches, packed)


def bits_per_byte(
    validate: Callable[[Any, Batch], tuple],
    model: LanguageModel,
    batches: Iterable[Any],
    packed: Packed,
) -> float:
    """The mean over the scored tokens of batches of `packed`."""
    # Fetched at the end, so that each batch is read while the one before is computed.
    sums = [validate(model, batch) for batch in batches]
    losses, counts = np.asarray(sums, np.float64).sum(0)
    return float(losses / counts) * bits_per_nat(packed)
