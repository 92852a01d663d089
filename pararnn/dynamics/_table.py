"""What reconstructions came to, as a table."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from .._jsonl import Record

HEADER = (
    "System",
    "Cell",
    "Forcing",
    "Divergence",
    "Spectrum",
    "Lyapunov exponent",
    "Seconds a run",
)


def write_table(records: Sequence[Record], path: Path) -> None:
    """Write the medians of the runs, the best one in brackets, as Markdown.

    The first row of a system compares two trajectories of the system itself: what no
    reconstruction can be better than, but by chance.
    """
    rows = [HEADER, ("---",) * len(HEADER)]
    for record in records:
        if record["kind"] == "system":
            rows.append(_system(record))
            rows += [_row(r) for r in records if _belongs(r, record)]
    lines = ("| " + " | ".join(row) + " |" for row in rows)
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _belongs(record: Record, system: Record) -> bool:
    same = ("system", "units", "runs", "observations", "seed", "recipe", "solver")
    return record["kind"] == "reconstruction" and all(
        record[name] == system[name] for name in same
    )


def _system(record: Record) -> tuple[str, ...]:
    return (
        record["system"],
        "the system itself",
        "",
        f"{record['divergence']:.2f}",
        f"{record['spectrum']:.2f}",
        _number(record["exponent"]),
        "",
    )


def _row(record: Record) -> tuple[str, ...]:
    best = record["measured"][record["best"]]

    def cell(name: str) -> str:
        values = [found[name] for found in record["measured"]]
        middle = None if None in values else statistics.median(values)
        return f"{_number(middle)} ({_number(best[name])})"

    return (
        record["system"],
        record["cell"],
        record["forcing"],
        cell("divergence"),
        cell("spectrum"),
        cell("exponent"),
        f"{record['seconds'] / record['runs']:.0f}",
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2f}"
