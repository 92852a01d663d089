"""`integrate` against diffrax: numbers, derivatives, batches and failures."""

import functools as ft
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

from pararnn import RESULTS, Auto, Ladder, Newton, Sequential, integrate
from tests.helpers import assert_close

T = 33
SOLVERS = {
    "auto": Auto(),
    "sequential": Sequential(),
    "newton": Newton(),
    "newton-7": Newton(7),
}

# The vector fields: modules whose arrays are parameters; one more is in `args`.


class LotkaVolterra(eqx.Module):
    rates: jax.Array

    def __call__(self, t, y, args):
        a, b, c, d = self.rates
        prey, predator = y
        growth = jnp.stack([a - b * predator, d * prey - c])
        return y * growth - args * jnp.sin(t) * y


class VanDerPol(eqx.Module):
    mu: jax.Array

    def __call__(self, t, y, args):
        x, v = y
        return jnp.stack([v, self.mu * (1 - x * x) * v - x + args * jnp.cos(t)])


class Pendulums(eqx.Module):
    """Two coupled pendulums and their dissipated energy: a state of three leaves."""

    friction: jax.Array

    def __call__(self, t, y, args):
        angle, (speed, _) = y
        pull = args * (angle[::-1] - angle)
        drag = self.friction * speed
        return speed, (pull - jnp.sin(angle) - drag, jnp.sum(drag * speed))


class Network(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, t, y, args):
        return args * self.mlp(y) - 0.1 * y


class Problem(NamedTuple):
    field: Callable
    args: jax.Array
    y0: jax.Array | tuple
    end: float

    @property
    def ts(self):
        """Steps of unequal length."""
        even = jnp.linspace(0.0, 1.0, T + 1)
        return self.end * (even + 0.1 * jnp.sin(5 * even) * (1 - even))


def make_problems():
    mlp = eqx.nn.MLP(3, 3, 8, 2, activation=jnp.tanh, key=jr.key(0))
    half = jnp.asarray(0.5)
    return {
        "lotka-volterra": Problem(
            LotkaVolterra(jnp.array([1.5, 1.0, 3.0, 1.0])),
            0.1 * half,
            jnp.array([2.0, 1.0]),
            2.0,
        ),
        "van-der-pol": Problem(
            VanDerPol(jnp.asarray(30.0)), half, jnp.array([2.0, 0.0]), 2.0
        ),
        "pytree": Problem(
            Pendulums(jnp.array([0.1, 0.3])),
            half,
            (jnp.array([1.0, -0.5]), (jnp.array([0.0, 1.0]), jnp.asarray(0.0))),
            4.0,
        ),
        "mlp": Problem(Network(mlp), 4 * half, jnp.array([1.0, -1.0, 0.5]), 4.0),
    }


PROBLEMS = make_problems()
EXPLICIT = ["Euler", "Heun", "Midpoint", "Ralston", "Bosh3", "Tsit5", "Dopri5"]
IMPLICIT = {
    "implicit-euler": diffrax.ImplicitEuler,
    "kvaerno3": diffrax.Kvaerno3,
}


def tight(make):
    """An implicit method that agrees with ours to rounding."""
    return make(root_finder=optx.Newton(1e-12, 1e-12), root_find_max_steps=50)


def by_diffrax(terms, method, ts, y0, args=None):
    """The same steps by `diffeqsolve`."""
    if not isinstance(terms, diffrax.AbstractTerm | tuple):
        terms = diffrax.ODETerm(terms)
    return diffrax.diffeqsolve(
        terms,
        method,
        ts[0],
        ts[-1],
        None,
        y0,
        args,
        stepsize_controller=diffrax.StepTo(ts),
        saveat=diffrax.SaveAt(steps=True),
        max_steps=len(ts) - 1,
    ).ys


