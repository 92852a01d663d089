"""torch's recurrent layers as ours and back, against NumPy loops and torch itself.

The loops are written from the equations in torch's documentation, with its names of the
parameters. Tests that need torch are skipped without it.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import pararnn
from pararnn import RNN, Auto, Bidirectional, Newton, Stack
from pararnn.interop import (
    from_torch,
    state_from_torch,
    state_to_torch,
    to_torch,
)
from tests.helpers import assert_close, whole

IN, WIDTH, T = 3, 4, 11
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}

# Kind, layers, directions, biases, nonlinearity.
NETWORKS = {
    "rnn": ("RNN", 1, 1, True, "tanh"),
    "rnn, relu, deep, both ways": ("RNN", 2, 2, True, "relu"),
    "rnn, no bias": ("RNN", 2, 1, False, "tanh"),
    "gru": ("GRU", 1, 1, True, None),
    "gru, deep, both ways": ("GRU", 3, 2, True, None),
    "gru, no bias": ("GRU", 1, 2, False, None),
    "lstm": ("LSTM", 1, 1, True, None),
    "lstm, deep, both ways": ("LSTM", 2, 2, True, None),
    "lstm, no bias": ("LSTM", 2, 1, False, None),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def random_state_dict(name, dtype=np.float64):
    kind, layers, directions, bias, _ = NETWORKS[name]
    rng, rows = np.random.default_rng(0), GATES[kind] * WIDTH
    state_dict = {}
    for k in range(layers):
        d_input = IN if k == 0 else directions * WIDTH
        for end in ("", "_reverse")[:directions]:
            shapes = {"weight_ih": (rows, d_input), "weight_hh": (rows, WIDTH)}
            if bias:
                shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
            for parameter, shape in shapes.items():
                values = rng.uniform(-0.5, 0.5, shape).astype(dtype)
                state_dict[f"{parameter}_l{k}{end}"] = values
    return state_dict


def nonlinearity_of(name):
    return {} if NETWORKS[name][4] is None else {"nonlinearity": NETWORKS[name][4]}


def inputs(steps=T, seed=1):
    return np.random.default_rng(seed).normal(size=(steps, IN))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_step(kind, activation, x_part, h_part, h, c):
    if kind == "RNN":
        total = x_part + h_part
        return np.tanh(total) if activation == "tanh" else np.maximum(total, 0), c
    xs, hs = (np.split(part, GATES[kind]) for part in (x_part, h_part))
    if kind == "GRU":
        r, z = sigmoid(xs[0] + hs[0]), sigmoid(xs[1] + hs[1])
        n = np.tanh(xs[2] + r * hs[2])
        return (1 - z) * n + z * h, c
    i, f, g, o = (a + b for a, b in zip(xs, hs, strict=True))
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def numpy_network(name, state_dict, xs):
    """Outputs, `h_n` and `c_n` from zeros."""
    kind, layers, directions, bias, activation = NETWORKS[name]
    last_h, last_c = [], []
    for k in range(layers):
        outputs = []
        for end in ("", "_reverse")[:directions]:
            W, U = (state_dict[f"weight_{part}_l{k}{end}"] for part in ("ih", "hh"))
            zero = np.zeros(len(W))
            b, d = (
                state_dict[f"bias_{part}_l{k}{end}"] if bias else zero
                for part in ("ih", "hh")
            )
            h, c, hs = np.zeros(WIDTH), np.zeros(WIDTH), []
            for x in xs[::-1] if end else xs:
                h, c = numpy_step(kind, activation, W @ x + b, U @ h + d, h, c)
                hs.append(h)
            outputs.append(np.stack(hs[::-1] if end else hs))
            last_h.append(h)
            last_c.append(c)
        xs = np.concatenate(outputs, axis=1)
    return xs, np.stack(last_h), np.stack(last_c)


# Without torch


@each_network
def test_equals_torchs_equations(name):
    state_dict, xs = random_state_dict(name), inputs()
    layer = from_torch(state_dict, **nonlinearity_of(name))
    ys, h, c = numpy_network(name, state_dict, xs)
    got, state = whole(layer, jnp.asarray(xs))
    np.testing.assert_allclose(got, ys, rtol=0, atol=1e-12)
    last = state_to_torch(layer, state)
    assert isinstance(last, tuple) == (NETWORKS[name][0] == "LSTM")
    for one, wanted in zip(jax.tree.leaves(last), (h, c), strict=False):
        np.testing.assert_allclose(one, wanted, rtol=0, atol=1e-12)
    assert_close(state_from_torch(layer, last), state, 0)


@each_network
def test_there_and_back(name):
    kind, *_, bias, _ = NETWORKS[name]
    state_dict = random_state_dict(name, np.float32)
    back = to_torch(from_torch(state_dict, **nonlinearity_of(name)), bias=bias)
    assert list(back) == list(state_dict)
    for key, wanted in state_dict.items():
        if kind == "RNN" and key.startswith("bias_ih"):
            wanted = wanted + state_dict[key.replace("ih", "hh")]
        elif kind == "RNN" and key.startswith("bias_hh"):
            wanted = np.zeros_like(wanted)
        assert back[key].dtype == np.float32 and back[key].flags.writeable
        np.testing.assert_array_equal(back[key], wanted)


def test_part_of_a_larger_model():
    state_dict = random_state_dict("gru")
    whole = {f"encoder.rnn.{key}": value for key, value in state_dict.items()}
    whole["head.weight"] = np.zeros((2, WIDTH))
    layer = from_torch(whole, prefix="encoder.rnn.")
    assert eqx.tree_equal(layer, from_torch(state_dict))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype):
    state_dict = random_state_dict("lstm, deep, both ways", jnp.dtype(dtype))
    layer = from_torch(state_dict)
    leaves = jax.tree.leaves(eqx.filter(layer, eqx.is_array))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}
    back = to_torch(layer)
    assert {v.dtype.name for v in back.values()} == {
        dtype.replace("bfloat16", "float32")
    }
    for key, value in state_dict.items():
        np.testing.assert_array_equal(back[key], value.astype(back[key].dtype))
    wide = from_torch(state_dict, dtype=jnp.float64)
    leaves = jax.tree.leaves(eqx.filter(wide, eqx.is_array))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float64")}


def test_float64_is_not_rounded_in_silence():
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match="jax_enable_x64"):
            from_torch(random_state_dict("gru"))
        from_torch(random_state_dict("gru"), dtype=jnp.float32)


def test_options_of_the_layers():
    solver = Newton(segments=4)
    layer = from_torch(random_state_dict("gru, deep, both ways"), solver=solver)
    for both in layer.layers:
        assert both.forward.solver == both.backward.solver == solver
    assert to_torch(layer.layers[0]).keys() == random_state_dict(
        "gru, no bias"
    ).keys() | {
        "bias_ih_l0",
        "bias_hh_l0",
        "bias_ih_l0_reverse",
        "bias_hh_l0_reverse",
    }
    assert list(to_torch(layer.layers[0].forward)) == list(random_state_dict("gru"))


def changed(name="gru", **entries):
    """A `state_dict` with entries replaced, added, or (None) taken away."""
    state_dict = random_state_dict(name) | entries
    return {key: value for key, value in state_dict.items() if value is not None}


class Module:
    """The part of a torch module that is read."""

    def __init__(self, name, **attributes):
        self.name = name
        for key, value in attributes.items():
            setattr(self, key, value)

    def state_dict(self):
        return random_state_dict(self.name)


WRONG_WEIGHTS = {
    "a file": ("weights.pt", {}, TypeError, "weights_only=True"),
    "empty": ({}, {}, ValueError, "nothing with the prefix ''"),
    "projection": (changed(weight_hr_l0=np.zeros((2, 4))), {}, ValueError, "proj_size"),
    "a larger model": (
        {f"rnn.{k}": v for k, v in random_state_dict("gru").items()},
        {},
        ValueError,
        "prefix='rnn.'",
    ),
    "a cell": ({"weight_ih": np.zeros((12, 3))}, {}, ValueError, "GRUCell"),
    "a bias missing": (changed(bias_hh_l0=None), {}, ValueError, "'bias_hh_l0'.*miss"),
    "a layer missing": (
        changed("gru, deep, both ways", weight_hh_l1=None),
        {},
        ValueError,
        r"\['weight_hh_l1'\] are missing .* 3 layer\(s\) in 2 direction",
    ),
    "transposed": (
        changed(weight_hh_l0=np.zeros((4, 12))),
        {},
        ValueError,
        r"shape \(4, 12\), expected \[k \* d, d\]",
    ),
    "a shape": (
        changed(bias_ih_l0=np.zeros(8)),
        {},
        ValueError,
        r"`bias_ih_l0` has shape \(8,\), expected \(12,\)",
    ),
    "widths of layers": (
        changed("lstm, no bias", weight_ih_l1=np.zeros((16, 5))),
        {},
        ValueError,
        r"`weight_ih_l1` has shape \(16, 5\), expected \(16, 4\)",
    ),
    "quantised": (
        changed(weight_hh_l0=np.zeros((12, 4), np.int8)),
        {},
        ValueError,
        "`weight_hh_l0` is int8",
    ),
    "rnn of unknown kind": (random_state_dict("rnn"), {}, ValueError, "does not say"),
    "nonlinearity of a gru": (
        random_state_dict("gru"),
        {"nonlinearity": "tanh"},
        ValueError,
        "fixed ones",
    ),
    "nonlinearity that is not": (
        random_state_dict("rnn"),
        {"nonlinearity": "gelu"},
        ValueError,
        "'gelu'",
    ),
    "nonlinearity of another": (
        Module("rnn", nonlinearity="relu"),
        {"nonlinearity": "tanh"},
        ValueError,
        "that of the module is 'relu'",
    ),
}


@pytest.mark.parametrize("case", WRONG_WEIGHTS)
def test_refuses_weights(case):
    source, options, exception, message = WRONG_WEIGHTS[case]
    with pytest.raises(exception, match=message):
        from_torch(source, **options)


def test_warns_of_dropout():
    with pytest.warns(UserWarning, match=r"dropout=0.2 .* `eval\(\)`"):
        layer = from_torch(Module("lstm, no bias", dropout=0.2))
    assert eqx.tree_equal(layer, from_torch(random_state_dict("lstm, no bias")))


def gru(d_input=IN, d_state=WIDTH, seed=0):
    return RNN(pararnn.GRUCell(d_input, d_state, key=jr.key(seed)))


def elman(activation):
    return RNN(pararnn.ElmanCell(IN, IN, activation=activation, key=jr.key(0)))


WRONG_LAYERS = {
    "another cell": (
        lambda: RNN(pararnn.ParaGRUCell(IN, key=jr.key(0))),
        TypeError,
        "ParaGRUCell has no counterpart",
    ),
    "another library": (
        lambda: RNN(eqx.nn.GRUCell(IN, WIDTH, key=jr.key(0))),
        TypeError,
        "another library's cell",
    ),
    "a fresh state": (
        lambda: RNN(gru().cell, init_state=jnp.ones(WIDTH)),
        TypeError,
        "FunctionCell .* `init_state`",
    ),
    "no layer": (lambda: gru().cell, TypeError, "a GRUCell has no counterpart"),
    "kinds": (
        lambda: Stack([gru(), RNN(pararnn.LSTMCell(WIDTH, key=jr.key(0)))]),
        ValueError,
        r"\['GRUCell', 'LSTMCell'\]",
    ),
    "activations": (
        lambda: Stack([elman("tanh"), elman("relu")]),
        ValueError,
        "ElmanCell relu",
    ),
    "directions": (
        lambda: Stack([Bidirectional(gru(), gru()), gru(2 * WIDTH)]),
        ValueError,
        "some layers have one direction",
    ),
    "widths": (
        lambda: Stack([gru(), gru(WIDTH, 5)]),
        ValueError,
        "layer 1 maps 4 inputs to 5 units",
    ),
    "inputs": (
        lambda: Bidirectional(gru(), gru(5)),
        ValueError,
        "layer 0 maps 5 inputs to 4 units",
    ),
}


@pytest.mark.parametrize("case", WRONG_LAYERS)
def test_refuses_layers(case):
    make, exception, message = WRONG_LAYERS[case]
    with pytest.raises(exception, match=message):
        to_torch(make())


def test_biases_are_not_dropped():
    with pytest.raises(ValueError, match="biases of layer 0 are not 0"):
        to_torch(gru(), bias=False)


LAYER = from_torch(random_state_dict("lstm, no bias"))
H = jnp.zeros((2, WIDTH))
WRONG_STATES = {
    "h alone": (lambda: state_from_torch(LAYER, H), r"\(h_0, c_0\) of shape \(2, 4\)"),
    "one layer": (lambda: state_from_torch(LAYER, (H[:1], H)), r"\(1, 4\).*\(2, 4\)"),
    "a batch": (
        lambda: state_from_torch(LAYER, (H[:, None], H[:, None])),
        "`jax.vmap` over axis 1",
    ),
    "h and c of a gru": (
        lambda: state_from_torch(from_torch(random_state_dict("gru")), (H, H)),
        r"expected shape \(1, 4\)",
    ),
    "torch's for ours": (lambda: state_to_torch(LAYER, (H, H)), "`layer.init_state"),
    "a batch of ours": (
        lambda: state_to_torch(
            LAYER, jax.tree.map(lambda s: s[None], LAYER.init_state())
        ),
        "a batch axis",
    ),
}


@pytest.mark.parametrize("case", WRONG_STATES)
def test_refuses_states(case):
    wrong, message = WRONG_STATES[case]
    with pytest.raises(ValueError, match=message):
        wrong()


# Against torch


def torch_module(name, dtype="float64"):
    torch = pytest.importorskip("torch")
    kind, layers, directions, bias, activation = NETWORKS[name]
    options = {} if activation is None else {"nonlinearity": activation}
    torch.manual_seed(0)
    return getattr(torch.nn, kind)(
        IN,
        WIDTH,
        num_layers=layers,
        bidirectional=directions == 2,
        bias=bias,
        dtype=getattr(torch, dtype),
        **options,
    )


def weighted(ys):
    return np.cos(np.arange(ys.size)).reshape(ys.shape).astype(ys.dtype)


SINGLE = ("rnn", "gru", "lstm, deep, both ways")


@pytest.mark.parametrize(
    "name, dtype, atol, solver",
    [
        *((name, "float64", 1e-10, Auto()) for name in NETWORKS),
        *((name, "float32", 1e-6, Auto()) for name in SINGLE),
        *((name, "float64", 1e-10, Newton(segments=4)) for name in ("gru", "lstm")),
    ],
)
def test_outputs_states_and_gradients_of_torch(name, dtype, atol, solver):
    torch = pytest.importorskip("torch")
    module = torch_module(name, dtype)
    xs = inputs().astype(dtype)
    layer = from_torch(module, solver=solver)

    @eqx.filter_jit
    def everything(layer, xs):
        def loss(layer_and_xs):
            layer, xs = layer_and_xs
            ys, state = layer(xs)
            return jnp.sum(weighted(ys) * ys), (ys, state)

        return eqx.filter_value_and_grad(loss, has_aux=True)((layer, xs))

    (_, (ys, state)), (gradient, of_xs) = everything(layer, jnp.asarray(xs))
    their_xs = torch.from_numpy(xs).requires_grad_()
    their_ys, their_state = module(their_xs)
    torch.sum(torch.from_numpy(weighted(ys)) * their_ys).backward()

    def close(got, wanted):
        wanted = wanted.detach().numpy()
        assert got.dtype == wanted.dtype
        scale = max(1, np.abs(wanted).max())
        np.testing.assert_allclose(got, wanted, rtol=0, atol=atol * scale)

    close(ys, their_ys)
    assert jax.tree.all(jax.tree.map(lambda s: s.dtype == dtype, state))
    ours = state_to_torch(layer, state)
    for one, wanted in zip(
        jax.tree.leaves(ours), jax.tree.leaves(their_state), strict=True
    ):
        close(one, wanted)
    close(of_xs, their_xs.grad)
    gradients = to_torch(gradient)
    for key, parameter in module.named_parameters():
        # The derivative in a sum of biases is that in either of them.
        summed = NETWORKS[name][0] == "RNN" and key.startswith("bias_hh")
        close(gradients[key.replace("hh", "ih") if summed else key], parameter.grad)


@each_network
def test_torch_loads_what_goes_back(name):
    torch = pytest.importorskip("torch")
    module, other = torch_module(name), torch_module(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    weights = to_torch(from_torch(module), bias=NETWORKS[name][3])
    other.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    xs = torch.from_numpy(inputs())
    (ys, _), (wanted, _) = other(xs), module(xs)
    exact = NETWORKS[name][0] != "RNN" or not NETWORKS[name][3]
    torch.testing.assert_close(ys, wanted, rtol=0, atol=0 if exact else 1e-14)


@pytest.mark.parametrize("name", ["gru, deep, both ways", "lstm, deep, both ways"])
def test_a_packed_batch_is_one_sequence_with_resets(name):
    torch = pytest.importorskip("torch")
    module, lengths = torch_module(name), [7, 1, 5]
    sequences = [inputs(n, seed) for seed, n in enumerate(lengths)]
    packed = torch.nn.utils.rnn.pack_sequence(
        [torch.from_numpy(s) for s in sequences], enforce_sorted=False
    )
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(module(packed)[0])
    wanted = [padded[:n, i].detach().numpy() for i, n in enumerate(lengths)]

    starts = np.cumsum([0, *lengths[:-1]])
    reset = jnp.zeros(sum(lengths), bool).at[starts].set(True)
    ys, _ = whole(from_torch(module), jnp.concatenate(sequences), None, reset)
    np.testing.assert_allclose(ys, np.concatenate(wanted), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["rnn, no bias", "lstm, deep, both ways"])
def test_continues_from_a_state_of_torch(name):
    torch = pytest.importorskip("torch")
    module = torch_module(name)
    _, between = module(torch.from_numpy(inputs(seed=2)))
    wanted, _ = module(torch.from_numpy(inputs()), between)
    layer = from_torch(module)
    numpy = jax.tree.map(lambda s: s.detach().numpy(), between)
    ys, _ = whole(layer, jnp.asarray(inputs()), state_from_torch(layer, numpy))
    np.testing.assert_allclose(ys, wanted.detach().numpy(), rtol=0, atol=1e-12)


def test_bfloat16_of_torch():
    torch = pytest.importorskip("torch")
    module = torch_module("gru", "float32").to(torch.bfloat16)
    weights = to_torch(from_torch(module))
    for key, parameter in module.state_dict().items():
        np.testing.assert_array_equal(weights[key], parameter.float().numpy())


def test_dropout_of_a_module_in_training():
    torch = pytest.importorskip("torch")
    module = torch.nn.GRU(IN, WIDTH, 2, dropout=0.5, dtype=torch.float64)
    with pytest.warns(UserWarning, match="dropout=0.5"):
        layer = from_torch(module)
    wanted, _ = module.eval()(torch.from_numpy(inputs()))
    ys, _ = whole(layer, jnp.asarray(inputs()))
    np.testing.assert_allclose(ys, wanted.detach().numpy(), rtol=0, atol=1e-12)
