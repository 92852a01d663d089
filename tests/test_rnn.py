"""`RNN` and `Bidirectional`, over cells of this library and of others."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import linear
import pararnn
from pararnn import RNN, Bidirectional, Newton, Sequential
from tests.helpers import assert_close, whole

IN, WIDTH, T = 3, 4, 19


def plain(h, x):
    return jnp.tanh(0.5 * h + x[:1])


def eqx_cell(name):
    return lambda key: getattr(eqx.nn, name)(IN, WIDTH, key=key)


def own_cell(name):
    return lambda key: getattr(pararnn, name)(IN, WIDTH, key=key)


def nnx_cell(name):
    def make(key):
        nnx = pytest.importorskip("flax.nnx")
        return getattr(nnx, name)(
            IN, WIDTH, rngs=nnx.Rngs(0), dtype=jnp.float64, param_dtype=jnp.float64
        )

    return make


OWN = [cell.__name__ for cell in pararnn.CELLS.values()]
MAKE = {
    **{name: own_cell(name) for name in OWN},
    "eqx.GRUCell": eqx_cell("GRUCell"),
    "eqx.LSTMCell": eqx_cell("LSTMCell"),
    "nnx.GRUCell": nnx_cell("GRUCell"),
    "nnx.LSTMCell": nnx_cell("LSTMCell"),
    "nnx.OptimizedLSTMCell": nnx_cell("OptimizedLSTMCell"),
    "nnx.SimpleCell": nnx_cell("SimpleCell"),
    "function": lambda key: plain,
}
each_cell = pytest.mark.parametrize("name", MAKE)


def layer_of(name, solver=Newton(5)):
    options = {}
    if name == "function":
        options = {
            "init_state": jnp.full(WIDTH, 0.1),
            "output": lambda h: jnp.concatenate([h, 2 * h]),
        }
    return RNN(MAKE[name](jr.key(0)), solver=solver, **options)


def inputs(steps=T, seed=1):
    return jr.normal(jr.key(seed), (steps, IN))


@pytest.mark.parametrize("solver", [pararnn.Auto(), Sequential(), Newton()])
def test_the_solver_changes_nothing(solver):
    wanted = whole(layer_of("eqx.GRUCell"), inputs())
    assert_close(whole(layer_of("eqx.GRUCell", solver), inputs()), wanted, 1e-11)


@pytest.mark.parametrize("name", ["LSTMCell", "eqx.LSTMCell", "nnx.LSTMCell"])
@pytest.mark.parametrize("cut", [1, 8])
def test_cut_and_continued(name, cut):
    layer, xs = layer_of(name), inputs()
    ys, state = whole(layer, xs)
    first, between = whole(layer, xs[:cut])
    second, last = whole(layer, xs[cut:], between)
    assert_close(jnp.concatenate([first, second]), ys, 1e-11)
    assert_close(last, state, 1e-11)


@each_cell
def test_no_steps_return_the_state_as_it_was(name):
    layer = layer_of(name)
    fresh = layer.init_state()
    given = jax.tree.map(lambda s: s + 0.3, fresh)
    ys, state = whole(layer, inputs(0), given)
    assert_close(state, given, 0)
    wanted = jax.eval_shape(lambda x, s: layer.step(x, s)[0], inputs()[0], fresh)
    assert ys.shape == (0, *wanted.shape) and ys.dtype == wanted.dtype
    assert_close(whole(layer, inputs(0))[1], fresh, 0)


@pytest.mark.parametrize(
    "name", ["LSTMCell", "ParaGRUCell", "SLSTMCell", "eqx.GRUCell", "nnx.GRUCell"]
)
def test_vmap_over_a_batch(name):
    layer = layer_of(name)
    batch = jnp.stack([inputs(seed=seed) for seed in range(3)])
    got = eqx.filter_jit(eqx.filter_vmap(lambda xs: layer(xs)))(batch)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], got)
        assert_close(one, whole(layer, batch[i]), 1e-11)


def test_the_fresh_state_of_a_function_is_a_parameter():
    layer = layer_of("function")
    gradient = eqx.filter_jit(
        eqx.filter_grad(lambda layer: jnp.sum(layer(inputs())[0]))
    )
    assert np.all(np.asarray(gradient(layer).cell.fresh) != 0)


def test_init_state_and_output_of_a_known_cell_can_be_replaced():
    cell = eqx.nn.GRUCell(IN, WIDTH, key=jr.key(0))
    fresh = jnp.full(WIDTH, 0.5)
    layer = RNN(cell, init_state=fresh, output=lambda h: h[:2])
    ys, state = whole(layer, inputs())
    assert ys.shape == (T, 2)
    _, wanted = whole(RNN(cell), inputs(), fresh)
    assert_close(state, wanted, 1e-11)


# Against the other libraries' own loops


@pytest.mark.parametrize("name", ["eqx.GRUCell", "eqx.LSTMCell"])
def test_equals_the_loop_of_equinox(name):
    cell, xs = MAKE[name](jr.key(0)), inputs()

    @eqx.filter_jit
    def loop(cell):
        zeros = jnp.zeros(WIDTH)
        start = (zeros, zeros) if name == "eqx.LSTMCell" else zeros

        def step(state, x):
            state = cell(x, state)
            return state, state[0] if name == "eqx.LSTMCell" else state

        state, ys = jax.lax.scan(step, start, xs)
        return ys, state

    assert_close(whole(RNN(cell), xs), loop(cell), 1e-11)


@pytest.mark.parametrize(
    "name",
    ["nnx.GRUCell", "nnx.LSTMCell", "nnx.OptimizedLSTMCell", "nnx.SimpleCell"],
)
def test_equals_the_loop_of_flax(name):
    nnx = pytest.importorskip("flax.nnx")
    cell, xs = MAKE[name](jr.key(0)), inputs()
    graph, parameters = nnx.split(cell)

    @jax.jit
    def loop(parameters):
        cell = nnx.merge(graph, parameters)
        carry = cell.initialize_carry((IN,), nnx.Rngs(0))

        def step(carry, x):
            carry, y = nnx.merge(graph, parameters)(carry, x)
            return carry, y

        carry, ys = jax.lax.scan(step, carry, xs)
        return ys, carry

    ys, state = whole(layer_of(name), xs)
    wanted, last = loop(parameters)
    np.testing.assert_allclose(ys, wanted, rtol=0, atol=1e-6)
    assert_close(
        jax.tree.map(lambda s: s.astype(jnp.float32), state),
        jax.tree.map(lambda s: s.astype(jnp.float32), last),
        1e-6,
    )


def test_a_cell_of_linen_with_its_parameters_bound():
    linen = pytest.importorskip("flax.linen")
    cell = linen.GRUCell(WIDTH, dtype=jnp.float64, param_dtype=jnp.float64)
    fresh, xs = jnp.zeros(WIDTH), inputs()
    parameters = cell.init(jr.key(0), fresh, xs[0])
    step = jax.tree_util.Partial(lambda p, h, x: cell.apply(p, h, x)[0], parameters)

    def loop(parameters):
        return jax.lax.scan(lambda h, x: cell.apply(parameters, h, x), fresh, xs)[1]

    def layer_of(parameters):
        bound = eqx.tree_at(lambda s: s.args, step, (parameters,))
        return RNN(bound, solver=Newton(5), init_state=fresh)

    @jax.jit
    def both(parameters):
        def loss(run):
            return lambda p: (jnp.sum(run(p) ** 2), run(p))

        return [
            jax.value_and_grad(loss(run), has_aux=True)(parameters)
            for run in (lambda p: layer_of(p)(xs)[0], loop)
        ]

    got, wanted = both(parameters)
    assert_close(got, wanted, 1e-11)


# Both directions

PAIRS = {
    "GRU, LSTM": lambda: (layer_of("GRUCell"), layer_of("LSTMCell")),
    "eqx, function": lambda: (layer_of("eqx.GRUCell"), layer_of("function")),
    "LRU, GRU": lambda: (linear.LRU(IN, 5, key=jr.key(0)), layer_of("GRUCell")),
    "LRU, LRU": lambda: (
        linear.LRU(IN, 5, key=jr.key(0)),
        linear.LRU(IN, 5, key=jr.key(1)),
    ),
}
each_pair = pytest.mark.parametrize("pair", PAIRS)


def both_ways(layer, xs):
    """A bidirectional layer by hand, on one sequence."""
    ys, ahead = whole(layer.forward, xs)
    zs, behind = whole(layer.backward, xs[::-1])
    return jnp.concatenate([ys, zs[::-1]], axis=-1), (ahead, behind)


@each_pair
def test_bidirectional_equals_two_runs(pair):
    layer, xs = Bidirectional(*PAIRS[pair]()), inputs()
    assert_close(whole(layer, xs), both_ways(layer, xs), 1e-11)


@pytest.mark.parametrize(
    "pair, starts",
    [
        ("GRU, LSTM", (0, 6, 7)),
        ("eqx, function", (6,)),
        ("LRU, GRU", (0, 6, 7)),
        ("LRU, GRU", (0,)),
        ("LRU, LRU", (6, T - 1)),
    ],
)
def test_bidirectional_on_packed_sequences(pair, starts):
    layer, xs = Bidirectional(*PAIRS[pair]()), inputs()
    reset = jnp.zeros(T, bool).at[jnp.array(starts)].set(True)
    ys, _ = whole(layer, xs, None, reset)
    bounds = sorted({0, *starts, T})
    parts = [both_ways(layer, xs[a:b])[0] for a, b in itertools.pairwise(bounds)]
    assert_close(ys, jnp.concatenate(parts), 1e-10)


def test_bidirectional_takes_and_returns_states():
    layer, xs = Bidirectional(*PAIRS["LRU, GRU"]()), inputs()
    fresh = layer.init_state()
    assert jax.tree.structure(whole(layer, xs)[1]) == jax.tree.structure(fresh)
    given = jax.tree.map(lambda s: s + 0.2, fresh)
    ys, state = whole(layer, xs, given)
    forward = whole(layer.forward, xs, given[0])
    backward = whole(layer.backward, xs[::-1], given[1])
    wanted = jnp.concatenate([forward[0], backward[0][::-1]], axis=-1)
    assert_close(ys, wanted, 1e-11)
    assert_close(state, (forward[1], backward[1]), 1e-11)


def test_bidirectional_without_steps():
    layer = Bidirectional(*PAIRS["GRU, LSTM"]())
    for reset in (None, jnp.zeros(0, bool)):
        ys, state = whole(layer, inputs(0), None, reset)
        assert ys.shape == (0, 2 * WIDTH)
        assert_close(state, layer.init_state(), 0)


def test_bidirectional_cannot_decode():
    layer = Bidirectional(*PAIRS["GRU, LSTM"]())
    with pytest.raises(NotImplementedError, match="starts at the end"):
        layer.step(inputs()[0], layer.init_state())


def test_a_given_fresh_state_adds_no_second_copy_of_the_cell():
    cell = pararnn.GRUCell(3, 4, key=jr.key(0))
    count = len(jax.tree.leaves(eqx.filter(cell, eqx.is_array)))
    layer = pararnn.RNN(cell, init_state=jnp.ones(4))
    assert len(jax.tree.leaves(eqx.filter(layer, eqx.is_array))) == count + 1
