"""Every linear layer of the tests: how it is made, and its reference."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import linear
import tests.linear_reference as reference
import tests.numpy_reference as first_reference

D_MODEL = 6


class Row(NamedTuple):
    layer: str
    reference: Any
    options: dict[str, Any] = {}


HEADS = {"heads": 2}
SIGNED = {"eigenvalues": "signed"}
COMPLEX = {"eigenvalues": "complex"}
SMALL = {"d_state": 4}

ROWS = {
    "lru": Row("lru", first_reference.lru, SMALL),
    "lru-positive": Row("lru", reference.lru_real, SMALL | {"eigenvalues": "positive"}),
    "lru-signed": Row("lru", reference.lru_real, SMALL | SIGNED),
    "s4d-scan": Row("s4d", first_reference.s4d, SMALL | {"form": "scan"}),
    "s4d-convolution": Row("s4d", first_reference.s4d, SMALL | {"form": "convolution"}),
    "s4d-legs-bilinear": Row(
        "s4d",
        first_reference.s4d,
        SMALL | {"initialisation": "legs", "discretisation": "bilinear"},
    ),
    "s4d-inv": Row("s4d", first_reference.s4d, SMALL | {"initialisation": "inv"}),
    "s4d-real": Row("s4d", first_reference.s4d, SMALL | {"initialisation": "real"}),
    "s4d-ptd": Row(
        "s4d",
        first_reference.s4d,
        SMALL | {"initialisation": "ptd", "perturbation": 0.3},
    ),
    "s5": Row("s5", reference.s5, {"d_state": 8, "blocks": 2}),
    "s5-ptd-bilinear": Row(
        "s5",
        reference.s5,
        {
            "d_state": 8,
            "initialisation": "ptd",
            "discretisation": "bilinear",
            "perturbation": 0.3,
        },
    ),
    "lssl": Row("lssl", reference.lssl, {"d_state": 4, "channels": 2}),
    "mamba": Row("mamba", reference.mamba, SMALL),
    "mamba-signed": Row(
        "mamba", reference.mamba, SIGNED | {"d_state": 1, "convolution": False}
    ),
    "mamba-complex": Row("mamba", reference.mamba, SMALL | COMPLEX),
    "mamba2": Row("mamba2", reference.mamba2, SMALL | HEADS),
    "mamba2-signed": Row(
        "mamba2",
        reference.mamba2,
        SMALL | HEADS | SIGNED | {"convolution": False},
    ),
    "gla": Row("gla", reference.gla, HEADS | {"d_key": 4}),
    "gla-signed": Row("gla", reference.gla, HEADS | SIGNED | {"d_key": 4}),
    "deltanet": Row("deltanet", reference.delta_rule, HEADS),
    "deltanet-signed": Row(
        "deltanet", reference.delta_rule, HEADS | SIGNED | {"d_value": 2}
    ),
    "gated_deltanet": Row("gated_deltanet", reference.delta_rule, HEADS),
    "deltaproduct": Row("deltaproduct", reference.delta_rule, HEADS),
    "deltaproduct-plain": Row(
        "deltaproduct", reference.delta_rule, HEADS | {"convolution": False}
    ),
    "gated_deltaproduct": Row(
        "gated_deltaproduct", reference.delta_rule, HEADS | {"householders": 3}
    ),
    "rwkv7": Row("rwkv7", reference.rwkv7, HEADS),
    "mlstm": Row("mlstm", reference.mlstm, HEADS),
    "mlstm-plain": Row("mlstm", reference.mlstm, HEADS | {"convolution": False}),
    "plstm": Row("plstm", reference.plstm, HEADS),
    "min_gru": Row("min_gru", reference.min_gru, SMALL),
    "min_lstm": Row("min_lstm", reference.min_lstm, SMALL),
    "rg_lru": Row("rg_lru", reference.rg_lru, {"blocks": 2}),
    "unitary": Row("unitary", reference.unitary_rnn, SMALL),
    "block_lrnn": Row("block_lrnn", reference.block_lrnn, {"d_state": 4, "blocks": 2}),
}


@functools.cache
def make(name: str, dtype=None):
    row = ROWS[name]
    return linear.make_layer(
        row.layer, D_MODEL, key=jr.key(0), dtype=dtype, **row.options
    )


def disturbed(layer, seed: int = 0, size: float = 0.2):
    """The layer with noise on all parameters: none is zero or equals another."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda v: (
            v + jnp.asarray(size * rng.normal(size=v.shape), v.dtype)
            if eqx.is_inexact_array(v)
            else v
        ),
        layer,
    )


def random_state(layer, seed: int = 1):
    """A random state, with a random stabiliser and normaliser too."""
    rng = np.random.default_rng(seed)

    def draw(fresh):
        values = rng.normal(size=fresh.shape)
        if np.iscomplexobj(fresh):
            values = values + 1j * rng.normal(size=fresh.shape)
        return jnp.asarray(0.5 * values, fresh.dtype)

    return jax.tree.map(draw, layer.init_state())
