"""Signals that ask a run to stop, which it does after the current step."""

import signal
from types import FrameType


class Interrupts:
    """Within `with`, SIGTERM and the first Ctrl-C only set `asked`.

    A second Ctrl-C raises `KeyboardInterrupt` as usual. Outside the main thread, where
    Python receives no signals, this has no effect.
    """

    def __init__(self):
        self.asked: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupts":
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._on_signal)
        except ValueError:  # not the main thread
            pass
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
