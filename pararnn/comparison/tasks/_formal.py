"""Formal languages and word problems: counting, arithmetic, products in groups."""

import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Int

from ..._parameters import check_size
from ._task import Example, Lengths, Metric, Sampler, Task, integers, within

FORMAL = Lengths((3, 40), (40, 64, 96, 128, 192, 256))
CHOMSKY = (
    'Delétang et al., "Neural Networks and the Chomsky Hierarchy" (2207.02098); '
    "lengths and score as in Grazzi et al. (2411.12537) and Beck et al. (2405.04517)"
)
EVERY_STEP = "The answer is asked for after every step, not only after the last."


def _sums(steps: tuple[int, ...], modulus: int) -> Sampler:
    """Sample tokens, each of which adds its number to a sum."""

    def sample(key, size, length):
        inputs = integers(key, size, len(steps))
        sums = jnp.cumsum(jnp.asarray(steps, jnp.int32)[inputs], dtype=jnp.int32)
        return Example(inputs, sums % modulus, within(size, length))

    return sample


def _sum_task(name, summary, source, differs, steps, modulus) -> Task:
    return Task(
        name=name,
        summary=summary,
        source=source,
        differs=differs,
        vocabulary=len(steps),
        outputs=modulus,
        metric=Metric("scaled accuracy", 1 / modulus),
        lengths=FORMAL,
        train=_sums(steps, modulus),
    )


def parity() -> Task:
    """Whether the number of ones so far is odd."""
    summary = "Whether the number of ones so far is odd."
    return _sum_task("parity", summary, CHOMSKY, EVERY_STEP, (0, 1), 2)


def sum_modulo(*, modulus: int = 3) -> Task:
    """The sum of digits so far, modulo `modulus`."""
    modulus = check_size("sum_modulo", "modulus", modulus, 2)
    return _sum_task(
        "sum_modulo",
        f"The sum of random digits so far, modulo {modulus}.",
        "Grazzi et al. (2411.12537), theorem 2: counting modulo 3",
        EVERY_STEP,
        tuple(range(modulus)),
        modulus,
    )


def count_modulo(*, modulus: int = 3) -> Task:
    """The number of steps so far, modulo `modulus`, when all inputs are the same."""
    modulus = check_size("count_modulo", "modulus", modulus, 2)
    return _sum_task(
        "count_modulo",
        f"The number of steps so far, modulo {modulus}; all inputs are the same.",
        "Grazzi et al. (2411.12537), theorem 2: counting modulo 3",
        EVERY_STEP,
        (1,),
        modulus,
    )


def cycle_navigation(*, modulus: int = 5) -> Task:
    """The place on a cycle after steps forwards, backwards and none."""
    modulus = check_size("cycle_navigation", "modulus", modulus, 2)
    return _sum_task(
        "cycle_navigation",
        f"The place on a cycle of {modulus} after steps of 0, 1 and -1.",
        CHOMSKY,
        EVERY_STEP,
        (0, 1, -1),
        modulus,
    )


def even_pairs() -> Task:
    """Whether neighbours differ an even number of times: first and last are equal."""

    def sample(key, size, length):
        inputs = integers(key, size, 2)
        even = (inputs == inputs[:1]).astype(jnp.int32)
        return Example(inputs, even, within(size, length))

    return Task(
        name="even_pairs",
        summary="Whether there are evenly many pairs of different neighbours so far.",
        source=CHOMSKY,
        differs=EVERY_STEP,
        vocabulary=2,
        outputs=2,
        metric=Metric("scaled accuracy", 1 / 2),
        lengths=FORMAL,
        train=sample,
    )


# The tokens after the digits.
SYMBOLS = "+-*()"
PLUS, MINUS, _, OPEN, CLOSE = range(len(SYMBOLS))

# How often a bracket opens or closes where another token is possible too.
BRACKET = 0.3


