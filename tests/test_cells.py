import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

import pararnn
import tests.numpy_reference as reference
from pararnn.cells import (
    ALRNNCell,
    CfCCell,
    ElmanCell,
    GRUCell,
    ICLRNNCell,
    LEMCell,
    LSTMCell,
    ParaGRUCell,
    ParaLSTMCell,
    PLRNNCell,
    QKANLSTMCell,
    SLSTMCell,
)
from tests.helpers import assert_close

# As released, the sLSTM's recurrent weights are zero at first.
MIXED = {"recurrence": "uniform"}
EXPONENTIAL = {"heads": 2, "forget": "exponential"}
# name: class, further arguments, reference, number of arrays in the state, and the
# size of the diagonal blocks of the Jacobian between any two of these arrays.
CELLS = {
    "elman": (ElmanCell, {}, reference.elman, 1, 6),
    "gru": (GRUCell, {}, reference.gru, 1, 6),
    "gru-heads": (GRUCell, {"heads": 2}, reference.gru, 1, 3),
    "lstm": (LSTMCell, {}, reference.lstm, 2, 6),
    "lstm-heads": (LSTMCell, {"heads": 3}, reference.lstm, 2, 2),
    "paragru": (ParaGRUCell, {}, reference.paragru, 1, 1),
    "paragru-heads": (ParaGRUCell, {"heads": 2}, reference.paragru, 1, 1),
    "paralstm": (ParaLSTMCell, {}, reference.paralstm, 2, 1),
    "paralstm-heads": (ParaLSTMCell, {"heads": 2}, reference.paralstm, 2, 1),
    "slstm": (SLSTMCell, MIXED, reference.slstm, 4, 6),
    "slstm-heads": (SLSTMCell, MIXED | EXPONENTIAL, reference.slstm, 4, 3),
    "slstm-diagonal": (SLSTMCell, MIXED | {"heads": 6}, reference.slstm, 4, 1),
    "cfc": (CfCCell, {"dt": 0.3}, reference.cfc, 1, 6),
    "cfc-timed": (CfCCell, {"dt": "input"}, reference.cfc, 1, 6),
    "lem": (LEMCell, {"dt": 0.5}, reference.lem, 2, 6),
    "elman-relu": (ElmanCell, {"activation": "relu"}, reference.elman, 1, 6),
    "plrnn": (PLRNNCell, {}, reference.plrnn, 1, 6),
    "alrnn": (ALRNNCell, {"rectified": 2}, reference.alrnn, 1, 6),
    "iclrnn": (ICLRNNCell, {}, reference.iclrnn, 1, 6),
    "qkanlstm": (QKANLSTMCell, {"layers": 2}, reference.qkanlstm, 2, 6),
}
# These have special initialisations, which other tests check.
OWN_INITIALISATION = {
    *("plrnn", "alrnn", "qkanlstm"),
    *("slstm", "slstm-heads", "slstm-diagonal"),
}
D_INPUT, D_STATE, T = 4, 6, 9

each_cell = pytest.mark.parametrize("name", CELLS)


@functools.cache
def make(name, dtype=None, seed=0):
    cls, arguments, *_ = CELLS[name]
    return cls(D_INPUT, D_STATE, **arguments, dtype=dtype, key=jr.key(seed))


def random_state(name, rng):
    arrays = tuple(rng.normal(size=D_STATE) for _ in range(CELLS[name][3]))
    return arrays if len(arrays) > 1 else arrays[0]


@eqx.filter_jit
def run(cell, state, xs):
    """All gates at once, then the updates one by one."""

    def step(state, gates):
        state = cell.update(state, gates)
        return state, cell.output(state)

    last, hs = lax.scan(step, state, cell.gates(xs))
    return hs, last


@eqx.filter_jit
def run_by_call(cell, state, xs):
    def step(state, x):
        state = cell(state, x)
        return state, cell.output(state)

    last, hs = lax.scan(step, state, xs)
    return hs, last


@each_cell
@pytest.mark.parametrize("runner", [run, run_by_call])
def test_equals_the_equations(name, runner):
    rng = np.random.default_rng(0)
    cell, state = make(name), random_state(name, rng)
    xs = rng.normal(size=(T, D_INPUT))
    wanted = CELLS[name][2](reference.parameters(cell), xs, state)
    assert_close(
        runner(cell, jax.tree.map(jnp.asarray, state), jnp.asarray(xs)), wanted, 1e-13
    )


