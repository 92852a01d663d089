"""The conditions under which all layers are compared."""

import dataclasses
import hashlib
import json
import operator
from types import MappingProxyType

import jax

from .._checks import is_count
from .tasks import Lengths, Task


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is the same for every layer and task of a comparison.

    **Raises:** `ValueError` on a value outside its range.
    """

    parameters: int = 16_000
    """Parameters of a model, maps in and out included."""
    state: int | None = None
    """Real numbers that the recurrence of each layer carries, without the last inputs
    for convolutions. Defaults to what follows from the width of the model."""
    depth: int = 1
    """Number of blocks."""
    steps: int = 1_500
    """Steps of the optimiser."""
    batch: int = 32
    """Sequences in a step."""
    learning_rates: tuple[float, ...] = (1e-2, 3e-2)
    """Each layer is trained with all of them; the report shows the one whose validation
    loss has the lowest median."""
    weight_decay: float = 0.01
    """Weight decay of matrices."""
    seeds: int = 3
    """Independent runs."""
    side_by_side: bool = True
    """Train all seeds at once, by `jax.vmap`, rather than one after the other."""
    short: bool = True
    """Use the shorter lengths of a task if it has some."""
    test_sequences: int = 256
    """Sequences in the test, for each length."""
    points: int = 20
    """Points of the curves over training."""
    cost_lengths: tuple[int, ...] = (128, 512, 2048)
    """Lengths at which time and memory are measured."""
    cost_batch: int = 8
    """Sequences in the measurement of time and memory."""
    seed: int = 0
    """Seed of everything that is drawn."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), LEAST.get(field.name)
            if value is None and field.default is None:
                continue
            values = value if isinstance(value, tuple) else (value,)
            if least is not None and (
                not values or not all(_fits(v, least) for v in values)
            ):
                kind = "a number above" if least == 0.0 else "whole numbers from"
                raise ValueError(
                    f"Protocol: `{field.name}` is {value!r}, expected {kind} {least}."
                )
        if not 0 <= self.weight_decay < 1:
            raise ValueError(
                f"Protocol: `weight_decay` is {self.weight_decay!r}, expected a number "
                "in [0, 1)."
            )

    def lengths(self, task: Task) -> Lengths:
        """Return the lengths of a task under this protocol."""
        return task.short if self.short and task.short else task.lengths

    def fingerprint(self, task: Task | None = None) -> str:
        """Hash all that results depend on: this, the lengths, JAX and the device."""
        values = dataclasses.asdict(self)
        if task is None:
            values = {k: v for k, v in values.items() if k in COST}
        else:
            values = {k: v for k, v in values.items() if k not in ONLY_COST}
            values["lengths"] = dataclasses.asdict(self.lengths(task))
        # A run with one rate does not depend on which others there are.
        values.pop("learning_rates", None)
        values["jax"] = jax.__version__
        values["device"] = jax.devices()[0].device_kind
        text = json.dumps(values, sort_keys=True, default=operator.index)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# Lower bounds: 0.0 is excluded, and for numbers; the others are for whole numbers.
LEAST = {
    "parameters": 1,
    "state": 1,
    "depth": 1,
    "steps": 2,
    "batch": 1,
    "learning_rates": 0.0,
    "seeds": 1,
    "test_sequences": 1,
    "points": 1,
    "cost_lengths": 1,
    "cost_batch": 1,
    "seed": 0,
}
ONLY_COST = ("cost_lengths", "cost_batch")
COST = ("parameters", "state", "depth", "seed", *ONLY_COST)


def _fits(value, least: float) -> bool:
    if isinstance(least, float):
        return isinstance(value, int | float) and least < value < float("inf")
    return is_count(value, int(least))


BUDGETS: MappingProxyType[str, Protocol] = MappingProxyType(
    {
        "small": Protocol(),
        "medium": Protocol(
            parameters=50_000,
            steps=3_000,
            batch=64,
            learning_rates=(1e-3, 3e-3, 1e-2),
            short=False,
            test_sequences=512,
            points=30,
            cost_lengths=(128, 512, 2048, 8192),
        ),
        "full": Protocol(
            parameters=200_000,
            depth=2,
            steps=20_000,
            batch=128,
            learning_rates=(3e-4, 1e-3, 3e-3, 1e-2),
            seeds=5,
            short=False,
            test_sequences=1024,
            points=50,
            cost_lengths=(128, 512, 2048, 8192, 32768),
        ),
    }
)