def _write(modulus: int, brackets: bool, key, size: int, length):
    """Write an expression of `length` tokens, an odd number.

    It is written from left to right; a bracket opens only if enough tokens are left to
    close it. With d open brackets, an operand needs at least d + 1 tokens up to the
    end, and every choice leaves d or d + 1 tokens plus a multiple of 2.
    """

    def write(carry, inputs):
        operand, depth = carry
        step, digit, operator, chance = inputs
        left = length - step
        may_open = operand & (left >= depth + 3) & brackets
        may_close = ~operand & (depth > 0)
        must_close = ~operand & (left <= depth)
        opens = may_open & (chance < BRACKET)
        closes = (may_close & (chance < BRACKET)) | must_close
        token = jnp.where(operand, digit, modulus + operator)
        token = jnp.where(opens, modulus + OPEN, token)
        token = jnp.where(closes, modulus + CLOSE, token)
        depth = depth + opens.astype(jnp.int32) - closes.astype(jnp.int32)
        # After a digit or a closed bracket comes an operator, else an operand.
        return (jnp.where(operand, opens, ~closes), depth), token

    digits, operators, chances = jr.split(key, 3)
    inputs = (
        jnp.arange(size, dtype=jnp.int32),
        jr.randint(digits, (size,), 0, modulus, jnp.int32),
        jr.randint(operators, (size,), 0, 3, jnp.int32),
        jr.uniform(chances, (size,), jnp.float32),
    )
    start = (jnp.asarray(True), jnp.zeros((), jnp.int32))
    return lax.scan(write, start, inputs)[1]


def _evaluate(modulus: int, tokens, depths: int):
    """Return the value after every token, and whether the expression may end there.

    A bracket's value is `total + term` of its contents: `term` is the product that is
    being read, with its sign, and `total` the sum of the products before it.
    """

    def read(carry, token):
        total, term, depth = carry
        symbol = token - modulus
        inner = (total[depth] + term[depth]) % modulus
        opens, closes = symbol == OPEN, symbol == CLOSE
        adds = (symbol == PLUS) | (symbol == MINUS)
        is_value = (symbol < 0) | closes
        value = jnp.where(closes, inner, token)
        depth = depth + opens.astype(jnp.int32) - closes.astype(jnp.int32)
        sign = jnp.where(symbol == MINUS, -1, 1)
        new_total = jnp.where(adds, inner, jnp.where(opens, 0, total[depth]))
        new_term = jnp.where(adds, sign, jnp.where(opens, 1, term[depth]))
        new_term = jnp.where(is_value, new_term * value % modulus, new_term)
        total, term = total.at[depth].set(new_total), term.at[depth].set(new_term)
        value = (new_total + new_term) % modulus
        return (total, term, depth), (value, is_value & (depth == 0))

    zeros = jnp.zeros(depths, jnp.int32)
    start = (zeros, zeros.at[0].set(1), jnp.zeros((), jnp.int32))
    return lax.scan(read, start, tokens)[1]


def _expressions(modulus: int, brackets: bool) -> Sampler:
    def sample(key: jax.Array, size, length):
        length = length.astype(jnp.int32)
        length = length - (1 - length % 2)
        tokens = _write(modulus, brackets, key, size, length)
        inside = within(size, length)
        # After the end, more brackets may be closed than were opened.
        tokens = jnp.where(inside, tokens, 0)
        values, complete = _evaluate(modulus, tokens, size // 2 + 1)
        return Example(tokens, values, complete & inside)

    return sample


def _arithmetic_task(
    name: str, modulus, brackets: bool, summary: str, differs: str
) -> Task:
    modulus = check_size(name, "modulus", modulus, 2)
    return Task(
        name=name,
        summary=f"The value modulo {modulus} of {summary}.",
        source=CHOMSKY,
        differs=f"{differs} Expressions have an odd number of tokens: even lengths are "
        "one less.",
        vocabulary=modulus + len(SYMBOLS) - (0 if brackets else 2),
        outputs=modulus,
        metric=Metric("scaled accuracy", 1 / modulus),
        lengths=FORMAL,
        scored="last" if brackets else "prefixes",
        train=_expressions(modulus, brackets),
    )


def modular_arithmetic(*, modulus: int = 5) -> Task:
    """The value of digits with +, - and * between them; products come first."""
    return _arithmetic_task(
        "modular_arithmetic",
        modulus,
        False,
        "an expression of digits, +, - and *; products come first",
        "The value is asked for after every digit.",
    )


def modular_arithmetic_brackets(*, modulus: int = 5) -> Task:
    """Like `modular_arithmetic`, with brackets, for which no finite state suffices."""
    return _arithmetic_task(
        "modular_arithmetic_brackets",
        modulus,
        True,
        "an expression of digits, +, -, * and brackets",
        "In training the value is asked for wherever the expression could end; the "
        "test counts only the end. Numbers have no sign.",
    )


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


def _word_lengths(tokens: int, shorter: int) -> Lengths:
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
        lengths=_word_lengths(tokens, 1),
        short=_word_lengths(tokens, 4),
        train=_words(table, chosen, tokens),
    )
