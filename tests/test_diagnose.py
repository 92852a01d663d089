"""`diagnose`: numbers against plain NumPy loops, the report, and refusals."""

import math
import sys

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import pararnn
from pararnn import (
    Auto,
    Diagnosis,
    Jacobi,
    Newton,
    Sequential,
    diagnose,
    solve,
)
from pararnn.diagnosis._diagnose import default_methods
from pararnn.diagnosis._measure import Progress, name_of
from tests.problems import CELLS, instance

WEIGHTS = np.array(jr.normal(jr.key(0), (8, 8), "float64")) / 8**0.5


def tanh_cell(gain):
    W = jnp.asarray(gain * WEIGHTS)
    return lambda h, x: jnp.tanh(W @ h + x)


def noise(steps, width=8, seed=100):
    return jr.normal(jr.key(seed), (steps, width), "float64")


def logistic(h, x):
    return 4 * h * (1 - h) + 0 * x


# The exponent and the largest growth, by loops in NumPy that use nothing of the
# library.


def jacobians_of_tanh(gain, xs):
    h, found = np.zeros(8), []
    for x in np.asarray(xs):
        h = np.tanh(gain * WEIGHTS @ h + x)
        found.append((1 - h**2)[:, None] * gain * WEIGHTS)
    return found


def exponent_of(jacobians):
    """The first exponent, by QR of all directions."""
    Q, total = np.eye(len(jacobians[0])), 0.0
    for J in jacobians[1:]:
        Q, R = np.linalg.qr(J @ Q)
        total += np.log(np.abs(R[0, 0]))
    return total / (len(jacobians) - 1)


def growth_of(jacobians):
    """`max ||J_t ... J_s||` over all pairs."""
    largest = 1.0
    for s in range(1, len(jacobians)):
        product = np.eye(len(jacobians[0]))
        for J in jacobians[s:]:
            product = J @ product
            norm = np.linalg.norm(product, 2)
            largest = max(largest, norm)
            if norm < 1e-3:
                break
    return largest


def test_exponent_of_a_linear_recurrence():
    a = jnp.asarray([0.5, -0.9, 0.3])
    d = diagnose(lambda h, x: a * h + x, noise(200, 3), jnp.ones(3), methods=[])
    # A tangent takes some steps to turn to the slowest direction.
    assert abs(d.exponent - math.log(0.9)) < 2 / 200
    assert d.exponent == d.trajectory.exponent
    # A linear recurrence has the same Jacobians everywhere.
    assert abs(d.at_h0.exponent - math.log(0.9)) < 2 / 200
    assert repr(d.structure) == "Diagonal" and d.width == 3 and d.length == 200
    assert d.dtype == "float64"


def test_exponent_of_the_logistic_map():
    xs = jnp.arange(3000, dtype=jnp.float64)
    d = diagnose(logistic, xs, jnp.asarray(0.3), methods=[])
    h, total = 0.3, 0.0
    for _ in range(3000):
        total += math.log(abs(4 - 8 * h))
        h = 4 * h * (1 - h)
    assert abs(d.exponent - math.log(2)) < 0.02
    assert abs(d.exponent - total / 3000) < 0.02
    # The number overflows, its logarithm does not.
    assert d.trajectory.log_growth > 0.9 * 3000 * math.log(2)


@pytest.mark.parametrize("gain", [0.8, 3.0])
def test_exponent_and_growth_of_a_tanh_cell(gain):
    xs = noise(300)
    d = diagnose(tanh_cell(gain), xs, jnp.zeros(8), methods=[])
    jacobians = jacobians_of_tanh(gain, xs)
    assert abs(d.exponent - exponent_of(jacobians)) < 0.01
    growth, largest = math.exp(d.trajectory.log_growth), growth_of(jacobians)
    assert largest / 6 <= growth <= largest * (1 + 1e-9)
    # At h0 = 0 the Jacobians are those of one step from zero.
    slopes = 1 - np.tanh(np.asarray(xs)) ** 2
    at_zero = [s[:, None] * gain * WEIGHTS for s in slopes]
    assert abs(d.at_h0.exponent - exponent_of(at_zero)) < 0.02
    assert math.exp(d.log_pl_bound) <= 1 / growth


