"""Reconstruction of dynamical systems: data, forcing, training and measures."""

import itertools
import json
import math
import pathlib
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.special import rel_entr

import pararnn
from pararnn import dynamics
from pararnn.dynamics import (
    SYSTEMS,
    GeneralisedForcing,
    Recipe,
    Reconstruction,
    Series,
    SparseForcing,
    Study,
    find_symbols,
    flow_map,
    largest_exponent,
    make_forcing,
    reconstruct,
    simulate,
    spectrum_distance,
    state_space_divergence,
)
from pararnn.dynamics._measures import power_spectrum
from tests.helpers import assert_close

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
# Written independently, in NumPy.
FIELDS = {
    "lorenz63": lambda t, u: [
        10 * (u[1] - u[0]),
        u[0] * (28 - u[2]) - u[1],
        u[0] * u[1] - 8 / 3 * u[2],
    ],
    "roessler": lambda t, u: [
        -u[1] - u[2],
        u[0] + 0.2 * u[1],
        0.2 + u[2] * (u[0] - 5.7),
    ],
}
CELLS = {
    "alrnn": lambda key: pararnn.ALRNNCell(0, 6, rectified=2, key=key),
    "plrnn": lambda key: pararnn.PLRNNCell(0, 6, key=key),
}


class Free:
    """A user's own forcing, which does not force."""

    def strengths(self, steps, progress):
        return jnp.zeros(steps, progress.dtype)


FORCINGS = {
    "sparse": SparseForcing(4),
    "generalised": GeneralisedForcing(0.6, 0.2),
    "free": Free(),
}
T, N = 17, 3


@pytest.mark.parametrize("name", SYSTEMS)
def test_observations_follow_the_equation(name):
    """SciPy's integrator leads from each observation to the next."""
    system = SYSTEMS[name]
    series = simulate(system, 50, key=jr.key(0))
    states = series.values * series.scale + series.mean
    for before, after in itertools.pairwise(states[:21]):
        end = solve_ivp(
            FIELDS[name], (0, system.interval), before, rtol=1e-10, atol=1e-10
        ).y[:, -1]
        assert_close(after, end, 1e-7)


def test_observations_are_standardised_and_repeat():
    system = SYSTEMS["lorenz63"]
    series = simulate(system, 300, noise=0.1, key=jr.key(0))
    again = simulate(system, 300, noise=0.1, key=jr.key(0))
    np.testing.assert_array_equal(series.values, again.values)
    clean = simulate(system, 300, key=jr.key(0))
    assert np.abs(clean.values.mean(0)).max() < 1e-10
    assert_close(clean.values.std(0), np.ones(3), 1e-10)
    assert 0.09 < np.std(series.values - clean.values) < 0.11
    other = simulate(system, 300, like=series, key=jr.key(1))
    np.testing.assert_array_equal(other.mean, series.mean)
    assert abs(other.values.mean()) > 1e-3


def make(cell: str, key=jr.key(3)) -> Reconstruction:
    return Reconstruction(CELLS[cell](key), N, key=jr.key(4))


def follow_by_hand(model, xs, strengths):
    """Predictions in NumPy, written from the equations."""
    cell = model.cell
    A, W, h, L = (np.asarray(v) for v in (cell.A, cell.W, cell.h, model.lift))
    rectified = getattr(cell, "rectified", cell.d_state)
    z, found = np.concatenate([xs[0], L @ xs[0]]), []
    for x, strength in zip(xs[:-1], strengths, strict=False):
        z = z.copy()
        z[:N] = (1 - strength) * z[:N] + strength * x
        phi = z.copy()
        phi[len(z) - rectified :] = np.maximum(phi[len(z) - rectified :], 0)
        z = A * z + W @ phi + h
        found.append(z)
    return np.stack(found)


