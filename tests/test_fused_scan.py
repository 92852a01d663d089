"""`fused_scan` against a loop in NumPy, in both forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pararnn import fused_scan
from pararnn.scan import _heuristics as choose
from tests.helpers import assert_close, refusal

N, D = 3, 4


@pytest.fixture(params=["fused", "stored", "fused in windows"])
def form(request, monkeypatch):
    name, _, windows = request.param.partition(" in ")
    if windows:
        monkeypatch.setattr(choose, "_LONG", 0)
        monkeypatch.setattr(choose, "_STEPPED", 3)
    return name


def problem(steps, kind="real", resets=False, seed=0):
    """A small selective state space: its inputs, decays, state and resets."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        v = rng.normal(size=shape)
        return v + 1j * rng.normal(size=shape) if kind == "complex" else v

    inputs = {"x": rng.normal(size=(steps, D)), "B": normal(steps, N), "C": normal(N)}
    inputs["C"] = np.tile(inputs["C"], (steps, 1)) * np.arange(1, steps + 1)[:, None]
    A = -rng.uniform(0.1, 2, (N, D)) + (1j * rng.normal(size=(N, D)) * (kind != "real"))
    if kind == "real":
        A = A.real
    reset = rng.uniform(size=steps) < 0.2 if resets else None
    return inputs, A, normal(N, D), reset


def run(inputs, A, initial, reset=None, form="auto"):
    def terms(at_t):
        size = jnp.abs(at_t["x"])[None].astype(A.dtype)
        return jnp.exp(size * A), at_t["B"][:, None] * at_t["x"][None].astype(A.dtype)

    def read(state, at_t):
        return jnp.real(jnp.sum(state * at_t["C"][:, None].astype(state.dtype), 0))

    return fused_scan(terms, read, inputs, initial, reset=reset, form=form)


def loop(inputs, A, state, reset):
    outputs = []
    for t in range(len(inputs["x"])):
        x, B, C = (inputs[name][t] for name in "xBC")
        if reset is not None and reset[t]:
            state = np.zeros_like(state)
        state = np.exp(np.abs(x) * A) * state + np.outer(B, x)
        outputs.append((C @ state).real)
    return np.array(outputs).reshape(-1, D), state


@pytest.mark.optimised
@pytest.mark.parametrize("resets", [False, True], ids=["whole", "resets"])
@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("steps", [0, 1, 37])
def test_equals_the_loop(steps, kind, resets, form):
    inputs, A, initial, reset = problem(steps, kind, resets)
    found = jax.jit(lambda inputs: run(inputs, A, initial, reset, form))(inputs)
    for ours, theirs in zip(found, loop(inputs, A, initial, reset), strict=True):
        assert_close(ours, theirs, 1e-12)


def test_derivatives(form):
    inputs, A, initial, reset = problem(9, resets=True)

    def scalars(A, x, initial):
        outputs, last = run(inputs | {"x": x}, A, initial, reset, form)
        return jnp.sum(jnp.sin(outputs)) + jnp.sum(last**2)

    # Away from the kink of |x|.
    x = np.where(np.abs(inputs["x"]) < 0.05, 0.05, inputs["x"])
    check_grads(jax.jit(scalars), (A, x, initial), 2, rtol=1e-6, atol=1e-6)


def test_batch_shares_what_is_closed_over(form):
    inputs, A, initial, reset = problem(12, resets=True)
    x = np.stack([inputs["x"], 2 * inputs["x"]])
    outputs, last = jax.vmap(lambda x: run(inputs | {"x": x}, A, initial, reset, form))(
        x
    )
    for n in range(2):
        theirs = loop(inputs | {"x": x[n]}, A, initial, reset)
        assert_close(outputs[n], theirs[0], 1e-12)
        assert_close(last[n], theirs[1], 1e-12)