def by_loop(field, method, ts, y0, args=None):
    """The same steps in a plain `lax.scan`, which JAX differentiates."""
    if getattr(method, "scan_kind", "") is None:
        method = eqx.tree_at(
            lambda m: m.scan_kind, method, "bounded", is_leaf=lambda x: x is None
        )
    term = diffrax.ODETerm(field)

    def step(y, times):
        state = method.init(term, *times, y, args)
        y = method.step(term, *times, y, args, state, made_jump=False)[0]
        return y, y

    return jax.lax.scan(step, y0, (ts[:-1], ts[1:]))[1]


def by_integrate(solver, **options):
    def run(terms, method, ts, y0, args=None):
        sol = integrate(terms, method, ts, y0, args, solver=solver, **options)
        return sol.states

    return run


def states_of(run, method, name):
    problem = PROBLEMS[name]

    def all_states(field, args, y0, ts):
        return run(field, method, ts, y0, args)

    jitted = eqx.filter_jit(all_states)
    return jitted(problem.field, problem.args, problem.y0, problem.ts)


@ft.cache
def wanted_states(method, name):
    return states_of(by_diffrax, method, name)


# Numbers


@pytest.mark.parametrize("method", EXPLICIT)
def test_explicit_methods(method):
    """Unrolled stages, against diffrax's loop over them."""
    method = getattr(diffrax, method)()
    got = states_of(by_integrate(Sequential()), method, "lotka-volterra")
    assert_close(got, states_of(by_loop, method, "lotka-volterra"), 1e-12)


@pytest.mark.parametrize(
    ("method", "name", "solver"),
    [
        (diffrax.Tsit5(), "lotka-volterra", "newton"),
        (diffrax.Tsit5(), "lotka-volterra", "auto"),
        (diffrax.Heun(), "pytree", "newton-7"),
        (diffrax.Heun(), "pytree", "sequential"),
        (diffrax.Midpoint(), "mlp", "newton"),
    ],
)
def test_problems(method, name, solver):
    got = states_of(by_integrate(SOLVERS[solver]), method, name)
    assert_close(got, wanted_states(method, name), 1e-11)


@pytest.mark.parametrize(
    ("method", "name", "solver"),
    [
        ("implicit-euler", "van-der-pol", "newton"),
        pytest.param("kvaerno3", "van-der-pol", "newton", marks=pytest.mark.slow),
    ],
)
def test_implicit_methods(method, name, solver):
    """With our root finder, against diffrax with a tight one."""
    make = IMPLICIT[method]
    got = states_of(by_integrate(SOLVERS[solver]), make(), name)
    assert_close(got, wanted_states(tight(make), name), 1e-11)


@pytest.mark.slow
def test_the_root_finder_that_was_given():
    method = diffrax.ImplicitEuler(optx.Chord(1e-2, 1e-2))
    got = states_of(by_integrate(Sequential()), method, "van-der-pol")
    assert_close(got, wanted_states(method, "van-der-pol"), 1e-12)
    exact = wanted_states(tight(diffrax.ImplicitEuler), "van-der-pol")
    with pytest.raises(AssertionError):
        assert_close(got, exact, 1e-9)


def identity(t, y, args):
    return y


def pull(t, y, args):
    return -jnp.sin(y)


