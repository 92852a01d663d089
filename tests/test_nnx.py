"""Flax NNX cells against `flax.nnx.RNN`: values, gradients, resets, refusals."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

import pararnn
from pararnn import RNN, Newton, Sequential
from pararnn.jaxprs import primitives_of
from tests.helpers import assert_close, decoded, refusal, whole

nnx = pytest.importorskip("flax.nnx")
from tests import nnx_cells  # noqa: E402

IN, WIDTH, T = nnx_cells.IN, nnx_cells.WIDTH, 19
BUILT_IN = ("GRUCell", "LSTMCell", "OptimizedLSTMCell", "SimpleCell")
each_cell = pytest.mark.parametrize(
    "name", [*BUILT_IN, *(cell.__name__ for cell in nnx_cells.CELLS)]
)


def make(name):
    if name in BUILT_IN:
        dtypes = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        return getattr(nnx, name)(IN, WIDTH, rngs=nnx.Rngs(0), **dtypes)
    cell = getattr(nnx_cells, name)(nnx.Rngs(0))
    cell.eval()
    return cell


def inputs(steps=T):
    return jr.normal(jr.key(1), (steps, IN))


def total(ys):
    return sum(jnp.sum(jnp.cos(leaf) ** 2) for leaf in jax.tree.leaves(ys))


def by_flax(cell, xs):
    """The outputs and the last carry of Flax's own layer, on a batch of one."""
    carry, ys = nnx.RNN(cell, return_carry=True)(xs[None])
    return jax.tree.map(lambda leaf: leaf[0], (ys, carry))


@each_cell
@pytest.mark.parametrize("solver", [Newton(5), Sequential()])
def test_values_and_gradients(name, solver):
    cell, xs = make(name), inputs()
    layer = RNN(cell, solver=solver)
    assert_close(whole(layer, xs), nnx.jit(by_flax)(cell, xs), 1e-11)

    @eqx.filter_jit
    @eqx.filter_grad
    def got(point):
        layer, xs = point
        return total(layer(xs)[0])

    @nnx.jit
    def wanted(cell, xs):
        def loss(cell, xs):
            return total(by_flax(cell, xs)[0])

        return nnx.grad(loss, argnums=(0, 1))(cell, xs)

    gradient, of_xs = got((layer, xs))
    of_cell, of_xs_by_flax = wanted(cell, xs)
    parameters = nnx.filter_state(gradient.cell.parameters, nnx.Param)
    assert_close(jax.tree.leaves(parameters), jax.tree.leaves(of_cell), 1e-10)
    assert_close(of_xs, of_xs_by_flax, 1e-10)


@each_cell
def test_a_step_is_a_step_of_the_sequence(name):
    """With resets, and from a given state."""
    layer, xs = RNN(make(name), solver=Newton(5)), inputs()
    reset = jnp.zeros(T, bool).at[jnp.array([0, 7, 8])].set(True)
    state = jax.tree.map(lambda leaf: leaf + 0.3, layer.init_state())
    for marks in (None, reset):
        got = whole(layer, xs, state, marks)
        assert_close(got, decoded(layer, xs, state, marks), 1e-11)


@each_cell
def test_a_batch_and_no_steps(name):
    layer = RNN(make(name), solver=Newton(5))
    batch = jr.normal(jr.key(2), (2, T, IN))
    ys = eqx.filter_jit(jax.vmap(lambda xs: layer(xs)[0]))(batch)
    one = whole(layer, batch[1])[0]
    assert_close(jax.tree.map(lambda leaf: leaf[1], ys), one, 1e-11)
    none, state = whole(layer, inputs(0))
    assert_close(none, jax.tree.map(lambda leaf: leaf[:0], one), 0)
    assert_close(state, layer.init_state(), 0)


@pytest.mark.parametrize(
    "name, allowed",
    [
        *((name, set()) for name in BUILT_IN),
        ("Before", set()),
        ("Head", {"dot_general", "add", "reshape", "broadcast_in_dim", "jit"}),
        ("Pair", {"mul"}),
    ],
)
def test_outputs_cost_what_is_theirs_alone(name, allowed):
    """An output that is in the carry costs nothing, and a head costs only itself."""
    layer, xs = RNN(make(name)), inputs()
    after = jax.tree.map(lambda h: jnp.stack([h] * T), layer.init_state())
    outputs = ft.partial(layer.cell.outputs, lambda: after)
    program = jax.make_jaxpr(outputs)(xs, after).jaxpr
    assert primitives_of(program) - {"squeeze"} <= allowed


