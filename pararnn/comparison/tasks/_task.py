"""What a task is: examples of any length, and how answers to them are scored."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Kind = Literal["scaled accuracy", "accuracy", "mean squared error", "bits per byte"]


@dataclasses.dataclass(frozen=True)
class Metric:
    r"""A mean over the scored steps, and the score computed from it.

    $$\text{scaled accuracy} = \frac{a - a_\mathrm{chance}}{1 - a_\mathrm{chance}}$$

    so that guessing is 0 and always right is 1 (Beck et al., 2405.04517). For accuracy,
    mean squared error and bits per byte, the score is the mean itself.

    **Arguments:** `kind`; `chance`, the mean that is reached without the inputs.
    """

    kind: Kind
    chance: float

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is better."""
        return self.kind in ("scaled accuracy", "accuracy")

    @property
    def classes(self) -> bool:
        """Whether targets are classes rather than numbers."""
        return self.kind != "mean squared error"

    def losses(
        self, outputs: Float[Array, "*T outputs"], targets: Array
    ) -> Float[Array, "*T"]:
        """Return what training minimises, for every step: the cross-entropy in nats, or
        the squared error."""
        if not self.classes:
            return (outputs[..., 0] - targets.astype(outputs.dtype)) ** 2
        log = jax.nn.log_softmax(outputs)
        return -jnp.take_along_axis(log, targets[..., None], -1)[..., 0]

    def values(
        self, outputs: Float[Array, "*T outputs"], targets: Array
    ) -> Float[Array, "*T"]:
        """Return the values whose mean is scored, for every step."""
        if self.kind == "mean squared error":
            return self.losses(outputs, targets)
        if self.kind == "bits per byte":
            return self.losses(outputs, targets) / math.log(2)
        right = jnp.argmax(outputs, -1).astype(targets.dtype) == targets
        return right.astype(outputs.dtype)

    def score(self, mean: float) -> float:
        """Return the score of a mean of `values`."""
        if self.kind != "scaled accuracy":
            return mean
        return (mean - self.chance) / (1 - self.chance)

    @property
    def guessing(self) -> float:
        """The score of guessing."""
        return self.score(self.chance)


class Example(NamedTuple):
    """One sequence, or a batch of them with a leading axis.

    **Attributes:**

    - `inputs`: tokens, int32 `[T]`, or features, float32 `[T, d]`.
    - `targets`: the right class, int32 `[T]`, or number, float32 `[T]`.
    - `mask`: bool `[T]`, where there is something to answer. Elsewhere, for instance
        after the end, `inputs` and `targets` have no meaning.
    """

    inputs: Int[Array, "*batch T"] | Float[Array, "*batch T d"]
    targets: Int[Array, "*batch T"] | Float[Array, "*batch T"]
    mask: Bool[Array, "*batch T"]


# `sample(key, size, length)` is an example of `length` steps (a traced integer), padded
# to `size` steps (a constant). A sampler that holds arrays is a pytree.
Sampler = Callable[[PRNGKeyArray, int, Int[Array, ""]], Example]

# Which answers of a test count: all, each as an answer to a problem of that many steps;
# only the last; all of a sequence alike.
Scored = Literal["prefixes", "last", "all"]


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths in steps: in training uniform from `train[0]` to `train[1]`, both
    included; in the test each of `test`, in increasing order."""

    train: tuple[int, int]
    test: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """A problem to learn.

    **Arguments:**

    - `name`: its name without options.
    - `summary`: what has to be answered, in a sentence or two.
    - `source`: where the task comes from.
    - `differs`: how it differs from the source; empty if it does not.
    - `vocabulary`: the number of tokens, or `None` if inputs are features.
    - `features`: the number of features of a step, or `None` if inputs are tokens.
    - `outputs`: the number of classes, or 1 for a number.
    - `metric`: how answers are scored.
    - `lengths`: those of the source.
    - `short`: those of a small budget. Defaults to `lengths`.
    - `scored`: which steps of a test count.
    - `image`: whether a sequence is a square image, row by row; training then has a
        single length.
    - `train`, `validation`, `test`: the samplers. Generated tasks need only `train`:
        their validation and test use other keys.
    """

    name: str
    summary: str
    source: str
    outputs: int
    metric: Metric
    lengths: Lengths
    train: Sampler
    vocabulary: int | None = None
    features: int | None = None
    differs: str = ""
    short: Lengths | None = None
    scored: Scored = "prefixes"
    image: bool = False
    validation: Sampler | None = None
    test: Sampler | None = None

    def __post_init__(self):
        if (self.vocabulary is None) == (self.features is None):
            raise ValueError(
                f"Task: {self.name!r} has `vocabulary` = {self.vocabulary} and "
                f"`features` = {self.features}; its inputs are either tokens or "
                "features, so exactly one of them must be given."
            )

        lengths = [self.lengths, *([self.short] if self.short else [])]
        if self.image and not all(map(_are_images, lengths)):
            raise ValueError(
                f"Task: {self.name!r} is on images, but has the lengths {lengths}; "
                "expected squares, and a single one in training."
            )

    def scored_alone(self) -> bool:
        """Whether each length of the test needs separate sequences."""
        return self.scored != "prefixes"


def _are_images(lengths: Lengths) -> bool:
    """Whether all are squares, and training, which cannot pad, has a single one."""
    counts = (*lengths.train, *lengths.test)
    square = all(math.isqrt(n) ** 2 == n for n in counts)
    return square and lengths.train[0] == lengths.train[1]


def draw_batch(
    sampler: Sampler,
    key: PRNGKeyArray,
    count: int,
    size: int,
    lengths: Int[Array, " count"],
) -> Example:
    """Draw `count` examples of the given lengths, all padded to `size` steps.

    **Arguments:** `sampler`, of a [`pararnn.comparison.Task`][]; `key`, a key of
    `jax.random`; `count` and `size`, constants; `lengths`, int32 `[count]`, each at
    most `size`.
    """
    keys = jax.random.split(key, count)
    return jax.vmap(lambda k, n: sampler(k, size, n))(keys, lengths)


def integers(
    key: PRNGKeyArray, size: int, limit: int | Int[Array, ""]
) -> Int[Array, " size"]:
    """Draw `size` integers, uniform in [0, `limit`)."""
    return jr.randint(key, (size,), 0, limit, jnp.int32)


def within(size: int, length: Int[Array, ""]) -> Bool[Array, " size"]:
    """Mark the first `length` of `size` steps."""
    return jnp.arange(size, dtype=jnp.int32) < length.astype(jnp.int32)
