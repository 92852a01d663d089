"""Files with a JSON object on each line, which an interrupted run goes on from."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Records:
    """The lines of a file, to be searched and added to.

    **Arguments:** `path`; it need not exist. A last line that was cut by a crash is
    dropped.

    **Raises:** `ValueError` if another line is no JSON object.
    """

    def __init__(self, path: Path):
        self.path = path
        self.records = read_records(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_records(path, self.records)

    def find(self, **fields: Any) -> Record | None:
        """The last record that has these values."""
        return find(self.records, **fields)

    def append(self, record: Record) -> None:
        """Add a line. **Raises:** `OSError` if the disk is full."""
        with self.path.open("a") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)


def find(records: list[Record], **fields: Any) -> Record | None:
    """The last of the records that has these values."""
    for record in reversed(records):
        if all(record.get(name) == value for name, value in fields.items()):
            return record
    return None


def read_records(path: Path) -> list[Record]:
    """The complete lines of a file; none if it does not exist.

    **Raises:** `ValueError` if one of them is no JSON object.
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
                f"{path}, line {number}, is no JSON object. Was it edited by hand? "
                "Remove the line, or the file, and run again."
            )
        found.append(value)
    return found


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write the file anew, at once or not at all."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(json.dumps(record) + "\n" for record in records))
    os.replace(fresh, path)
