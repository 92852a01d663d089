"""What a task is: examples of any length, and how answers to them are scored."""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ._metric import Metric


class Example(NamedTuple):
    """One sequence, or a batch of them behind a leading axis.

    **Attributes:**

    - `inputs`: tokens, int32 `[T]`, or features, float32 `[T, d]`.
    - `targets`: the right class, int32 `[T]`, or number, float32 `[T]`.
    - `mask`: bool `[T]`, where there is something to answer. What `inputs` and
        `targets` hold elsewhere, such as behind the end, has no meaning.
    """

    inputs: Int[Array, "*batch T"] | Float[Array, "*batch T d"]
    targets: Int[Array, "*batch T"] | Float[Array, "*batch T"]
    mask: Bool[Array, "*batch T"]


# `sample(key, size, length)`: an example of `length` steps (a traced integer), padded
# to `size` steps (a constant). A pytree, if it holds arrays.
Sampler = Callable[[PRNGKeyArray, int, Int[Array, ""]], Example]

# Which steps of a test count: every answer of a sequence is one to a problem of that
# many steps; only the one at the end; all of a sequence alike.
Scored = Literal["prefixes", "last", "all"]


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths in steps: of training uniformly from `train[0]` to `train[1]`, both
    included; of the test each of `test`, increasing."""

    train: tuple[int, int]
    test: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """A problem to learn.

    **Arguments:**

    - `name`: without options.
    - `summary`: what has to be answered, in a sentence or two.
    - `source`: where the task comes from.
    - `differs`: how it differs from the source; empty if it does not.
    - `vocabulary`: the number of tokens, or `None` if inputs are features.
    - `features`: of a step, or `None` if inputs are tokens.
    - `outputs`: the number of classes, or 1 for a number.
    - `metric`: how answers are scored.
    - `lengths`: those of the source.
    - `short`: those of a small budget; the same if not given.
    - `scored`: which steps of a test count.
    - `image`: whether a sequence is a square image, row by row; they are then of one
        length in training.
    - `train`, `validation`, `test`: what examples are drawn from. Generated tasks need
        one only: their validation and test draw with other keys.
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
                f"Task: {self.name!r} is on images, but has the lengths {lengths}, "
                "expected squares, and one of them only in training."
            )

    def scored_alone(self) -> bool:
        """Whether each length of the test needs sequences of its own."""
        return self.scored != "prefixes"


def _are_images(lengths: Lengths) -> bool:
    """Squares, and one of them only in training, where nothing may be padded."""
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
    """`count` examples of the given lengths, all padded to `size` steps.

    **Arguments:** `sampler`, of a [`pararnn.comparison.Task`][]; `key`, of
    `jax.random`; `count` and `size`, constants; `lengths`, int32 `[count]`, each at
    most `size`.
    """
    keys = jax.random.split(key, count)
    return jax.vmap(lambda k, n: sampler(k, size, n))(keys, lengths)
