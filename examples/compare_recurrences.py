"""Which recurrence does a problem need? Layers on tasks, under one protocol.

    python examples/compare_recurrences.py --layers lru,deltanet:neg,gru \
        --tasks parity,s3,mqar --seeds 3 --budget small --out runs/comparison
    python examples/compare_recurrences.py --list

Every layer gets the same number of parameters, the same data and optimiser, and tries
the same learning rates. Seeds are trained side by side. Results go to results.jsonl in
the folder as they come. Run the same command again after an interruption, or with more
layers, and only what is missing is run. Then report.html and report.md are written.
"""

import dataclasses
import pathlib
import shlex
import sys
from typing import Literal

import tyro

from pararnn.comparison import (
    BUDGETS,
    Protocol,
    compare,
    list_layers,
    list_tasks,
    write_report,
)

# Options that override those of the budget.
REPLACED = (
    "seeds",
    "parameters",
    "state",
    "depth",
    "steps",
    "batch",
    "learning_rates",
    "seed",
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A comparison."""

    layers: str = "lru,deltanet,deltanet:neg,deltaproduct:nh=2,mamba,gru"
    """Names, with options after colons: `deltaproduct:nh=2:heads=2`, `lru:real`."""
    tasks: str = "parity,s3,mqar"
    """Names, with options after colons: `s5:swaps`, `sum_modulo:modulus=5`."""
    budget: Literal["small", "medium", "full"] = "small"
    """How large and how long: the defaults of the options below."""
    out: pathlib.Path = pathlib.Path("runs/comparison")
    """Folder of the results and the report."""
    seeds: int | None = None
    """Independent runs."""
    parameters: int | None = None
    """Parameters of a model."""
    state: int | None = None
    """Real numbers in the state of every layer; follows from the width by default."""
    depth: int | None = None
    """Blocks of a model."""
    steps: int | None = None
    """Steps of the optimiser."""
    batch: int | None = None
    """Sequences in a step."""
    learning_rates: tuple[float, ...] | None = None
    """Learning rates, all of which are tried."""
    seed: int | None = None
    """Seed of everything that is drawn."""
    report_only: bool = False
    """Write the report again, from the results in the folder."""
    list: bool = False
    """List layers and tasks, and do nothing else."""


def make_protocol(arguments: Arguments) -> Protocol:
    """Return the budget's protocol, with the options that were given."""
    given = {name: getattr(arguments, name) for name in REPLACED}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(BUDGETS[arguments.budget], **given)


def split(names: str) -> list[str]:
    """Return the names between commas."""
    return [name.strip() for name in names.split(",") if name.strip()]


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.list:
        print(f"layers: {', '.join(list_layers())}")
        print(f"tasks: {', '.join(list_tasks())}")
        return 0
    try:
        if not arguments.report_only:
            layers, tasks = split(arguments.layers), split(arguments.tasks)
            protocol = make_protocol(arguments)
            command = shlex.join(["python", *sys.argv])
            compare(layers, tasks, arguments.out, protocol, command=command)
        print(write_report(arguments.out))
    except (ValueError, ImportError, OSError) as error:
        print(f"compare_recurrences.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
