"""`solve` against plain loops: values, certificates, failures, batches."""

import functools as ft
import gc
import weakref

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import pararnn
from pararnn import (
    RESULTS,
    Auto,
    Jacobi,
    Ladder,
    Newton,
    Sequential,
    Structure,
    Windows,
    solve,
)
from pararnn.recurrence import Recurrence
from pararnn.solver._solvers import choose_ladder
from tests.helpers import assert_close
from tests.problems import (
    CELLS,
    SOLVERS,
    TOLERANCE,
    T,
    instance,
    residual_of,
    scan,
    some_resets,
)

NEWTONS = {k: v for k, v in SOLVERS.items() if isinstance(v, Newton)}
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7}


def solver_of(cell, **options):
    """The jitted solve of a cell of the table, with its parameters as an argument."""

    def run(parameters, xs, h0, **more):
        return solve(cell.f(parameters), xs, h0, **options, **more)

    return eqx.filter_jit(run)


def oracle(cell):
    def run(parameters, xs, h0, *reset):
        return scan(cell.f(parameters), xs, h0, *reset)

    return jax.jit(run)


@ft.cache
def wanted_states(name):
    return oracle(CELLS[name])(*instance(name))


def is_success(result):
    return bool(result == RESULTS.successful)


# Values


# The number of segments does not depend on the kind of state, so not every pair is
# needed: all cells with two solvers, and the other solvers with a few cells.
@pytest.mark.parametrize(
    "name, solver",
    [
        *((name, solver) for name in CELLS for solver in ("auto", "newton-7")),
        *(
            (name, solver)
            for name in ("lstm-blocks", "gru-dense", "nonholomorphic", "bfloat16")
            for solver in ("sequential", "newton", "newton-1", "newton-11")
        ),
    ],
)
def test_equals_scan_and_certifies_it(name, solver):
    cell, problem = CELLS[name], instance(name)
    sol = solver_of(cell, solver=SOLVERS[solver])(*problem)
    assert is_success(sol.result)
    assert_close(sol.states, wanted_states(name), TOLERANCE[cell.dtype])
    parameters, xs, h0 = problem
    wanted = residual_of(cell.f(parameters), xs, h0, sol.states)
    largest = max(float(jnp.abs(s).max()) for s in jax.tree.leaves(sol.states))
    # Another program may round each step differently.
    assert abs(float(sol.stats["residual"]) - wanted) <= 4 * EPS[cell.dtype] * largest
    assert sol.stats["first_nonfinite"] == T


@pytest.mark.parametrize("name", ["gru-diagonal", "dict-state", "nonholomorphic"])
@pytest.mark.parametrize("solver", ["sequential", "newton", "newton-7"])
def test_resets(name, solver):
    cell, (parameters, xs, h0) = CELLS[name], instance(name)
    reset, fresh = some_resets(T), jax.tree.map(lambda h: h + 0.3, h0)
    run = solver_of(cell, solver=SOLVERS[solver])
    sol = run(parameters, xs, h0, reset=reset, reset_state=fresh)
    assert_close(sol.states, oracle(cell)(parameters, xs, h0, reset, fresh), 1e-11)
    sol = run(parameters, xs, h0, reset=reset)
    assert_close(sol.states, oracle(cell)(parameters, xs, h0, reset), 1e-11)


def growing(h, x):
    """Overflows a few steps after an input above 100."""
    return jnp.where(jnp.abs(h) > 10, h * h * h, 0.5 * h) + x