@pytest.mark.parametrize("forcing", FORCINGS)
@pytest.mark.parametrize("cell", CELLS)
def test_forced_states_are_those_of_the_loop(cell, forcing):
    model = make(cell)
    xs = np.asarray(jr.normal(jr.key(5), (T, N)))
    strengths = FORCINGS[forcing].strengths(T, jnp.asarray(0.3))
    wanted = follow_by_hand(model, xs, np.asarray(strengths))
    for solver in (pararnn.Sequential(), pararnn.Newton()):
        found = model.follow(jnp.asarray(xs), strengths, solver=solver)
        assert_close(found.states, wanted, 1e-12)


def test_newton_has_the_gradient_of_the_loop():
    model = make("alrnn")
    xs = jr.normal(jr.key(5), (T, N))
    strengths = SparseForcing(4).strengths(T, jnp.asarray(0.0))

    def gradient(solver):
        def loss(model):
            states = model.follow(xs, strengths, solver=solver).states
            return jnp.mean((states[:, :N] - xs[1:]) ** 2)

        return jax.tree.leaves(eqx.filter_grad(loss)(model))

    def by_scan(model):
        def step(z, at_t):
            z = model.step(model.force(z, *at_t))
            return z, z

        inputs = xs[:-1], strengths[:-1]
        _, states = jax.lax.scan(step, model.start(xs[0]), inputs)
        return jnp.mean((states[:, :N] - xs[1:]) ** 2)

    wanted = jax.tree.leaves(eqx.filter_grad(by_scan)(model))
    for a, b in zip(gradient(pararnn.Newton()), wanted, strict=True):
        assert_close(a, b, 1e-10)


def test_a_free_run_is_the_cell_alone():
    model = make("alrnn")
    x = jnp.array([0.3, -1.0, 0.5])
    xs = np.stack([np.asarray(x)] + [np.zeros(N)] * 9)
    wanted = follow_by_hand(model, xs, np.zeros(10))
    assert_close(model.generate(x, 9), wanted, 1e-12)


def test_strengths():
    start, end = jnp.asarray(0.0), jnp.asarray(1.0)
    sparse = SparseForcing(3).strengths(7, start)
    assert sparse.tolist() == [1, 0, 0, 1, 0, 0, 1]
    falling = GeneralisedForcing(0.8, 0.2)
    assert_close(falling.strengths(2, start), np.full(2, 0.8), 1e-12)
    assert_close(falling.strengths(2, end), np.full(2, 0.2), 1e-12)
    assert_close(falling.strengths(1, jnp.asarray(0.5)), np.array([0.4]), 1e-12)


def line_series(steps: int) -> Series:
    """A damped rotation, which a linear network can reproduce."""
    angle, values = 0.3, [np.array([1.0, 0.0, 0.5])]
    turn = np.array(
        [
            [math.cos(angle), -math.sin(angle), 0],
            [math.sin(angle), math.cos(angle), 0],
            [0, 0, 0.99],
        ]
    )
    for _ in range(steps - 1):
        values.append(turn @ values[-1])
    return Series(np.stack(values), np.zeros(3), np.ones(3), 1.0)


@pytest.fixture(scope="module")
def fitted():
    models = eqx.filter_vmap(lambda key: make("alrnn", key))(jr.split(jr.key(0), 2))
    rates = {"learning_rate": 1e-2, "final_rate": 1e-2}
    recipe = Recipe(steps=300, batch=4, length=12, noise=0.0, **rates)
    points = []
    found = dynamics.fit(
        models,
        line_series(100),
        SparseForcing(4),
        recipe,
        key=jr.key(1),
        on_point=lambda step, loss: points.append((step, loss)),
    )
    return models, recipe, found, points


def test_training_lowers_the_loss_of_every_run(fitted):
    _, recipe, found, points = fitted
    assert found.steps[-1] == recipe.steps and len(found.losses) == 20
    assert [step for step, _ in points] == found.steps
    for first, last in zip(found.losses[0], found.losses[-1], strict=True):
        assert last < 0.5 * first
    assert found.skipped == [0, 0]


