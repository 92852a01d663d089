"""Layers by name, for scripts that take a layer as an argument."""

from types import MappingProxyType
from typing import Any

import equinox as eqx
from jaxtyping import PRNGKeyArray

from pararnn._registry import make_by_name

from ._layer import AbstractLayer
from ._monoid import CommutativeMonoid
from .dense import LRNN, LSSL, BlockLRNN, UnitaryRNN
from .diagonal import LRU, RGLRU, S4D, S5, Mamba, MinGRU, MinLSTM
from .matrix import (
    GLA,
    MLSTM,
    PLSTM,
    RWKV7,
    DeltaNet,
    DeltaProduct,
    GatedDeltaNet,
    GatedDeltaProduct,
    Mamba2,
    PLSTMGrid,
)

LAYERS: MappingProxyType[str, type[AbstractLayer]] = MappingProxyType(
    {
        "block_lrnn": BlockLRNN,
        "commutative_monoid": CommutativeMonoid,
        "deltanet": DeltaNet,
        "deltaproduct": DeltaProduct,
        "gated_deltanet": GatedDeltaNet,
        "gated_deltaproduct": GatedDeltaProduct,
        "gla": GLA,
        "lrnn": LRNN,
        "lru": LRU,
        "lssl": LSSL,
        "mamba": Mamba,
        "mamba2": Mamba2,
        "min_gru": MinGRU,
        "min_lstm": MinLSTM,
        "mlstm": MLSTM,
        "plstm": PLSTM,
        "rg_lru": RGLRU,
        "rwkv7": RWKV7,
        "s4d": S4D,
        "s5": S5,
        "unitary": UnitaryRNN,
    }
)


# Layers on images `[H, W, d_model]`. They have no state to continue from.
IMAGE_LAYERS: MappingProxyType[str, type[eqx.Module]] = MappingProxyType(
    {"plstm_grid": PLSTMGrid}
)


def make_layer(
    name: str, d_model: int, *, key: PRNGKeyArray, **options: Any
) -> AbstractLayer:
    """Build a layer by its name in `linear.LAYERS`.

    **Arguments:** `name`; `d_model`, the size of an input and of an output; `key`, a
    key of `jax.random`; `options`, further arguments of the layer's constructor.

    **Raises:** `ValueError` on an unknown name or option, listing those that exist, and
    whatever the constructor raises.
    """
    if name in IMAGE_LAYERS:
        raise ValueError(
            f"make_layer: {name!r} is a layer for images, without a state or "
            f"steps. Build it as `linear.{IMAGE_LAYERS[name].__name__}(d_model, ..., "
            "key=key)`."
        )
    sizes = {"d_model": d_model, "key": key}
    return make_by_name("make_layer", "layer", LAYERS, name, sizes, options)
