"""`python -m benchmarks.seven_billion`: a training step too large for one machine.

A ParaGRU language model of seven billion parameters, sequences of 32,768 tokens, on 64
virtual CPU devices: the step of `pararnn.training` is traced on shapes and compiled.
The compiled program tells the memory of one device and what devices exchange. Nothing
is allocated. The table is printed and stored beside the other results.
"""

import argparse
import os
import time
from pathlib import Path

# Before JAX is imported: it reads them once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=64"

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import pararnn
from pararnn.training._build import Placement, make_optimiser, new_state
from pararnn.training._config import Config, MeshConfig, ModelConfig, OptimiserConfig
from pararnn.training._step import make_train_step

VOCAB, LENGTH, WIDTH, DEPTH = 32_000, 2**15, 4096, 34
MESHES = {"fsdp 8, time 8": (8, 8), "fsdp 64": (64, 1), "fsdp 16, time 4": (16, 4)}
PATH = Path(__file__).parent / "results" / "cpu-training" / "seven_billion.md"
COLUMNS = (
    "mesh",
    "sequences",
    "parameters and optimiser, GB",
    "temporary, GB",
    "all-gather, GB",
    "all-reduce, GB",
    "reduce-scatter, GB",
    "collective-permute, GB",
)


def configure(fsdp: int, time: int, depth: int) -> Config:
    return Config(
        model=ModelConfig(
            ("paragru",),
            d_model=WIDTH,
            depth=depth,
            solver="newton",
            segments=LENGTH // 16,
            rematerialise=True,
            precision="bfloat16",
        ),
        optimiser=OptimiserConfig(),
        mesh=MeshConfig(fsdp=fsdp, time=time),
    )


def measure(fsdp: int, shares: int, depth: int) -> dict[str, float]:
    """Compile one step for `fsdp` sequences, and read memory and exchange from it."""
    config = configure(fsdp, shares, depth)
    placement = Placement(config.mesh)
    shapes = eqx.filter_eval_shape(lambda: new_state(config, VOCAB))
    state = placement.with_shardings(shapes)
    step = make_train_step(
        make_optimiser(config.optimiser, config.steps),
        config.model.precision,
        placement.state,
    )
    dynamic, static = eqx.partition(state, _is_shape)

    def run(dynamic, batch):
        return eqx.filter(step(eqx.combine(dynamic, static), batch), eqx.is_array)

    with placement.context():
        jitted = jax.jit(run, donate_argnums=0)
        compiled = jitted.lower(dynamic, _batch(placement, fsdp)).compile()
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError("This platform does not report the memory of a program.")
    exchanged = pararnn.communication(compiled)
    sizes = {f"{kind}, GB": value.bytes / 1e9 for kind, value in exchanged.items()}
    arrays = eqx.filter(shapes.model, _is_shape)
    return {
        "parameters": sum(a.size for a in jax.tree.leaves(arrays)),
        "parameters and optimiser, GB": memory.argument_size_in_bytes / 1e9,
        "temporary, GB": memory.temp_size_in_bytes / 1e9,
        **sizes,
    }


def _is_shape(leaf) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _batch(placement: Placement, sequences: int) -> dict[str, jax.ShapeDtypeStruct]:
    assert placement.mesh is not None
    axes = PartitionSpec(None, ("data", "fsdp"), "time")
    place = NamedSharding(placement.mesh, axes)
    dtypes = {
        "tokens": jnp.int32,
        "targets": jnp.int32,
        "reset": jnp.bool_,
        "weights": jnp.float32,
    }
    return {
        name: jax.ShapeDtypeStruct((1, sequences, LENGTH), dtype, sharding=place)
        for name, dtype in dtypes.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=DEPTH)
    parser.add_argument("--output", type=Path, default=PATH)
    options = parser.parse_args()
    rows, parameters = [], 0
    for name, (fsdp, shares) in MESHES.items():
        start = time.perf_counter()
        found = measure(fsdp, shares, options.depth) | {"sequences": fsdp}
        print(f"{name}: compiled in {time.perf_counter() - start:.0f} s", flush=True)
        parameters = found["parameters"]
        cells = [name] + [f"{found.get(column, 0):.3g}" for column in COLUMNS[1:]]
        rows.append(f"| {' | '.join(cells)} |")
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    command = "`python -m benchmarks.seven_billion`"
    note = f"{parameters / 1e9:.2f} billion parameters, T = {LENGTH:,}; {command}."
    text = "\n".join((head, *rows, "", note, ""))
    print(text)
    options.output.write_text(text)


if __name__ == "__main__":
    main()
