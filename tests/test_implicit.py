"""Implicit recurrences against loops in NumPy."""

import functools as ft
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from pararnn import (
    RESULTS,
    RNN,
    Auto,
    Jacobi,
    Newton,
    Sequential,
    jacobian_structure,
    solve,
)
from pararnn._implicit import Implicit
from tests.implicit_equations import (
    EQUATIONS,
    Equation,
    T,
    at,
    diagonal,
    directions,
    flat,
    like,
    normal,
    numpy_curvature,
    numpy_loop,
    numpy_slope,
    numpy_step,
    pendulum,
    pendulum_at,
    singular,
    stiff_matrix,
    weights,
)
from tests.problems import some_resets

SOLVERS = {
    "newton": Newton(),
    "newton-7": Newton(7),
    "sequential": Sequential(),
    "auto": Auto(),
}


def vectors(states):
    """JAX's states as `[T, width]`."""
    leaves = [leaf.reshape(T, -1) for leaf in jax.tree.leaves(states)]
    return jnp.concatenate(leaves, axis=1)


def loss_of(equation, solver):
    """A number that depends on all states, and the states."""

    def loss(point):
        p, xs, h0 = point
        states = vectors(solve(equation.cell(p), xs, h0, solver=solver).states)
        return jnp.sum(jnp.asarray(weights(states.shape[1])) * states), states

    return loss


def dot(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(np.vdot(x, y) for x, y in pairs)


def close(got, wanted, rtol):
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=rtol * scale)


# The table: equations x solvers. Derivatives are taken at the states, whichever solver
# found them. So first ones of one equation suffice for each solver, and second ones for
# each kind of inverse (`test_gradient_of_a_gradient`: the diagonal).

DERIVATIVES = [
    ("stiff", "sequential", 2),
    ("van-der-pol", "sequential", 1),
    ("pendulum", "sequential", 2),
    ("implicit-rnn", "sequential", 2),
    ("blocks", "auto", 2),
    *(("diagonal", solver, 1) for solver in ("newton", "newton-7", "auto")),
]
STATES = [(name, solver) for name in EQUATIONS for solver in SOLVERS]
STATES = [pair for pair in STATES if pair[1] != "newton-7" or pair[0] == "blocks"]
STATES = [pair for pair in STATES if pair not in {row[:2] for row in DERIVATIVES}]


@pytest.mark.parametrize("name, solver", STATES)
def test_states(name, solver):
    equation = EQUATIONS[name]
    run = ft.partial(solve, equation.cell(), solver=SOLVERS[solver])
    states = jax.jit(lambda xs, h0: vectors(run(xs, h0).states))(*equation.point[1:])
    close(states, numpy_loop(equation)[0], 1e-11)


@pytest.mark.parametrize("name, solver, order", DERIVATIVES)
def test_states_and_derivatives(name, solver, order):
    """The gradient, a tangent, and the forward derivative of the gradient."""
    equation = EQUATIONS[name]
    loss, point = loss_of(equation, SOLVERS[solver]), equation.point

    @jax.jit
    def everything(point, v):
        both = jax.value_and_grad(loss, has_aux=True)
        if order == 2:
            return jax.jvp(both, (point,), (v,))
        slope, pushed = jax.jvp(loss, (point,), (v,))[1]
        return both(point), ((slope, pushed), None)

    v = directions(point, 0)
    ((_, states), gradient), ((slope, pushed), product) = everything(point, v)
    close(states, numpy_loop(equation)[0], 1e-11)
    close(pushed, numpy_loop(equation, tangents=v)[1], 1e-9)
    np.testing.assert_allclose(slope, numpy_slope(equation, v), rtol=1e-9)
    for seed in (1, 2):
        u = directions(point, seed)
        wanted = numpy_slope(equation, u)
        np.testing.assert_allclose(dot(gradient, u), wanted, rtol=1e-9)
        if order == 2:
            wanted = numpy_curvature(equation, u, v)
            np.testing.assert_allclose(dot(product, u), wanted, rtol=1e-6)


def test_gradient_of_a_gradient():
    equation = EQUATIONS["diagonal"]
    loss, point = loss_of(equation, Sequential()), equation.point
    u, v = directions(point, 1), directions(point, 2)

    def along(point):
        gradient = jax.grad(lambda p: loss(p)[0])(point)
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(v), strict=True)
        return sum(jnp.vdot(a, b) for a, b in pairs)

    product = jax.jit(jax.grad(along))(point)
    wanted = numpy_curvature(equation, u, v)
    np.testing.assert_allclose(dot(product, u), wanted, rtol=1e-6)


