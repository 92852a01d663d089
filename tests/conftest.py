"""Settings under which every test runs: strict where JAX is lenient by default."""

import os
import zlib

import hypothesis
import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling on a busy machine takes longer than any deadline for one example, and
# shrinking a failure compiles again each time, which takes minutes.
PHASES = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
hypothesis.settings.register_profile("default", deadline=None, phases=PHASES)
hypothesis.settings.register_profile(
    "ci", deadline=None, phases=PHASES, derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


# The slowest files, slowest first. Where every worker takes whole files, as in
# `run.py`, the short ones then even out the end.
LONGEST = (
    *("sharding", "linear_layers", "solve", "comparison", "methods", "cells_solved"),
    *("examples", "derivatives", "implicit", "rnn", "diffrax", "matrix_scan"),
    *("training", "models", "dynamics", "benchmarks"),
)


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture
def getkey(request):
    """A function that returns a new random key at each call, the same every run."""
    key = jax.random.key(zlib.crc32(request.node.nodeid.encode()))

    def split():
        nonlocal key
        key, new = jax.random.split(key)
        return new

    return split


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory():
    """Drop compiled programs, which otherwise grow to some gigabytes."""
    yield
    jax.clear_caches()
