"""Layers by name, with the short forms of the field."""

import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._option_strings import parse_spec
from .._registry import check_name, make_by_name
from ..models import list_mixers, make_mixer, registered_layers
from ..solver import AbstractSolver, Auto

# Where packages enter layers on images, `[H, W, d_model]`, as they enter others in
# `pararnn.layers`.
IMAGES = "pararnn.images"
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


def list_layers() -> tuple[str, ...]:
    """The names that [`pararnn.comparison.expand_layer`][] knows: those of
    `pararnn.list_mixers`, then layers on images."""
    return (*list_mixers(), *_image_layers())


def expand_layer(layer: str) -> str:
    """A layer's name with its options, the short forms written out.

    **Arguments:** `layer`, as for `pararnn.make_mixer`, or a layer on images
    (`"plstm_grid"`); beside `option=value` there are `neg` (`eigenvalues=signed`),
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
    make_shapes(full, heads(full) * TRIAL)
    return full


def make_layer(
    layer: str,
    d_model: int,
    *,
    solver: AbstractSolver = Auto(),
    dtype: DTypeLike | None = None,
    key: PRNGKeyArray,
) -> Any:
    """The layer of a name with options, written out; one on images as an `ImageMixer`.

    **Arguments:** as of `pararnn.make_mixer`.
    """
    if not needs_images(layer):
        return make_mixer(layer, d_model, solver=solver, dtype=dtype, key=key)
    name, options = parse_spec("make_layer", layer)
    sizes = {"d_model": d_model, "key": key}
    options = options if dtype is None else options | {"dtype": dtype}
    made = make_by_name("make_layer", "layer", _image_layers(), name, sizes, options)
    return ImageMixer(made)


def needs_images(layer: str) -> bool:
    """Whether a layer takes sequences only that are images, row by row."""
    return layer.partition(":")[0] in _image_layers()


def heads(layer: str) -> int:
    """The heads that a layer was asked to have, or 1."""
    count = parse_spec("heads", layer)[1].get("heads", 1)
    return count if isinstance(count, int) and count > 0 else 1


def make_shapes(layer: str, d_model: int) -> Any:
    """The layer with shapes for arrays: nothing of JAX's is computed."""
    return eqx.filter_eval_shape(lambda: make_layer(layer, d_model, key=jr.key(0)))


def _image_layers() -> Mapping[str, type]:
    found = registered_layers(IMAGES).values()
    return {name: made for layers in found for name, made in layers.items()}


class ImageMixer(eqx.Module):
    """A layer `[H, W, d]` to `[H, W, d]`, on a sequence that is a square image, row by
    row.

    Each step may see all others, so that there is no decoding, and no language model
    can be made of it.

    **Attributes:** `layer`.
    """

    layer: Any

    def init_state(self) -> tuple[()]:
        """There is none."""
        return ()

    def __call__(
        self, xs: Float[Array, "T d_model"], state: tuple[()] = (), *, reset=None
    ) -> tuple[Float[Array, "T d_model"], tuple[()]]:
        """Outputs `[T, d_model]`; T is a square.

        **Raises:** `ValueError` if it is not, or with resets.
        """
        side = math.isqrt(xs.shape[0])
        if side * side != xs.shape[0]:
            raise ValueError(
                f"ImageMixer: a sequence of {xs.shape[0]} steps is no square image, "
                f"row by row. The nearest would have {side * side}."
            )
        if reset is not None:
            raise ValueError("ImageMixer: an image has no resets.")
        image = self.layer(xs.reshape(side, side, -1))
        return image.reshape(xs.shape), state