@pytest.mark.parametrize("name", EQUATIONS)
def test_structure(name):
    equation = EQUATIONS[name]
    found = jacobian_structure(equation.cell(), equation.xs[0], equation.h0)
    assert repr(found) == equation.structure


def test_resets_under_vmap():
    """Parameters, inputs and states with a batch axis, under `jit`, with resets."""
    equation, reset = EQUATIONS["diagonal"], some_resets(T)

    def of(seed):
        return jax.tree.map(lambda v, d: v + 0.1 * d, *shifted(seed))

    def shifted(seed):
        return equation.point, directions(equation.point, seed)

    points, fresh = [of(seed) for seed in (0, 1, 2)], np.ones(5)
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *points)

    def states(point):
        p, xs, h0 = point
        options = {"solver": Newton(5), "reset": reset, "reset_state": fresh}
        return solve(equation.cell(p), xs, h0, **options).states

    got = jax.jit(jax.vmap(states))(batch)
    for one, point in zip(got, points, strict=True):
        close(one, numpy_loop(equation, point, None, reset, fresh)[0], 1e-11)


# Newton's steps on one system for all states, where each step is a segment.


def numpy_system(equation, states):
    """`F` at all states, its Jacobian `[T w, T w]`, and the blocks of `∂F/∂h_t`."""
    steps, width = states.shape
    p, xs, h0 = equation.point

    def F(v):
        z = v.reshape(steps, width)
        before = [h0, *(like(h0, row) for row in z[:-1])]
        rows = [
            flat(equation.F(np, p, like(h0, z[t]), before[t], at(xs, t)))
            for t in range(steps)
        ]
        return np.concatenate(rows)

    v = states.reshape(-1)
    columns = [F(v + e).imag / 1e-30 for e in 1e-30j * np.eye(v.size)]
    jacobian = np.stack(columns, axis=1)
    own = [jacobian[t : t + width, t : t + width] for t in range(0, v.size, width)]
    return F(v), jacobian, own


@pytest.mark.parametrize("name", ["van-der-pol", "implicit-rnn", "blocks"])
def test_steps_are_those_of_one_system(name):
    """The defects, step by step, are those of Newton's method on a dense matrix."""
    equation = EQUATIONS[name]
    steps, exact = 6, numpy_loop(equation)[0]
    guess = exact + 0.02 * normal(20, *exact.shape)
    solver = Newton(history=steps)

    def run(guess):
        guess = jax.vmap(lambda v: like(equation.h0, v))(guess)
        return solve(
            equation.cell(), *equation.point[1:], solver=solver, initial_guess=guess
        )

    solution = jax.jit(run)(jnp.asarray(guess))
    close(vectors(solution.states), exact, 1e-11)
    taken = int(solution.stats["num_steps"])
    assert 2 <= taken <= steps
    states, expected = guess, []
    for _ in range(taken):
        value, jacobian, own = numpy_system(equation, states)
        defects = np.linalg.solve(np.stack(own), value.reshape(*states.shape, 1))
        expected.append(np.abs(defects[:-1]).max())
        states = states - np.linalg.solve(jacobian, value).reshape(states.shape)
    history = np.asarray(solution.stats["residual_history"])[:taken]
    np.testing.assert_allclose(history, expected, rtol=1e-5, atol=1e-13)


def test_a_system_that_finds_another_root_is_solved_again():
    """z² = x has two roots; the cell's is positive, and the guess is at the other."""

    def F(z, h, x):
        return z**2 - x - 0.1 * jnp.tanh(h)

    cell = Implicit(F, guess=lambda h, x: 1 + x)
    xs = 1 + jnp.asarray(normal(21, 2, T, 3)) ** 2

    def run(xs, near, solver):
        return solve(cell, xs, jnp.zeros(3), solver=solver, initial_guess=near)

    # One sequence starts at the wrong root, the other at the right one.
    near = jnp.asarray([-1.0, 1.0])[:, None, None] * jnp.sqrt(xs)
    got = jax.jit(jax.vmap(ft.partial(run, solver=Newton())))(xs, near)
    wanted = jax.jit(jax.vmap(ft.partial(run, solver=Sequential())))(xs, near).states
    assert np.all(np.asarray(wanted) > 0)
    close(got.states, wanted, 1e-13)
    astray, right = got.stats["num_steps"]
    assert right < astray <= 16


