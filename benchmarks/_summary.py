"""The requirements on the results, and which rows meet them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ._case import Row


class Requirement(NamedTuple):
    """At most `limit` in some columns of the rows of a table to which it `applies`."""

    name: str
    limit: float
    table: str
    columns: tuple[str, ...]
    applies: Callable[[dict[str, Any]], bool] = lambda key: True


def _is_diagonal(key) -> bool:
    return key["cell"].startswith("diagonal")


def _has_dtype(dtype: str):
    return lambda key: key["dtype"] == dtype


_VALUES = tuple(
    f"{solver} error"
    for solver in ("Sequential()", "Auto()", "Newton(256)", "Newton()")
)
REQUIREMENTS = (
    Requirement("solve: time, forward", 1.25, "solve", ("ratio",)),
    Requirement("solve: time, value and gradient", 1.25, "solve", ("v&g ratio",)),
    Requirement(
        "solve: memory, value and gradient", 0.4, "solve", ("v&g memory ratio",)
    ),
    Requirement("projections: time, forward", 1.25, "projections", ("ratio",)),
    Requirement(
        "projections: time, value and gradient", 1.25, "projections", ("v&g ratio",)
    ),
    Requirement(
        "projections: memory, value and gradient",
        0.4,
        "projections",
        ("v&g memory ratio",),
    ),
    Requirement("linear_scan: time", 1.2, "linear_scan", ("ratio",)),
    Requirement("newton: time", 1.0, "newton", ("ratio",)),
    Requirement("newton: time, diagonal", 0.2, "newton", ("ratio",), _is_diagonal),
    Requirement(
        "newton: memory, diagonal", 0.5, "newton", ("memory ratio",), _is_diagonal
    ),
    Requirement(
        "scaling: exponent of time over length",
        1.05,
        "exponents",
        ("exponent",),
        lambda key: key["time of"].endswith("solve"),
    ),
    Requirement(
        "scaling: gradient memory over iterations", 1.0, "iterations", ("memory ratio",)
    ),
    Requirement(
        "accuracy: values, float64", 1e-11, "values", _VALUES, _has_dtype("float64")
    ),
    Requirement(
        "accuracy: values, float32", 1e-5, "values", _VALUES, _has_dtype("float32")
    ),
    Requirement(
        "accuracy: gradients, float64",
        1e-9,
        "gradients",
        ("inputs error", "h0 error", "parameters error"),
    ),
    Requirement(
        "accuracy: second derivatives, float64", 1e-7, "second derivatives", ("error",)
    ),
    Requirement(
        "layers: chunks over steps, value", 1 / 3, "matrix_scan", ("chunkwise ratio",)
    ),
    Requirement(
        "layers: chunks over steps, value and gradient",
        1 / 3,
        "matrix_scan",
        ("chunkwise v&g ratio",),
    ),
    Requirement(
        "layers: chunks over a plain loop, value and gradient",
        1 / 3,
        "matrix_scan",
        ("chunkwise v&g over plain",),
    ),
    Requirement("layers: over bare scans, value", 1.3, "bare scans", ("ratio",)),
    Requirement(
        "layers: over bare scans, value and gradient",
        1.3,
        "bare scans",
        ("v&g ratio",),
    ),
    Requirement("layers: over memax, value", 1, "memax", ("ratio",)),
    Requirement("layers: over memax, value and gradient", 1, "memax", ("v&g ratio",)),
    Requirement(
        "layers: time over length at T = 131072",
        1.25,
        "long layers",
        ("ratio over length",),
    ),
    Requirement("reliability: wrong answers", 0, "random cells", ("wrong",)),
    Requirement(
        "reliability: residual of certified steps of chaotic flows, float64",
        1e-12,
        "flow solvers",
        ("residual error",),
    ),
    Requirement("reliability: time of the default on chaos", 1.5, "flows", ("ratio",)),
    Requirement(
        "reliability: steps for synchronized flows", 5, "observers", ("steps",)
    ),
    Requirement(
        "reliability: steps for the word problem of S5",
        3,
        "permutations",
        ("steps",),
        lambda key: key["T"] <= 512,
    ),
)


class Verdict(NamedTuple):
    """A requirement, and what was measured."""

    requirement: str
    limit: float
    median: float
    worst: float
    rows: int
    not_met_by: list[str]
    failed: list[str]

    @property
    def met(self) -> bool:
        return not self.not_met_by and not self.failed

    def as_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "met": self.met}


def _number(value: Any) -> float:
    return float(value["median"] if isinstance(value, dict) else value)


def summarise(rows: list[Row]) -> list[Verdict]:
    """Return a verdict on each requirement that has rows."""
    verdicts = []
    for name, limit, table, columns, applies in REQUIREMENTS:
        concerned = [row for row in rows if row.table == table and applies(row.key)]
        measured = [row for row in concerned if row.values]
        failed = [row.name() for row in concerned if row.failed]
        if not measured and not failed:
            continue
        worst = [max(_number(row.values[c]) for c in columns) for row in measured]
        verdicts.append(
            Verdict(
                name,
                limit,
                float(np.median(worst)) if worst else float("nan"),
                max(worst, default=float("nan")),
                len(measured),
                [
                    f"{row.name()} ({value:.3g})"
                    for row, value in zip(measured, worst, strict=True)
                    if not value <= limit
                ],
                failed,
            )
        )
    return verdicts


def render_summary(rows: list[Row]) -> str:
    """Return the verdicts as a Markdown table."""
    verdicts = summarise(rows)
    if not verdicts:
        return "No requirement applies to any row."
    lines = [
        "| requirement | at most | median | worst | rows | met | not met by |",
        "| --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for v in verdicts:
        named = [*v.not_met_by, *(f"{name} (failed)" for name in v.failed)]
        lines.append(
            f"| {v.requirement} | {v.limit:g} | {v.median:.3g} | {v.worst:.3g} | "
            f"{v.rows} | {'yes' if v.met else 'no'} | {'; '.join(named)} |"
        )
    return "\n".join(lines)
