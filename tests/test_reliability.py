"""No wrong answer is reported as successful: a short version of the benchmark."""

import functools as ft
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pararnn
from benchmarks._case import Settings
from benchmarks._flows import FLOWS, find_exponent, make_trajectory
from benchmarks.reliability import cases, measure_random

pytestmark = pytest.mark.optimised

CASES = list(cases(Settings(quick=True)))


def measure(table, **key) -> dict[str, Any]:
    """Measure a row of the benchmark, in its short version."""
    (case,) = [
        case
        for case in CASES
        if case.table == table and key.items() <= case.key.items()
    ]
    return dict(case.measure())


@pytest.mark.parametrize("flow", FLOWS)
def test_flows_are_chaotic_and_bounded(flow):
    _, h0, states = make_trajectory(FLOWS[flow], 4096)
    assert find_exponent(FLOWS[flow], h0) > 0.005
    assert np.abs(states).max() < 100


@pytest.mark.slow
@pytest.mark.parametrize("flow", ["Lorenz", "Chua", "Hindmarsh-Rose"])
def test_chaos_is_solved_or_said_not_to_be(flow):
    get = ft.partial(measure, "flow solvers", flow=flow, T=256)
    for name in ("Auto()", "Ladder", "Newton(T // 16), 16 steps"):
        row = get(solver=name)
        assert row["obtained by"] != "not converged"
        assert row["certified"] == 256
        assert row["residual error"] <= 1e-12
        assert row["difference error"] <= 1e-6


@pytest.mark.slow
def test_newton_does_not_claim_a_chaotic_sequence():
    row = measure("flow solvers", flow="Lorenz", T=1024, solver="Newton(), 64 steps")
    assert row["obtained by"] == "not converged"
    assert row["steps"] == 64 and row["certified"] < 256
    assert row["residual error"] <= 1e-12 and row["difference error"] <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("flow", ["Lorenz", "Chua"])
def test_observers_are_solved_in_a_few_steps(flow):
    row = measure("observers", flow=flow, T=1024)
    assert row["obtained by"] == "converged" and row["steps"] <= 5
    assert row["difference error"] <= 1e-12
    assert row["distance error"] <= 1e-6


@pytest.mark.slow
def test_permutations_are_multiplied_exactly():
    row = measure("permutations", T=256)
    assert row["obtained by"] == "converged" and row["steps"] <= 3
    assert row["error"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver",
    ["Auto()", "Newton()", "QuasiNewton(probes=2)", "Picard", "Ladder", "Jacobi"],
)
def test_no_random_cell_is_solved_wrongly(solver):
    row = measure_random(solver, programs=1, instances=10)
    assert row["instances"] == 10 and row["wrong"] == 0


# XLA's `max` over 4096 numbers or more loses a NaN on CPUs (jaxlib 0.10.2):
# https://github.com/openxla/xla/issues/21461
def test_a_nan_is_not_lost_in_a_batch():
    xs = jnp.ones((2, 2048, 4))
    xs = xs.at[0, 512].set(-1.0).at[1, 1024, 0].set(-1.0)

    @jax.jit
    @jax.vmap
    def run(xs):
        sol = pararnn.solve(
            lambda h, x: jnp.tanh(0.1 * h) + jnp.sqrt(x),
            xs,
            jnp.zeros(4),
            solver=pararnn.Jacobi(),
            throw=False,
        )
        return sol.result == pararnn.RESULTS.successful

    assert not run(xs).any()