@pytest.mark.parametrize("limit", [2, 5, T, T + 1])
def test_a_limit_leaves_whole_steps(limit):
    """As many as the limit allows, from a guess at which the system diverges."""

    def F(z, h, x):
        return z**2 - x - 0.1 * jnp.tanh(h)

    cell, h0 = Implicit(F, guess=lambda h, x: 1 + x), jnp.zeros(3)
    xs = 1 + jnp.asarray(normal(21, T, 3)) ** 2

    def run(f):
        options = {"initial_guess": -jnp.sqrt(xs), "throw": False, "max_steps": limit}
        return solve(f, xs, h0, solver=Newton(), **options)

    got, wanted = jax.jit(lambda: (run(cell), run(lambda h, x: cell(h, x))))()
    assert got.stats["num_steps"] == wanted.stats["num_steps"] <= limit
    assert got.result == wanted.result
    close(got.states, wanted.states, 1e-14)


def test_a_system_far_from_its_solution_is_solved_by_whole_steps():
    """Newton's method on `tanh(z) = ...` diverges from a start beyond 1.09."""

    def F(z, h, x):
        return jnp.tanh(z) - 0.5 * jnp.tanh(h) - x

    cell = Implicit(F, guess=lambda h, x: 0 * h)
    xs = jnp.asarray(0.4 * np.cos(np.arange(T)))[:, None]
    far = jnp.full((T, 1), 3.0)
    solution = jax.jit(
        lambda xs: solve(cell, xs, jnp.zeros(1), solver=Newton(), initial_guess=far)
    )(xs)
    h, wanted = 0.0, []
    for x in np.asarray(xs)[:, 0]:
        h = np.arctanh(0.5 * np.tanh(h) + x)
        wanted.append([h])
    close(solution.states, np.array(wanted), 1e-13)


@pytest.mark.parametrize("method", [Jacobi, Newton])
def test_who_takes_many_steps_takes_whole_ones(method):
    """Only Newton's method takes joint steps; others step as for a plain function."""
    equation = EQUATIONS["implicit-rnn"]
    cell, arguments = equation.cell(), equation.point[1:]

    def whole(h, x):
        return cell(h, x)

    def count(f):
        run = ft.partial(solve, f, solver=method(history=T))
        return jax.jit(lambda xs, h0: run(xs, h0).stats["residual_history"])(*arguments)

    same = np.array_equal(count(cell), count(whole), equal_nan=True)
    assert same == (method is Jacobi)


def test_one_round_and_its_derivative():
    equation = EQUATIONS["implicit-rnn"]
    p, xs, h0 = equation.point
    cell, x = equation.cell(), xs[0]
    z, u = normal(22, 4), normal(23, 4)

    def parts(h):
        value = equation.F(np, p, z, h, x)
        jacobian = (
            np.eye(4)
            - (1 - np.tanh(p["W"] @ z + p["U"] @ h + p["V"] @ x)[:, None] ** 2) * p["W"]
        )
        return value, jacobian

    value, jacobian = parts(h0)
    got, pushed = jax.jit(
        lambda h, u: jax.jvp(lambda h: cell.refine(jnp.asarray(z), h, x), (h,), (u,))
    )(h0, u)
    close(got, z - np.linalg.solve(jacobian, value), 1e-14)
    moved = (parts(h0 + 1e-30j * u)[0]).imag / 1e-30
    close(pushed, -np.linalg.solve(jacobian, moved), 1e-14)


# Against known properties of the equations.


def test_stiff_linear_equation_in_closed_form():
    """The states are powers of the resolvent, and so are their Jacobians."""
    L, h0 = jnp.asarray(stiff_matrix()), jnp.ones(3)

    def F(z, h, x):
        return z - h - 0.1 * L @ z

    def states(h0):
        return solve(Implicit(F), jnp.arange(T), h0).states

    resolvent = np.linalg.inv(np.eye(3) - 0.1 * stiff_matrix())
    powers = np.stack([np.linalg.matrix_power(resolvent, t + 1) for t in range(T)])
    got, jacobian = jax.jit(lambda h: (states(h), jax.jacfwd(states)(h)))(h0)
    close(got, powers @ np.ones(3), 1e-11)
    close(jacobian, powers, 1e-11)


