"""The progress bar of many runs."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as Bar,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Progress:
    """A bar for all runs and one for the steps of this one; silent where not wanted.

    A line for each result stays, also where there is no terminal for the bars.
    """

    def __init__(self, runs: int, visible: bool):
        self._console, self._visible = Console(), visible
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (visible and self._console.is_terminal),
        )
        self._all = self._bar.add_task("all runs", total=runs)
        self._one = self._bar.add_task("", total=1, visible=False)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def begin(self, what: str, steps: int) -> None:
        """A run of so many steps begins."""
        self._bar.reset(self._one, total=steps, description=what, visible=True)

    def show_step(self, what: str, step: int, loss: float) -> None:
        """Move the bar of the run."""
        text = f"{what}, loss {loss:.4f}"
        self._bar.update(self._one, completed=step, description=text)

    def finish(self, what: str) -> None:
        """Move the bar of all runs, and print a line that stays."""
        self._bar.advance(self._all)
        if self._visible:
            self._console.print(what, highlight=False, soft_wrap=True)