def splits():
    """Terms of several kinds, and methods for them."""
    grid = jnp.linspace(0.0, 1.0, T + 1)
    wiggle = diffrax.LinearInterpolation(grid, jnp.stack([grid, grid**2], axis=1))
    noise = diffrax.VirtualBrownianTree(0.0, 1.0, 0.1, (2,), jr.key(0))
    drift = diffrax.ODETerm(pull)
    controlled = diffrax.ControlTerm(lambda t, y, args: jnp.outer(y, y), wiggle)
    noisy = diffrax.ControlTerm(
        lambda t, y, args: lx.DiagonalLinearOperator(jnp.cos(y)), noise
    )
    stiff = diffrax.ODETerm(lambda t, y, args: -50.0 * y)
    y0 = jnp.array([1.0, -0.5])
    return {
        "control": (controlled, diffrax.Heun(), y0, Newton()),
        "drift and control": (
            diffrax.MultiTerm(drift, controlled),
            diffrax.Midpoint(),
            y0,
            Sequential(),
        ),
        "drift and noise": (
            diffrax.MultiTerm(drift, noisy),
            diffrax.EulerHeun(),
            y0,
            Sequential(),
        ),
        "symplectic": (
            (diffrax.ODETerm(identity), drift),
            diffrax.SemiImplicitEuler(),
            (y0, y0[::-1]),
            Newton(),
        ),
        "implicit-explicit": (
            diffrax.MultiTerm(drift, stiff),
            tight(diffrax.KenCarp3),
            y0,
            Sequential(),
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        "control",
        pytest.param("drift and control", marks=pytest.mark.slow),
        pytest.param("drift and noise", marks=pytest.mark.slow),
        "symplectic",
        pytest.param("implicit-explicit", marks=pytest.mark.slow),
    ],
)
def test_terms(name):
    terms, method, y0, solver = splits()[name]
    ts = jnp.linspace(0.0, 1.0, T + 1)
    got, wanted = (
        jax.jit(lambda y0: run(terms, method, ts, y0))(y0)
        for run in (by_integrate(solver), by_diffrax)
    )
    assert_close(got, wanted, 1e-11)


def test_plain_functions_for_several_terms():
    y0, ts = jnp.array([1.0, -0.5]), jnp.linspace(0.0, 1.0, T + 1)
    method = diffrax.SemiImplicitEuler()
    wrapped = tuple(map(diffrax.ODETerm, (identity, pull)))
    got, wanted = (
        jax.jit(lambda y0: integrate(terms, method, ts, y0).states)((y0, y0))
        for terms in ((identity, pull), wrapped)
    )
    assert_close(got, wanted, 0.0)


@pytest.mark.parametrize(
    ("method", "solver"),
    [
        (diffrax.Heun(), "newton"),
        pytest.param(
            tight(diffrax.ImplicitEuler), "sequential", marks=pytest.mark.slow
        ),
    ],
)
def test_backwards_in_time(method, solver):
    problem = PROBLEMS["pytree"]
    ts = problem.ts[::-1]
    got, wanted = (
        jax.jit(lambda y0: run(problem.field, method, ts, y0, problem.args))(problem.y0)
        for run in (by_integrate(SOLVERS[solver]), by_diffrax)
    )
    assert_close(got, wanted, 1e-11)


@pytest.mark.parametrize(
    ("y0", "times", "dtype"),
    [
        (1, "float64", "float64"),
        (np.array([1, 2]), "float32", "float32"),
        (jnp.float32(1.0), "float64", "float64"),
        (jnp.ones(2, jnp.bfloat16), "float32", "float32"),
        (jnp.ones(2), "float32", "float64"),
    ],
)
def test_dtypes(y0, times, dtype):
    """As diffrax does, promote the state by the times."""
    ts = jnp.linspace(0.0, 1.0, 5, dtype=times)
    states = jax.eval_shape(
        lambda ts: integrate(lambda t, y, args: -y, diffrax.Heun(), ts, y0).states, ts
    )
    assert states.dtype == dtype and states.shape == (4, *np.shape(y0))


@pytest.mark.parametrize(
    "method", ["implicit-euler", pytest.param("kvaerno3", marks=pytest.mark.slow)]
)
def test_root_finder_at_any_size_of_the_state(method):
    """In float32 and stiff, an absolute tolerance would be unreachable or useless."""
    sizes = np.array([1e4, 1.0, 1e-6, 0.0])
    stiff = jnp.array([[-1000.0, 1.0], [3.0, -0.5]])
    ts, y0 = jnp.linspace(0.0, 2.0, 65), jnp.array([1.0, 0.5])

    def single(x):
        return jnp.asarray(x, jnp.float32)

    def field(t, y, matrix):
        return matrix @ y

    @jax.jit
    @jax.vmap
    def states(y0):
        times, matrix = single(ts), single(stiff)
        return integrate(field, IMPLICIT[method](), times, y0, matrix).states

    @jax.jit
    def exact(y0):
        return by_loop(field, tight(IMPLICIT[method]), ts, y0, stiff)

    got = states(single(sizes[:, None] * y0[None]))
    wanted = exact(y0)
    for size, states_of_size in zip(sizes, got, strict=True):
        assert_close(states_of_size.astype(jnp.float64), wanted * size, 2e-5)