def test_a_carry_alone_from_a_state_that_is_given():
    cell, xs = nnx_cells.Alone(nnx.Rngs(0)), inputs()
    fresh = {"h": jnp.full(WIDTH, 0.1), "n": jnp.zeros(())}

    def loop(xs):
        return jax.lax.scan(lambda h, x: (cell(h, x),) * 2, fresh, xs)[::-1]

    layer = RNN(cell, init_state=fresh, solver=Newton(5))
    assert_close(whole(layer, xs), jax.jit(loop)(xs), 1e-11)
    assert_close(decoded(layer, xs), jax.jit(loop)(xs), 1e-11)
    sol = jax.jit(lambda xs: pararnn.solve(cell, xs, fresh, initial_guess="cell"))(xs)
    assert_close(sol.states, jax.jit(loop)(xs)[0], 1e-11)


@pytest.mark.parametrize("name", ["Unstarted", "Head"])
def test_the_fresh_state_that_is_given_is_a_parameter(name):
    cell, xs, fresh = make(name), inputs(), jnp.full(WIDTH, 0.1)

    def loss(run, fresh):
        return total(run(fresh))

    def layer(fresh):
        return RNN(cell, init_state=fresh, solver=Newton(5))(xs)[0]

    def loop(fresh):
        return jax.lax.scan(lambda h, x: cell(h, x), fresh, xs)[1]

    got, wanted = (
        jax.jit(jax.value_and_grad(ft.partial(loss, run)))(fresh)
        for run in (layer, loop)
    )
    assert_close(got, wanted, 1e-11)


def test_a_given_output_replaces_that_of_the_cell():
    layer = RNN(make("Head"), output=lambda h: h[:1])
    assert whole(layer, inputs())[0].shape == (T, 1)


def changing():
    return nnx_cells.Evaluated(nnx.Rngs(0))


def called(cell, **options):
    return lambda: RNN(cell, **options)(inputs())


WRONG = {
    "a cell in training": (
        called(changing()),
        NotImplementedError,
        ["Evaluated", "`norm.mean` (BatchStat)", "`drop.rngs.count` (RngCount)"],
    ),
    "a cell in training, decoding": (
        lambda: RNN(changing()).step(inputs()[0], jnp.zeros(WIDTH)),
        NotImplementedError,
        ["RngCount", "cell.eval()"],
    ),
    "a cell in training, solved": (
        lambda: pararnn.solve(changing(), inputs(), jnp.zeros(WIDTH)),
        NotImplementedError,
        ["BatchStat", "cell.eval()"],
    ),
    "a cell that counts its calls": (
        called(nnx_cells.Counting(nnx.Rngs(0))),
        NotImplementedError,
        ["Counting", "an attribute"],
    ),
    "no fresh state": (
        called(nnx_cells.Alone(nnx.Rngs(0))),
        ValueError,
        ["Alone", "no `initialize_carry`", "init_state="],
    ),
    "an unfinished fresh state": (
        called(nnx_cells.Unfinished()),
        ValueError,
        ["Unfinished", "no `initialize_carry`", "init_state="],
    ),
    "a state of another structure": (
        called(make("Head"), init_state=(jnp.zeros(WIDTH),) * 3),
        Exception,
        ["tuple"],
    ),
    "a layer of Flax": (
        lambda: RNN(nnx.RNN(make("Head"))),
        TypeError,
        ["flax.nnx.RNN", "layer.cell"],
    ),
    "both directions of Flax": (
        lambda: RNN(nnx.Bidirectional(*(nnx.RNN(make("Head")),) * 2)),
        TypeError,
        ["flax.nnx.Bidirectional", "pararnn.Bidirectional"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refusals(name):
    wrong, exception, parts = WRONG[name]
    # Flax's BatchNorm keeps its statistics in float32 in any case.
    with jax.numpy_dtype_promotion("standard"), refusal(exception, parts):
        wrong()
