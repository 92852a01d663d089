"""Steps split into what needs the state and what can be done for all steps at once.

Compared with `lax.scan` of the whole cell. The derivative sees the whole step; that of
cells which are split is tested with the others.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax import lax

import pararnn
from pararnn import RESULTS, Newton, Sequential, solve
from pararnn.jaxprs import primitives_of
from pararnn.recurrence import _hoist, make_recurrence, split_step
from tests.helpers import assert_close
from tests.problems import scan

# Inputs are prepared 32 steps at a time, with a remainder.
T, N, D_INPUT = 150, 4, 6


def matrices(seed, *shape):
    return 0.5 * jr.normal(jr.key(seed), shape)


def vectors(seed=0):
    return jr.normal(jr.key(seed), (T, D_INPUT))


def tanh_of(term):
    """A cell with an elementwise recurrence, and a term of the input."""
    return lambda p, h, x: jnp.tanh(p["a"] * h + term(p, x))


class Case(NamedTuple):
    step: Callable  # (parameters, h, x) -> h
    xs: object
    stored: list  # shapes of what is stored for each step
    h0: object = jnp.full(N, 0.3)


def jitted(p, h, x):
    return jax.jit(lambda h, x: jnp.tanh(p["U"] @ h + jax.jit(jnp.dot)(p["W"], x)))(
        h, x
    )


def lstm(p, state, x):
    cell = eqx.nn.LSTMCell(D_INPUT, N, key=jr.key(0))
    cell = eqx.tree_at(lambda c: c.weight_ih, cell, jnp.tile(p["W"], (4, 1)))
    return cell(x, state)


def shifted(p, state, x):
    """One of the states is the last projected input."""
    h, last = state
    return jnp.tanh(p["a"] * h + last), p["W"] @ x


def looped(p, x):
    return lax.scan(lambda v, _: (jnp.sin(p["W"][:, :N] @ v), None), x[:N], length=2)[0]


@jax.custom_vjp
def project(W, x):
    return W @ x


project.defvjp(lambda W, x: (W @ x, None), lambda _, g: (None, None))


CASES = {
    "bias": Case(tanh_of(lambda p, x: p["W"] @ x + p["b"]), vectors(), [(N,)]),
    "dense": Case(lambda p, h, x: jnp.tanh(p["U"] @ h + p["W"] @ x), vectors(), [(N,)]),
    "jitted": Case(jitted, vectors(), [(N,)]),
    "lstm": Case(lstm, vectors(), [(4 * N,)], (jnp.zeros(N), jnp.ones(N))),
    "embedding": Case(
        tanh_of(lambda p, x: p["W"] @ p["V"][x]), jnp.arange(T) % 5, [(N,)]
    ),
    "also as it is": Case(
        tanh_of(lambda p, x: p["W"] @ x["v"] * x["gain"]),
        {"v": vectors(), "gain": jnp.linspace(0.5, 1, T)},
        [(N,)],
    ),
    "beside the state": Case(
        lambda p, h, x: x[0] * jnp.tanh(p["a"] * h + p["W"] @ x),
        vectors(),
        [(), (N,)],
    ),
    "one number": Case(
        tanh_of(lambda p, x: p["W"][0] @ x + 0 * p["a"]), vectors(), [()]
    ),
    "convolution": Case(
        tanh_of(lambda p, x: jnp.convolve(x, p["W"][0, :3], mode="valid")),
        vectors(),
        [(N,)],
    ),
    "noise": Case(
        tanh_of(lambda p, x: p["W"] @ jr.normal(x, (D_INPUT,))),
        jr.split(jr.key(3), T),
        [(N,)],
    ),
    "relu": Case(tanh_of(lambda p, x: jax.nn.relu(p["W"] @ x)), vectors(), [(N,)]),
    "custom_vjp": Case(tanh_of(lambda p, x: project(p["W"], x)), vectors(), [(N,)]),
    "loop": Case(tanh_of(looped), vectors(), [(N,)]),
    "in the state": Case(shifted, vectors(), [(N,)], (jnp.zeros(N), jnp.ones(N))),
    "complex": Case(
        lambda p, h, x: jnp.sin(0.5j * h) + p["W"] @ x,
        lax.complex(vectors(), vectors(1)),
        [(N,)],
        jnp.full(N, 0.3j),
    ),
}


def parameters(name):
    made = {
        "W": matrices(1, N, D_INPUT),
        "U": matrices(2, N, N),
        "V": matrices(3, 5, D_INPUT),
        "a": matrices(4, N),
        "b": matrices(5, N),
    }
    if name == "complex":
        made["W"] = made["W"].astype(complex)
    return made


def split_of(name):
    case, p = CASES[name], parameters(name)
    step = lambda h, x: case.step(p, h, x)  # noqa: E731
    return split_step(make_recurrence("test", step, case.xs, case.h0))


@pytest.mark.parametrize("name", CASES)
def test_what_is_stored(name):
    found = split_of(name)
    assert found is not None
    assert [s.shape for s in found.advance.x_structs] == CASES[name].stored
    if name not in ("dense", "jitted", "lstm"):
        assert not _hoist.PRODUCTS & primitives_of(found.advance.jaxpr)


# Which of parameters, inputs and initial state have a batch axis, at each level.
BATCHES = {
    "none": [],
    "inputs": [(None, 0, None)],
    "parameters": [(0, None, None)],
    "h0": [(None, None, 0)],
    "all, h0": [(0, 0, 0), (None, None, 0)],
}


@pytest.mark.parametrize(
    "name, solver, batch",
    [
        *((name, "newton-7", "none") for name in CASES),
        *((name, "sequential", "inputs") for name in CASES),
        *(("beside the state", "newton", batch) for batch in BATCHES),
        *(("jitted", "sequential", batch) for batch in BATCHES),
        ("also as it is", "windows", "parameters"),
        ("bias", "ladder", "all, h0"),
    ],
)
def test_equals_scan(name, solver, batch):
    solvers = {
        "sequential": Sequential(),
        "newton": Newton(),
        "newton-7": Newton(7),
        "windows": pararnn.Windows(Newton(4), 40),
        "ladder": pararnn.Ladder((pararnn.Jacobi(8), Newton(8)), (1, 2)),
    }
    case = CASES[name]
    reset = jnp.arange(T) % 50 == 49

    def solved(p, xs, h0):
        def f(h, x):
            return case.step(p, h, x)

        return solve(f, xs, h0, reset=reset, solver=solvers[solver]).states

    def looped(p, xs, h0):
        return scan(lambda h, x: case.step(p, h, x), xs, h0, reset)

    arguments = [parameters(name), case.xs, case.h0]
    for axes in BATCHES[batch]:
        solved, looped = jax.vmap(solved, axes), jax.vmap(looped, axes)
        for i, axis in enumerate(axes):
            if axis == 0:
                arguments[i] = jax.tree.map(twice, arguments[i])
    assert_close(jax.jit(solved)(*arguments), jax.jit(looped)(*arguments), 1e-11)


@pytest.mark.parametrize("batch", ["none", "all, h0"])
@pytest.mark.parametrize("name", CASES)
def test_equals_scan_where_cheap_operations_stay(name, batch, monkeypatch):
    """As in wide cells."""
    monkeypatch.setattr(_hoist, "WIDE_ENOUGH", 0)
    test_equals_scan(name, "sequential", batch)


def twice(v):
    other = 0.5 * v if jnp.issubdtype(v.dtype, jnp.inexact) else v[::-1]
    return jnp.stack([v, other])


W, A = matrices(1, N, D_INPUT), matrices(4, N)


@jax.jit
def closed(h, x):
    return jnp.tanh(A * h + W @ x)


def guarded(h, x):
    """A loop that would not end for the inputs that skip it."""

    def endless(v):
        return lax.while_loop(lambda v: v > 0, lambda v: v - x[0], v)

    end = lax.cond(x[0] > 0.1, endless, lambda v: v, 1.0)
    return jnp.tanh(A * h + W @ x + end)


def drawn(h, key):
    """The number drawn depends on whether others are drawn with it."""
    return jnp.tanh(A * h + W @ jr.normal(key, (D_INPUT,)))


def constant(h, x):
    return jnp.tanh(A * h[0] + W @ x), jnp.asarray(2.0)


AS_WRITTEN = {
    "a jitted function that holds arrays": (closed, vectors(), jnp.zeros(N)),
    "a branch": (guarded, vectors(), jnp.zeros(N)),
    "keys of another kind": (
        drawn,
        jr.split(jr.key(0, impl="rbg"), T),
        jnp.zeros(N),
    ),
    "a number in the program": (constant, vectors(), (jnp.zeros(N), jnp.zeros(()))),
}


@pytest.mark.parametrize("name", AS_WRITTEN)
def test_equals_scan_as_it_is_written(name):
    """Without `jit`, which would make arguments of all that a cell holds."""
    f, xs, h0 = AS_WRITTEN[name]
    found = solve(f, xs, h0, solver=Sequential())
    assert_close(found.states, jax.jit(lambda xs: scan(f, xs, h0))(xs), 1e-11)


def test_what_stays_small():
    """A matrix for each step would be cheap to compute, but large to store."""
    n = 40
    P = jr.normal(jr.key(0), (n, n, 2))
    of_h = make_recurrence(
        "test", lambda h, x: jnp.tanh((P @ x) @ h), jnp.ones((T, 2)), jnp.ones(n)
    )
    summed = make_recurrence(
        "test",
        lambda h, x: jnp.tanh(h + jnp.sum(jnp.tanh(P @ x), 1)),
        jnp.ones((T, 2)),
        jnp.ones(n),
    )
    assert split_step(of_h) is None and split_step(summed) is None


def printing(p, h, x):
    jax.debug.print("{}", x[0], ordered=False)
    return jnp.tanh(h + p["W"] @ x)


WHOLE = {
    "no products": (tanh_of(lambda p, x: jnp.sin(x[:N])), vectors()),
    "of the state only": (
        lambda p, h, x: jnp.tanh(p["U"] @ h + x[:N] * x[0]),
        vectors(),
    ),
    "more to store than to save": (
        tanh_of(lambda p, x: p["W"][:, :1] @ x),
        vectors()[:, :1],
    ),
    "an effect": (printing, vectors()),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_stays_whole(name):
    step, xs = WHOLE[name]
    p = parameters(name)
    recurrence = make_recurrence("test", lambda h, x: step(p, h, x), xs, jnp.zeros(N))
    assert split_step(recurrence) is None


@pytest.mark.parametrize("solver", [Sequential(), Newton(7)])
@pytest.mark.parametrize("what", ["inputs", "parameters"])
def test_what_is_not_finite_is_blamed(what, solver):
    p, xs = parameters("bias"), vectors()
    if what == "inputs":
        xs = xs.at[90, 2].set(jnp.nan)
    else:
        p = p | {"W": p["W"].at[0, 0].set(jnp.nan)}

    def run(p, xs):
        f, h0 = lambda h, x: CASES["bias"].step(p, h, x), jnp.zeros(N)
        return solve(f, xs, h0, solver=solver, throw=False)

    found = jax.jit(run)(p, xs)
    assert bool(found.result == getattr(RESULTS, f"nonfinite_{what}"))
    assert found.stats["first_nonfinite"] == (90 if what == "inputs" else 0)
    assert what == "parameters" or jnp.all(jnp.isfinite(found.states[:90]))


def test_a_loop_prepares_a_part_of_its_inputs_at_a_time():
    """Except for its states, a longer sequence takes no more memory."""
    cell = eqx.nn.GRUCell(16, 16, key=jr.key(0))

    def memory(steps):
        def run(xs):
            f, h0 = lambda h, x: cell(x, h), jnp.zeros(16)
            return solve(f, xs, h0, solver=Sequential(), throw=False).states

        compiled = jax.jit(run).lower(jnp.zeros((steps, 16))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # 48 numbers of 8 bytes are prepared for each step.
    assert memory(4096) < 0.2 * 4096 * 48 * 8