@each_cell
def test_gates_act_on_the_last_axis_alone(name):
    xs = jr.normal(jr.key(1), (2, 3, D_INPUT))
    gates_of = eqx.filter_jit(lambda cell, x: cell.gates(x))
    cell = make(name)
    gates = gates_of(cell, xs)
    assert isinstance(gates, tuple)
    assert all(g.shape == (2, 3, D_STATE) for g in gates)
    for alone, g in zip(gates_of(cell, xs[1, 2]), gates, strict=True):
        np.testing.assert_allclose(alone, g[1, 2], rtol=1e-14, atol=1e-16)
    assert all(g.shape == (0, D_STATE) for g in gates_of(cell, xs[0, :0]))


@each_cell
@pytest.mark.parametrize(
    "parameters, inputs, state",
    [
        ("float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "float32"),
        ("bfloat16", "float32", "float32"),
        ("float32", "float64", "float32"),
        ("float32", "bfloat16", "float64"),
    ],
)
def test_dtype_of_the_state_is_kept(name, parameters, inputs, state):
    cell, xs = make(name, parameters), jr.normal(jr.key(1), (T, D_INPUT), inputs)
    fresh = cell.init_state()
    assert {s.dtype for s in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    start = jax.tree.map(lambda s: s.astype(state), fresh)
    # Shapes and dtypes only: a scan refuses a carry whose dtype changes.
    hs, last = eqx.filter_eval_shape(run, cell, start, xs)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), last) == jax.tree.map(
        lambda s: (s.shape, s.dtype), start
    )
    assert (hs.shape, hs.dtype) == ((T, D_STATE), jnp.dtype(state))


@pytest.mark.parametrize("name", ["gru", "paralstm-heads", "lstm-heads", "cfc", "lem"])
def test_16_bit_parameters_are_the_only_loss(name):
    """The arithmetic is float32: only inputs and parameters are rounded."""
    cell = make(name, "bfloat16")
    xs = jr.normal(jr.key(1), (T, D_INPUT), "bfloat16")
    zeros = jax.tree.map(lambda s: np.zeros(s.shape), cell.init_state())
    wanted = CELLS[name][2](reference.parameters(cell), np.asarray(xs, float), zeros)
    got = run(cell, cell.init_state(), xs)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@each_cell
def test_structure_of_the_jacobian(name):
    cell = make(name)
    x = jr.normal(jr.key(1), (D_INPUT,))
    # At several states, because each leaves other units of a ReLU idle.
    states = jax.tree.map(
        lambda s: jr.normal(jr.key(2), (64, *s.shape), s.dtype), cell.init_state()
    )
    state = jax.tree.map(lambda s: s[0], states)
    jacobians = jax.jit(jax.vmap(jax.jacfwd(cell), in_axes=(0, None)))(states, x)
    parts = [np.abs(part).max(0) for part in jax.tree.leaves(jacobians)]
    assert len(parts) == CELLS[name][3] ** 2
    size = CELLS[name][4]
    block = np.arange(D_STATE) // size
    same_block = block[:, None] == block[None]
    assert not any(np.any(np.asarray(part)[~same_block]) for part in parts)
    coupled = same_block & ~np.eye(D_STATE, dtype=bool)
    assert any(np.all(np.asarray(part)[coupled]) for part in parts)
    # The blocks of the whole state contain those of all its arrays.
    rows = size * CELLS[name][3]
    wanted = "Diagonal" if rows == 1 else f"BlockDiagonal({rows})"
    found = pararnn.jacobian_structure(cell, x, state)
    assert str(found) == ("Dense" if size == D_STATE else wanted)


@each_cell
def test_every_parameter_has_a_derivative(name):
    xs = jr.normal(jr.key(1), (T, D_INPUT))
    # From a fresh state the sLSTM's outputs do not depend on b_i.
    state = jax.tree.map(jnp.asarray, random_state(name, np.random.default_rng(0)))

    @eqx.filter_jit
    @eqx.filter_grad
    def grad(cell):
        hs, _ = run(cell, state, xs)
        return jnp.sum(hs**2)

    for path, leaf in jax.tree.leaves_with_path(grad(make(name))):
        assert np.all(np.isfinite(leaf)) and np.any(leaf), jax.tree_util.keystr(path)


