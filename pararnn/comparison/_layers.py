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
