"""Where results are stored, and how they read in Markdown."""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from ._case import Row
from ._summary import render_summary, summarise


def describe_machine(quick: bool) -> dict[str, Any]:
    """Return what results depend on; results of different machines are not mixed."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": _cpu_model() if device.platform == "cpu" else device.device_kind,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "os": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "equinox")},
        "quick": quick,
    }


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Results:
    """The rows of a folder's `results.json`, written after every row."""

    def __init__(self, folder: Path, machine: dict[str, Any], command: str):
        self.folder = folder
        self.machine = machine
        self.rows: list[Row] = []
        self.runs: list[dict[str, Any]] = []
        self.derived: list[Row] = []
        self._command = command

    @property
    def json_path(self) -> Path:
        return self.folder / "results.json"

    @property
    def summary_path(self) -> Path:
        return self.folder / "summary.md"

    @property
    def markdown_path(self) -> Path:
        return self.folder / "results.md"

    def load(self) -> bool:
        """Load the folder's results, if they are from this machine."""
        if not self.json_path.exists():
            return True
        stored = json.loads(self.json_path.read_text())
        if stored["machine"] != self.machine:
            return False
        self.rows = [Row(**row) for row in stored["rows"]]
        self.runs = stored["runs"]
        return True

    def start_run(self) -> None:
        self.runs.append(
            {
                "command": self._command,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "load": [round(load, 2) for load in os.getloadavg()]
                if hasattr(os, "getloadavg")
                else [],
                "seconds": 0.0,
            }
        )

    def add(self, row: Row, seconds: float) -> None:
        """Store a row; `seconds` is how long the run has taken so far."""
        self.rows.append(row._replace(run=len(self.runs) - 1))
        self.runs[-1]["seconds"] = round(seconds, 1)
        self.write_json()

    def write_json(self) -> None:
        everything = self.rows + self.derived
        content = {
            "machine": self.machine,
            "runs": self.runs,
            "rows": [row._asdict() for row in self.rows],
            "derived": [row._asdict() for row in self.derived],
            "summary": [verdict.as_dict() for verdict in summarise(everything)],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        # Replaced in one go, so that an interruption never leaves half a file.
        partial = self.json_path.with_suffix(".partial")
        text = json.dumps(_finite(content), indent=1, allow_nan=False)
        partial.write_text(text + "\n")
        partial.replace(self.json_path)

    def write_markdown(self, captions: dict[str, dict[str, str]]) -> None:
        sections = [
            "# Benchmark results",
            self.render_header(),
            "## Summary",
            render_summary(self.rows + self.derived),
            *self.render_groups(captions),
        ]
        self.markdown_path.write_text("\n\n".join(sections) + "\n")

    def render_header(self) -> str:
        machine = self.machine
        seconds = sum(run["seconds"] for run in self.runs)
        lines = [
            f"- Machine: {machine['device']} ({machine['platform']}), "
            f"{machine['cores']} CPU cores",
            f"- System: {machine['os']}",
            *(
                f"- {name}: {machine[name]}"
                for name in ("python", "jax", "jaxlib", "equinox")
            ),
            f"- Duration: {seconds / 60:.1f} minutes",
            *(
                f"- Run on {run['date']}, load average {run['load']}: "
                f"`{run['command']}`"
                for run in self.runs
            ),
        ]
        note = (
            "Times are medians. A ratio is the median over samples taken in turn, with "
            "the least and the greatest of them in parentheses. MB are 10^6 bytes."
        )
        return "\n".join(lines) + "\n\n" + note

    def render_groups(self, captions: dict[str, dict[str, str]]) -> list[str]:
        """A heading and tables for each group that has rows."""
        sections = []
        for group, tables in captions.items():
            rows = [row for row in self.rows + self.derived if row.group == group]
            if not rows:
                continue
            sections.append(f"## {group}")
            for table, caption in tables.items():
                of_table = [row for row in rows if row.table == table]
                if of_table:
                    sections += [caption, render_table(of_table)]
        return sections


def render_table(rows: list[Row]) -> str:
    """Return a Markdown table, and below it a list of what was left out or failed."""
    measured = [row for row in rows if row.values]
    parts = []
    if measured:
        keys = _union(row.key for row in measured)
        columns = _union(row.values for row in measured)
        lines = [keys + columns, ["---"] * len(keys) + ["---:"] * len(columns)]
        for row in measured:
            lines.append(
                [str(row.key.get(k, "")) for k in keys]
                + [format_value(c, row.values.get(c, "")) for c in columns]
            )
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    for title, field in (("Left out", "left_out"), ("Failed", "failed")):
        notes = [
            f"- {row.name()}: {getattr(row, field)}"
            for row in rows
            if getattr(row, field)
        ]
        if notes:
            parts.append("\n".join([f"{title}:", "", *notes]))
    return "\n\n".join(parts)


def _union(dicts) -> list[str]:
    return list(dict.fromkeys(key for d in dicts for key in d))


def format_value(column: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['median']:.2f} ({value['min']:.2f} to {value['max']:.2f})"
    if not isinstance(value, float):
        return str(value)
    if "error" in column:
        return f"{value:.1e}"
    if any(word in column for word in ("ratio", "exponent", "bits per byte")):
        return f"{value:.3f}"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _finite(value: Any) -> Any:
    """JSON has no infinities; `float` reads them from strings."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not abs(value) <= sys.float_info.max:
        return str(value)
    return value