def initial_bound(cell, field, value):
    """An upper bound of the absolute values of an initial parameter."""
    if isinstance(cell, ParaGRUCell | ParaLSTMCell):
        return (D_INPUT // cell.heads) ** -0.5 if field[0] in "Bb" else 1.0
    if isinstance(cell, CfCCell):
        fan_in = cell.B_x.shape[1] + D_STATE
        if value.ndim == 1:
            return (fan_in if field == "b" else D_STATE) ** -0.5
        return (6 / ((fan_in if field[0] == "B" else D_STATE) + D_STATE)) ** 0.5
    return (value.shape[-1] if value.ndim == 3 else D_STATE) ** -0.5


@pytest.mark.parametrize("name", [n for n in CELLS if n not in OWN_INITIALISATION])
def test_initialisation(name):
    cell = make(name)
    assert (cell.d_input, cell.d_state) == (D_INPUT, D_STATE)
    for field, value in vars(reference.parameters(cell)).items():
        if not isinstance(value, np.ndarray):
            continue
        bound = initial_bound(cell, field, value)
        assert 0.3 * bound < np.abs(value).max() <= bound, (
            f"{field}: initialised beyond {bound:.3g}, or far below. If that is meant, "
            "say so in `initial_bound`, or list the cell in OWN_INITIALISATION."
        )
        assert len(np.unique(value)) == value.size, field
    other = make(name, seed=1)
    assert not eqx.tree_equal(cell, other)


@each_cell
def test_state_defaults_to_the_size_of_the_input(name):
    cls, arguments, *_ = CELLS[name]
    if "heads" in arguments:
        arguments = arguments | {"heads": 2}
    cell = cls(D_INPUT, **arguments, key=jr.key(0))
    for state in jax.tree.leaves(cell.init_state()):
        assert state.shape == (D_INPUT,) and not np.any(state)


ALL = tuple(CELLS)
PARA = ("paragru", "paralstm")
HEADS = (*PARA, "gru", "lstm", "slstm")
TIMED = ("cfc", "lem")
AUTONOMOUS = ("plrnn", "alrnn")  # They may go without inputs.
DRIVEN = tuple(name for name in CELLS if name not in AUTONOMOUS)
# What is wrong, which cells refuse it, arguments, and what the message must say.
BAD_ARGUMENTS = {
    "zero input": (
        DRIVEN,
        {"d_input": 0},
        "`d_input` must be a positive integer, got 0",
    ),
    "negative input": (AUTONOMOUS, {"d_input": -1}, "an integer, at least 0, got -1"),
    "no input, no state": (
        AUTONOMOUS,
        {"d_input": 0, "d_state": None},
        "Pass `d_state`",
    ),
    "rectified float": (("alrnn",), {"rectified": 2.0}, "`rectified` must be .* 2.0"),
    "too many rectified": (("alrnn",), {"rectified": 7}, "`rectified` = 7 .* 6"),
    "activation": (("elman",), {"activation": "gelu"}, "'tanh' or 'relu', got 'gelu'"),
    "no layers": (("qkanlstm",), {"layers": 0}, "`layers` must be .* got 0"),
    "negative state": (ALL, {"d_state": -3}, "`d_state` must be .* got -3"),
    "float size": (ALL, {"d_input": 4.0}, "computed with `/`"),
    "bool size": (ALL, {"d_state": True}, "`d_state` must be .* got True"),
    "no key": (ALL, {"key": None}, "`key` must be .* got None"),
    "seed as key": (ALL, {"key": 0}, "Pass `key=jax.random.key"),
    "two keys": (ALL, {"key": jr.split(jr.key(0))}, "several keys"),
    "unknown dtype": (ALL, {"dtype": "no"}, "`dtype` must be .* got no"),
    "integer dtype": (ALL, {"dtype": jnp.int32}, "`dtype` must be .* got int32"),
    "complex dtype": (ALL, {"dtype": jnp.complex64}, "real floating point"),
    "no heads": (HEADS, {"heads": 0}, "`heads` must be a positive integer"),
    "heads and input": (PARA, {"heads": 3}, "`d_input` = 4 is not divisible"),
    "heads and state": (HEADS, {"heads": 4}, "`d_state` = 6 is not divisible"),
    "forget": (("slstm",), {"forget": "tanh"}, "there are sigmoid, exponential"),
    "recurrence": (("slstm",), {"recurrence": 0}, "there are zeros, uniform"),
    "depth": (("slstm",), {"depth": 3}, "`depth` must be a number from 0 to 1, got 3"),
    "no sweeps": (("slstm",), {"sweeps": 0}, "`sweeps` must be a positive integer"),
    "no backbone": (("cfc",), {"d_backbone": 0}, "`d_backbone` must be"),
    "time alone": (("cfc",), {"d_input": 1, "dt": "input"}, "leaves no other"),
    "zero dt": (TIMED, {"dt": 0}, "`dt` must be a positive finite number, got 0"),
    "infinite dt": (TIMED, {"dt": float("inf")}, "positive finite number, got inf"),
    "dt by step": (TIMED, {"dt": jnp.ones(3)}, "a constant of the cell"),
    "dt by name": (TIMED, {"dt": "inputs"}, "number, got 'inputs'"),
}


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        pytest.param(name, arguments, message, id=f"{case}-{name}")
        for case, (names, arguments, message) in BAD_ARGUMENTS.items()
        for name in names
    ],
)
def test_refuses_arguments(name, arguments, message):
    cls = CELLS[name][0]
    good = {"d_input": D_INPUT, "d_state": D_STATE, "key": jr.key(0)} | CELLS[name][1]
    with pytest.raises(ValueError, match=message) as error:
        cls(**good | arguments)
    assert cls.__name__ in str(error.value)


