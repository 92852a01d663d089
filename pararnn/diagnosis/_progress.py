"""The progress bar."""

import importlib
import time
from typing import Any


class Progress:
    """A bar on the terminal from the second second on; nothing without `rich`."""

    def __init__(self, total: int, wanted: bool):
        self.total, self.wanted, self.done = total, wanted, 0
        self.started = time.perf_counter()
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, text: str) -> None:
        """Say what is worked on now; everything said before is done."""
        if self.bar is None and time.perf_counter() - self.started > 1:
            self._open()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, description=text)
        self.done += 1

    def _open(self) -> None:
        if not self.wanted:
            return
        try:
            console = importlib.import_module("rich.console").Console(stderr=True)
            make = importlib.import_module("rich.progress").Progress
        except ImportError:
            self.wanted = False
            return
        self.wanted = console.is_terminal
        if self.wanted:
            self.bar = make(console=console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total)