def test_runs_do_not_know_of_each_other(fitted):
    models, recipe, found, _ = fitted
    arrays, static = eqx.partition(models, eqx.is_array)
    first = eqx.combine(jax.tree.map(lambda v: v[:1], arrays), static)
    # The first of the keys split from one does not depend on their number.
    assert jr.split(jr.key(1), 1)[0] == jr.split(jr.key(1), 2)[0]
    alone = dynamics.fit(
        first, line_series(100), SparseForcing(4), recipe, key=jr.key(1)
    )
    for a, b in zip(
        jax.tree.leaves(eqx.filter(alone.models, eqx.is_array)),
        jax.tree.leaves(eqx.filter(found.models, eqx.is_array)),
        strict=True,
    ):
        assert_close(a[0], b[0], 1e-8)


def test_a_gradient_that_is_not_finite_is_left_out():
    models = eqx.filter_vmap(lambda key: make("alrnn", key))(jr.split(jr.key(0), 2))
    huge = eqx.tree_at(lambda m: m.cell.A, models, models.cell.A.at[0].set(1e200))
    recipe = Recipe(steps=3, batch=2, length=12)
    found = dynamics.fit(huge, line_series(50), Free(), recipe, key=jr.key(1))
    assert found.skipped == [3, 0]
    assert np.all(np.asarray(found.models.cell.A[0]) == 1e200)


def test_divergence_against_scipy():
    rng = np.random.default_rng(0)
    true, other = rng.normal(size=(500, 2)), rng.normal(0.5, 1.5, size=(400, 2))
    edges = [np.linspace(v.min(), v.max(), 8) for v in true.T]
    p, q = (np.histogramdd(v, edges)[0] + 1e-5 for v in (true, other))
    # Points of `other` outside of the range count too.
    wanted = rel_entr(p / p.sum(), q / (400 + 49e-5)).sum()
    found = state_space_divergence(true, other, bins=7)
    assert_close(np.asarray(found), wanted, 1e-12)
    inside = np.clip(other, true.min(0), true.max(0))
    q = np.histogramdd(inside, edges)[0] + 1e-5
    wanted = rel_entr(p / p.sum(), q / q.sum()).sum()
    found = state_space_divergence(true, inside, bins=7)
    assert_close(np.asarray(found), wanted, 1e-12)
    assert state_space_divergence(true, true) == 0
    lost = np.where(np.arange(400)[:, None] < 3, other, np.nan)
    assert math.isfinite(state_space_divergence(true, lost))


def test_divergence_grows_as_less_of_the_range_is_visited():
    true = np.random.default_rng(0).normal(size=(500, 2))
    point = np.broadcast_to(true[0], true.shape)
    partly = np.where(np.arange(500)[:, None] < 250, true, 100)
    cases = (true, partly, point, np.where(true == true, 100, true), true + np.nan)
    found = [state_space_divergence(true, case) for case in cases]
    # Inside, outside for half of the time, at one point, outside, not finite.
    assert found[0] == 0 and 0.5 < found[1] < found[2] < found[3] == found[4]
    # Every bin has the smallest possible share.
    counts = np.histogram2d(*true.T, 30)[0].ravel() + 1e-5
    p = counts / counts.sum()
    wanted = np.sum(p * np.log(p * (500 + 900e-5) / 1e-5))
    assert_close(np.asarray(found[3]), wanted, 1e-12)


