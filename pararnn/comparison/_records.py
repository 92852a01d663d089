"""Results on disk: a line of JSON for each, which an interrupted run goes on from."""

import json
import os
from pathlib import Path
from typing import Any

from .._json_lines import read_lines, write_lines

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
        write_lines(path, self.records)

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
    return read_lines(path)
