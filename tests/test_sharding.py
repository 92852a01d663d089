"""Recurrences over several devices and over two processes, each in its own process.

The number of devices is fixed once JAX has started, and all other tests use one.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests import two_processes

HERE = Path(__file__).parent


def environment(devices: int) -> dict[str, str]:
    count = f"--xla_force_host_platform_device_count={devices}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_on_eight_devices():
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:xdist")
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(HERE / "eight_devices.py")],
        env=environment(8),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-10000:] + run.stderr[-2000:]


def loop_losses() -> list[float]:
    """The same training on one device, by a plain loop."""

    def loss(model, batch):
        cell, readout = model
        xs, targets = batch

        def one(xs):
            def step(h, x):
                h = cell(h, x)
                return h, h

            return lax.scan(step, cell.init_state(), xs)[1]

        return jnp.mean((jax.vmap(one)(xs) @ readout - targets) ** 2)

    return two_processes.train(loss, *two_processes.problem())


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    command = (sys.executable, HERE / "two_processes.py", address)
    files = [tmp_path / f"losses-{number}.json" for number in range(2)]
    started = [
        subprocess.Popen(
            [*map(str, command), str(number), str(file)],
            env=environment(2),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, file in enumerate(files)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, said in zip(started, errors, strict=True):
        assert process.returncode == 0, said[-5000:]
    expected = loop_losses()
    assert expected[-1] < expected[0]
    for file in files:
        runs = json.loads(file.read_text())
        assert len(runs) == len(two_processes.MESHES)
        for losses in runs:
            np.testing.assert_allclose(losses, expected, rtol=1e-10)
