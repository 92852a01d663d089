"""The family of methods: right answers, exact derivatives, and what is reported."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest

import pararnn
from pararnn import (
    ELK,
    RESULTS,
    DampedNewton,
    Jacobi,
    Ladder,
    Newton,
    Picard,
    Problem,
    QuasiNewton,
    RootFinder,
    Sequential,
    Windows,
    residual,
    solve,
)
from pararnn.scan import invert_matrices, prefix
from pararnn.solver import _elk
from tests.helpers import assert_close
from tests.problems import CELLS, T, instance, scan, some_resets

METHODS = {
    "newton": Newton(),
    "newton-7": Newton(7),
    "quasi-newton": QuasiNewton(),
    "quasi-newton-7": QuasiNewton(7),
    "hutchinson": QuasiNewton(probes=3),
    "damped": DampedNewton(),
    "damped-7": DampedNewton(7, damping=0.9),
    "elk": ELK(),
    "elk-7": ELK(7, damping=0.1),
    "quasi-elk": ELK(diagonal=True),
    "picard": Picard(),
    "picard-7": Picard(7),
    "jacobi": Jacobi(),
    "jacobi-7": Jacobi(7),
}
SOLVERS = METHODS | {
    "ladder": Ladder((Jacobi(7), QuasiNewton(7), Newton(7)), max_steps=(1, 1, 2)),
    "windows": Windows(Newton(), 10),
    "windows-auto": Windows(pararnn.Auto(), 11),
    "windows-ladder": Windows(Ladder((Jacobi(4),), 2), 8),
    "sequential": Sequential(),
}
each_method = pytest.mark.parametrize("method", METHODS)
# Every approximation once: the number of segments does not matter here.
REPEATED = {"newton", "quasi-newton-7", "damped", "elk", "picard-7", "jacobi"}
REPEATED |= {"windows", "windows-ladder"}
each_kind = pytest.mark.parametrize(
    "solver", [name for name in SOLVERS if name not in REPEATED]
)


def logistic(h, x):
    return 3.9 * h * (1 - h) + 0 * x


def run_jitted(f, xs, h0, **options):
    return eqx.filter_jit(lambda xs, h0: solve(f, xs, h0, **options))(xs, h0)


@ft.cache
def wanted(name):
    cell, (parameters, xs, h0) = CELLS[name], instance(name)
    reset, fresh = some_resets(T), jax.tree.map(lambda h: h + 0.3, h0)
    run = jax.jit(lambda p, xs, h0: scan(cell.f(p), xs, h0, reset, fresh))
    return run(parameters, xs, h0)


# Values


@pytest.mark.parametrize(
    "name, solver",
    [
        *(("dict-state", solver) for solver in SOLVERS),
        *(("nonholomorphic", solver) for solver in ("elk-7", "hutchinson", "windows")),
    ],
)
def test_equals_scan(name, solver):
    cell, (parameters, xs, h0) = CELLS[name], instance(name)
    options = {"reset": some_resets(T), "solver": SOLVERS[solver]}
    fresh = jax.tree.map(lambda h: h + 0.3, h0)
    sol = run_jitted(cell.f(parameters), xs, h0, reset_state=fresh, **options)
    assert bool(sol.result == RESULTS.successful)
    assert_close(sol.states, wanted(name), 1e-11)
    assert sol.stats["certified_steps"] == T


@pytest.mark.parametrize("solver", ["quasi-newton", "elk-7", "ladder", "windows"])
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_low_precision(name, solver):
    cell, (parameters, xs, h0) = CELLS[name], instance(name)
    sol = run_jitted(cell.f(parameters), xs, h0, solver=SOLVERS[solver])
    oracle = jax.jit(lambda p, xs, h0: scan(cell.f(p), xs, h0))(parameters, xs, h0)
    assert_close(sol.states, oracle, {"float32": 1e-5, "bfloat16": 0.02}[name])


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("method", ["elk", "quasi-elk", "damped", "hutchinson"])
def test_short_sequences(method, steps):
    cell, (parameters, xs, h0) = CELLS["gru-dense"], instance("gru-dense", steps)
    sol = run_jitted(cell.f(parameters), xs, h0, solver=METHODS[method])
    oracle = jax.jit(lambda xs: scan(cell.f(parameters), xs, h0))(xs)
    assert_close(sol.states, oracle, 1e-11)


@each_method
def test_as_many_steps_as_segments_always_suffice(method):
    """With chaos, no method predicts anything except by stepping."""
    xs = jnp.zeros(T)
    sol = run_jitted(logistic, xs, 0.37, solver=METHODS[method])
    oracle = jax.jit(lambda xs: scan(logistic, xs, 0.37))(xs)
    assert bool(sol.result == RESULTS.successful)
    # Rounding errors double at every step, and another compilation rounds differently.
    assert_close(sol.states[:20], oracle[:20], 1e-9)


@each_kind
def test_vmap_equals_a_loop(solver):
    cell, (parameters, xs, h0) = CELLS["gru-dense"], instance("gru-dense")
    xs = jnp.stack([xs, -xs, 2 * xs])

    @jax.jit
    def both(parameters, xs):
        def one(x):
            sol = solve(cell.f(parameters), x, h0, solver=SOLVERS[solver])
            return sol.states, sol.stats["certified_steps"]

        return jax.vmap(one)(xs), jax.vmap(lambda x: scan(cell.f(parameters), x, h0))(
            xs
        )

    (states, steps), oracle = both(parameters, xs)
    assert_close(states, oracle, 1e-11)
    assert np.all(steps == T)


# Derivatives are exact, whatever the method approximates


def derivatives(name, run):
    """The gradient, the JVP, and second derivatives forward over reverse."""
    cell, (parameters, xs, h0) = CELLS[name], instance(name)

    def loss(arguments):
        parameters, xs, h0 = arguments
        leaves = jax.tree.leaves(run(cell.f(parameters), xs, h0))
        return sum(jnp.sum(jnp.sin(leaf) ** 2) for leaf in leaves)

    arguments = (parameters, xs, h0)
    direction = jax.tree.map(
        lambda v: jnp.cos(jnp.arange(v.size, dtype=v.dtype)).reshape(v.shape), arguments
    )

    @jax.jit
    def all_of_them(arguments):
        gradient = jax.grad(loss)
        return {
            "gradient": gradient(arguments),
            "jvp": jax.jvp(loss, (arguments,), (direction,))[1],
            "forward over reverse": jax.jvp(gradient, (arguments,), (direction,))[1],
        }

    return all_of_them(arguments)


@ft.cache
def wanted_derivatives(name):
    return derivatives(name, scan)


@pytest.mark.slow
@each_kind
def test_derivatives_are_exact(solver):
    found = derivatives(
        "elman", lambda f, xs, h0: solve(f, xs, h0, solver=SOLVERS[solver]).states
    )
    for name, oracle in wanted_derivatives("elman").items():
        tolerance = 1e-9 if name in ("gradient", "jvp") else 1e-7
        assert_close(found[name], oracle, tolerance)


def test_history_of_a_batch_is_that_of_each_sequence():
    cell, (parameters, xs, h0) = CELLS["gru-dense"], instance("gru-dense")
    xs = jnp.stack([xs, -xs, 2 * xs, xs / 2, 3 * xs, -2 * xs]).reshape(2, 3, *xs.shape)

    def history(x):
        solver = Newton(7, history=3)
        return solve(cell.f(parameters), x, h0, solver=solver).stats["residual_history"]

    found = jax.jit(jax.vmap(jax.vmap(history)))(xs)
    assert found.shape == (2, 3, 3)
    alone = [jax.jit(history)(x) for row in xs for x in row]
    alone = np.stack(alone).reshape(found.shape)
    np.testing.assert_allclose(found, alone, rtol=1e-3, atol=1e-14)


# What the methods are good for


def test_methods_need_the_steps_they_are_known_for():
    xs = jnp.sin(jnp.arange(256.0))

    def steps(f, method):
        return int(run_jitted(f, xs, 0.0, solver=method).stats["num_steps"])

    def linear(h, x):
        return 0.95 * h + x

    def forgetful(h, x):
        return 0.01 * jnp.tanh(h) + x

    def lazy(h, x):
        return h + 1e-3 * (jnp.tanh(h) + x)

    # The first step solves a linear recurrence; the second has nothing to correct.
    assert steps(linear, Newton()) <= 2
    assert steps(linear, QuasiNewton()) <= 2
    # A contraction by 0.01: two digits a step.
    assert steps(forgetful, Jacobi()) <= 10
    # Increments that hardly depend on the state.
    assert 4 * steps(lazy, Picard()) < steps(lazy, Jacobi())


def test_elk_bounds_its_corrections_where_newton_overflows():
    """Away from its solution, 0, this cell expands fiftyfold at every step."""

    def f(h, x):
        return 0.5 * jnp.sin(100 * h) * h + x

    xs = jnp.full(128, 0.01)
    guess = jnp.full(128, 1.1)

    def overflows(method):
        sol = run_jitted(f, xs, 0.0, solver=method, initial_guess=guess)
        assert bool(sol.result == RESULTS.successful)
        oracle = jax.jit(lambda xs: scan(f, xs, 0.0))(xs)
        assert_close(sol.states, oracle, 1e-11)
        return int(sol.stats["nonfinite"])

    assert overflows(Newton(history=1)) >= overflows(ELK()) == 0


@pytest.mark.parametrize("diagonal", [True, False])
def test_smoother_solves_the_damped_least_squares(diagonal):
    rng = np.random.default_rng(0)
    steps, n, damping = 7, 3, 0.7
    J = rng.standard_normal((steps, n, n))
    if diagonal:
        J = J * np.eye(n)
    r = rng.standard_normal((steps, n))
    if diagonal:
        factors = np.einsum("tii->ti", J)
        arguments = _elk._Elementwise, "elementwise", factors, r
        strength = np.full((1, 1), damping)
    else:
        arguments = _elk._Matrices, "matrix", J, r[..., None]
        strength = np.full((1, 1, 1), damping)
    smooth = jax.jit(lambda F, r, s: _elk._smooth(*arguments[:2], F, r, s))
    found = smooth(arguments[2], arguments[3], strength)

    system = np.eye(steps * n)
    for t in range(1, steps):
        system[t * n : (t + 1) * n, (t - 1) * n : t * n] = -J[t]
    normal = system.T @ system + damping * np.eye(steps * n)
    expected = np.linalg.solve(normal, system.T @ r.reshape(-1))
    np.testing.assert_allclose(np.ravel(found), expected, rtol=1e-11)


@pytest.mark.parametrize("backend", ["sequential", "associative", "auto"])
def test_prefixes_of_an_operation_that_does_not_commute(backend):
    matrices = np.random.default_rng(0).standard_normal((9, 3, 3))

    def combine(earlier, later):
        return {"m": later["m"] @ earlier["m"]}

    found = jax.jit(lambda m: prefix(combine, {"m": m}, backend))(matrices)["m"]
    product = np.eye(3)
    for m, got in zip(matrices, found, strict=True):
        product = m @ product
        np.testing.assert_allclose(got, product, rtol=1e-11)


@pytest.mark.parametrize("shape", [(1, 1), (5, 4, 4), (2, 3, 7, 7)])
def test_inverses(shape):
    a = np.random.default_rng(0).standard_normal(shape)
    a[..., 0, 0] = 0 if shape[-1] > 1 else 2  # needs a pivot
    inverse = np.asarray(jax.jit(invert_matrices)(a))
    np.testing.assert_allclose(inverse @ a, np.eye(shape[-1]) + 0 * a, atol=1e-10)
    singular = np.asarray(jax.jit(invert_matrices)(np.zeros(shape)))
    assert not np.any(np.isfinite(singular).all(axis=(-1, -2)))


# Guesses


GUESSES = {
    "cell": "cell",
    "h0": "h0",
    "zeros": "zeros",
    "function": lambda xs, h0: jnp.cumsum(xs, axis=0),
    "overflow": lambda xs, h0: jnp.full_like(xs, jnp.inf),
    "nan": lambda xs, h0: jnp.full_like(xs, jnp.nan),
}


@pytest.mark.parametrize(
    "method, guess",
    [
        *(("newton-7", guess) for guess in GUESSES),
        *(
            (method, guess)
            for method in ("newton", "elk", "jacobi-7")
            for guess in ("function", "nan")
        ),
    ],
)
def test_the_answer_does_not_depend_on_the_guess(method, guess):
    cell, (parameters, xs, h0) = CELLS["gru-dense"], instance("gru-dense")
    f = cell.f(parameters)
    options = {"solver": METHODS[method], "initial_guess": GUESSES[guess]}
    sol = run_jitted(f, xs, h0, **options)
    assert_close(sol.states, jax.jit(lambda xs: scan(f, xs, h0))(xs), 1e-11)


def test_a_warm_start_saves_steps():
    cell, (parameters, xs, h0) = CELLS["gru-dense"], instance("gru-dense")
    f = cell.f(parameters)
    cold = run_jitted(f, xs, h0, solver=Newton())
    warm = run_jitted(f, xs, h0, solver=Newton(), initial_guess=cold.states)
    assert warm.stats["num_steps"] <= 1 < cold.stats["num_steps"]


def stiff(h, x):
    """One explicit step of a reaction that is fast for large states."""
    return h - 0.4 * (jnp.exp(h) - 1) + x


@pytest.mark.parametrize("guess", [None, "h0", "zeros", "cell"])
def test_guesses_of_a_stiff_cell_do_not_overflow(guess):
    xs = 0.1 * jnp.cos(jnp.arange(200.0))
    sol = run_jitted(stiff, xs, 0.5, solver=Newton(20), initial_guess=guess)
    assert sol.stats["nonfinite"] == 0
    assert_close(sol.states, jax.jit(lambda xs: scan(stiff, xs, 0.5))(xs), 1e-11)


def test_an_unknown_guess_is_refused():
    with pytest.raises(ValueError, match=r"unknown `initial_guess` 'zero'.*'h0'"):
        solve(stiff, jnp.zeros(3), 0.5, initial_guess="zero")
    with pytest.raises(ValueError, match=r"`initial_guess` is float64\[2\]"):
        solve(stiff, jnp.zeros(3), 0.5, initial_guess=lambda xs, h0: xs[1:])


# Reports


@pytest.mark.parametrize("method", ["newton", "quasi-elk", "jacobi", "picard-7"])
def test_a_failure_returns_the_best_iterate(method):
    xs = jnp.zeros(200)
    plain = METHODS[method]
    solver = type(plain)(plain.segments, history=4)
    sol = run_jitted(logistic, xs, 0.37, solver=solver, max_steps=4, throw=False)
    assert bool(sol.result == RESULTS.not_converged)
    before = np.concatenate([[0.37], sol.states[:-1]])
    gaps = np.abs(3.9 * before * (1 - before) - np.asarray(sol.states))
    history = sol.stats["residual_history"]
    np.testing.assert_allclose(sol.stats["residual"], gaps.max(), rtol=1e-9)
    assert sol.stats["residual"] <= np.min(history) * (1 + 1e-9)
    # Sizes are those of each step, or of the largest in up to 40 steps before it.
    sizes = np.abs(sol.states)
    around = [sizes[max(0, t - 40) : t + 1].max() for t in range(200)]
    least, most = (
        int(np.argmax(gaps > 64 * np.finfo(float).eps * np.asarray(size)))
        for size in (sizes, around)
    )
    assert least <= sol.stats["certified_steps"] <= most


def test_a_ladder_says_which_rung_held():
    ladder = Ladder((Jacobi(8), Newton(8)), max_steps=(2, 3))
    xs = jnp.zeros(64)
    cells = {
        0: lambda h, x: 0.05 * jnp.cos(h) + x,
        1: lambda h, x: 0.999 * jnp.sin(h) + 0.1 + x,
        2: logistic,
    }
    for rung, f in cells.items():
        sol = run_jitted(f, xs, 0.37, solver=ladder)
        assert sol.stats["rung"] == rung and bool(sol.result == RESULTS.successful)
        assert bool(sol.stats["sequential"]) == (rung == 2)
        assert sol.stats["num_steps"] <= 5

    def mixed(h, x):
        return jnp.where(x > 0, cells[0](h, 0.0), logistic(h, 0.0))

    xs = jnp.stack([jnp.ones(64), -jnp.ones(64)])
    run = jax.jit(jax.vmap(lambda x: solve(mixed, x, 0.37, solver=ladder).stats))
    assert run(xs)["rung"].tolist() == [0, 2]


def test_windows_bound_the_memory():
    """Except for inputs and outputs, nothing grows with T."""

    def temporary(steps):
        xs = jax.ShapeDtypeStruct((steps, 8), jnp.float64)
        solver = Windows(Newton(), 256)
        run = jax.jit(
            lambda xs: (
                solve(
                    lambda h, x: jnp.tanh(0.5 * h + x), xs, jnp.zeros(8), solver=solver
                ).states
            )
        )
        return run.lower(xs).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(1024), temporary(16384)
    # Statistics of each window, some tens of bytes.
    assert long - short < 64 * (16384 - 1024) // 256 * 8


PRINTED = {
    "Newton()": Newton(),
    "Newton(segments=64)": Newton(64),
    "Newton(rtol=0.001, history=4)": Newton(rtol=1e-3, history=4),
    "QuasiNewton(segments=7, probes=3)": QuasiNewton(7, probes=3),
    "DampedNewton()": DampedNewton(damping=1 / 2),
    "DampedNewton(damping=0)": DampedNewton(damping=0),
    "ELK(diagonal=True)": ELK(diagonal=True),
    "Picard(atol=0)": Picard(atol=0),
    "Jacobi(segments=1)": Jacobi(1),
    "Ladder(methods=(Jacobi(segments=4), Newton()))": Ladder((Jacobi(4), Newton())),
    "Windows(solver=ELK(segments=2), length=9)": Windows(ELK(2), 9),
}


@pytest.mark.parametrize("text", PRINTED)
def test_a_method_prints_what_is_not_the_default(text):
    assert repr(PRINTED[text]) == text


def test_a_solution_prints_what_happened():
    xs = jnp.zeros(64)
    sol = run_jitted(lambda h, x: 0.5 * jnp.cos(h) + x, xs, 0.3, solver=Newton(8))
    text = repr(sol)
    parts = "successful", "float64[64]", "by Newton(segments=8)\n", "steps, residual"
    for part in parts:
        assert part in text
    xs = jnp.zeros(200)
    sol = run_jitted(logistic, xs, 0.37, solver=Newton(), max_steps=2, throw=False)
    assert "did not bring the residual below the tolerance" in repr(sol)
    seen = []
    jax.jit(lambda xs: seen.append(repr(solve(logistic, xs, 0.3))) or xs)(xs)
    assert "states" in seen[0] and "residual" not in seen[0]


# Bad input


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: QuasiNewton(probes=0), "`probes` is 0"),
        (lambda: DampedNewton(damping=1.5), "`damping` is 1.5"),
        (lambda: ELK(damping=0.0), "`damping` is 0.0"),
        (lambda: ELK(0), "`segments` is 0"),
        (lambda: Picard(True), "`segments` is True"),
        (lambda: Jacobi(rtol=-1.0), "`rtol` is -1.0"),
        (lambda: Newton(history=-1), "`history` is -1"),
        (lambda: Ladder((Newton(),), (1, 2)), "for 1 methods"),
        (lambda: Ladder((Newton(),), 0), "`max_steps` is 0"),
        (lambda: Windows(Newton(), 0), "`length` is 0"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_solvers():
    with pytest.raises(TypeError, match="tuple of methods"):
        Ladder((Sequential(),))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="itself a `Windows`"):
        Windows(Windows(Newton(), 4), 8)


# Optimistix


# `RootFinder` is the same for all methods, so each kind of step once.
@pytest.mark.parametrize(
    "method", ["newton-7", "quasi-newton", "damped", "elk-7", "picard", "jacobi"]
)
def test_methods_are_optimistix_root_finders(method):
    cell, (parameters, xs, h0) = CELLS["elman"], instance("elman")

    class Elman(eqx.Module):
        parameters: dict

        def __call__(self, h, x):
            return cell.step(self.parameters, h, x)

    reset = some_resets(T)

    @eqx.filter_jit
    def find(f, xs, h0):
        problem = Problem(f, xs, h0, reset)
        guess = jnp.zeros((T, *h0.shape))
        finder = RootFinder(METHODS[method])
        found = optx.root_find(residual, finder, guess, args=problem)
        return found.value, found.stats["num_steps"]

    states, steps = find(Elman(parameters), xs, h0)
    oracle = jax.jit(lambda xs: scan(cell.f(parameters), xs, h0, reset))(xs)
    assert_close(states, oracle, 1e-11)
    assert 1 <= steps <= T


def test_optimistix_differentiates_through_its_own_adjoint():
    xs, h0 = jr.normal(jr.key(0), (7, 2)), jnp.ones(2)

    class Cell(eqx.Module):
        a: jax.Array

        def __call__(self, h, x):
            return jnp.tanh(self.a * h + x)

    def loss(run, a, xs, h0):
        return jnp.sum(jnp.sin(run(Cell(a), xs, h0)))

    def find(f, xs, h0):
        guess, problem = jnp.zeros_like(xs), Problem(f, xs, h0)
        finder = RootFinder(Newton())
        return optx.root_find(residual, finder, guess, args=problem).value

    gradient = jax.jit(jax.grad(ft.partial(loss, find), (0, 1, 2)))
    oracle = jax.jit(jax.grad(ft.partial(loss, scan), (0, 1, 2)))
    a = jnp.array([0.5, -0.8])
    assert_close(gradient(a, xs, h0), oracle(a, xs, h0), 1e-9)


def test_optimistix_with_another_function_is_not_reported_as_solved():
    problem = Problem(logistic, jnp.zeros(9), jnp.asarray(0.3))
    wrong = optx.root_find(
        lambda y, args: residual(y, args) + 1.0,
        RootFinder(Newton()),
        jnp.zeros(9),
        args=problem,
        max_steps=12,
        throw=False,
    )
    assert not bool(wrong.result == optx.RESULTS.successful)


def test_optimistix_wants_a_problem():
    with pytest.raises(TypeError, match=r"expected a `pararnn\.Problem`"):
        optx.root_find(lambda y, args: y, RootFinder(Newton()), jnp.zeros(3))
    problem = Problem(logistic, jnp.zeros(9), jnp.asarray(0.3))
    with pytest.raises(ValueError, match=r"`y0` is float64\[8\]"):
        finder = RootFinder(Newton())
        optx.root_find(lambda y, _: y, finder, jnp.zeros(8), args=problem)


@jax.custom_jvp
def rounded(h):
    return jnp.tanh(h)


@rounded.defjvp
def _(primals, tangents):
    """The value that comes with the derivative is rounded otherwise."""
    value, tangent = jax.jvp(jnp.tanh, primals, tangents)
    return value * (1 + 1e-9), tangent


@pytest.mark.parametrize("limit", [None, 8], ids=["no limit", "limit"])
@pytest.mark.parametrize("method", [Newton(8), QuasiNewton(8)], ids=repr)
def test_steps_that_change_nothing_are_not_repeated(method, limit):
    """Where a step's program rounds otherwise than the one that certifies, no number of
    steps would satisfy the certificate."""
    xs = jnp.sin(jnp.arange(64.0 * 3).reshape(64, 3))
    reset = jnp.arange(64) % 4 == 1

    def cell(h, x):
        return rounded(1.5 * h) + x

    sol = solve(cell, xs, jnp.ones(3), solver=method, reset=reset, max_steps=limit)
    assert sol.stats["num_steps"] <= 3
    np.testing.assert_allclose(
        sol.states, scan(cell, xs, jnp.ones(3), reset), rtol=1e-13
    )
