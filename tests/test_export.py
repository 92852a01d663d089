"""Programs exported by `jax.export`, also for unknown batch sizes and lengths."""

import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax import export, lax

import pararnn
from pararnn import Auto, Newton, Sequential, Windows, linear_scan, solve
from tests import layers
from tests.helpers import assert_close, refusal

B, T, N = 3, 11, layers.D_MODEL
CELL = pararnn.GRUCell(N, key=jr.key(0))
XS = jr.normal(jr.key(1), (B, T, N))


def solved(solver, **options):
    def run(xs):
        start = CELL.init_state()
        return solve(CELL, xs, start, solver=solver, throw=False, **options).states

    return run


def layer(made):
    return lambda xs: made(xs)[0]


def scanned(xs, **options):
    return linear_scan(pararnn.Diagonal(jax.nn.sigmoid(xs)), xs, xs[0], **options)


def scan(xs):
    """The loop with which all solves of the cell are compared."""

    def step(h, x):
        h = CELL(h, x)
        return h, h

    return lax.scan(step, CELL.init_state(), xs)[1]


def matrix(xs):
    q, k, v = jnp.split(xs[:, None], 3, -1)
    return pararnn.matrix_scan(q, k, v, jax.nn.sigmoid(k), read=k / 4)[0]


def spread_out(xs):
    terms = lambda x: (jax.nn.sigmoid(x)[:, None], x[:, None] * jnp.ones((1, 2)))  # noqa: E731
    read = lambda h, x: jnp.sum(h, 1)  # noqa: E731
    return pararnn.fused_scan(terms, read, xs, jnp.zeros((N, 2)))[0]


PROGRAMS = {
    "Auto": (solved(Auto()), scan),
    "Sequential": (solved(Sequential()), scan),
    "Newton": (solved(Newton(4)), scan),
    "Newton, more segments than steps": (solved(Newton(16)), scan),
    "full Newton": (solved(Newton()), scan),
    "sweep": (solved(Auto(), adjoint="sweep"), scan),
    "RNN": (layer(pararnn.RNN(CELL, throw=False)), scan),
    "RNN, reverse": (
        lambda xs: pararnn.RNN(CELL, throw=False)(xs, reverse=True)[0],
        lambda xs: scan(xs[::-1])[::-1],
    ),
    "mixer": (
        layer(pararnn.make_mixer("gru", N, throw=False, key=jr.key(2))),
        layer(pararnn.make_mixer("gru", N, key=jr.key(2))),
    ),
    "linear_scan": (scanned, scanned),
    "matrix_scan": (matrix, matrix),
    "fused_scan": (spread_out, spread_out),
    "prefix": (
        lambda xs: pararnn.scan.prefix(jnp.maximum, xs),
        lambda xs: lax.cummax(xs),
    ),
}


def shapes(*names):
    batch, steps = export.symbolic_shape("b, t")
    batch, steps = batch if "b" in names else B, steps if "t" in names else T
    return jax.ShapeDtypeStruct((batch, steps, N), XS.dtype)


def derived(run):
    def loss(xs):
        ys = jax.vmap(run)(xs)
        return jnp.sum(jnp.sin(ys)), ys

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("name", PROGRAMS)
def test_values_and_gradients(name):
    run, reference = PROGRAMS[name]
    wanted = derived(reference)(XS)
    for sizes in ((), ("b", "t")):
        exported = export.export(derived(run))(shapes(*sizes))
        assert_close(exported.call(XS), wanted, 1e-9)


@pytest.mark.parametrize("name", layers.ROWS)
def test_linear_layers_of_any_length(name):
    made = layers.make(name)
    if layers.ROWS[name].options.get("form") == "convolution":
        with refusal(ValueError, ["'convolution'", "jax.export", "'auto'"]):
            export.export(jax.jit(jax.vmap(layer(made))))(shapes("t"))
        return
    run = jax.jit(jax.vmap(layer(made)))
    assert_close(export.export(run)(shapes("b", "t")).call(XS), run(XS), 1e-9)


def test_failures_are_exported_as_statistics():
    def run(xs):
        return solve(CELL, xs, CELL.init_state(), throw=False).stats

    exported = export.export(jax.jit(jax.vmap(run)))(shapes("b", "t"))
    found = exported.call(XS.at[1, 4].set(jnp.nan))
    assert found["first_nonfinite"].tolist() == [T, 4, T]


THROWING = {
    "solve": lambda xs: solve(CELL, xs, CELL.init_state()).states,
    "Newton": lambda xs: solve(CELL, xs, CELL.init_state(), solver=Newton(4)).states,
    "RNN": layer(pararnn.RNN(CELL)),
}


@pytest.mark.parametrize("name", THROWING)
@pytest.mark.parametrize("batched", [False, True])
def test_what_raises_is_refused(name, batched):
    run, xs = THROWING[name], XS if batched else XS[0]
    run = jax.jit(jax.vmap(run) if batched else run)
    with refusal(NotImplementedError, ["jax.export", "throw=False", "pararnn.RNN"]):
        export.export(run)(jax.ShapeDtypeStruct(xs.shape, xs.dtype))
    # The refusal has no lasting effect.
    assert run(xs).shape == xs.shape


REFUSED = {
    "Windows": (solved(Windows(Newton(2), 4)), "`Windows`"),
    "associative": (lambda xs: scanned(xs, backend="associative"), "'associative'"),
    "chunked": (lambda xs: scanned(xs, backend="chunked"), "'chunked'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_length_is_refused(name):
    run, named = REFUSED[name]
    with refusal(ValueError, [named, "symbolic", "fixed number of steps"]):
        export.export(jax.jit(jax.vmap(run)))(shapes("t"))


def test_throw_of_a_layer_is_a_flag():
    with refusal(ValueError, ["RNN", "`throw`"]):
        pararnn.RNN(CELL, throw="no")  # pyright: ignore[reportArgumentType]
    model = pararnn.LanguageModel(8, N, 1, mixer="gru", throw=False, key=jr.key(0))
    exported = export.export(jax.jit(lambda tokens: model(tokens)[0]))
    tokens = jnp.arange(5) % 8
    made = exported(jax.ShapeDtypeStruct(tokens.shape, tokens.dtype)).call(tokens)
    assert_close(made, model(tokens)[0], 1e-9)
