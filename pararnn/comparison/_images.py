"""Layers on images among those on sequences."""

import math
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float


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