def test_independent_states_are_found_independent():
    y0, ts = jnp.linspace(-1.0, 1.0, 5), jnp.linspace(0.0, 1.0, T + 1)

    def run(y0):
        return integrate(pull, diffrax.Tsit5(), ts, y0, structure="diagonal").states

    jax.eval_shape(run, y0)  # refused here if they were not


def test_no_steps():
    problem = PROBLEMS["pytree"]
    sol = integrate(problem.field, diffrax.Heun(), problem.ts[:1], problem.y0, 1.0)
    assert sol.result == RESULTS.successful
    assert_close(sol.states, jax.tree.map(lambda y: y[None][:0], problem.y0), 0.0)


# Derivatives


def total(states):
    """A number that depends on every state, with unequal weights."""

    def one(s):
        return jnp.sum(jnp.cos(jnp.arange(s.size, dtype=s.dtype)).reshape(s.shape) * s)

    return sum(one(s) for s in jax.tree.leaves(states))


def loss_of(run, method, name):
    """A loss of everything that can be differentiated, and a point."""
    problem = PROBLEMS[name]
    arrays, static = eqx.partition(problem.field, eqx.is_array)

    def loss(primals):
        arrays, args, y0, ts = primals
        return total(run(eqx.combine(arrays, static), method, ts, y0, args))

    return loss, (arrays, problem.args, problem.y0, problem.ts)


def direction(primals):
    leaves, tree = jax.tree.flatten(primals)
    keys = jr.split(jr.key(1), len(leaves))
    normal = [jr.normal(k, v.shape, v.dtype) for k, v in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, normal)


def derivatives(run, method, name, forward=False):
    """The gradient, and the derivative along one direction by forward mode."""
    loss, primals = loss_of(run, method, name)

    @jax.jit
    def both(primals, tangents):
        along = jax.jvp(loss, (primals,), (tangents,))[1] if forward else None
        return jax.grad(loss)(primals), along

    return both(primals, direction(primals))