BAD_INPUTS = {
    "width": (jnp.zeros((T, D_INPUT + 1)), "`x` has shape (9, 5), expected [..., 4]"),
    "state first": (jnp.zeros(D_STATE), "`cell(state, x)`"),
    "scalar": (jnp.zeros(()), "`x` has shape ()"),
    "tokens": (jnp.zeros(D_INPUT, jnp.int32), "embed them"),
    "complex": (jnp.zeros(D_INPUT, complex), "`x` is complex128"),
}


@each_cell
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_refuses_inputs(name, case):
    x, message = BAD_INPUTS[case]
    cell = make(name)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        cell(cell.init_state(), x)
    assert type(cell).__name__ in str(error.value)


def test_a_backbone_of_its_own_width_and_a_time_for_each_step():
    cell = CfCCell(D_INPUT, D_STATE, d_backbone=5, dt="input", key=jr.key(0))
    rng = np.random.default_rng(0)
    xs, state = rng.normal(size=(T, D_INPUT)), rng.normal(size=D_STATE)
    xs[:, -1] = rng.exponential(size=T)
    assert [g.shape for g in cell.gates(jnp.asarray(xs))] == [(T, 5), (T, D_STATE)]
    wanted = reference.cfc(reference.parameters(cell), xs, state)
    assert_close(run(cell, jnp.asarray(state), jnp.asarray(xs)), wanted)


def test_registry_lists_what_there_is():
    with pytest.raises(ValueError, match=r"unknown cell 's4d'.*elman.*slstm"):
        pararnn.make_cell("s4d", 4, key=jr.key(0))
    with pytest.raises(ValueError, match=r"unknown cell \['gru'\]"):
        pararnn.make_cell(["gru"], 4, key=jr.key(0))  # pyright: ignore
    with pytest.raises(ValueError, match="no option bias; there are heads, dtype"):
        pararnn.make_cell("gru", 4, key=jr.key(0), bias=False)
    cells = {
        value
        for value in vars(pararnn.cells).values()
        if isinstance(value, type) and issubclass(value, pararnn.AbstractCell)
    }
    assert cells - {pararnn.AbstractCell} == set(pararnn.CELLS.values())
    with pytest.raises(TypeError, match="does not support item assignment"):
        pararnn.CELLS["mine"] = ElmanCell  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize("name", pararnn.CELLS)
def test_registry_makes_what_the_class_makes(name):
    cls = pararnn.CELLS[name]
    assert eqx.tree_equal(
        pararnn.make_cell(name, D_INPUT, D_STATE, key=jr.key(3), dtype="float32"),
        cls(D_INPUT, D_STATE, key=jr.key(3), dtype="float32"),  # pyright: ignore
    )
    assert pararnn.make_cell(name, D_INPUT, key=jr.key(3)).d_state == D_INPUT