@pytest.mark.optimised
def test_a_reset_drops_what_is_not_finite(form):
    inputs, A, initial, _ = problem(6)
    inputs["x"][1] = np.nan
    reset = np.arange(6) == 3
    outputs, last = run(inputs, A, initial * np.inf, reset, form)
    assert np.isnan(outputs[1:3]).all()
    assert np.isfinite(outputs[3:]).all() and np.isfinite(last).all()


@pytest.mark.optimised
def test_a_reset_keeps_what_is_dropped_out_of_gradients(form):
    inputs, A, initial, _ = problem(6)
    reset = np.arange(6) == 0

    def total(inputs, A, initial):
        outputs, last = run(inputs, A, initial, reset, form)
        return jnp.sum(outputs**2) + jnp.sum(last)

    grad = jax.jit(jax.grad(total, (0, 1, 2)))
    spoiled = grad(inputs, A, initial * np.inf)
    assert_close(spoiled, grad(inputs, A, initial * 0), 1e-12)
    assert not np.asarray(spoiled[2]).any()


def test_a_factor_may_be_a_number(form):
    x = np.random.default_rng(0).normal(size=(20, D))
    outputs, last = fused_scan(
        lambda x: (0.5, x), lambda h, x: h, x, np.zeros(D), form=form
    )
    state = np.zeros(D)
    for t in range(20):
        state = 0.5 * state + x[t]
        np.testing.assert_allclose(outputs[t], state, rtol=1e-12)
    np.testing.assert_allclose(last, state, rtol=1e-12)


@pytest.mark.optimised
def test_half_precision_is_accumulated_in_float32(form):
    inputs, A, initial, _ = problem(40)
    half = jax.tree.map(lambda v: jnp.asarray(v, jnp.bfloat16), (inputs, A, initial))
    outputs, last = run(*half, form=form)
    assert last.dtype == jnp.float32
    exact = jax.tree.map(lambda v: np.asarray(v, np.float64), half)
    for ours, theirs in zip((outputs, last), loop(*exact, None), strict=True):
        assert_close(np.asarray(ours, np.float64), theirs, 2e-2)


@pytest.mark.optimised
def test_the_fused_form_stores_no_states():
    steps, states = 4096, 64
    x, A = jnp.ones((steps, D)), -jnp.ones((states, D))

    def value(x, form):
        inputs = {
            "x": x,
            "B": jnp.ones((steps, states)),
            "C": jnp.ones((steps, states)),
        }
        return run(inputs, A, jnp.zeros((states, D)), None, form)[0]

    def gradient(x, form):
        return jax.grad(lambda x: jnp.sum(value(x, form) ** 2))(x)

    def memory(fn, form):
        compiled = jax.jit(lambda x: fn(x, form)).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # All states: the derivative of a loop would store them, and the stored form does.
    whole = steps * states * D * x.dtype.itemsize
    assert memory(value, "fused") < whole / 2 < memory(value, "stored")
    assert memory(gradient, "fused") < whole / 2 < memory(gradient, "stored")


BAD = {
    "lengths": ({"inputs": {"x": jnp.ones((3, D)), "B": jnp.ones(4)}}, "same length"),
    "scalar": ({"inputs": 1.0}, "leading axis is time"),
    "state": ({"initial": jnp.ones(7)}, "does not broadcast"),
    "pair": ({"terms": lambda at_t: at_t}, "expected a pair"),
    "nested": ({"terms": lambda x: (x, (x, x))}, "expected a pair of arrays"),
    "nothing": ({"terms": lambda x: (x, None)}, "expected a pair of arrays"),
    "form": ({"form": "kernel"}, "auto, fused, stored"),
    "reset": ({"reset": jnp.ones(5, bool)}, "one flag for each step"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    changed, message = BAD[name]
    given = {
        "terms": lambda x: (x, x),
        "read": lambda state, x: state,
        "inputs": jnp.ones((3, D)),
        "initial": jnp.ones(D),
    } | changed
    with refusal(ValueError, [message]):
        fused_scan(**given)