def test_corrections_that_end_as_noise(getkey):
    """So badly conditioned that they stay above the rounding of every entry."""
    L, h0 = stiff_matrix(), jax.random.normal(getkey(), (64, 3))
    cell = Implicit(lambda z, h, x: z - h - 0.1 * jnp.asarray(L) @ z)
    solution = jax.jit(jax.vmap(lambda h: solve(cell, jnp.zeros(60), h)))(h0)
    powers = exact_inverse_powers(np.eye(3) - 0.1 * L, 60)
    wanted = np.einsum("tij,bj->bti", powers, np.asarray(h0))
    assert np.abs(solution.states - wanted).max() < 1e-11


def exact_inverse_powers(matrix, count):
    """The first powers of the inverse, in rational numbers."""
    rows = [
        [*map(Fraction, row), *(Fraction(int(i == j)) for j in range(len(row)))]
        for i, row in enumerate(matrix.tolist())
    ]
    for k, pivot in enumerate(rows):
        pivot[:] = [entry / pivot[k] for entry in pivot]
        for row in rows:
            if row is not pivot:
                row[:] = [a - row[k] * b for a, b in zip(row, pivot, strict=True)]
    inverse = np.array([row[len(matrix) :] for row in rows], object)
    powers = [inverse]
    for _ in range(count - 1):
        powers.append(powers[-1] @ inverse)
    return np.array(powers).astype(float)


def pendulum_run(steps):
    """The states at `steps` times up to t = 2, and the exact ones from the angle."""
    dt, h0 = 2 / steps, pendulum_at(1.0)

    def F(z, h, x):
        return pendulum(jnp, {"g": 9.81}, z, h, x, dt)

    run = jax.jit(lambda h0: solve(Implicit(F), jnp.zeros(steps), h0).states)
    times = dt * np.arange(1, steps + 1)
    exact = scipy.integrate.solve_ivp(
        lambda t, y: [y[1], -9.81 * np.sin(y[0])],
        (0, 2.0),
        [1.0, 0.0],
        t_eval=times,
        rtol=1e-10,
        atol=1e-10,
    )
    angle = exact.y[0]
    return run(h0), np.stack([np.sin(angle), -np.cos(angle)], axis=1)


def test_pendulum_behaves_as_its_equations_say():
    """The hidden constraint holds at every step; errors are of the first order."""
    errors, drifts, energies = [], [], []
    for steps in (800, 1600):
        (p, v, tension), exact = jax.tree.map(np.asarray, pendulum_run(steps))
        square = np.sum(p**2, axis=1)
        hidden = np.sum(v**2, axis=1) - tension * square - 9.81 * p[:, 1]
        assert np.abs(hidden).max() < 1e-11
        energy = 0.5 * np.sum(v**2, axis=1) + 9.81 * p[:, 1]
        errors.append(np.abs(p - exact).max())
        drifts.append(np.abs(square - 1).max())
        energies.append(np.abs(energy + 9.81 * np.cos(1.0)).max())
    for name, (coarse, fine) in zip(
        ("error", "drift", "energy"), (errors, drifts, energies), strict=True
    ):
        assert 1.7 < coarse / fine < 2.3, name


def test_few_steps_are_needed():
    equation = EQUATIONS["implicit-rnn"]
    stats = jax.jit(equation.cell().stats)(equation.h0, equation.xs[0])
    assert stats["converged"] and 3 <= stats["num_steps"] <= 6
    assert stats["correction"] < 1e-14
    z, _ = numpy_step(equation.F, equation.parameters, equation.h0, equation.xs[0])
    close(stats["last"], z, 1e-14)


# Failure.


def no_root_from(t):
    """z² = x, which has no solution once the input is negative."""
    return lambda z, h, x: z**2 - x, jnp.where(jnp.arange(T) < t, 4.0, -1.0)[:, None]


@pytest.mark.parametrize("solver", ["newton", "sequential"])
def test_a_step_without_solution_is_reported(solver):
    F, xs = no_root_from(9)
    run = ft.partial(solve, Implicit(F), solver=SOLVERS[solver])
    solution = jax.jit(lambda xs: run(xs, jnp.ones(1), throw=False))(xs)
    assert solution.result == RESULTS.nonfinite_states
    assert solution.stats["first_nonfinite"] == 9
    close(solution.states[:9], np.full((9, 1), 2.0), 1e-14)
    assert np.all(np.isnan(solution.states[9]))


