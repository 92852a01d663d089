"""What `Implicit` refuses, and with which message."""

import jax
import jax.numpy as jnp
import pytest

from pararnn import solve
from pararnn._implicit import Implicit
from tests.helpers import refusal
from tests.implicit_equations import T, singular


@jax.custom_vjp
def reverse_only(x):
    return x


reverse_only.defvjp(lambda x: (x, None), lambda _, g: (g,))
H, X = jnp.ones(3), jnp.ones(2)


def called(F, h=H, x=X, **options):
    return lambda: jax.eval_shape(Implicit(F, **options), h, x)


# name: (call, exception, parts of the message)
WRONG = {
    "no function": (lambda: Implicit(H), TypeError, ["`F`", "called", "F(h_new"]),
    "a guess that is a state": (
        called(lambda z, h, x: z, guess=H),
        TypeError,
        ["`guess`", "lambda h, x"],
    ),
    "a negative rtol": (
        lambda: Implicit(singular, rtol=-1.0),
        ValueError,
        ["`rtol`", "-1.0"],
    ),
    "a NaN atol": (
        lambda: Implicit(singular, atol=float("nan")),
        ValueError,
        ["`atol`", "nan"],
    ),
    "a tolerance that is not a number": (
        lambda: Implicit(singular, rtol="1e-3"),
        ValueError,
        ["`rtol`", "'1e-3'"],
    ),
    "no steps": (
        lambda: Implicit(singular, max_steps=0),
        ValueError,
        ["`max_steps`", "0"],
    ),
    "half a step": (
        lambda: Implicit(singular, max_steps=2.5),
        ValueError,
        ["`max_steps`", "2.5"],
    ),
    "two arguments": (
        called(lambda z, h: z - h),
        TypeError,
        ["`F(h_new, h, x)`", "order", "float64[3]"],
    ),
    "sizes that do not fit": (
        called(lambda z, h, x: z - h - x),
        TypeError,
        ["sizes", "float64[2]"],
    ),
    "an equation too few": (
        called(lambda z, h, x: (z - h)[:2]),
        ValueError,
        ["float64[2]", "float64[3]", "an equation is missing"],
    ),
    "another structure": (
        called(lambda z, h, x: (z - h, x)),
        ValueError,
        ["(float64[3], float64[2])", "same structure"],
    ),
    "another dtype": (
        called(lambda z, h, x: (z - h).astype(jnp.float32)),
        ValueError,
        ["float32[3]", "float64[3]", "dtype"],
    ),
    "an integer state": (
        called(lambda z, h, x: z - h, h={"n": jnp.ones(3, int)}),
        TypeError,
        ["`h['n']`", "floating-point"],
    ),
    "a guess of another shape": (
        called(lambda z, h, x: z - h, guess=lambda h, x: x),
        ValueError,
        ["guess(h, x)", "float64[2]", "float64[3]"],
    ),
    "no forward derivative": (
        called(lambda z, h, x: reverse_only(z) - h),
        TypeError,
        ["custom_vjp", "custom_jvp"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    wrong, exception, parts = WRONG[name]
    with refusal(exception, ["Implicit: ", *parts]):
        wrong()


def test_wrong_equations_are_named_by_solve():
    with pytest.raises(ValueError, match="an equation is missing"):
        solve(Implicit(lambda z, h, x: z[:2]), jnp.ones((T, 2)), H)
