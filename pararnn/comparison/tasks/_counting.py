"""Regular languages of commuting steps: parity, sums, cycles, and pairs."""

import jax.numpy as jnp

from ..._parameters import check_size
from ._draw import integers, within
from ._metric import Metric
from ._task import Example, Lengths, Sampler, Task

FORMAL = Lengths((3, 40), (40, 64, 96, 128, 192, 256))
CHOMSKY = (
    'Delétang et al., "Neural Networks and the Chomsky Hierarchy" (2207.02098); '
    "lengths and score as in Grazzi et al. (2411.12537) and Beck et al. (2405.04517)"
)
EVERY_STEP = "The answer is asked for after every step, not only after the last."


def _sums(steps: tuple[int, ...], modulus: int) -> Sampler:
    """Tokens of which each adds its own number to a sum."""

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
    """Where one is on a cycle after steps forwards, backwards and none."""
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