def test_a_step_without_solution_raises():
    F, xs = no_root_from(9)
    with pytest.raises(RuntimeError, match="a NaN or an infinity"):
        jax.block_until_ready(
            jax.jit(lambda xs: solve(Implicit(F), xs, jnp.ones(1)).states)(xs)
        )


FAILING = {
    "singular": (Implicit(singular), jnp.ones(2), jnp.asarray(0.5)),
    "singular, solved by the previous state": (
        Implicit(singular),
        jnp.asarray([1.0, 0.0]),
        jnp.asarray(1.0),
    ),
    "no solution": (Implicit(lambda z, h, x: z**2 + 1 + x), jnp.ones(3), 0.0),
    "NaN in the equation": (
        Implicit(lambda z, h, x: z + jnp.log(z) - x),
        -jnp.ones(1),
        1.0,
    ),
    "NaN in the previous state": (
        Implicit(lambda z, h, x: z - h),
        jnp.asarray([1.0, jnp.nan]),
        0.0,
    ),
    "too few steps": (
        Implicit(lambda z, h, x: jnp.exp(z) - h - x, max_steps=2),
        jnp.ones(2),
        30.0,
    ),
    "cycling": (
        Implicit(lambda z, h, x: z**3 - 2 * z + 2 + x),
        jnp.zeros(1),
        0.0,
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_step_that_fails_is_nan(name):
    cell, h, x = FAILING[name]
    state, stats = jax.jit(lambda h, x: (cell(h, x), cell.stats(h, x)))(h, x)
    assert np.all(np.isnan(state))
    assert not stats["converged"]
    assert stats["num_steps"] <= cell.max_steps


def test_a_guess_selects_the_solution_and_has_no_derivative():
    def F(z, h, x):
        return z**2 - x

    def run(scale, x, cell):
        return cell(scale * jnp.ones(2), x)

    def far(h, x):
        return 5 * h

    x = jnp.asarray([4.0, 9.0])
    for guess, sign in ((None, -1), (far, -1), (lambda h, x: -far(h, x), 1)):
        cell = Implicit(F, guess=guess)
        jacobians = jax.jit(jax.jacfwd(lambda s, x: run(s, x, cell), (0, 1)))
        close(jax.jit(lambda s, x: run(s, x, cell))(-1.0, x), sign * np.sqrt(x), 1e-14)
        along_guess, along_x = jacobians(-1.0, x)
        assert not np.any(along_guess)
        close(along_x, sign * np.diag(0.5 / np.sqrt(x)), 1e-14)


def test_tolerances_decide_what_is_accepted():
    """From 2 to the root at 1, looser tolerances stop at an earlier iterate."""

    def F(z, h, x):
        return z**3 - 1

    def at(**options):
        cell = Implicit(F, **options)
        stats = jax.jit(cell.stats)(jnp.full(1, 2.0), 0.0)
        assert stats["converged"]
        return abs(stats["last"][0] - 1), int(stats["num_steps"])

    iterates = [2.0]
    for _ in range(9):
        z = iterates[-1]
        iterates.append(z - (z**3 - 1) / (3 * z**2))
    corrections = np.abs(np.diff(iterates))
    for rtol in (0.5, np.float64(1e-3), None):
        error, steps = at(rtol=rtol)
        close = corrections <= (2e-8 if rtol is None else rtol) * np.array(iterates[1:])
        assert steps == np.argmax(close) + 2
        np.testing.assert_allclose(error, abs(iterates[steps] - 1), atol=1e-15)
    # A state close to the previous one need not be close to the solution.
    assert np.isnan(jax.jit(Implicit(F, max_steps=20))(jnp.full(1, 1e10), 0.0))


SINGULAR = {
    "double": lambda z: (z - 1) ** 2,
    "double, with rounding": lambda z: z * z - 2 * z + 1,
    "double, at zero": lambda z: z**2,
    "double, of a cosine": lambda z: 1 - jnp.cos(z - 1),
    "triple": lambda z: z**3 - 3 * z**2 + 3 * z - 1,
    "double, beside a regular one": lambda z: jnp.stack([z[0] - z[1], (z[1] - 1) ** 2]),
}


@pytest.mark.parametrize("name", SINGULAR)
def test_a_singular_solution_fails(name):
    """From many starts and with any number of steps, and its derivative fails too."""
    cell = Implicit(lambda z, h, x: SINGULAR[name](z) - x, max_steps=200)
    starts = 1 + np.array([1e-7, 1e-5, -1e-3, 0.03, -0.2, 0.9, 0.51, 1.7, 3.3])
    starts = np.stack([starts, starts[::-1]], axis=1)

    def run(h):
        gradient = jax.grad(lambda x: jnp.sum(cell(h, x)))(0.0)
        return cell(h, 0.0), gradient, cell.stats(h, 0.0)["converged"]

    states, gradients, converged = jax.jit(jax.vmap(run))(starts)
    assert np.all(np.isnan(states)) and np.all(np.isnan(gradients))
    assert not np.any(converged)


def test_a_solution_that_is_nearly_singular_does_not_fail():
    """Roots at 1 and 1 + gap, from outside, from between, and from a root itself."""
    gap = 1e-4
    cell = Implicit(lambda z, h, x: (z - 1) * (z - 1 - gap) - x)
    starts = jnp.array([[3.0], [1 + 0.7 * gap], [1 + gap], [1 + gap + 1e-9]])
    states, slopes = jax.jit(
        jax.vmap(lambda h: (cell(h, 0.0), jax.grad(lambda x: cell(h, x)[0])(0.0)))
    )(starts)
    np.testing.assert_allclose(states[:, 0], 1 + gap, rtol=1e-11)
    np.testing.assert_allclose(slopes, 1 / gap, rtol=1e-6)


@pytest.mark.parametrize("solver", ["newton", "sequential"])
def test_a_singular_solution_is_reported(solver):
    F, xs = SINGULAR["double"], jnp.where(jnp.arange(T) < 9, 0.25, 0.0)[:, None]
    cell = Implicit(lambda z, h, x: F(z) - x, guess=lambda h, x: 2 + 0 * h)
    run = ft.partial(solve, cell, h0=jnp.ones(1), solver=SOLVERS[solver], throw=False)
    solution = jax.jit(lambda xs: run(xs))(xs)
    assert solution.result == RESULTS.nonfinite_states
    assert solution.stats["first_nonfinite"] == 9
    close(solution.states[:9], np.full((9, 1), 1.5), 1e-14)


def test_tolerances_below_rounding_are_rounding():
    """Also where the solution is zero but its terms are not."""

    def F(z, h, x):
        return jnp.tanh(z) - 0.1 * z[::-1] + h - x

    cell = Implicit(F, rtol=0.0, atol=0.0)
    run = jax.jit(jax.vmap(lambda h: cell(h, 1e3)))
    assert np.all(np.isfinite(run(1e3 + np.linspace(-0.1, 0.1, 60).reshape(30, 2))))


# Other states, inputs and cells.


@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-6), ("bfloat16", 0.03)])
def test_coarse_dtypes(dtype, rtol):
    equation = EQUATIONS["implicit-rnn"]
    point = jax.tree.map(lambda v: jnp.asarray(v, dtype), equation.point)
    run = jax.jit(lambda p, xs, h0: solve(equation.cell(p), xs, h0).states)
    states = run(*point)
    assert states.dtype == dtype
    exact = jax.tree.map(lambda v: np.asarray(v, float), point)
    close(np.asarray(states, float), numpy_loop(equation, exact)[0], rtol)