def test_growth_before_decay():
    """All eigenvalues are below one, but perturbations grow many times at first."""
    A = np.array([[0.9, 5.0], [0.0, 0.8]])
    d = diagnose(lambda h, x: A @ h + x, noise(100, 2), jnp.zeros(2), methods=[])
    largest = max(np.linalg.norm(np.linalg.matrix_power(A, k), 2) for k in range(99))
    assert largest / 6 <= math.exp(d.trajectory.log_growth) <= largest
    assert -0.2 < d.exponent < 0
    # At most the largest growth between the states that it names.
    span = d.trajectory.last - d.trajectory.first
    norm = np.linalg.norm(np.linalg.matrix_power(A, span), 2)
    assert math.exp(d.trajectory.log_growth) <= norm


def test_resets_stop_perturbations():
    reset = jnp.arange(64) % 8 == 3
    xs = noise(64, 2)
    d = diagnose(
        lambda h, x: 1.5 * h + x,
        xs,
        jnp.zeros(2),
        reset=reset,
        reset_state=jnp.ones(2),
        methods=[],
    )
    assert abs(d.exponent - math.log(1.5)) < 1e-9
    # Seven factors stand between two resets.
    assert abs(d.trajectory.log_growth - 7 * math.log(1.5)) < 1e-9
    assert d.trajectory.last - d.trajectory.first == 7


def test_perturbations_that_vanish():
    d = diagnose(lambda h, x: 0 * h + x, noise(32, 2), jnp.zeros(2), methods=[])
    assert d.exponent == -math.inf and d.trajectory.log_growth == 0
    assert "Lyapunov exponent -inf a step; no growth" in repr(d)


# What methods need, and what is recommended.


def test_a_negative_exponent_does_not_promise_few_steps():
    T = 512
    d = diagnose(
        tanh_cell(4.0), noise(T), jnp.zeros(8), methods=[Newton()], max_steps=T
    )
    report = d.methods["Newton()"]
    assert report.lengths == (32, 128, 512) and all(report.converged)
    assert d.exponent < -0.05 and report.steps[-1] > 250
    assert d.at_h0.exponent > 0.5
    # Far from the solution the problem is as badly conditioned as a chaotic one.
    assert d.log_pl_bound < -100
    assert isinstance(d.recommended, Sequential)
    assert "negative exponent alone does not promise few steps" in repr(d)
    assert "with the Jacobians at h0" in " ".join(d.reasons)


def test_few_steps_where_perturbations_shrink_everywhere():
    T = 512
    d = diagnose(tanh_cell(1.0), noise(T), jnp.zeros(8), methods=[Newton(32)])
    report = d.methods["Newton(segments=32)"]
    assert d.exponent < 0 and d.at_h0.exponent < 0 and d.log_pl_bound > -1
    assert all(report.converged) and max(report.steps) <= 4
    assert repr(d.recommended) == repr(Newton(32))
    assert "Over a segment" in d.reasons[1] and "hardly grow" in d.reasons[2]
    sol = solve(tanh_cell(1.0), noise(T), jnp.zeros(8), solver=d.recommended)
    assert int(sol.stats["num_steps"]) == report.steps[-1]


def test_a_chaotic_recurrence_is_left_to_the_loop():
    xs = jnp.arange(256, dtype=jnp.float64)
    d = diagnose(
        logistic, xs, jnp.asarray(0.3), methods=[Newton(), Newton(16)], max_steps=64
    )
    assert isinstance(d.recommended, Sequential)
    assert d.methods["Newton()"].converged[-1] is False
    assert d.methods["Newton()"].steps[-1] == 64
    assert "> 64" in repr(d)
    assert "not predictable" in d.reasons[1]


def test_a_strong_contraction_is_left_to_jacobi():
    d = diagnose(
        lambda h, x: 0.05 * jnp.tanh(h) + x,
        noise(256, 3),
        jnp.zeros(3),
        methods=[Newton(), Jacobi()],
    )
    assert max(d.methods["Jacobi()"].steps) <= 16
    assert isinstance(d.recommended, Jacobi)
    assert "everywhere at once" in d.reasons[1]
    # Every step reduces the residual.
    history = d.methods["Jacobi()"].history
    assert len(history) == d.methods["Jacobi()"].steps[-1]
    assert np.all(np.diff(history) <= 0)


