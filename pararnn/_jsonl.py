"""Records of long runs, a JSON object a line, and the machine they were made on."""

import json
import operator
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

Record = dict[str, Any]


class Records:
    """The lines of a file, which can be searched and added to.

    **Arguments:** `path`; the file need not exist. A last line that was cut off by a
    crash is dropped.

    **Raises:** `ValueError` if another line is not a JSON object.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records = read_records(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_records(path, self.records)

    def find(self, **fields: Any) -> Record | None:
        """Return the last record that has these values."""
        return find(self.records, **fields)

    def append(self, record: Record) -> None:
        """Add a line. **Raises:** `OSError` if the disk is full."""
        with self.path.open("a") as file:
            # The function for other types is for NumPy's integers.
            line = json.dumps(record, allow_nan=False, default=operator.index)
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)


def find(records: list[Record], **fields: Any) -> Record | None:
    """Return the last of the records that has these values."""
    for record in reversed(records):
        if all(record.get(name) == value for name, value in fields.items()):
            return record
    return None


def read_records(path: Path) -> list[Record]:
    """Return the complete lines of a file; none if it does not exist.

    **Raises:** `ValueError` if one of them is not a JSON object.
    """
    if not path.exists():
        return []
    *complete, _ = path.read_text().split("\n")
    found = []
    for number, line in enumerate(complete, start=1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            raise ValueError(
                f"{path}, line {number}, is not a JSON object. Was it edited by hand? "
                "Remove the line, or the file, and run again."
            )
        found.append(value)
    return found


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Replace the file by these records, all at once or not at all."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(fresh, path)


PACKAGES = ("jax", "jaxlib", "equinox", "optax", "numpy")


def describe_machine() -> dict[str, Any]:
    """Return the device, the processor, its cores, the system and versions."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "devices": jax.device_count(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line for line in file if line.startswith("model name")]
        return names[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
