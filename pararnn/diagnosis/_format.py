"""Numbers and sentences as text."""

import math
from collections.abc import Sequence

from ._results import MethodReport


def format_steps(report: MethodReport, at: int) -> str:
    mark = "" if report.converged[at] else "> "
    return f"{mark}{report.steps[at]}"


def plural(count: int) -> str:
    return f"{count} step" + "s" * (count != 1)


def format_power(logarithm: float) -> str:
    """`exp(logarithm)`, however large or small."""
    if not math.isfinite(logarithm):
        return f"{math.exp(logarithm) if logarithm < 0 else logarithm:g}"
    if abs(logarithm) < 600:
        return f"{math.exp(logarithm):.3g}"
    return f"1e{logarithm / math.log(10):+.0f}"


def format_bytes(count: int | None) -> str:
    if count is None:
        return "unknown"
    units = ("B", "KiB", "MiB", "GiB")
    power = min(len(units) - 1, int(math.log2(max(1, count)) // 10))
    return f"{count / 1024**power:.3g} {units[power]}"


def format_duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def bullets(sentences: Sequence[str], width: int = 86) -> list[str]:
    """Wrapped at spaces, with a dash in front of each."""
    lines = []
    for sentence in sentences:
        lines.append("  -")
        for word in sentence.split(" "):
            if len(lines[-1]) + 1 + len(word) > width:
                lines.append("   ")
            lines[-1] += f" {word}"
    return lines
