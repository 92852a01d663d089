"""Layers by name, with the short forms of the field."""

from typing import Any

import equinox as eqx
import jax.random as jr

from .._specs import parse_spec
from ..models import list_mixers, make_mixer

# What a part without a value stands for.
FLAGS = {
    "neg": ("eigenvalues", "signed"),
    "pos": ("eigenvalues", "positive"),
    "real": ("eigenvalues", "positive"),
    "complex": ("eigenvalues", "complex"),
    "noconv": ("convolution", False),
}
# Short names of options.
SHORT = {"nh": "householders", "n": "d_state"}
# Of the layers that are built to see whether a name and its options are right.
TRIAL = 48


def expand_layer(layer: str) -> str:
    """A layer's name with its options, the short forms written out.

    **Arguments:** `layer`, as for `pararnn.make_mixer`; beside `option=value` there
    are `neg` (`eigenvalues=signed`), `pos` and `real` (`eigenvalues=positive`),
    `complex` (`eigenvalues=complex`), `noconv` (`convolution=False`), `nh=2`
    (`householders=2`) and `n=16` (`d_state=16`): `"deltanet:neg"`, `"lru:real"`,
    `"deltaproduct:nh=3"`.

    **Returns:** what `pararnn.make_mixer` takes.

    **Raises:** `ValueError` on an unknown name or option, listing those that exist, and
    what the layer's constructor raises.
    """
    name, options = parse_spec("expand_layer", layer, FLAGS, SHORT)
    if name not in list_mixers():
        raise ValueError(
            f"expand_layer: unknown layer {name!r}; there are "
            f"{', '.join(list_mixers())}."
        )
    full = ":".join([name, *(f"{key}={value}" for key, value in options.items())])
    make_shapes(full, heads(full) * TRIAL)
    return full


def heads(layer: str) -> int:
    """The heads that a layer was asked to have, or 1."""
    count = parse_spec("heads", layer)[1].get("heads", 1)
    return count if isinstance(count, int) and count > 0 else 1


def make_shapes(layer: str, d_model: int) -> Any:
    """The layer with shapes for arrays, at no cost."""
    return eqx.filter_eval_shape(lambda: make_mixer(layer, d_model, key=jr.key(0)))
