"""The training loop."""

import contextlib
import dataclasses
import math
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from .._progress import Progress
from ._build import (
    Data,
    Placement,
    abstract_state,
    make_optimiser,
    make_sharded,
    new_state,
    open_data,
    training_batches,
    validation_batches,
)
from ._checkpoints import Checkpoints
from ._config import Config
from ._metrics import MetricLog, draw_curves, read_metrics
from ._step import (
    Batch,
    TrainState,
    bits_per_byte,
    bits_per_nat,
    make_train_step,
    make_validation,
)

CONFIG = "config.json"


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


class TrainingFailed(RuntimeError):
    """A run that cannot go on; the message names the last good checkpoint."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended.

    `step` is the number of the optimiser's steps so far; `finished` is whether these
    are all; `signal` is the name of the signal that ended it early; `bits_per_byte` is
    the result of the last validation; `checkpoint` is the newest checkpoint.
    """

    step: int
    finished: bool
    signal: str | None
    bits_per_byte: float | None
    checkpoint: Path | None


class StepRecord(NamedTuple):
    """The number of a step, its metrics (perhaps still computed) and its duration."""

    step: int
    metrics: dict[str, Array]
    seconds: float


class Run:
    """The state of a run, its data, and what it writes."""

    def __init__(self, config: Config, folder: Path):
        self.config, self.folder = config, folder
        # Before anything is written: most mistakes in a configuration show up here.
        self.data: Data = open_data(config)
        self.placement = Placement(config.mesh)
        folder.mkdir(parents=True, exist_ok=True)
        self.batches = training_batches(config, self.data)
        self.checkpoints = Checkpoints(folder / "checkpoints", config.keep)
        self.step, self.state = self._restore()
        # One host writes the log; all of them write checkpoints.
        self.is_main_process = jax.process_index() == 0
        if self.is_main_process:
            config.save(folder / CONFIG)
        self.log = MetricLog(folder, self.step) if self.is_main_process else None
        self.seconds = _seconds_of(read_metrics(folder))
        self.bits_per_byte: float | None = None
        self.last_numbers = ""
        optimiser = make_optimiser(config.optimiser, config.steps)
        self.train_step = make_train_step(
            optimiser, config.model.precision, self.placement.state
        )
        self.validate_batch = make_validation(config.model.precision)

    def _restore(self) -> tuple[int, TrainState]:
        size = self.data.tokenizer.vocab_size
        step = self.checkpoints.latest()
        if step is None:
            return 0, make_sharded(lambda: new_state(self.config, size), self.placement)
        like = self.placement.with_shardings(abstract_state(self.config, size))
        state, place = self.checkpoints.restore(step, like)
        self.batches.set_state(place)
        return step, state

    def resume_point(self) -> str:
        """Return a sentence that says where to continue from."""
        # A write may still be in progress; one that fails leaves nothing on disk.
        with contextlib.suppress(OSError):
            self.checkpoints.wait()
        step = self.checkpoints.on_disk()
        if step is None:
            return "There is no checkpoint yet."
        return f"The last good checkpoint is {self.checkpoints.path(step)}."

    def train(self, interrupts: Interrupts, show_progress: bool) -> Outcome:
        """Train until the last step, or until a signal asks to stop."""
        bar = Progress(show_progress and self.is_main_process)
        with self.placement.context(), bar as progress:
            progress.begin("compiling", self.config.steps, self.step)
            self._loop(interrupts, progress)
        self.checkpoints.wait()
        if self.is_main_process:
            draw_curves(self.folder)
        newest = self.checkpoints.latest()
        return Outcome(
            step=self.step,
            finished=self.step >= self.config.steps,
            signal=interrupts.asked,
            bits_per_byte=self.bits_per_byte,
            checkpoint=None if newest is None else self.checkpoints.path(newest),
        )

    def _loop(self, interrupts: Interrupts, progress: Progress) -> None:
        pending, started = None, time.perf_counter()
        while self.step < self.config.steps and not interrupts.asked:
            batch = self.next_batch()
            self.state, metrics = self.train_step(self.state, batch)
            self.step += 1
            validating = self._is_due(self.config.validate_every)
            saving = validating or self._is_due(self.config.checkpoint_every)
            # One step late, so that the next step runs while this one is written.
            if pending is not None:
                self._write_record(pending, progress)
            if saving or interrupts.asked:
                jax.block_until_ready(metrics)
            now = time.perf_counter()
            pending, started = StepRecord(self.step, metrics, now - started), now
            if saving or interrupts.asked:
                self._write_record(pending, progress)
                self._save(progress, validate=validating)
                pending, started = None, time.perf_counter()
        if pending is not None:
            # A signal came after the loop last checked for one.
            self._write_record(pending, progress)
            self._save(progress, validate=False)

    def next_batch(self) -> Batch:
        """Return the batch of the next step: leaves `[microbatches, batch, T]`."""
        count = self.config.optimiser.accumulate
        window: dict[str, Any] = dict(next(self.batches))
        cut = {k: v.reshape(count, -1, v.shape[-1]) for k, v in window.items()}
        return self.placement.batch(cut, batch_axis=1)

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.steps

    def _write_record(self, record: StepRecord, progress: Progress) -> None:
        """Write the metrics of a step; waits until it is done."""
        metrics = {name: float(value) for name, value in record.metrics.items()}
        if not all(math.isfinite(metrics[k]) for k in ("loss", "gradient_norm")):
            raise TrainingFailed(
                f"train: step {record.step} has a loss of {metrics['loss']} and a "
                f"gradient of norm {metrics['gradient_norm']}. "
                f"{self.resume_point()} Likely causes: (a) the learning rate is too "
                "high, or the warm-up too short; (b) a cell whose state grows without "
                "bound. Lower `optimiser.learning_rate`, and call again with `resume`."
            )
        data = self.config.data
        tokens = data.length * data.batch * self.config.optimiser.accumulate
        self.seconds += record.seconds
        values = {
            "loss": metrics["loss"],
            "bits_per_byte": metrics["loss"] * bits_per_nat(self.data.training),
            **metrics,
            "tokens_per_second": tokens / record.seconds,
            "seconds": self.seconds,
        }
        if self.log is not None:
            self.log.write(record.step, values)
        self.last_numbers = _describe_step(values)
        progress.show_step(record.step, self.last_numbers)

    def _save(self, progress: Progress, *, validate: bool) -> None:
        score = self._validate() if validate else None
        self.checkpoints.save(self.step, self.state, self.batches.get_state(), score)
        if score is not None:
            self.bits_per_byte = score
            progress.print(
                f"step {self.step}: {score:.4f} bits/byte in validation; "
                f"{self.last_numbers}"
            )
        if score is not None and self.log is not None:
            self.log.write(self.step, {"validation_bits_per_byte": score})
            draw_curves(self.folder)

    def _validate(self) -> float:
        batches = (
            self.placement.batch(dict(batch), batch_axis=0)
            for batch in validation_batches(self.config, self.data)
        )
        return bits_per_byte(
            self.validate_batch, self.state.model, batches, self.data.validation
        )

    def close(self) -> None:
        """Close the files."""
        if self.log is not None:
            self.log.close()
        # `wait` has raised, or is raising, what could not be written.
        with contextlib.suppress(OSError):
            self.checkpoints.close()


def _describe_step(values: dict[str, Any]) -> str:
    """Return the numbers of a step that the progress bar shows."""
    parts = [
        f"loss {values['loss']:.3f}",
        f"{values['tokens_per_second']:,.0f} tokens/s",
    ]
    if "newton_steps" in values:
        parts.append(f"Newton {values['newton_steps']:.0f}")
        parts.append(f"residual {values['residual']:.0e}")
    return ", ".join(parts)


def _seconds_of(lines: list[dict[str, Any]]) -> float:
    return max((line.get("seconds", 0.0) for line in lines), default=0.0)
