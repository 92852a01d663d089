"""Wrong calls of `solve` and `RNN`: what is raised, and what the message says."""

import diffrax
import jax
import jax.numpy as jnp
import pytest

import pararnn
import pararnn.dynamics
from pararnn import RNN, Ladder, Newton, Windows, solve
from tests.helpers import refusal

N, T = 3, 5
XS, H0 = jnp.ones((T, N)), jnp.zeros(N)


def f(h, x):
    return jnp.tanh(h + x)


def call(f=f, xs=XS, h0=H0, **options):
    return lambda: solve(f, xs, h0, **options)


def weighted(h, x):
    return jnp.tanh(jnp.ones((N, N)) @ h + jnp.ones((N, 4)) @ x)


RESET = jnp.zeros(T, bool)
F8, KEY = jnp.float8_e4m3fn, jax.random.key(0)
HEADS = jnp.ones((T, 2, N))

# name: (call, exception, parts of the message)
WRONG = {
    "the cell is not a function": (call(f=3), TypeError, ["int", "cannot be called"]),
    "swapped arguments": (
        lambda: solve(XS, f, H0),
        TypeError,
        ["cannot be called", "order"],
    ),
    "sizes that do not fit": (
        call(f=weighted),
        TypeError,
        ["could not be traced", "time first", "float64[3]"],
    ),
    "a batch axis in the inputs": (
        call(xs=jnp.ones((T, 2, N))),
        ValueError,
        ["time first", "vmap"],
    ),
    "(input, state) cell": (
        call(f=lambda x, h: {"h": h["h"] + x}, h0={"h": H0}),
        TypeError,
        ["(input, state)"],
    ),
    "leaves of different length": (
        call(f=lambda h, x: h + x[0], xs=(XS, XS[1:])),
        ValueError,
        ["leading (time) axis", "xs[0]", "xs[1]", "5", "4"],
    ),
    "an input without time": (
        call(f=lambda h, x: h + x[1], xs=(XS, 1.0)),
        ValueError,
        ["xs[1]", "no time axis", "close over"],
    ),
    "inputs without arrays": (call(xs=None), ValueError, ["no arrays", "jnp.arange"]),
    "an integer state": (
        call(h0=jnp.zeros(N, int)),
        TypeError,
        ["h0", "int64", "floating point"],
    ),
    "a boolean state": (call(h0=jnp.zeros(N, bool)), TypeError, ["h0", "bool"]),
    "a state that is not an array": (call(h0="zeros"), TypeError, ["zeros"]),
    "no state": (call(f=lambda h, x: h, h0=()), ValueError, ["h0", "no arrays"]),
    "a cell of scan's kind": (
        call(f=lambda h, x: (h + x, h)),
        ValueError,
        ["structure of the state", "(state, output)", "return the state alone"],
    ),
    "a cell that changes the dtype": (
        call(f=lambda h, x: (h + x).astype(jnp.float32)),
        ValueError,
        ["float64[3]", "float32[3]", "dtypes"],
    ),
    "a cell that changes the shape": (
        call(f=lambda h, x: jnp.concatenate([h, x])),
        ValueError,
        ["float64[3]", "float64[6]"],
    ),
    "a reset of another length": (
        call(reset=RESET[1:]),
        ValueError,
        ["reset", "4", "5"],
    ),
    "a reset that is not boolean": (
        call(reset=jnp.zeros(T)),
        (TypeError, ValueError),
        ["reset", "bool", "float64"],
    ),
    "a reset state without resets": (
        call(reset_state=H0),
        ValueError,
        ["reset_state", "reset"],
    ),
    "a reset state of another shape": (
        call(reset=RESET, reset_state=jnp.zeros(N + 1)),
        ValueError,
        ["reset_state", "float64[4]", "float64[3]"],
    ),
    "a reset state of another dtype": (
        call(reset=RESET, reset_state=jnp.zeros(N, jnp.float32)),
        ValueError,
        ["reset_state", "float32[3]", "float64[3]"],
    ),
    "an unknown solver": (
        call(solver="newton"),
        TypeError,
        ["'newton'", "pararnn.Newton(", "pararnn.Auto()"],
    ),
    "the class of a solver": (
        call(solver=Newton),
        TypeError,
        ["Newton", "forget to call the class"],
    ),
    "the name of a solver of windows": (
        lambda: Windows("newton", 8),
        TypeError,
        ["Windows", "'newton'", "pararnn.Newton("],
    ),
    "a number of steps as the solver of windows": (
        lambda: Windows(5, 8),
        TypeError,
        ["Windows", "`solver` is 5"],
    ),
    "the class of a solver of windows": (
        lambda: Windows(Newton, 8),
        TypeError,
        ["Windows", "forget to call the class"],
    ),
    "windows within windows": (
        lambda: Windows(Windows(Newton(), 8), 8),
        TypeError,
        ["Windows", "give its solver"],
    ),
    "the class of a method on a ladder": (
        lambda: Ladder((Newton,)),
        TypeError,
        ["Ladder", "forget to call the class"],
    ),
    "the name of a layer's solver": (
        lambda: RNN(f, init_state=H0, solver="newton"),
        TypeError,
        ["RNN", "'newton'"],
    ),
    "the class of a model's solver": (
        lambda: pararnn.LanguageModel(7, 4, solver=Newton, key=KEY),
        TypeError,
        ["LanguageModel", "forget to call the class"],
    ),
    "no solver for a mixer that needs none": (
        lambda: pararnn.make_mixer("lru", 4, solver=None, key=KEY),
        TypeError,
        ["make_mixer", "None"],
    ),
    "the name of a solver of an equation": (
        lambda: pararnn.integrate(
            lambda t, y, args: y, diffrax.Heun(), jnp.arange(3.0), H0, solver="newton"
        ),
        TypeError,
        ["integrate", "'newton'"],
    ),
    "the name of a solver of a study": (
        lambda: pararnn.dynamics.Study(solver="newton"),
        TypeError,
        ["Study", "'newton'"],
    ),
    "a state of 8 bits": (
        call(h0=H0.astype(F8)),
        TypeError,
        ["solve", "`h0` is float8_e4m3fn", "16 bits", "astype"],
    ),
    "a part of the state in 4 bits": (
        call(f=lambda h, x: h, h0=(H0, H0.astype(jnp.float4_e2m1fn))),
        TypeError,
        ["`h0[1]` is float4_e2m1fn"],
    ),
    "a layer's state of 8 bits": (
        lambda: RNN(f, init_state=H0.astype(F8))(XS),
        TypeError,
        ["float8_e4m3fn", "16 bits"],
    ),
    "the structure of a cell with a state of 8 bits": (
        lambda: pararnn.jacobian_structure(f, XS[0], H0.astype(F8)),
        TypeError,
        ["jacobian_structure", "float8_e4m3fn"],
    ),
    "an implicit step from a state of 8 bits": (
        lambda: pararnn.Implicit(lambda z, h, x: z)(H0.astype(F8), XS[0]),
        TypeError,
        ["Implicit", "`h` is float8_e4m3fn"],
    ),
    "an equation with a state of 8 bits": (
        lambda: pararnn.integrate(f, diffrax.Heun(), jnp.arange(3.0), H0.astype(F8)),
        TypeError,
        ["integrate", "`y0` is float8_e4m3fn"],
    ),
    "a linear recurrence of inputs of 8 bits": (
        lambda: pararnn.linear_scan(pararnn.Diagonal(XS), XS.astype(F8)),
        TypeError,
        ["linear_scan", "`inputs` is float8_e4m3fn"],
    ),
    "a linear recurrence with factors of 8 bits": (
        lambda: pararnn.linear_scan(pararnn.Diagonal(XS.astype(F8)), XS),
        TypeError,
        ["linear_scan", "`transition` is float8_e4m3fn"],
    ),
    "a linear recurrence from a state of 8 bits": (
        lambda: pararnn.linear_scan(pararnn.Diagonal(XS), XS, H0.astype(F8)),
        TypeError,
        ["linear_scan", "`initial` is float8_e4m3fn"],
    ),
    "a matrix recurrence of keys of 8 bits": (
        lambda: pararnn.matrix_scan(HEADS, HEADS.astype(F8), HEADS),
        TypeError,
        ["matrix_scan", "`keys` is float8_e4m3fn"],
    ),
    "a fused recurrence with factors of 8 bits": (
        lambda: pararnn.fused_scan(lambda x: (x.astype(F8), x), lambda h, x: h, XS, H0),
        TypeError,
        ["fused_scan", "`factor` is float8_e4m3fn"],
    ),
    "an unknown adjoint": (
        call(adjoint="backward"),
        ValueError,
        ["'backward'", "parallel", "sweep"],
    ),
    "an unknown structure": (
        call(structure="banded"),
        ValueError,
        ["'banded'", "diagonal", "dense"],
    ),
    "a wrong structure": (
        call(f=lambda h, x: jnp.roll(h, 1) + x, structure="diagonal"),
        ValueError,
        ["declared 'diagonal'", "Dense", "xxx"],
    ),
    "no segments": (lambda: Newton(0), ValueError, ["segments", "0"]),
    "half a segment": (lambda: Newton(1.5), ValueError, ["segments", "1.5"]),
    "a negative rtol": (lambda: Newton(rtol=-1e-3), ValueError, ["rtol", "-0.001"]),
    "a NaN atol": (lambda: Newton(atol=float("nan")), ValueError, ["atol", "nan"]),
    "a negative history": (lambda: Newton(history=-1), ValueError, ["history", "-1"]),
    "no steps": (call(max_steps=0), ValueError, ["max_steps", "0"]),
    "a fraction of steps": (call(max_steps=2.5), ValueError, ["max_steps", "2.5"]),
    "a guess of another shape": (
        call(initial_guess=XS[1:]),
        ValueError,
        ["initial_guess", "float64[4, 3]", "float64[5, 3]"],
    ),
    "a guess of another structure": (
        call(initial_guess=(XS,)),
        ValueError,
        ["initial_guess", "[T, ...]"],
    ),
    "a layer of no function": (lambda: RNN(3), TypeError, ["RNN", "int"]),
    "a layer without a fresh state": (
        lambda: RNN(f),
        ValueError,
        ["RNN", "init_state="],
    ),
    "a layer of lengths that differ": (
        lambda: RNN(f, init_state=H0)((XS, XS[1:])),
        ValueError,
        ["RNN", "leading (time) axis"],
    ),
    "the structure of a wrong cell": (
        lambda: pararnn.jacobian_structure(lambda h, x: (h, h), XS[0], H0),
        ValueError,
        ["jacobian_structure", "structure of the state"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    wrong, exception, parts = WRONG[name]
    with refusal(exception, parts):
        wrong()


@pytest.mark.parametrize("name", ["an integer state", "a cell of scan's kind"])
def test_wrong_calls_are_refused_while_tracing(name):
    wrong, exception, _ = WRONG[name]
    with pytest.raises(exception, match="solve"):
        jax.eval_shape(wrong)
