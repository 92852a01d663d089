"""Word problems: the product of a sequence of elements of a group."""

import itertools
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Int

from ..._parameters import check_size
from ._task import Example, Lengths, Metric, Sampler, Task, integers, within

Generators = Literal["all", "swaps", "cycles"]
Permutation = tuple[int, ...]


def _is_even(p: Permutation) -> bool:
    return sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0


def _symmetric(points: int) -> list[Permutation]:
    return list(itertools.permutations(range(points)))


def _cyclic(points: int) -> list[Permutation]:
    return [
        tuple((i + shift) % points for i in range(points)) for shift in range(points)
    ]


# Elements as permutations, the identity first.
GROUPS = {
    "s3": lambda: _symmetric(3),
    "s4": lambda: _symmetric(4),
    "a5": lambda: [p for p in _symmetric(5) if _is_even(p)],
    "s5": lambda: _symmetric(5),
    "z60": lambda: _cyclic(60),
}

TRAIN, LONG = 128, (128, 192, 256, 384, 512)

# How many points an element moves: a swap moves two, a cycle three.
MOVED = {"all": None, "swaps": 2, "cycles": 3}


def multiplication_table(elements: list[Permutation]) -> Int[np.ndarray, "n n"]:
    """Return the table with the index of "element j after element i" at `[i, j]`."""
    places = {element: number for number, element in enumerate(elements)}
    return np.array(
        [[places[tuple(q[i] for i in p)] for q in elements] for p in elements],
        np.int32,
    )


def _generate(where: str, elements: list[Permutation], kind: str) -> np.ndarray:
    if kind not in MOVED:
        raise ValueError(
            f"{where}: `generators` is {kind!r}; there are {', '.join(MOVED)}."
        )
    moved = [sum(i != image for i, image in enumerate(p)) for p in elements]
    chosen = [n for n, m in enumerate(moved) if MOVED[kind] in (None, m)]
    if not chosen:
        raise ValueError(
            f"{where}: the group has no {kind}; take another group, or other "
            f"`generators`; there are {', '.join(MOVED)}."
        )
    return np.array(chosen, np.int32)


def _reached(table: np.ndarray, generators: np.ndarray) -> int:
    """Count the elements that a long product of a known length may be."""
    reached = np.array([0])
    # The subgroup has at most 120 elements, all of which are reached long before that.
    for _ in range(len(table)):
        reached = np.unique(table[np.ix_(reached, generators)])
    return len(reached)


def _words(table: np.ndarray, generators: np.ndarray, tokens: int) -> Sampler:
    """Sample elements, each as its token and `tokens - 1` fillers (the last token)."""

    def sample(key, size, length):
        numbers = integers(key, -(-size // tokens), len(generators))

        def multiply(product, element):
            product = jnp.asarray(table)[product, element]
            return product, product

        chosen = jnp.asarray(generators)[numbers]
        products = lax.scan(multiply, jnp.zeros((), jnp.int32), chosen)[1]
        step = jnp.arange(size, dtype=jnp.int32)
        first, last = step % tokens == 0, step % tokens == tokens - 1
        numbers, products = (jnp.repeat(a, tokens)[:size] for a in (numbers, products))
        inputs = jnp.where(first, numbers, len(generators))
        return Example(inputs, products, within(size, length) & last)

    return sample


def _lengths(tokens: int, shorter: int) -> Lengths:
    train, *test = (tokens * n // shorter for n in (TRAIN, *LONG))
    return Lengths((train, train), tuple(test))


def word_problem(group: str, generators: Generators = "all", tokens: int = 1) -> Task:
    """The product so far of random elements of a group."""
    elements = GROUPS[group]()
    table = multiplication_table(elements)
    chosen = _generate(group, elements, generators)
    tokens = check_size(group, "tokens", tokens)
    among = "" if generators == "all" else f", {generators} only"
    spelled = "" if tokens == 1 else f", {tokens} tokens each"
    return Task(
        name=group,
        summary=f"The product so far of random elements of {group.upper()}"
        f"{among}{spelled}.",
        source="Liu et al. (2210.10749) and Merrill et al. (2404.08819); lengths as in "
        "Siems et al. (2502.10297), variants as in Grazzi et al. (2411.12537)",
        differs="An element of several tokens is its own token, then fillers. A small "
        "budget trains and tests on a quarter of the lengths.",
        vocabulary=len(chosen) + (tokens > 1),
        outputs=len(elements),
        metric=Metric("scaled accuracy", 1 / _reached(table, chosen)),
        lengths=_lengths(tokens, 1),
        short=_lengths(tokens, 4),
        train=_words(table, chosen, tokens),
    )
