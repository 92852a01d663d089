"""The examples run from end to end, at the smallest scale."""

import pathlib
import subprocess
import sys

import pytest

from benchmarks import interruptions

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.optimised
def test_train_neural_ode(tmp_path):
    figure = tmp_path / "figure.png"
    script = EXAMPLES / "train_neural_ode.py"
    done = subprocess.run(
        [sys.executable, script, "--quick", "--output", figure],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Newton steps" in done.stdout and figure.stat().st_size > 10_000


@pytest.mark.slow
def test_parallelize_custom_cell(tmp_path):
    """The main job, which `run.py example` runs at its full size."""
    figure = tmp_path / "figure.png"
    options = ("--length", 2048, "--train-steps", 4, "--window", 64, "--batch", 2)
    done = run_example("parallelize_custom_cell.py", *options, "--output", figure)
    assert done.returncode == 0, done.stderr
    assert "BlockDiagonal(2)" in done.stdout and "step 4/4" in done.stdout
    for row in ("lax.scan", "solve (default)", "64 segments", "every step"):
        assert row in done.stdout
    assert figure.stat().st_size > 10_000


TINY = (
    *("--model.d-model", "16", "--model.d-hidden", "16", "--model.depth", "1"),
    *("--data.length", "32", "--data.batch", "2", "--data.validation-batches", "2"),
    *("--optimiser.warmup", "1", "--steps", "4"),
    *("--validate-every", "2", "--checkpoint-every", "2"),
)


def run_example(name, *arguments, under=()):
    """Run a script, optionally under a program that replaces itself with it."""
    command = [*under, sys.executable, EXAMPLES / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_model_is_trained_and_speaks(tmp_path):
    folder = tmp_path / "run"
    trained = run_example("train_lm.py", "--out", folder, *TINY)
    assert trained.returncode == 0, trained.stderr
    assert "bits/byte in validation" in trained.stdout
    again = run_example("train_lm.py", "--out", folder, *TINY)
    assert again.returncode == 1 and "holds a run already" in again.stderr
    told = run_example("sample_lm.py", folder, "--prompt", "def ", "--tokens", 5)
    assert told.returncode == 0 and told.stdout.startswith("def "), told.stderr
    missing = run_example("sample_lm.py", tmp_path)
    assert missing.returncode == 1 and "holds no run" in missing.stderr


@pytest.mark.slow
def test_a_full_disk_is_said(tmp_path):
    pytest.importorskip("resource")
    # (Not by `preexec_fn`: JAX warns if its process is forked.)
    limited = (
        "import os, resource, sys; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    folder, under = tmp_path / "run", (sys.executable, "-c", limited)
    ended = run_example("train_lm.py", "--out", folder, *TINY, under=under)
    assert ended.returncode == 1
    assert "Likely cause: the disk is full" in ended.stderr
    assert "There is no checkpoint yet." in ended.stderr


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit():
    found = interruptions.measure(kills=1)
    assert found["broken"] == found["lines that differ"] == 0
    # A checkpoint every 5 steps, each written while the next steps are taken.
    assert found["most lost"] <= 10