def test_growing_without_being_hard():
    """A linear recurrence takes one step, however fast perturbations grow."""
    d = diagnose(
        lambda h, x: 1.1 * h + x, noise(128, 2), jnp.zeros(2), methods=[Newton()]
    )
    assert d.exponent > 0 and isinstance(d.recommended, Newton)
    assert "errors may be far larger" in d.reasons[2]


def test_nothing_to_try(tmp_path):
    d = diagnose(tanh_cell(1.0), noise(16), jnp.zeros(8), methods=[])
    assert d.methods == {} and d.reasons[0] == "No method was tried."
    assert d.sequential.serial_steps == 16 and d.sequential.seconds > 0
    # A logarithmic axis would have nothing to show.
    d.plot(tmp_path / "nothing.png")


@pytest.mark.parametrize("method", [Newton(), Newton(8)], ids=["one", "eight"])
def test_a_shorter_length_is_a_shorter_recurrence(method):
    f, xs, h0 = tanh_cell(2.0), noise(256), jnp.full(8, 0.3)
    d = diagnose(f, xs, h0, methods=[method], lengths=[96])
    (report,) = d.methods.values()
    segments = method.segments and 3  # of the same length
    alone = type(method)(segments)
    sol = jax.jit(
        lambda xs: solve(f, xs, h0, solver=alone, max_steps=100, throw=False)
    )(xs[:96])
    assert report.lengths == (96, 256) and report.converged[0]
    # The part that is cut off takes one step itself.
    assert abs(report.steps[0] - int(sol.stats["num_steps"])) <= 1


def test_default_methods_of_wide_cells():
    def names(width, steps):
        structure = pararnn.Structure(np.arange(width)[None], width)
        found = default_methods(structure, steps, 4)
        return [name_of(method) for method in found]

    assert names(8, 1024)[:2] == ["Newton()", "Newton(segments=64)"]
    assert "ELK()" in names(8, 1024)
    assert names(64, 2048)[0] == "Newton()" and "ELK()" not in names(64, 2048)
    assert "QuasiNewton(probes=4)" in names(64, 2048)
    assert "Newton()" not in names(256, 4096)


# Any cell.


@pytest.mark.parametrize("name", ["nonholomorphic", "bfloat16", "dict-state"])
def test_any_state(name):
    parameters, xs, h0 = instance(name)
    d = diagnose(CELLS[name].f(parameters), xs, h0, methods=[])
    assert math.isfinite(d.exponent) and math.isfinite(d.at_h0.exponent)
    assert repr(d.structure) == CELLS[name].structure
    assert d.dtype in repr(d)


def test_a_module_with_resets(getkey):
    cell = pararnn.GRUCell(2, 4, key=getkey(), dtype=jnp.float64)
    d = diagnose(
        cell,
        noise(48, 2),
        cell.init_state(),
        reset=jnp.arange(48) % 16 == 9,
        methods=[Newton(6)],
    )
    assert all(d.methods["Newton(segments=6)"].converged)
    assert d.methods["Newton(segments=6)"].memory > 0


# The report and the figure.


@pytest.fixture(scope="module")
def default() -> Diagnosis:
    return diagnose(tanh_cell(1.0), noise(64), jnp.zeros(8), max_steps=40)


def test_report(default, capsys):
    print(default)
    text = capsys.readouterr().out
    for part in (
        "Diagnosis of T = 64 steps, width 8, float64, Dense Jacobian",
        "along the solution  Lyapunov exponent -0.",
        "at h0               Lyapunov exponent -0.",
        "largest growth",
        "sqrt(PL constant) at most",
        "A negative exponent alone does not promise few steps",
        "Steps until certified, of at most 40",
        "Recommended: ",
    ):
        assert part in text
    names = ("Newton()", "Newton(segments=4)", "QuasiNewton()", "ELK()", "Jacobi()")
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    for name in (*names, "Picard()", "Sequential()"):
        assert rows[name][-1] in ("ms", "s") and rows[name][-3].endswith("B")
    assert rows["T"][2:5] == ["4", "16", "64"]
    assert rows["Newton()"][1] == str(default.methods["Newton()"].steps[0])
    assert max(map(len, text.splitlines())) <= 100


