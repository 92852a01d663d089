"""Language models of about a million parameters on the standard library's source."""

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
from matplotlib.figure import Figure

from pararnn.training import (
    ByteTokenizer,
    Config,
    DataConfig,
    ModelConfig,
    OptimiserConfig,
    Packed,
    evaluate,
    find_corpus,
    load_model,
    ngram_bits_per_byte,
    read_metrics,
    train,
)
from pararnn.training._run import Run

from ._case import Case, Settings

TABLES = {
    "language": "Two blocks of width 192 (mixer and MLP, byte tokens), windows of 4096 "
    "bytes of the standard library's source, 2 a step, float32, seed 0. Bits per byte: "
    "of the last checkpoint on all validation documents. Newton steps: the most over "
    "all solves of all training steps. Minutes: of the training loop.",
    "n-grams": "What counting achieves on the same windows: interpolated n-grams "
    "(Witten-Bell) of the training documents, with so many bytes of context; two bytes "
    "are an n-gram of order 3.",
    "overhead": "Time of a step in the training loop, with data, log and progress, "
    "over that of the compiled step alone on one batch; medians over the steps.",
}
RUNS = Path(__file__).parents[1] / "runs" / "language"
FIGURE = Path(__file__).parents[1] / "docs" / "language-models.png"
LENGTH = 4096
MODELS = {
    "paragru, Newton": ModelConfig(("paragru",), solver="newton", segments=64),
    "paragru, loop": ModelConfig(("paragru",), solver="sequential"),
    "paralstm, Newton": ModelConfig(("paralstm",), solver="newton", segments=64),
    "paralstm, loop": ModelConfig(("paralstm",), solver="sequential"),
    "mamba2": ModelConfig(("mamba2",)),
    "deltanet": ModelConfig(("deltanet:heads=4",)),
}


def cases(settings: Settings) -> Iterator[Case]:
    for name in MODELS:
        yield Case(
            "language", {"model": name}, lambda n=name: _measure_model(n, settings)
        )
    for context in (2, 3):
        yield Case(
            "n-grams", {"context": context}, lambda c=context: _measure_ngrams(c)
        )
    yield Case("overhead", {"model": "paragru, Newton"}, _measure_overhead)


def configure(name: str, steps: int, length: int = LENGTH) -> Config:
    return Config(
        model=MODELS[name],
        data=DataConfig(length=length, batch=2, validation_batches=16),
        optimiser=OptimiserConfig(warmup=min(50, steps // 4)),
        steps=steps,
        validate_every=min(100, steps),
        checkpoint_every=min(100, steps),
    )


def _measure_model(name: str, settings: Settings):
    steps, length = (4, 256) if settings.quick else (300, LENGTH)
    folder = RUNS / f"{name.replace(', ', '-')}-{steps}"
    train(configure(name, steps, length), folder, resume=True)
    model, _ = load_model(folder, best=False)
    lines = [line for line in read_metrics(folder) if "loss" in line]
    arrays = jax.tree.leaves(eqx.filter(model, eqx.is_array))
    # All validation documents take a minute for each model, too long for --quick.
    windows = _windows(length)[1]
    if not settings.quick:
        draw([RUNS / f"{n.replace(', ', '-')}-{steps}" for n in MODELS], FIGURE)
    return {
        "parameters": sum(a.size for a in arrays),
        "optimiser steps": steps,
        "bits per byte": (
            lines[-1]["bits_per_byte"] if settings.quick else evaluate(model, windows)
        ),
        "Newton steps": int(max(line.get("newton_steps", 0) for line in lines)),
        "residual error": max(line.get("residual", 0.0) for line in lines),
        "minutes": lines[-1]["seconds"] / 60,
        "tokens per second": float(
            np.median([line["tokens_per_second"] for line in lines])
        ),
    }


def _windows(length: int) -> tuple[Packed, Packed]:
    """Return the windows of the training runs."""
    train, validation = find_corpus().split(DataConfig.validation, seed=Config.seed)
    return (
        Packed(train, ByteTokenizer(), length, seed=Config.seed),
        Packed(validation, ByteTokenizer(), length, seed=Config.seed),
    )


def _measure_ngrams(context: int):
    start = time.perf_counter()
    score = ngram_bits_per_byte(*_windows(LENGTH), context=context)
    return {"bits per byte": score, "seconds": time.perf_counter() - start}


def _measure_overhead(steps: int = 40):
    config = dataclasses.replace(
        configure("paragru, Newton", steps, 1024),
        validate_every=steps,
        checkpoint_every=steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        # Before and after, as the load of the machine changes.
        bare = _time_steps(Run(config, Path(folder, "before")), steps)
        train(config, Path(folder, "loop"), show_progress=False)
        bare += _time_steps(Run(config, Path(folder, "after")), steps)
        lines = read_metrics(Path(folder, "loop"))
    tokens = config.data.length * config.data.batch
    # Without the first steps, which compile, and the last, which waits for nothing.
    loop = [tokens / line["tokens_per_second"] for line in lines[2 : steps - 1]]
    return {
        "loop ms": 1e3 * float(np.median(loop)),
        "step ms": 1e3 * float(np.median(bare)),
        "ratio": float(np.median(loop) / np.median(bare)),
    }


def _time_steps(run: Run, count: int) -> list[float]:
    """Seconds of the compiled step alone."""
    batch, seconds = run.next_batch(), []
    for _ in range(count):
        start = time.perf_counter()
        run.state, metrics = run.train_step(run.state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    run.close()
    return seconds[1:]


def draw(folders: list[Path], path: Path) -> None:
    """Validation curves of runs, in bits per byte."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for folder in filter(Path.exists, folders):
        lines = read_metrics(folder)
        checks = [line for line in lines if "validation_bits_per_byte" in line]
        label = folder.name.rpartition("-")[0].replace("-", ", ")
        # The loop's curve lies on that of Newton's method.
        style = "--" if label.endswith("loop") else "-"
        axis.plot(
            [line["step"] for line in checks],
            [line["validation_bits_per_byte"] for line in checks],
            style,
            marker=".",
            label=label,
        )
    axis.set_xlabel("optimiser steps")
    axis.set_ylabel("bits per byte, validation")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
