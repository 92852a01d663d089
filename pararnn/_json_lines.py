"""Files with a JSON object on each line, which a crash may have cut."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
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


def write_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    """Write the file anew, at once or not at all."""
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(json.dumps(value) + "\n" for value in values))
    os.replace(fresh, path)