@pytest.mark.parametrize("value", [0, 0.1, 0.5, 1e10, 1e-30, -3.7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_has_no_spectrum(value, dtype):
    wave = np.sin(np.arange(400) / 7)[:, None].astype(dtype)
    constant = np.full_like(wave, value)
    assert spectrum_distance(wave, constant) == 1
    assert spectrum_distance(constant, wave) == 1
    # The last bit of a network at rest may still change.
    restless = np.where(wave > 0, constant, np.nextafter(constant, dtype(np.inf)))
    assert value == 0 or spectrum_distance(wave, restless) == 1
    assert spectrum_distance(constant, constant) == 0
    # An amplitude of 100 roundings is a signal, whatever the offset.
    small = constant + wave * np.abs(constant) * dtype(100 * np.finfo(dtype).eps)
    assert value == 0 or spectrum_distance(wave, small) < 0.2
    huge = wave * np.sqrt(np.finfo(dtype).max) * 2
    assert spectrum_distance(wave, huge) < 1e-6


def test_spectra():
    t = np.arange(400)
    slow, fast = (np.sin(2 * np.pi * k * t / 400)[:, None] for k in (10, 100))
    assert spectrum_distance(slow, slow) < 1e-7
    assert spectrum_distance(slow, fast, smoothing=0) == pytest.approx(1)
    assert 0.5 < spectrum_distance(slow, fast) <= 1
    # A shift in time changes no power.
    assert spectrum_distance(slow, np.roll(slow, 7, axis=0)) < 1e-6
    assert spectrum_distance(slow, np.full_like(slow, np.nan)) == 1
    assert spectrum_distance(slow, np.ones_like(slow)) == pytest.approx(1)
    half = np.concatenate([slow + fast, slow - fast], axis=1)
    power = power_spectrum(half, 0)
    assert_close(power[[9, 99], 0], np.array([0.5, 0.5]), 1e-10)
    assert_close(power_spectrum(half, 3.0).sum(0), np.ones(2), 1e-10)


def test_exponents_that_are_known():
    turned = jnp.array([[0.5, 0.2], [0.0, 1.25]])
    found = largest_exponent(lambda u: turned @ u, jnp.ones(2), 50, settle=200)
    assert found == pytest.approx(math.log(1.25), abs=1e-6)
    logistic = largest_exponent(lambda u: 4 * u * (1 - u), jnp.array([0.3]), 20_000)
    assert logistic == pytest.approx(math.log(2), abs=0.01)
    strong = largest_exponent(lambda u: 1e-200 * u, jnp.ones(2), 50)
    assert strong == pytest.approx(-200 * math.log(10))


EXPONENTS = {
    "onto one point": (lambda u: 0 * u + 1, -math.inf),
    "through a matrix that is nilpotent": (
        lambda u: jnp.array([[0.0, 1.0], [0.0, 0.0]]) @ u,
        -math.inf,
    ),
    "along one direction only": (
        lambda u: jnp.array([[1.0, -1.0], [-1.0, 1.0]]) @ u / 4,
        math.log(0.5),
    ),
    "to infinity": (lambda u: 2 * u, math.nan),
}


@pytest.mark.parametrize("what", EXPONENTS)
def test_exponents_of_maps_that_lose_or_gain_all(what):
    step, wanted = EXPONENTS[what]
    found = largest_exponent(step, jnp.ones(2), 50, settle=1000)
    assert found == pytest.approx(wanted, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, wanted, error", [("lorenz63", 0.9056, 0.03), ("roessler", 0.0714, 0.01)]
)
def test_exponents_of_the_systems(name, wanted, error):
    """Sprott, Chaos and Time-Series Analysis (2003)."""
    system = SYSTEMS[name]
    steps = int(1_000 / system.interval)
    start = jnp.asarray(system.start)
    found = largest_exponent(flow_map(system), start, steps) / system.interval
    assert found == pytest.approx(wanted, abs=error)


def test_symbols_count_by_hand():
    cell = pararnn.ALRNNCell(0, 4, rectified=2, key=jr.key(0))
    signs = [(1, 1), (1, 1), (1, -1), (1, 1), (-1, -1), (1, 1)]
    states = np.array([[0.5, -0.5, *pair] for pair in signs])
    found = find_symbols(cell, states)
    assert found.regions[0].tolist() == [True, True]
    assert found.code.tolist()[:2] == [0, 0] and len(found.regions) == 3
    np.testing.assert_array_equal(found.regions[found.code], np.array(signs) > 0)
    # From (+, +): once to itself, once to each of the others.
    assert_close(found.transitions[0], np.full(3, 1 / 3), 1e-12)
    assert_close(found.transitions[1:, 0], np.ones(2), 1e-12)


BAD = {
    "unknown system": (
        lambda d: reconstruct(["x"], ["alrnn"], ["sparse"], d),
        "lorenz63",
    ),
    "unknown cell": (
        lambda d: reconstruct(["lorenz63"], ["x"], ["sparse"], d),
        "plrnn",
    ),
    "unknown option": (lambda d: make_forcing("sparse:x=1"), "interval"),
    "unknown forcing": (lambda d: make_forcing("x"), "generalised"),
    "strength": (lambda d: GeneralisedForcing(1.5), "from 1e-06 to 1"),
    "interval": (lambda d: SparseForcing(0), "interval"),
    "cell with inputs": (
        lambda d: Reconstruction(
            pararnn.ALRNNCell(2, 6, key=jr.key(0)), 3, key=jr.key(0)
        ),
        "d_input=0",
    ),
    "too few units": (
        lambda d: Reconstruction(
            pararnn.ALRNNCell(0, 2, key=jr.key(0)), 3, key=jr.key(0)
        ),
        "at least as many",
    ),
    "strengths": (
        lambda d: make("alrnn").follow(jnp.ones((5, 3)), jnp.ones(4)),
        r"\(5,\)",
    ),
    "observations": (lambda d: make("alrnn").generate(jnp.ones(2), 4), r"\[3\]"),
    "one model": (
        lambda d: dynamics.fit(
            make("alrnn"), line_series(300), SparseForcing(), key=jr.key(0)
        ),
        "stacked",
    ),
    "short series": (
        lambda d: dynamics.fit(
            make("alrnn"), line_series(20), SparseForcing(), key=jr.key(0)
        ),
        "201",
    ),
    "recipe": (lambda d: Recipe(noise=-1.0), "noise"),
    "study": (lambda d: Study(runs=0), "runs"),
    "bins": (
        lambda d: state_space_divergence(np.ones((4, 2)), np.ones((4, 2)), bins=1),
        "bins",
    ),
    "widths": (
        lambda d: state_space_divergence(np.ones((4, 2)), np.ones((4, 3))),
        "observed",
    ),
    "true": (
        lambda d: spectrum_distance(np.full((4, 1), np.nan), np.ones((4, 1))),
        "finite",
    ),
    "lengths": (
        lambda d: spectrum_distance(np.ones((4, 1)), np.ones((5, 1))),
        "one length",
    ),
    "noise": (
        lambda d: simulate(SYSTEMS["lorenz63"], 5, noise=-1.0, key=jr.key(0)),
        "noise",
    ),
    "states": (
        lambda d: find_symbols(pararnn.ALRNNCell(0, 4, key=jr.key(0)), np.ones(4)),
        "two states",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what, tmp_path):
    call, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_symbols_of_another_cell():
    with pytest.raises(TypeError, match="PLRNNCell"):
        find_symbols(make("plrnn").cell, np.ones((4, 6)))


@pytest.mark.slow
def test_the_script(tmp_path):
    out = tmp_path / "out"
    options = ["--systems", "lorenz63", "--cells", "alrnn:rectified=2", "plrnn"]
    options += ["--forcings", "sparse:interval=8", "--units", "6", "--runs", "2"]
    options += ["--observations", "500", "--steps", "20", "--length", "20"]
    command = [sys.executable, EXAMPLES / "reconstruct_dynamics.py", "--out", out]
    command = [str(part) for part in [*command, *options]]
    subprocess.run(command, check=True, timeout=300)
    lines = [
        json.loads(line)
        for line in (out / "results.jsonl").read_text().split("\n")[:-1]
    ]
    assert [line["kind"] for line in lines] == ["system", *["reconstruction"] * 2]
    assert all(len(line["measured"]) == 2 for line in lines[1:])
    pictures = sorted(path.name for path in out.glob("*.png"))
    assert pictures == [
        "lorenz63-alrnn-rectified-2-sparse-interval-8.png",
        "lorenz63-plrnn-sparse-interval-8.png",
    ]
    table = (out / "results.md").read_text().splitlines()
    assert len(table) == 5 and "the system itself" in table[2]
    again = subprocess.run(
        command, check=True, timeout=300, capture_output=True, text=True
    )
    assert again.stdout.count("there already") == 2
    bad = subprocess.run([*command, "--systems", "x"], capture_output=True, text=True)
    assert bad.returncode == 1 and "lorenz63" in bad.stderr
