"""The progress bar of a run."""

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as Bar,
    TextColumn,
    TimeRemainingColumn,
)


class Progress:
    """A bar with the last step's numbers; silent where it is not wanted.

    A line at each validation stays, also where there is no terminal for the bar.
    """

    def __init__(self, steps: int, done: int, visible: bool):
        self._console, self._visible = Console(), visible
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (visible and self._console.is_terminal),
        )
        self._task = self._bar.add_task("compiling", total=steps, completed=done)
        self._last = ""

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def show_step(self, step: int, values: dict[str, Any]) -> None:
        """Move the bar, and show a step's numbers beside it."""
        parts = [
            f"loss {values['loss']:.3f}",
            f"{values['tokens_per_second']:,.0f} tokens/s",
        ]
        if "newton_steps" in values:
            parts.append(f"Newton {values['newton_steps']:.0f}")
            parts.append(f"residual {values['residual']:.0e}")
        self._last = ", ".join(parts)
        self._bar.update(self._task, completed=step, description=self._last)

    def show_validation(self, step: int, bits_per_byte: float) -> None:
        """Print a line that stays."""
        if self._visible:
            text = f"step {step}: {bits_per_byte:.4f} bits/byte in validation; "
            self._console.print(text + self._last, highlight=False, soft_wrap=True)