def rotated(m, p, z, h, x):
    """z + a |z|² z = exp(0.4 i) h + x, in real and imaginary parts."""
    c, s = np.cos(0.4), np.sin(0.4)
    turned = m.stack([c * h[0] - s * h[1], s * h[0] + c * h[1]])
    return z + p["a"] * (z[0] ** 2 + z[1] ** 2) * z - turned - x


def test_complex_states():
    """They equal those of the same equation in real and imaginary parts."""
    a = np.array(0.5)
    parts = Equation(
        rotated, {"a": a}, normal(0, T, 2, 3), normal(1, 2, 3), "BlockDiagonal(2)"
    )

    def F(z, h, x):
        square = (z * jnp.conj(z)).real
        return z + jax.lax.complex(a * square, 0 * square) * z - np.exp(0.4j) * h - x

    def joined(v):
        return jax.lax.complex(v[..., 0, :], v[..., 1, :])

    def loss(xs, h0):
        states = solve(Implicit(F), joined(xs), joined(h0)).states
        states = jnp.stack([states.real, states.imag], axis=1).reshape(T, 6)
        return jnp.sum(jnp.asarray(weights(6)) * states), states

    xs, h0 = jnp.asarray(parts.xs), jnp.asarray(parts.h0)
    both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, states), gradient = both(xs, h0)
    close(states, numpy_loop(parts)[0], 1e-11)
    _, *u = directions(parts.point, 0)
    wanted = numpy_slope(parts, ({"a": 0.0}, *u))
    np.testing.assert_allclose(dot(gradient, tuple(u)), wanted, rtol=1e-9)
    found = jacobian_structure(Implicit(F), joined(xs[0]), joined(h0))
    assert repr(found) == parts.structure


