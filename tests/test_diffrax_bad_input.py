"""What `integrate` refuses, and with which message."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from pararnn import Newton, integrate
from tests.helpers import refusal

T = 33
Y0, TS = jnp.ones(2), jnp.linspace(0.0, 1.0, T + 1)
PATH = diffrax.LinearInterpolation(TS, TS[:, None])


def field(t, y, args):
    return -y


def call(terms=field, method=diffrax.Heun(), ts=TS, y0=Y0, args=None, **options):
    return lambda: integrate(terms, method, ts, y0, args, **options)


CONTROLLED = diffrax.ControlTerm(lambda t, y, args: y[:, None], PATH)

# name: (call, exception, parts of the message)
WRONG = {
    "terms that are an array": (call(terms=Y0), TypeError, ["terms", "the function"]),
    "terms and method swapped": (
        call(terms=diffrax.Heun(), method=field),
        TypeError,
        ["terms", "Heun", "swapped"],
    ),
    "the class of a method": (
        call(method=diffrax.Heun),
        TypeError,
        ["method", "forget to call the class"],
    ),
    "a solver of ours as the method": (
        call(method=Newton()),
        TypeError,
        ["method", "diffrax.Tsit5()", "`solver`"],
    ),
    "a method with a memory": (
        call(method=diffrax.ReversibleHeun()),
        ValueError,
        ["ReversibleHeun", "state of its own", "diffeqsolve"],
    ),
    "a method of two steps": (
        call(method=diffrax.LeapfrogMidpoint()),
        ValueError,
        ["LeapfrogMidpoint", "state of its own"],
    ),
    "a method that estimates errors": (
        call(method=diffrax.HalfSolver(diffrax.Euler())),
        ValueError,
        ["HalfSolver", "the solver itself"],
    ),
    "one term for a split method": (
        call(method=diffrax.KenCarp3()),
        ValueError,
        ["KenCarp3", "MultiTerm", "ODETerm"],
    ),
    "one term for a symplectic method": (
        call(method=diffrax.SemiImplicitEuler()),
        ValueError,
        ["(AbstractTerm, AbstractTerm)", "a tuple of two"],
    ),
    "two terms for one": (
        call(terms=(field, field)),
        ValueError,
        ["(ODETerm, ODETerm)", "diffrax.MultiTerm(...)"],
    ),
    "no terms": (call(terms=None), ValueError, ["`terms` is NoneType"]),
    "the length of a step": (call(ts=0.1), ValueError, ["ts", "[T + 1]", "[]"]),
    "no times": (call(ts=TS[:0]), ValueError, ["ts", "[0]"]),
    "a batch of times": (call(ts=TS[None]), ValueError, ["ts", "[1, 34]", "vmap"]),
    "integer times": (
        call(ts=jnp.arange(5)),
        TypeError,
        ["ts", "int64", "jnp.arange(T + 1.0)"],
    ),
    "times that repeat": (
        call(ts=TS.at[3].set(TS[2])),
        ValueError,
        ["ts", "strictly increasing or strictly decreasing", "equal"],
    ),
    "times that turn back": (call(ts=jnp.sin(5 * TS)), ValueError, ["sorted"]),
    "a time that is not a number": (
        call(ts=TS.at[3].set(jnp.nan)),
        ValueError,
        ["ts", "NaN"],
    ),
    "a control run backwards": (
        call(terms=CONTROLLED, ts=TS[::-1]),
        ValueError,
        ["must be strictly increasing.", "control"],
    ),
    "no state": (call(y0=()), ValueError, ["y0", "no arrays"]),
    "a state that is not an array": (call(y0=(Y0, "x")), TypeError, ["y0[1]", "'x'"]),
    "a field of another signature": (
        call(terms=lambda y: -y),
        TypeError,
        ["vector field", "float64[2]", "(t, y, args)"],
    ),
    "a field that needs arguments": (
        call(terms=lambda t, y, args: args * y),
        TypeError,
        ["vector field", "`args` was not passed"],
    ),
    "a field of another structure": (
        call(terms=lambda t, y, args: (y, y)),
        ValueError,
        ["vector field", "structure"],
    ),
    "a field of another shape": (
        call(terms=lambda t, y, args: jnp.ones(3)),
        ValueError,
        ["vector field", "one number for each"],
    ),
    "a guess of another shape": (
        call(initial_guess=jnp.ones((T + 1, 2))),
        ValueError,
        ["initial_guess", "float64[34, 2]", "float64[33, 2]"],
    ),
    "a wrong structure": (
        call(terms=lambda t, y, args: y[::-1], structure="diagonal"),
        ValueError,
        ["declared 'diagonal'"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    wrong, exception, parts = WRONG[name]
    with refusal(exception, parts):
        jax.eval_shape(wrong)


@pytest.mark.parametrize(
    "ts", [TS.at[3].set(TS[2]), TS.at[3].set(jnp.nan), jnp.sin(5 * TS)]
)
def test_times_known_only_at_run_time(ts):
    run = eqx.filter_jit(lambda ts: integrate(field, diffrax.Heun(), ts, Y0).states)
    assert run(TS).shape == run(TS[::-1]).shape == (T, 2)
    with pytest.raises(eqx.EquinoxRuntimeError, match="strictly increasing"):
        run(ts)