def test_numbers_of_the_default_methods(default):
    for report in default.methods.values():
        assert report.lengths == (4, 16, 64) and report.memory > 0
        assert len(report.history) == report.steps[-1] and report.seconds > 0
        for n, steps, converged in zip(
            report.lengths, report.steps, report.converged, strict=True
        ):
            assert steps <= min(n + 1, 40) and (converged or steps == 40)
    newton = default.methods["Newton()"]
    # Each step has one evaluation and six rounds of a scan; one pass comes at the end.
    assert newton.serial_steps == newton.steps[-1] * (1 + 6) + 1


def test_plot(default, tmp_path):
    path = tmp_path / "diagnosis.png"
    figure = default.plot(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    left, right = figure.axes
    assert left.get_yscale() == right.get_yscale() == "log"
    shown = {text.get_text() for text in figure.legends[0].get_texts()}
    assert shown == {*default.methods, "steps = T"}


def test_plot_without_matplotlib(default, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pararnn\[examples\]"):
        default.plot()


def test_progress(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress(2, True) as bar:
        bar.advance("at once")
        assert bar.bar is None
        bar.started -= 2
        bar.advance("after a while")
        assert bar.bar is not None
    assert "after a while" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with Progress(2, True) as bar:
        bar.started -= 2
        bar.advance("without rich")
        assert bar.bar is None


# Wrong calls.

XS, H0 = jnp.ones((16, 2)), jnp.zeros(2)


def f(h, x):
    return jnp.tanh(h + x)


WRONG = {
    "inside jit": (
        lambda: jax.jit(lambda xs: diagnose(f, xs, H0).exponent)(XS),
        TypeError,
        "outside of `jax.jit`",
    ),
    "inside jit, of constants": (
        lambda: jax.jit(lambda: diagnose(f, XS, H0).exponent)(),
        TypeError,
        "outside of `jax.jit`",
    ),
    "a cell that closes over a tracer": (
        lambda: jax.grad(lambda a: diagnose(lambda h, x: a * h + x, XS, H0).exponent)(
            1.0
        ),
        TypeError,
        "one sequence at a time",
    ),
    "under vmap": (
        lambda: jax.vmap(lambda xs: diagnose(f, xs, H0).exponent)(XS[None]),
        TypeError,
        "one sequence at a time",
    ),
    "too short": (
        lambda: diagnose(f, XS[:15], H0),
        ValueError,
        "15 steps; expected at least 16",
    ),
    "no method": (
        lambda: diagnose(f, XS, H0, methods=[Auto()]),
        TypeError,
        "expected methods such as pararnn.Newton",
    ),
    "the name of a method": (
        lambda: diagnose(f, XS, H0, methods="newton"),
        TypeError,
        "'newton'; expected methods",
    ),
    "a class": (
        lambda: diagnose(f, XS, H0, methods=[Newton]),
        TypeError,
        "forget to call the class",
    ),
    "the same method twice": (
        lambda: diagnose(f, XS, H0, methods=[Newton(4), Newton(4, history=3)]),
        ValueError,
        "Newton(segments=4) twice",
    ),
    "a length above T": (
        lambda: diagnose(f, XS, H0, lengths=[8, 17]),
        ValueError,
        "`lengths` holds 17",
    ),
    "no limit": (
        lambda: diagnose(f, XS, H0, max_steps=0),
        ValueError,
        "`max_steps` is 0",
    ),
    "states that are not finite": (
        lambda: diagnose(f, XS.at[5].set(jnp.nan), H0, methods=[]),
        ValueError,
        "not finite from step 5",
    ),
    "swapped arguments": (
        lambda: diagnose(XS, f, H0),
        TypeError,
        "cannot be called",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind) as raised:
        call()
    assert "diagnose: " in str(raised.value) and message in str(raised.value)