@pytest.mark.parametrize("bad", [jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.parametrize(
    "solver", ["sequential", "newton-1", "newton-7", "newton-11", "newton"]
)
def test_a_dropped_nonfinite_initial_state_does_not_survive(bad, solver):
    xs, h0 = jnp.full((T, 2), 0.1), jnp.full(2, bad)
    reset = jnp.arange(T) == 0
    run = jax.jit(
        lambda xs, h0: solve(growing, xs, h0, reset=reset, solver=SOLVERS[solver])
    )
    wanted = jax.jit(lambda xs: scan(growing, xs, jnp.zeros(2)))(xs)
    assert_close(run(xs, h0).states, wanted, 1e-11)


@pytest.mark.parametrize("large", [jnp.inf, 1e30])
def test_a_dropped_initial_state_does_not_loosen_the_certificate(large):
    cell, (parameters, xs, h0) = CELLS["gru-dense"], instance("gru-dense")
    run = solver_of(cell, solver=Newton(), max_steps=1, throw=False)
    sol = run(parameters, xs, jnp.full_like(h0, large), reset=jnp.arange(T) == 0)
    assert sol.stats["residual"] > 1e-6
    assert bool(sol.result == RESULTS.not_converged)


@pytest.mark.parametrize(
    "solver",
    [
        "sequential",
        "newton-1",
        "newton-7",
        "newton",
    ],
)
def test_an_overflow_before_a_reset_stays_before_it(solver):
    xs = jnp.full((T, 2), 0.1).at[3].set(200.0)
    reset = jnp.arange(T) == 12
    sol = jax.jit(
        lambda xs: solve(
            growing, xs, jnp.zeros(2), reset=reset, solver=SOLVERS[solver], throw=False
        )
    )(xs)
    wanted = jax.jit(lambda xs: scan(growing, xs, jnp.zeros(2), reset))(xs)
    assert not np.isfinite(wanted[11]).any() and np.isfinite(wanted[12:]).all()
    assert_close(sol.states[12:], wanted[12:], 1e-11)
    assert sol.stats["first_nonfinite"] == int(np.argmin(np.isfinite(wanted[:, 0])))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_short_sequences(solver, steps):
    cell, problem = CELLS["dict-state"], instance("dict-state", steps)
    sol = solver_of(cell, solver=SOLVERS[solver])(*problem)
    assert is_success(sol.result)
    assert_close(sol.states, oracle(cell)(*problem), 1e-11)


def test_final_is_the_last_state():
    cell, problem = CELLS["lstm-blocks"], instance("lstm-blocks")
    sol = solver_of(cell)(*problem)
    assert_close(sol.final, jax.tree.map(lambda s: s[-1], sol.states), 0)


@pytest.mark.parametrize("solver", ["newton", "newton-7"])
def test_a_good_guess_needs_fewer_steps(solver):
    cell, problem = CELLS["gru-dense"], instance("gru-dense")
    run = solver_of(cell, solver=SOLVERS[solver])
    cold = run(*problem)
    warm = run(*problem, initial_guess=cold.states)
    near = run(*problem, initial_guess=cold.states + 1e-4)
    assert warm.stats["num_steps"] <= 1
    assert 0 < near.stats["num_steps"] < cold.stats["num_steps"]
    for sol in (warm, near):
        assert_close(sol.states, cold.states, 1e-11)


@pytest.mark.parametrize("solver", NEWTONS)
@pytest.mark.parametrize("name", ["gru-dense", "lstm-blocks", "nonholomorphic"])
def test_residual_of_an_unfinished_solve(name, solver):
    if solver == "newton-1":
        pytest.skip("one segment is always exact")
    cell, (parameters, xs, h0) = CELLS[name], instance(name)
    run = solver_of(cell, solver=SOLVERS[solver], max_steps=1, throw=False)
    sol = run(parameters, xs, h0)
    assert bool(sol.result == RESULTS.not_converged)
    wanted = residual_of(cell.f(parameters), xs, h0, sol.states)
    assert wanted > 1e-6
    np.testing.assert_allclose(sol.stats["residual"], wanted, rtol=1e-10)
    assert sol.stats["num_steps"] == 1


@pytest.mark.parametrize("jit", [eqx.filter_jit, jax.jit], ids=["eqx", "jax"])
def test_throw_raises_at_run_time(jit):
    cell, problem = CELLS["gru-dense"], instance("gru-dense")
    run = jit(
        lambda *args: (
            solve(cell.f(args[0]), *args[1:], solver=Newton(), max_steps=1).states
        )
    )
    with pytest.raises(Exception, match="did not bring the residual below"):
        jax.block_until_ready(run(*problem))


def test_residual_history_falls():
    cell, problem = CELLS["gru-dense"], instance("gru-dense")
    sol = solver_of(cell, solver=Newton(history=8))(*problem)
    taken = int(sol.stats["num_steps"])
    history = np.asarray(sol.stats["residual_history"])
    assert history.shape == (8,) and taken < 8
    assert np.isfinite(history[:taken]).all() and np.isnan(history[taken:]).all()
    assert history[taken - 1] < 1e-3 * history[0]


@pytest.mark.parametrize(
    "solver, length",
    [
        (Newton(history=5), 5),
        (Ladder((Jacobi(4, history=2), Newton(history=7), Newton(4))), 7),
        (Windows(Newton(history=3), 2), 3),
        (Windows(Ladder((Jacobi(4, history=2),)), 2), 2),
        (Newton(1, history=4), 4),
        (Ladder((Newton(),)), None),
        (Sequential(), None),
    ],
)
@pytest.mark.parametrize("steps", [0, 5])
def test_the_residual_history_is_there_whatever_happened(solver, length, steps):
    def history(xs):
        sol = solve(lambda h, x: jnp.tanh(h + x), xs, jnp.zeros(2), solver=solver)
        return sol.stats.get("residual_history")

    for batch in ((), (3,)):
        run = jax.vmap(history) if batch else history
        found = jax.eval_shape(run, jnp.zeros((*batch, steps, 2)))
        if length is None:
            assert found is None
        else:
            assert found.shape == (*batch, length) and found.dtype == jnp.float64
    if steps == 0 and length is not None:
        assert np.all(np.isnan(jax.jit(history)(jnp.zeros((0, 2)))))


def on_a_ladder():
    """A batch on a ladder: solved by either method, by the loop, and with a reset."""
    rungs = Newton(6, rtol=1e-13, history=2), Newton(4, history=4)
    ladder = Ladder(rungs, (1, 2))
    gains = jnp.array([1e-9, 1.0, 3.9, 1.0])
    xs = 0.01 * jnp.cos(jnp.arange(4 * 24.0).reshape(4, 24))
    reset = jnp.zeros((4, 24), bool).at[3, 11].set(True)

    def run(solver, gain, xs, reset, **options):
        def cell(h, x):
            return gain * h * (1 - h) + x

        return solve(cell, xs, jnp.asarray(0.3), solver=solver, reset=reset, **options)

    return run, rungs, ladder, (gains, xs, reset)


def test_the_history_of_a_ladder_is_that_of_the_rung_that_answers():
    run, (first, second), ladder, problems = on_a_ladder()
    sols = jax.jit(jax.vmap(ft.partial(run, ladder)))(*problems)
    rungs = np.asarray(sols.stats["rung"])
    assert set(rungs) == {0, 1, 2}

    @jax.jit
    @jax.vmap
    def one_by_one(*problem):
        options = {"throw": False}
        sol = run(first, *problem, max_steps=1, **options)
        then = run(second, *problem, max_steps=2, initial_guess=sol.states, **options)
        return [s.stats["residual_history"] for s in (sol, then)]

    short, long = map(np.asarray, one_by_one(*problems))
    nothing = np.full((4, 2), np.nan)
    padded = np.concatenate([short, nothing], axis=1)
    choices = np.stack([padded, long, np.full((4, 4), np.nan)])
    wanted = choices[rungs, np.arange(4)]
    np.testing.assert_allclose(sols.stats["residual_history"], wanted, rtol=1e-9)


def test_the_history_over_windows_is_the_largest():
    run, _, ladder, problems = on_a_ladder()
    sols = jax.jit(jax.vmap(ft.partial(run, Windows(ladder, 12))))(*problems)

    @jax.jit
    @jax.vmap
    def one_by_one(gain, xs, reset):
        first = run(ladder, gain, xs[:12], reset[:12])

        def cell(h, x):
            return gain * h * (1 - h) + x

        options = {"solver": ladder, "reset": reset[12:]}
        second = solve(cell, xs[12:], first.states[-1], **options)
        return jnp.stack([s.stats["residual_history"] for s in (first, second)])

    wanted = np.fmax.reduce(one_by_one(*problems), axis=1)
    np.testing.assert_allclose(sols.stats["residual_history"], wanted, rtol=1e-9)


def test_loose_tolerances_take_fewer_steps():
    cell, problem = CELLS["gru-dense"], instance("gru-dense")
    tight = solver_of(cell, solver=Newton())(*problem)
    loose = solver_of(cell, solver=Newton(rtol=1e-2, atol=1e-2))(*problem)
    assert loose.stats["num_steps"] < tight.stats["num_steps"]
    assert is_success(loose.result)


def dropped_out(h, x):
    key, signal = x
    return jnp.where(jr.bernoulli(key, 0.5, h.shape), jnp.tanh(h), 0) + signal


@pytest.mark.parametrize("solver", ["sequential", "newton"])
def test_random_keys_as_inputs(solver):
    xs = jr.split(jr.key(0), T), jr.normal(jr.key(1), (T, 3))
    run = jax.jit(
        lambda xs: solve(dropped_out, xs, jnp.zeros(3), solver=SOLVERS[solver]).states
    )
    wanted = jax.jit(lambda xs: scan(dropped_out, xs, jnp.zeros(3)))(xs)
    assert_close(run(xs), wanted, 1e-11)


# Hard recurrences


def logistic(h, x):
    return 3.9 * h * (1 - h) + x


def logistic_in_numpy(h, steps):
    states = []
    for _ in range(steps):
        h = 3.9 * h * (1 - h)
        states.append(h)
    return np.array(states)


@pytest.mark.parametrize("segments", [1, 2, 8, 16, 64])
def test_segments_many_steps_are_always_enough(segments):
    """For any recurrence: each step makes one more segment exact."""
    h0s = jnp.linspace(0.1, 0.8, 8)

    @jax.jit
    def run(h0):
        return solve(logistic, jnp.zeros(64), h0, solver=Newton(segments), throw=False)

    for h0 in h0s:
        sol = run(h0)
        assert is_success(sol.result)
        assert sol.stats["num_steps"] <= segments
        # Chaos doubles a difference of one rounding at about every step.
        wanted = logistic_in_numpy(float(h0), 20)
        np.testing.assert_allclose(sol.states[:20], wanted, rtol=0, atol=1e-6)
        np.testing.assert_array_less(sol.stats["residual"], 1e-13)


def test_auto_is_right_where_newton_fails(monkeypatch):
    """A chaotic sequence, by the rule for a GPU, where Newton is tried first."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    xs = jnp.zeros(4096)
    run = jax.jit(lambda h0: solve(logistic, xs, h0, solver=Auto(), max_steps=1))
    sol = run(0.37)
    assert is_success(sol.result) and bool(sol.stats["sequential"])
    # One step of each rung; the loop is the third.
    assert sol.stats["num_steps"] == 2 and sol.stats["rung"] == 2
    wanted = jax.jit(lambda h0: solve(logistic, xs, h0, solver=Sequential()).states)
    assert_close(sol.states, wanted(0.37), 0)


def test_auto_keeps_newtons_answer_where_it_is_certified(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    f = CELLS["scalar"].f({"a": jnp.asarray(0.3)})
    xs = jr.normal(jr.key(0), (4096,))
    sol = jax.jit(lambda xs: solve(f, xs, 0.0))(xs)
    assert is_success(sol.result) and not bool(sol.stats["sequential"])
    assert_close(sol.states, jax.jit(lambda xs: scan(f, xs, 0.0))(xs), 1e-11)


def test_auto_on_a_cpu_is_the_loop():
    sol = jax.jit(lambda xs: solve(logistic, xs, 0.37))(jnp.zeros(4096))
    assert bool(sol.stats["sequential"]) and sol.stats["num_steps"] == 0


def test_auto_falls_back_for_a_whole_batch():
    """One hard sequence in a batch: all answers are right, none is reported."""
    f = lambda h, x: jnp.where(x > 0, 0.5 * jnp.cos(h), 3.9 * h * (1 - h))  # noqa: E731
    xs = jnp.stack([jnp.ones(4096), -jnp.ones(4096)])
    h0 = jnp.array([0.2, 0.37])
    sol = jax.jit(lambda xs: solve_pairs(f, xs, h0))(xs)
    wanted = jax.jit(lambda xs: jax.vmap(lambda x, h: scan(f, x, h))(xs, h0))(xs)
    assert_close(sol.states[:, :24], wanted[:, :24], 1e-6)
    assert jax.vmap(lambda r: r == RESULTS.successful)(sol.result).all()


def solve_pairs(f, xs, h0):
    return jax.vmap(lambda x, h: solve(f, x, h))(xs, h0)


def blocks(width, size):
    return Structure(np.arange(width).reshape(-1, size), width)


@pytest.mark.parametrize(
    "structure, batch, steps, segments",
    [
        (blocks(1024, 1), 1, 4096, 256),
        (blocks(1024, 1), 1000, 4096, 256),
        (blocks(256, 2), 16, 4096, 256),
        (blocks(1024, 32), 4, 4096, 256),
        (blocks(64, 64), 1, 4096, 256),
        (blocks(128, 128), 1, 32, None),  # too short
        (blocks(256, 256), 1, 4096, None),  # too much work for each step saved
        (blocks(128, 128), 16, 4096, None),
        (blocks(1024, 1), 1024, 2**17, 256),  # no room for 8192 segments
        (blocks(4096, 1), 1024, 2**17, 64),
    ],
)
def test_auto_off_the_cpu_goes_by_structure(
    monkeypatch, structure, batch, steps, segments
):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    channels = batch * structure.width
    ladder = choose_ladder(Auto(), steps, channels, lambda: structure)
    if segments is None:
        assert ladder.methods == ()
    else:
        assert [method.segments for method in ladder.methods] == [segments] * 2


@pytest.mark.parametrize("name", ["gru-diagonal", "lstm-blocks", "elman", "logistic"])
def test_auto_off_the_cpu_is_right(monkeypatch, name):
    """By the rule for a GPU: its ladder, and the loop where that fails."""
    if name == "logistic":
        f, h0, xs = logistic, jnp.asarray(0.37), jnp.zeros(256)
    else:
        cell = CELLS[name]
        parameters, _, h0 = instance(name)
        f, xs = cell.f(parameters), cell.xs(jr.key(5), 256, "float64")

    def loss(xs, run):
        states = run(f, xs, h0)
        return sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(states)), states

    wanted = jax.jit(jax.grad(ft.partial(loss, run=scan), has_aux=True))(xs)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def auto(f, xs, h0):
        return solve(f, xs, h0).states

    sol = jax.jit(lambda xs: solve(f, xs, h0))(xs)
    assert sol.stats["rung"] == (2 if name == "logistic" else 1)
    got = jax.jit(jax.grad(ft.partial(loss, run=auto), has_aux=True))(xs)
    steps = 20 if name == "logistic" else 256
    first = jax.tree.map(lambda s: s[:steps], (got[1], wanted[1]))
    assert_close(*first, 1e-9)
    if name != "logistic":
        assert_close(got[0], wanted[0], 1e-9)


# Reporting what is not finite


def exponent(p, h, x):
    return p * jnp.exp(h) + x


NONFINITE = {
    "inputs": (RESULTS.nonfinite_inputs, 0.1, jnp.zeros(T).at[9].set(jnp.nan), 0.0, 9),
    "parameters": (RESULTS.nonfinite_parameters, jnp.nan, jnp.zeros(T), 0.0, 0),
    "h0": (RESULTS.nonfinite_parameters, 0.1, jnp.zeros(T), jnp.inf, 0),
    "h0-nan": (RESULTS.nonfinite_parameters, 0.1, jnp.zeros(T), jnp.nan, 0),
    "states": (RESULTS.nonfinite_states, 1.0, jnp.zeros(T), 0.0, 4),
}


@pytest.mark.parametrize("solver", ["sequential", "newton-7", "newton"])
@pytest.mark.parametrize("what", NONFINITE)
def test_nonfinite(what, solver):
    result, p, xs, h0, first = NONFINITE[what]

    def run(throw):
        def call(p, xs, h0):
            f = lambda h, x: exponent(p, h, x)  # noqa: E731
            return solve(f, xs, h0, solver=SOLVERS[solver], throw=throw)

        return eqx.filter_jit(call)(jnp.asarray(p), xs, jnp.asarray(h0))

    sol = run(throw=False)
    assert bool(sol.result == result)
    assert sol.stats["first_nonfinite"] == first
    with pytest.raises(Exception, match="NaN or an infinity"):
        jax.block_until_ready(run(throw=True).states)


@pytest.mark.parametrize("steps, at, first", [(0, [], 0), (10, [], 10), (10, [7], 7)])
@pytest.mark.parametrize("solver", [Sequential(), Newton(3)], ids=repr)
def test_first_nonfinite_over_windows(solver, steps, at, first):
    """The last two windows of 4 steps overlap, and both contain step 7."""
    xs = jnp.ones((steps, 2)).at[jnp.asarray(at, int)].set(jnp.nan)
    windows = pararnn.Windows(solver, 4)
    sol = solve(lambda h, x: 0.5 * h + x, xs, jnp.zeros(2), solver=windows, throw=False)
    assert sol.stats["first_nonfinite"] == first


# Batches

BATCH = 4
AXES = {
    # parameters, xs, h0, reset
    "xs": (None, 0, None, None),
    "parameters": (0, None, None, None),
    "h0": (None, None, 0, None),
    "reset": (None, None, None, 0),
    "all": (0, 0, 0, 0),
    "xs-axis-1": (None, 1, None, None),
}


def batched_problem(name, axes, getkey):
    """Arguments with a batch along the given axes, each sequence harder than the last.

    Gains differ a lot, so that the sequences need different numbers of Newton steps.
    """
    parameters, xs, h0 = instance(name)
    gains = jnp.array([0.01, 0.5, 1.0, 2.5])

    def along(axis, tree):
        def stack(leaf):
            return jnp.stack([g * leaf for g in gains], axis=axis)

        return tree if axis is None else jax.tree.map(stack, tree)

    reset = some_resets(T)
    if axes[3] is not None:
        reset = jnp.stack([some_resets(T, every) for every in (3, 5, 7, 11)])
    arguments = (parameters, xs, h0)
    return *(along(a, v) for a, v in zip(axes[:3], arguments, strict=True)), reset


def take(axes, arguments, i):
    def one(axis, tree):
        if axis is None:
            return tree
        return jax.tree.map(lambda leaf: jnp.take(leaf, i, axis=axis), tree)

    return [one(a, v) for a, v in zip(axes, arguments, strict=True)]


@pytest.mark.parametrize(
    "which, solver",
    [
        *((which, "newton-7") for which in AXES),
        *((which, "newton") for which in ("xs", "parameters", "all")),
    ],
)
def test_vmap_equals_a_loop(which, solver, getkey):
    axes, cell = AXES[which], CELLS["gru-dense"]
    arguments = batched_problem("gru-dense", axes, getkey)

    def run(parameters, xs, h0, reset):
        return solve(cell.f(parameters), xs, h0, reset=reset, solver=SOLVERS[solver])

    batch = jax.jit(jax.vmap(run, in_axes=axes))(*arguments)
    alone = jax.jit(run)
    for i in range(BATCH):
        sol = alone(*take(axes, arguments, i))
        one = jax.tree.map(lambda leaf, i=i: leaf[i], batch)
        assert is_success(one.result)
        assert_close(one.states, sol.states, 1e-12)
        # A sequence is frozen once converged, so it takes as many steps as alone.
        assert one.stats["num_steps"] == sol.stats["num_steps"]
        assert set(one.stats) == set(sol.stats)


@pytest.mark.parametrize("solver", ["newton-7", "sequential"])
def test_vmap_over_no_sequences(solver):
    cell = CELLS["gru-dense"]
    parameters, xs, h0 = instance("gru-dense")

    def run(xs):
        return solve(cell.f(parameters), xs, h0, solver=SOLVERS[solver])

    sol = jax.jit(jax.vmap(run))(xs[None][:0])
    assert sol.states.shape == (0, len(xs), *h0.shape)
    assert sol.stats["num_steps"].shape == (0,)


def test_vmap_within_vmap():
    cell = CELLS["lstm-blocks"]
    parameters, xs, h0 = instance("lstm-blocks")
    gains = jnp.array([0.2, 1.0, 2.0])
    many = jax.tree.map(lambda leaf: jnp.stack([g * leaf for g in gains]), parameters)
    several = jnp.stack([xs, -2 * xs], axis=1)

    def run(parameters, xs):
        return solve(cell.f(parameters), xs, h0, solver=Newton(7))

    inner = jax.vmap(run, in_axes=(None, 1))
    batch = jax.jit(jax.vmap(inner, in_axes=(0, None)))(many, several)
    assert batch.stats["num_steps"].shape == (3, 2)
    alone = jax.jit(run)
    for i in range(3):
        for j in range(2):
            parameters = jax.tree.map(lambda leaf, i=i: leaf[i], many)
            sol = alone(parameters, several[:, j])
            states = jax.tree.map(lambda s, i=i, j=j: s[i, j], batch.states)
            assert_close(states, sol.states, 1e-12)
            assert batch.stats["num_steps"][i, j] == sol.stats["num_steps"]


def test_vmap_out_axes():
    cell, (parameters, xs, h0) = CELLS["tanh-diagonal"], instance("tanh-diagonal")
    several = jnp.stack([xs, 2 * xs], axis=1)

    def run(xs):
        return solve(cell.f(parameters), xs, h0, solver=Newton()).states

    got = jax.jit(jax.vmap(run, in_axes=1, out_axes=1))(several)
    wanted = jax.vmap(lambda xs: scan(cell.f(parameters), xs, h0), 1, 1)
    assert_close(got, jax.jit(wanted)(several), 1e-11)


def fragile(h, x):
    """Converges at once where x = 0, and needs many steps where x is large."""
    return jnp.sin(x * h + 0.1)


@pytest.mark.parametrize("solver", [Newton(), Newton(11)])
def test_only_the_sequence_that_fails_is_reported(solver):
    xs = jnp.stack([jnp.full(T, v) for v in (0.1, 5.0, 0.2)])

    def run(throw):
        one = lambda xs: solve(  # noqa: E731
            fragile, xs, 0.3, solver=solver, max_steps=4, throw=throw
        )
        return jax.jit(jax.vmap(one))(xs)

    sol = run(throw=False)
    failed = jax.vmap(lambda r: r == RESULTS.not_converged)(sol.result)
    assert failed.tolist() == [False, True, False]
    wanted = jax.jit(jax.vmap(lambda xs: scan(fragile, xs, 0.3)))(xs)
    assert_close(sol.states[0::2], wanted[0::2], 1e-11)
    assert sol.stats["residual"][1] > 1e-6
    with pytest.raises(Exception, match="did not bring the residual below"):
        jax.block_until_ready(run(throw=True).states)


@pytest.mark.parametrize("solver", ["sequential", "newton-7"])
def test_each_sequence_has_its_own_cause(solver):
    """One sequence with a NaN in its inputs, one that overflows, one that is fine."""
    xs = jnp.zeros((3, T)).at[0, 5].set(jnp.nan).at[1, 5].set(20.0)
    run = lambda xs: solve(  # noqa: E731
        lambda h, x: exponent(0.1, h, x), xs, 0.0, solver=SOLVERS[solver], throw=False
    )
    sol = jax.jit(jax.vmap(run))(xs)
    results = [jax.tree.map(lambda leaf, i=i: leaf[i], sol.result) for i in range(3)]
    assert bool(results[0] == RESULTS.nonfinite_inputs)
    assert bool(results[1] == RESULTS.nonfinite_states)
    assert bool(results[2] == RESULTS.successful)


def count_loops(fn, *args):
    """The number of `while` operations in the compiled program."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    return sum(" while(" in line for line in text.splitlines())


@pytest.mark.parametrize("solver", ["auto", "sequential", "newton", "newton-7"])
def test_a_batch_runs_the_same_loops_as_one_sequence(solver):
    cell, (parameters, xs, h0) = CELLS["gru-diagonal"], instance("gru-diagonal")

    def run(xs):
        return solve(cell.f(parameters), xs, h0, solver=SOLVERS[solver]).states

    one = count_loops(run, xs)
    many = count_loops(jax.vmap(run), jnp.stack([xs] * BATCH))
    assert one >= 1
    assert many == one


# Anything


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    steps=st.integers(1, 20),
    width=st.integers(1, 4),
    dtype=st.sampled_from([np.float32, np.float64]),
    segments=st.sampled_from([None, 1, 2, 3, 5, 100]),
    mask=st.none() | st.integers(0, 2**20 - 1),
    seed=st.integers(0, 5),
)
def test_solve_equals_a_numpy_loop(steps, width, dtype, segments, mask, seed):
    rng = np.random.default_rng(seed)
    U = rng.normal(size=(width, width)) / 2
    xs, h0 = rng.normal(size=(steps, width)), rng.normal(size=width)
    U, xs, h0 = (v.astype(dtype) for v in (U, xs, h0))
    reset = None
    if mask is not None:
        reset = np.array([bool(mask >> t & 1) for t in range(steps)])
    wanted, h = [], h0.astype(np.float64)
    for t in range(steps):
        if reset is not None and reset[t]:
            h = np.zeros(width)
        h = np.tanh(U.astype(np.float64) @ h + xs[t])
        wanted.append(h)

    @jax.jit
    def run(U, xs, h0, reset):
        f = lambda h, x: jnp.tanh(jnp.matmul(U, h, precision="highest") + x)  # noqa: E731
        return solve(f, xs, h0, reset=reset, solver=Newton(segments))

    sol = run(U, xs, h0, reset)
    assert sol.states.dtype == dtype and is_success(sol.result)
    rtol = 1e-11 if dtype == np.float64 else 3e-5
    np.testing.assert_allclose(sol.states, np.stack(wanted), rtol=0, atol=rtol)
    assert isinstance(sol, pararnn.Solution)


def leaky_pair(h, x):
    return h[0] + x, 0.5 * h[1] + h[0]


SEEN = {
    "later leaf": lambda states: states[1],
    "first leaf": lambda states: states[0],
    "steps before the failure": lambda states: states[1][:2],
}


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("batched", [False, True])
def test_a_failure_raises_whatever_is_looked_at(seen, batched):
    def run(xs):
        return SEEN[seen](solve(leaky_pair, xs, (0.0, 0.0)).states)

    run = jax.jit(jax.vmap(run) if batched else run)
    good = jnp.ones((2, T) if batched else T)
    jax.block_until_ready(run(good))
    with pytest.raises(Exception, match="NaN or an infinity"):
        jax.block_until_ready(run(good.at[..., 5].set(jnp.nan)))


@pytest.mark.parametrize("solver", [Newton(), Newton(512), pararnn.Jacobi()])
def test_nan_in_a_long_sequence_is_never_certified(solver):
    """XLA's maximum over many numbers on a CPU may lose a NaN."""

    def f(h, x):
        return jnp.tanh(0.1 * h) + jnp.sqrt(x)

    steps, width = 2048, 4
    xs = jnp.ones((2, steps, width)).at[0, 512].set(-1.0).at[1, 1024, 0].set(-1.0)

    @jax.jit
    @jax.vmap
    def run(xs):
        options = {"solver": solver, "max_steps": 30, "throw": False}
        sol = solve(f, xs, jnp.zeros(width), **options)
        return sol.result == RESULTS.successful, sol.stats

    good, stats = run(xs)
    assert not np.any(good)
    assert stats["first_nonfinite"].tolist() == [512, 1024]
    assert stats["certified_steps"].tolist() == [512, 1024]


def test_one_segment_keeps_the_history_it_was_asked_for():
    sol = solve(lambda h, x: 0.5 * h + x, jnp.ones(T), 0.0, solver=Newton(1, history=3))
    assert sol.stats["residual_history"].shape == (3,)


def test_nothing_outlives_a_solve():
    big = jnp.ones(1000)
    gone = weakref.ref(big)
    act = jax.custom_jvp(jnp.tanh)
    act.defjvp(lambda primals, tangents: (act(*primals), tangents[0] * big[0]))

    def states(xs):
        cell = lambda h, x: act(0.5 * h + x)  # noqa: E731
        return solve(cell, xs, jnp.zeros(2), solver=Newton(3)).states

    def count():
        gc.collect()
        return sum(isinstance(o, Recurrence) for o in gc.get_objects())

    before = count()
    jax.jit(states)(jnp.zeros((6, 2)))
    del act, big, states
    assert count() <= before
    assert gone() is None


def test_a_guess_is_made_from_arrays_of_jax():
    def guess(xs, h0):
        return jnp.broadcast_to(h0.at[0].set(1.0), xs.shape)

    xs, h0 = np.ones((40, 2)), np.zeros(2)
    solution = solve(lambda h, x: jnp.tanh(h + x), xs, h0, initial_guess=guess)
    assert solution.states.shape == (40, 2)