@pytest.mark.parametrize(
    ("method", "name", "solver", "forward"),
    [
        (diffrax.Euler(), "mlp", "auto", True),
        (diffrax.Heun(), "lotka-volterra", "newton", False),
        pytest.param(
            diffrax.Heun(), "pytree", "sequential", False, marks=pytest.mark.slow
        ),
        pytest.param(
            tight(diffrax.ImplicitEuler),
            "van-der-pol",
            "newton",
            True,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_gradients(method, name, solver, forward):
    got = derivatives(by_integrate(SOLVERS[solver]), method, name, forward)
    assert_close(got, derivatives(by_loop, method, name, forward), 1e-9)


@pytest.mark.parametrize(
    "method", ["implicit-euler", pytest.param("kvaerno3", marks=pytest.mark.slow)]
)
def test_implicit_gradients_against_differences(method):
    """Finite differences do not use the implicit function theorem."""
    loss, primals = loss_of(
        by_integrate(Sequential()), IMPLICIT[method](), "van-der-pol"
    )
    tangents = direction(primals)

    def along(step):
        return loss(jax.tree.map(lambda p, t: p + step * t, primals, tangents))

    h = 1e-5
    at = jax.jit(jax.vmap(along))(h * jnp.array([-2.0, -1.0, 1.0, 2.0]))
    # Of fourth order, so that the only error is the rounding of the loss.
    wanted = (8 * (at[2] - at[1]) - (at[3] - at[0])) / (12 * h)
    got = jax.jit(jax.grad(along))(0.0)
    np.testing.assert_allclose(got, wanted, rtol=1e-8)


# Batches


def test_vmap():
    problem = PROBLEMS["lotka-volterra"]
    batch = problem.y0[None] * jnp.linspace(0.5, 1.5, 3)[:, None]

    def gradient(y0):
        def loss(y0):
            sol = integrate(
                problem.field,
                diffrax.Heun(),
                problem.ts,
                y0,
                problem.args,
                solver=Newton(7),
            )
            return total(sol.states), sol

        return jax.grad(loss, has_aux=True)(y0)

    slopes, sols = jax.jit(jax.vmap(gradient))(batch)
    alone = jax.jit(gradient)
    wanted, each = zip(*map(alone, batch), strict=True)
    assert_close(sols.states, jnp.stack([sol.states for sol in each]), 1e-11)
    assert_close(slopes, jnp.stack(wanted), 1e-9)
    assert bool(jnp.all(jax.vmap(lambda r: r == RESULTS.successful)(sols.result)))


# Guesses


def test_a_coarse_solution_is_a_good_guess():
    """As in docs/api/diffrax.md."""
    field = VanDerPol(jnp.asarray(1.0))
    ts, y0 = jnp.linspace(0.0, 10.0, 1025), jnp.array([2.0, 0.0])

    def coarse(times, y0):
        t = jnp.concatenate([times[0][:1], times[1]])
        few = integrate(field, diffrax.Tsit5(), t[::16], y0, 0.0, solver=Sequential())
        few = jnp.concatenate([y0[None], few.states])
        return jax.vmap(lambda y: jnp.interp(t[1:], t[::16], y), 1, 1)(few)

    @jax.jit
    def steps(y0):
        return [
            integrate(
                field,
                diffrax.Tsit5(),
                ts,
                y0,
                0.0,
                solver=Newton(64),
                initial_guess=guess,
            ).stats["num_steps"]
            for guess in ("h0", coarse)
        ]

    plain, better = map(int, steps(y0))
    assert better < plain / 3


# Failures


@pytest.mark.parametrize(
    ("solver", "throw"),
    [
        ("sequential", True),
        pytest.param("newton", False, marks=pytest.mark.slow),
    ],
)
def test_a_root_finder_that_fails(solver, throw):
    """One step of Newton's method cannot solve a stiff stage."""
    method = diffrax.ImplicitEuler(optx.Newton(1e-9, 1e-9), root_find_max_steps=1)
    problem = PROBLEMS["van-der-pol"]

    @eqx.filter_jit
    def run(y0):
        return integrate(
            problem.field,
            method,
            problem.ts,
            y0,
            problem.args,
            solver=SOLVERS[solver],
            throw=throw,
        )

    if throw:
        with pytest.raises(eqx.EquinoxRuntimeError, match="root_find_max_steps"):
            run(problem.y0)
        return
    sol = run(problem.y0)
    assert sol.result == RESULTS.nonfinite_states
    first = int(sol.stats["first_nonfinite"])
    assert first < T and bool(jnp.all(jnp.isnan(sol.states[first])))


def test_a_solver_that_does_not_converge():
    problem = PROBLEMS["lotka-volterra"]

    @eqx.filter_jit
    def run(y0):
        return integrate(
            problem.field,
            diffrax.Heun(),
            problem.ts,
            y0,
            problem.args,
            solver=Newton(),
            max_steps=1,
            throw=False,
        )

    assert run(problem.y0).result == RESULTS.not_converged


def test_other_failures_of_an_implicit_method():
    problem = PROBLEMS["van-der-pol"]

    @eqx.filter_jit
    def run(args):
        method = diffrax.ImplicitEuler()
        return integrate(problem.field, method, problem.ts, problem.y0, args)

    with pytest.raises(eqx.EquinoxRuntimeError, match="value that the cell closes"):
        run(jnp.asarray(jnp.nan))


def robertson(t, y, args):
    a, b, c = y
    slow, back, fast = 0.04 * a, 1e4 * b * c, 3e7 * b * b
    return jnp.stack([back - slow, slow - back - fast, fast])


def blow_up(t, y, args):
    return args * y**2


def euler_by_numpy(ts, y0):
    """Implicit Euler for Robertson's equations, each step by Newton's method."""
    y, states = np.array(y0), []
    for dt in np.diff(ts):
        z = y
        for _ in range(50):
            field = np.asarray(robertson(0.0, z, None))
            b, c = z[1:]
            jacobian = np.array(
                [
                    [-0.04, 1e4 * c, 1e4 * b],
                    [0.04, -1e4 * c - 6e7 * b, -1e4 * b],
                    [0, 6e7 * b, 0],
                ]
            )
            z = z - np.linalg.solve(np.eye(3) - dt * jacobian, z - y - dt * field)
        y = z
        states.append(y)
    return np.stack(states)


@pytest.mark.parametrize("solver", [Ladder((Newton(8),)), Newton()])
def test_iterates_without_a_step_raise_nothing(solver):
    """Newton's method over the steps passes states from which no step has a root."""
    ts = np.concatenate([[0.0], np.geomspace(1e-5, 1e4, 60)])
    y0 = jnp.array([1.0, 0.0, 0.0])
    method = diffrax.ImplicitEuler()

    @jax.jit
    def run(y0):
        options = {"solver": solver, "throw": False}
        return integrate(robertson, method, jnp.asarray(ts), y0, **options)

    sol = run(y0)
    assert sol.result == RESULTS.successful
    wanted = euler_by_numpy(ts, y0)
    np.testing.assert_allclose(sol.states, wanted, rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize(
    ("method", "solver"),
    [
        ("implicit-euler", Sequential()),
        ("implicit-euler", Ladder((Newton(8),))),
        pytest.param("kvaerno3", Sequential(), marks=pytest.mark.slow),
    ],
)
def test_a_step_that_fails_has_no_derivative(method, solver):
    """A step past a blow-up. Before it, a formula gives the root of z = y + dt z²."""
    dt, T = 0.05, 40
    ts = dt * jnp.arange(T + 1.0)

    @jax.jit
    def run(y0, rate, weights):
        def loss(y0, rate):
            options = {"solver": solver, "throw": False}
            sol = integrate(blow_up, IMPLICIT[method](), ts, y0, rate, **options)
            return jnp.sum(weights * sol.states), sol

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(y0, rate)

    (_, sol), gradient = run(jnp.asarray(1.0), jnp.asarray(1.0), jnp.ones(T))
    assert sol.result == RESULTS.nonfinite_states
    first = int(sol.stats["first_nonfinite"])
    assert 5 < first < 25 and np.all(np.isnan(sol.states[first:]))
    assert np.all(np.isnan(gradient))
    if method == "implicit-euler":
        y, wanted = 1.0, []
        while 4 * dt * y < 1:
            y = (1 - np.sqrt(1 - 4 * dt * y)) / (2 * dt)
            wanted.append(y)
        np.testing.assert_allclose(sol.states[:first], wanted, rtol=1e-9)


def test_a_closure_is_differentiated():
    """Parameters that the field closes over are, not only those in `args`."""
    method, y0, ts = tight(diffrax.ImplicitEuler), jnp.ones(2), jnp.linspace(0, 1.0, 6)

    def loss(run):
        def of(rate):
            return total(run(lambda t, y, args: -rate * y**3, method, ts, y0))

        return jax.jit(jax.value_and_grad(of))(jnp.asarray([0.5, 40.0]))

    assert_close(loss(by_integrate(Sequential())), loss(by_loop), 1e-11)
