"""Formal languages: counting, and arithmetic modulo a number."""

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax

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


def _task(name: str, modulus, brackets: bool, summary: str, differs: str) -> Task:
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
    return _task(
        "modular_arithmetic",
        modulus,
        False,
        "an expression of digits, +, - and *; products come first",
        "The value is asked for after every digit.",
    )


def modular_arithmetic_brackets(*, modulus: int = 5) -> Task:
    """Like `modular_arithmetic`, with brackets, for which no finite state suffices."""
    return _task(
        "modular_arithmetic_brackets",
        modulus,
        True,
        "an expression of digits, +, -, * and brackets",
        "In training the value is asked for wherever the expression could end; the "
        "test counts only the end. Numbers have no sign.",
    )
