"""Progress bars of long runs."""

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
    """A bar for the steps of a run, and one for all runs if there are several.

    Lines that are printed stay, also where there is no terminal for the bars.

    **Arguments:** `visible`, whether to show anything; `runs`, how many runs there
    are; `None` for a single one.
    """

    def __init__(self, visible: bool, runs: int | None = None):
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
        self._all = self._bar.add_task("all runs", total=runs, visible=runs is not None)
        self._one = self._bar.add_task("", total=1, visible=False)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def begin(self, text: str, steps: int, done: int = 0) -> None:
        """Begin a run of `steps` steps, of which `done` have been taken."""
        self._bar.reset(
            self._one, total=steps, completed=done, description=text, visible=True
        )

    def show_step(self, step: int, text: str) -> None:
        """Move the bar of the run, and describe it by `text`."""
        self._bar.update(self._one, completed=step, description=text)

    def finish(self, text: str) -> None:
        """Move the bar of all runs, and print a line that stays."""
        self._bar.advance(self._all)
        self.print(text)

    def print(self, text: str) -> None:
        """Print a line that stays."""
        if self._visible:
            self._console.print(text, highlight=False, soft_wrap=True)
