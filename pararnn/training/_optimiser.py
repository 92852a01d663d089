"""The optimiser of language models."""

import equinox as eqx
import jax
import jax.tree_util as jtu
import optax
from jaxtyping import PyTree

from ._config import OptimiserConfig


def make_optimiser(
    config: OptimiserConfig, steps: int
) -> optax.GradientTransformationExtraArgs:
    """AdamW behind clipping; the rate rises linearly, then falls as a cosine to a
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
    """Which leaves decay: matrices, not vectors and not the embedding.

    Biases, norms, decay rates and the like are vectors for each block; blocks are
    stacked, which adds an axis.
    """

    def one(path, leaf):
        if not eqx.is_array(leaf):
            return False
        names = [key.name for key in path if isinstance(key, jtu.GetAttrKey)]
        stacked = "blocks" in names
        return leaf.ndim - stacked >= 2 and not {"embedding", "head"} & set(names)

    return jax.tree_util.tree_map_with_path(one, parameters)
