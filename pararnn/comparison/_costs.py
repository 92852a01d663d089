"""Time and memory of a layer against the length, forward and backward."""

import math
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

from ._layers import make_layer, needs_images
from ._once import run_once
from ._protocol import Protocol
from ._seeds import key_of

# A time is the least of so many calls, or of those that fit into so many seconds.
REPEATS, SECONDS = 5, 1.0


def measure_costs(layer: str, d_model: int, protocol: Protocol) -> dict[str, Any]:
    """Seconds and bytes of a layer alone, at every length of the protocol.

    **Arguments:** `layer`, as of `expand_layer`; `d_model`; `protocol`, for its
    lengths and batch. Images have the largest squares up to the lengths.

    **Returns:** `lengths`, and for each of `forward_seconds`, `backward_seconds` (the
    gradient of the parameters, the forward pass included), `forward_bytes` and
    `backward_bytes` (what the compiled program allocates beside its arguments) a list
    along them. Bytes are `None` where the platform does not tell.
    """
    key = key_of(protocol.seed, "costs")
    model = run_once(lambda key: make_layer(layer, d_model, key=key), key)
    found: dict[str, list] = {f"{n}_{unit}": [] for n in PROGRAMS for unit in UNITS}
    lengths = list(protocol.cost_lengths)
    if needs_images(layer):
        lengths = [math.isqrt(length) ** 2 for length in lengths]
    for length in lengths:
        shape = (protocol.cost_batch, length, d_model)
        xs = run_once(lambda key, shape=shape: jr.normal(key, shape, float), key)
        for name, program in PROGRAMS.items():
            compiled = eqx.filter_jit(program).lower(model, xs).compile()
            found[f"{name}_seconds"].append(_time(compiled, model, xs))
            found[f"{name}_bytes"].append(_temporary_bytes(compiled))
    return {"lengths": lengths, **found}


def _forward(model, xs):
    return jax.vmap(lambda x: model(x)[0])(xs)


def _backward(model, xs):
    return eqx.filter_grad(lambda m: jnp.mean(_forward(m, xs) ** 2))(model)


PROGRAMS = {"forward": _forward, "backward": _backward}
UNITS = ("seconds", "bytes")


def _time(compiled, *inputs) -> float:
    # The first call may touch memory for the first time.
    jax.block_until_ready(compiled(*inputs))
    times = []
    while len(times) < REPEATS and sum(times) < SECONDS:
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - begin)
    return min(times)


def _temporary_bytes(compiled) -> int | None:
    analysis = compiled.compiled.memory_analysis()
    return getattr(analysis, "temp_size_in_bytes", None)
