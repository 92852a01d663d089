"""The sections of the report that a diagnosis prints as."""

from collections.abc import Sequence

from ..solver import AbstractMethod, Sequential
from ._format import bullets, format_bytes, format_duration, format_power, format_steps
from ._options import name_of
from ._results import Growth, MethodReport

CAVEAT = (
    "A negative exponent alone does not promise few steps: it describes the solution,",
    "not the trajectories that a method passes on its way there. The steps below are",
    "measured.",
)


def describe_growth(
    trajectory: Growth, at_h0: Growth, log_pl_bound: float
) -> list[str]:
    return [
        "Growth of perturbations",
        f"  {'along the solution':<19} {_growth_line(trajectory)}",
        f"  {'at h0':<19} {_growth_line(at_h0)}",
        f"  {'conditioning':<19} sqrt(PL constant) at most "
        f"{format_power(log_pl_bound)}; 1 is best",
        *(f"  {line}" for line in CAVEAT),
    ]


def describe_methods(
    methods: dict[str, MethodReport], sequential: MethodReport, max_steps: int
) -> list[str]:
    return [
        f"Steps until certified, of at most {max_steps}; at T: depth (evaluations",
        "one after the other), temporary memory and time of a forward solve",
        *(f"  {line}" for line in _table(methods, sequential)),
    ]


def describe_recommendation(
    solver: AbstractMethod | Sequential, reasons: Sequence[str]
) -> list[str]:
    name = name_of(solver) if isinstance(solver, AbstractMethod) else "Sequential()"
    return [f"Recommended: {name}", *bullets(reasons)]


def _growth_line(growth: Growth) -> str:
    text = f"Lyapunov exponent {growth.exponent:+.3g} a step; "
    if growth.log_growth == 0:
        return text + "no growth between any two states"
    return (
        f"{text}largest growth {format_power(growth.log_growth)}, "
        f"from state {growth.first} to {growth.last}"
    )


def _table(methods: dict[str, MethodReport], sequential: MethodReport) -> list[str]:
    lengths = sequential.lengths
    rows = [["T =", *map(str, lengths), "depth", "memory", "time"]]
    for name, report in methods.items():
        steps = [format_steps(report, i) for i in range(len(lengths))]
        depth = str(report.serial_steps) if report.converged[-1] else "-"
        rows.append([name, *steps, depth, *_costs(report)])
    unmeasured = ["-"] * len(lengths)
    depth = str(sequential.serial_steps)
    rows.append(["Sequential()", *unmeasured, depth, *_costs(sequential)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _costs(report: MethodReport) -> list[str]:
    return [format_bytes(report.memory), format_duration(report.seconds)]
