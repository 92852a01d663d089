"""`python -m benchmarks.cores`: a batch on one device, and on one for each core.

XLA's CPU backend does the small products of a step on one core. With one virtual device
for each core and the batch sharded over them, all cores work. The number of devices is
fixed when a process starts, so each measurement is a process of its own, in turn.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

FLAG = "--xla_force_host_platform_device_count"
SHAPES = ((16, 512, 128), (32, 256, 256), (64, 128, 512))
ROUNDS = 3
OUTPUT = Path(__file__).parent / "results" / "cpu-users" / "cores.md"


def measure(devices: int) -> dict[str, float]:
    """Milliseconds of each program, with the batch over so many devices."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import jax.random as jr

    import pararnn

    from ._rnn_peers import value_and_gradient
    from ._timing import compile_all, time_in_turn

    mesh, found = pararnn.make_mesh(data=devices), {}
    for cls in (pararnn.GRUCell, pararnn.LSTMCell):
        for shape in SHAPES:
            cell = cls(shape[-1], shape[-1], key=jr.key(0))
            arrays, static = eqx.partition(pararnn.RNN(cell), eqx.is_inexact_array)

            def run(arrays, xs, static=static):
                return jax.vmap(lambda x: eqx.combine(arrays, static)(x)[0])(xs)

            with jax.set_mesh(mesh):
                arrays = pararnn.shard_parameters(arrays, mesh)
                xs = pararnn.shard_batch(jnp.ones(shape), mesh)
                programs = {
                    "forward": run,
                    "value and gradient": value_and_gradient(run),
                }
                compiled = compile_all(programs, arrays, xs)
                times = time_in_turn(compiled, arrays, xs, quick=True)
            name = f"{cls.__name__}, B, T, H = {', '.join(map(str, shape))}"
            found |= {f"{name} | {what}": times.ms(what) for what in programs}
    return found


def _measure_in_process(devices: int) -> dict[str, float]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}={devices}".strip()
    command = [sys.executable, "-m", "benchmarks.cores", "--devices", str(devices)]
    environment = os.environ | {"XLA_FLAGS": flags}
    out = subprocess.run(command, env=environment, capture_output=True, check=True)
    return json.loads(out.stdout.decode().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, help="measure once, in this process")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if options.devices:
        print(json.dumps(measure(options.devices)))
        return
    cores = os.cpu_count() or 1
    rounds = [
        (_measure_in_process(1), _measure_in_process(cores)) for _ in range(ROUNDS)
    ]
    lines = [
        f"| layer | program | one device, ms | {cores} devices, ms | ratio |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name in rounds[0][0]:
        one, all_cores = (min(r[side][name] for r in rounds) for side in (0, 1))
        lines.append(
            f"| {name} | {one:.3g} | {all_cores:.3g} | {all_cores / one:.2f} |"
        )
    table = "\n".join(lines)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