def test_integer_inputs_and_rules_inside():
    """A table indexed by tokens, a `relu`, and a matrix in the previous state."""
    table, U = jnp.asarray(normal(0, 3, 4)), jnp.asarray(0.5 * normal(1, 4, 4))
    tokens, h0 = jnp.arange(T) % 3, jnp.zeros(4)

    def F(z, h, x):
        return z + 0.5 * jax.nn.relu(z) - U @ h - table[x]

    def explicit(h, x):
        v = U @ h + table[x]
        return jnp.where(v > 0, v / 1.5, v)

    states = jax.jit(lambda: solve(Implicit(F), tokens, h0, solver=Newton(4)).states)()
    wanted = jax.jit(
        lambda: jax.lax.scan(lambda h, x: (explicit(h, x),) * 2, h0, tokens)[1]
    )()
    close(states, wanted, 1e-13)
    assert repr(jacobian_structure(Implicit(F), tokens[0], h0)) == "Dense"


def test_random_keys_as_inputs():
    keys, h0 = jax.random.split(jax.random.key(0), T), jnp.zeros(3)

    def F(z, h, key):
        return 2 * z - jnp.tanh(h) - jax.random.normal(key, (3,))

    def explicit(h, key):
        return 0.5 * (jnp.tanh(h) + jax.random.normal(key, (3,)))

    cell = Implicit(F)
    states, stats = jax.jit(
        lambda: (solve(cell, keys, h0).states, cell.stats(h0, keys[0]))
    )()
    wanted = jax.jit(
        lambda: jax.lax.scan(lambda h, k: (explicit(h, k),) * 2, h0, keys)[1]
    )()
    close(states, wanted, 1e-14)
    assert stats["converged"]
    assert repr(jacobian_structure(cell, keys[0], h0)) == "Diagonal"


def test_as_a_layer_with_parameters():
    """`F` may be a module: its arrays are parameters of the layer."""
    equation = EQUATIONS["diagonal"]

    class Model(eqx.Module):
        a: jax.Array

        def __call__(self, z, h, x):
            return diagonal(jnp, {"a": self.a}, z, h, x)

    layer = RNN(
        Implicit(Model(jnp.asarray(equation.parameters["a"]))), init_state=equation.h0
    )

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(layer):
        ys, _ = layer(equation.xs)
        return jnp.sum(jnp.asarray(weights(5)) * ys)

    found = gradient(layer).cell.function.F.a
    u = directions(equation.point, 0)
    u = (u[0], *jax.tree.map(np.zeros_like, u[1:]))
    np.testing.assert_allclose(
        np.vdot(found, u[0]["a"]), numpy_slope(equation, u), rtol=1e-9
    )


@pytest.mark.parametrize("coarse", [False, True], ids=["a clock", "a coarse leaf"])
def test_an_entry_is_solved_to_its_own_size(coarse):
    """Not to that of a clock at a million, nor to the rounding of a coarser dtype."""

    def F(z, h, x):
        other, gate = z
        moved = other - 0.5 * h[0] - 1 if coarse else other - h[0] - 1
        return moved, 0.8 * gate + 0.3 * gate**3 - jnp.tanh(2 * h[1] + x)

    other = jnp.bfloat16(0.3) if coarse else jnp.float32(1e6)
    xs = jnp.linspace(-1, 1, 20, dtype=jnp.float32)
    states = solve(Implicit(F), xs, (other, jnp.float32(0))).states
    h, wanted = 0.0, []
    for x in np.asarray(xs, np.float64):
        right, z = np.tanh(2 * h + x), h
        for _ in range(50):
            z = z - (0.8 * z + 0.3 * z**3 - right) / (0.8 + 0.9 * z**2)
        h = z
        wanted.append(h)
    np.testing.assert_allclose(states[1], wanted, rtol=0, atol=3e-6)
