"""How the answers to a task are scored."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Kind = Literal["scaled accuracy", "accuracy", "mean squared error", "bits per byte"]


@dataclasses.dataclass(frozen=True)
class Metric:
    r"""A mean over the steps that count, and the score made of it.

    $$\text{scaled accuracy} = \frac{a - a_\mathrm{chance}}{1 - a_\mathrm{chance}}$$

    so that guessing is 0 and never wrong is 1 (Beck et al., 2405.04517). An accuracy,
    a mean squared error and bits per byte are the mean itself.

    **Arguments:** `kind`; `chance`, the mean that one reaches without looking at the
    inputs.
    """

    kind: Kind
    chance: float

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is a better one."""
        return self.kind in ("scaled accuracy", "accuracy")

    @property
    def classes(self) -> bool:
        """Whether targets are classes; numbers otherwise."""
        return self.kind != "mean squared error"

    def losses(
        self, outputs: Float[Array, "*T outputs"], targets: Array
    ) -> Float[Array, "*T"]:
        """What training minimises, for every step: the cross-entropy in nats, or the
        squared error."""
        if not self.classes:
            return (outputs[..., 0] - targets.astype(outputs.dtype)) ** 2
        log = jax.nn.log_softmax(outputs)
        return -jnp.take_along_axis(log, targets[..., None], -1)[..., 0]

    def values(
        self, outputs: Float[Array, "*T outputs"], targets: Array
    ) -> Float[Array, "*T"]:
        """What the score is a mean of, for every step."""
        if self.kind == "mean squared error":
            return self.losses(outputs, targets)
        if self.kind == "bits per byte":
            return self.losses(outputs, targets) / math.log(2)
        right = jnp.argmax(outputs, -1).astype(targets.dtype) == targets
        return right.astype(outputs.dtype)

    def score(self, mean: float) -> float:
        """The score of a mean of `values`."""
        if self.kind != "scaled accuracy":
            return mean
        return (mean - self.chance) / (1 - self.chance)

    @property
    def guessing(self) -> float:
        """The score of guessing."""
        return self.score(self.chance)
