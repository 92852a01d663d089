"""The examples: that they run from end to end, at the smallest scale."""

import json
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_track_state(tmp_path):
    output = tmp_path / "scores.json"
    arguments = {"only": "two factors", "steps": 2, "seeds": 2, "batch": 4}
    arguments |= {"train-length": 8, "test-length": 32, "d-model": 8, "output": output}
    options = [str(v) for pair in arguments.items() for v in (f"--{pair[0]}", pair[1])]
    command = [sys.executable, EXAMPLES / "track_state.py", *options]
    subprocess.run(command, check=True, timeout=300)
    first = output.read_text()
    # A second run finds the results of the first.
    subprocess.run(command, check=True, timeout=300)
    assert output.read_text() == first
    (row,) = json.loads(output.read_text())["results"].values()
    assert len(row["scores"]) == 2 and len(row["curve"]) == 32
    # Two steps teach nothing: close to guessing, which counts as zero.
    assert all(-0.3 < score < 0.5 for score in row["scores"])
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_track_state_names_what_there_is():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "track_state.py", "--only", "transformer"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode and "DeltaProduct" in done.stderr


@pytest.mark.slow
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
