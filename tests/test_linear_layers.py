"""Every layer against its equations, and what all layers promise."""

import functools
import math
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

import linear
import tests.numpy_reference as reference
from linear import _windows as windows
from pararnn.scan import _heuristics as choose
from tests.helpers import assert_close, decoded, in_two_parts, whole
from tests.layers import D_MODEL, ROWS, disturbed, make, random_state

T = 40  # Long enough for chunkwise derivatives.
PARTS = ("steps", "two parts", "windows")
RESETS = np.isin(np.arange(T), [0, 4, 5, 20, T - 2])
each_layer = pytest.mark.parametrize("name", ROWS)


@functools.cache
def problem(name):
    layer = disturbed(make(name))
    xs = np.random.default_rng(2).normal(size=(T, D_MODEL))
    return layer, jnp.asarray(xs), random_state(layer)


def in_steps(layer, xs, state, reset):
    def step(state, at_t):
        x, reset = at_t
        ys, state = layer(x[None], state, reset=reset[None])
        return state, ys[0]

    state, ys = lax.scan(step, state, (xs, reset))
    return ys, state


def in_windows(layer, xs, state, reset=None):
    """Run as if `xs` were long: three windows and a rest. Call it while tracing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_WINDOWED_FROM", 1)
        patch.setattr(windows, "_WINDOW", 12)
        patch.setattr(windows, "_MIN_WINDOW", 12)
        patch.setattr(windows, "_NUMBERS_PER_WINDOW", 1)
        return layer(xs, state, reset=reset)


@each_layer
def test_equals_the_equations(name):
    layer, xs, state = problem(name)
    reset = jnp.asarray(RESETS)

    @eqx.filter_jit
    def run(layer, xs, state, reset):
        return {
            "fresh": layer(xs),
            "continued": layer(xs, state),
            "decoded": decoded(layer, xs, state),
            "reset": layer(xs, state, reset=reset),
            "reset in steps": in_steps(layer, xs, state, reset),
            "reset in two parts": in_two_parts(layer, xs, state, reset),
            "reset in windows": in_windows(layer, xs, state, reset),
            "reversed": layer(xs, state, reset=reset, reverse=True),
        }

    def loop(xs, state, reset=None):
        state = jax.tree.map(np.asarray, state)
        return ROWS[name].reference(reference.parameters(layer), xs, state, reset)

    got, xs = run(layer, xs, state, reset), np.asarray(xs)
    assert_close(got["fresh"], loop(xs, layer.init_state()))
    for case in ("continued", "decoded"):
        assert_close(got[case], loop(xs, state))
    for case in ("reset", *(f"reset in {parts}" for parts in PARTS)):
        assert_close(got[case], loop(xs, state, RESETS))
    # In reverse, a sequence starts at the step before the first one of the next.
    ends = np.append(RESETS[1:], False)[::-1]
    ys, last = loop(xs[::-1], state, ends)
    assert_close(got["reversed"], (ys[::-1], last))


GRADIENTS = [
    *((name, whole) for name in ROWS),
    *((name, in_windows) for name in ("lru", "mamba", "s4d-scan", "deltanet", "lssl")),
]


@pytest.mark.parametrize("name, run", GRADIENTS)
def test_derivatives_by_finite_differences(name, run):
    layer, xs, state = problem(name)
    weights = np.random.default_rng(3).normal(size=(T, D_MODEL))
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)

    @jax.jit
    def gradient(arrays, xs, state):
        def loss(arrays, xs, state):
            layer = eqx.combine(arrays, static)
            ys, last = run(layer, xs, state, jnp.asarray(RESETS))
            return jnp.sum(ys * weights) + sum(
                jnp.sum(jnp.abs(v) ** 2) for v in jax.tree.leaves(last)
            )

        return jax.grad(loss, argnums=(0, 1, 2))(arrays, xs, state)

    def loop(arrays, xs, state):
        p = reference.parameters(eqx.combine(arrays, static))
        ys, last = ROWS[name].reference(p, xs, state, RESETS)
        return np.sum(ys * weights) + sum(
            np.sum(np.abs(v) ** 2) for v in jax.tree.leaves(last)
        )

    primal = jax.tree.map(np.asarray, (arrays, xs, state))
    found = jax.tree.map(np.asarray, gradient(*primal))
    fixed = ("A", "B") if name == "lssl" else ()
    for path, g in jax.tree.leaves_with_path(found[0]):
        assert np.all(np.isfinite(g)), path
        assert np.any(g) != (path[0].name in fixed), path
    for seed in range(2):
        rng = np.random.default_rng(seed)

        def direction(v):
            d = rng.normal(size=v.shape)
            return d + 1j * rng.normal(size=v.shape) if np.iscomplexobj(v) else d

        tangent = jax.tree.map(direction, primal)
        for field in fixed:
            tangent = eqx.tree_at(
                lambda t: getattr(t[0], field),
                tangent,
                replace_fn=np.zeros_like,
            )
        step = 1e-6
        ahead, behind = (
            loop(*jax.tree.map(lambda v, d: v + sign * step * d, primal, tangent))
            for sign in (1, -1)
        )
        # JAX's gradient of a complex variable is the conjugate of the field's.
        along = sum(
            np.sum(g * d).real
            for g, d in zip(
                jax.tree.leaves(found), jax.tree.leaves(tangent), strict=True
            )
        )
        np.testing.assert_allclose(along, (ahead - behind) / (2 * step), rtol=2e-6)


@each_layer
def test_no_steps_and_one(name):
    layer, xs, state = problem(name)
    ys, last = layer(xs[:0], state, reset=jnp.zeros(0, bool))
    assert ys.shape == (0, D_MODEL)
    assert_close(last, state, 0)
    one, last = eqx.filter_jit(layer)(xs[:1], state)
    y, after = eqx.filter_jit(layer.step)(xs[0], state)
    assert_close((one[0], last), (y, after), 1e-15)


@each_layer
@pytest.mark.parametrize(
    "parameters, inputs",
    [
        ("float32", "float32"),
        ("float32", "float64"),
        ("bfloat16", "bfloat16"),
        ("bfloat16", "float32"),
        ("float64", "bfloat16"),
    ],
)
def test_dtypes(name, parameters, inputs):
    layer = make(name, dtype=parameters)
    xs = jnp.zeros((T, D_MODEL), inputs)
    wide = jnp.float64 if parameters == "float64" else jnp.float32
    for fresh in jax.tree.leaves(layer.init_state()):
        assert jnp.finfo(fresh.dtype).dtype == wide
    ys, last = eqx.filter_eval_shape(lambda f, xs: f(xs), layer, xs)
    assert ys.dtype == jnp.dtype(inputs)
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype, last, layer.init_state())
    assert all(jax.tree.leaves(same))


@each_layer
def test_float32(name):
    layer, xs, state = problem(name)
    wanted, _ = eqx.filter_jit(layer)(xs, state)

    def narrow(v):
        if not eqx.is_inexact_array(v):
            return v
        return v.astype(jnp.complex64 if jnp.iscomplexobj(v) else jnp.float32)

    narrow_layer, narrow_xs, narrow_state = jax.tree.map(narrow, (layer, xs, state))
    got, _ = eqx.filter_jit(narrow_layer)(narrow_xs, narrow_state)
    assert got.dtype == jnp.float32
    assert_close(got.astype(jnp.float64), wanted, 2e-4 if name == "lssl" else 3e-5)


@each_layer
def test_batch(name):
    layer, xs, state = problem(name)
    batch = jnp.stack([xs, xs[::-1]])
    resets = jnp.stack([jnp.asarray(RESETS), jnp.zeros(T, bool)])
    ys, _ = eqx.filter_jit(jax.vmap(lambda x, r: layer(x, state, reset=r)))(
        batch, resets
    )
    run = eqx.filter_jit(lambda x, r: layer(x, state, reset=r))
    for i in range(2):
        assert_close(ys[i], run(batch[i], resets[i])[0], 1e-13)


# One row for each path through the engine; RWKV-7 both erases and decays by key.
@pytest.mark.parametrize("name", ["lru", "s4d-convolution", "rwkv7", "lssl"])
def test_derivative_of_a_batch(name, monkeypatch):
    """Staged first. With as many sequences as steps, mixed-up axes raise no error."""
    # As for matrix states of large heads: another form for the derivative.
    monkeypatch.setattr(choose, "_SMALL", 0)
    size = T
    layer, _, _ = problem(name)
    batch = jnp.asarray(np.random.default_rng(7).normal(size=(size, T, D_MODEL)))
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)

    def run(arrays, xs):
        return jnp.sin(eqx.combine(arrays, static)(xs)[0])

    def staged(arrays):
        ys = jax.jit(jax.vmap(run, (None, 0)))(arrays, batch)
        return jnp.sum(ys * jnp.arange(1.0, size + 1)[:, None, None])

    def checkpointed(arrays):
        ys = jax.checkpoint(jax.vmap(run, (None, 0)))(arrays, batch)
        return jnp.sum(ys * jnp.arange(1.0, size + 1)[:, None, None])

    def looped(arrays):
        def one(total, at_i):
            xs, weight = at_i
            return total + weight * jnp.sum(run(arrays, xs)), None

        total = jnp.zeros(())
        return lax.scan(one, total, (batch, jnp.arange(1.0, size + 1)))[0]

    wanted = jax.jit(jax.value_and_grad(looped))(arrays)
    for fn in (staged, checkpointed):
        assert_close(jax.jit(jax.value_and_grad(fn))(arrays), wanted, 1e-11)


@each_layer
def test_what_is_not_finite_stays_in_its_sequence(name):
    layer, xs, state = problem(name)
    run = eqx.filter_jit(lambda xs, state, reset: layer(xs, state, reset=reset))
    at = jnp.arange(T) == 9
    clean, _ = run(xs, state, at)
    bad, _ = run(xs.at[5, 0].set(jnp.nan), state, at)
    assert np.any(np.isnan(bad[5]))
    assert_close((bad[:5], bad[9:]), (clean[:5], clean[9:]), 1e-14)
    lost = jax.tree.map(lambda v: jnp.full_like(v, jnp.inf), state)
    afresh, _ = run(xs, lost, at)
    assert_close(afresh[9:], clean[9:], 1e-14)
    # Without a reset, or where a convolution spreads it, only later steps change.
    plain = eqx.filter_jit(layer)
    bad, _ = plain(xs.at[5, 0].set(jnp.nan), state)
    assert_close(bad[:5], plain(xs, state)[0][:5], 1e-12)
    assert np.isnan(bad[-1, 0])


BAD, AFTER = 10, 24  # A step that is not finite, and the next reset.


@each_layer
def test_derivatives_stay_in_their_sequence(name):
    """Outputs after a reset have the derivatives of these steps alone.

    Values before it that are not finite change nothing. Outputs that are themselves not
    finite have no finite derivative.
    """
    layer, xs, state = problem(name)
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)
    reset = jnp.arange(T) == AFTER

    def outputs(arrays, xs, state=None, reset=None):
        return eqx.combine(arrays, static)(xs, state, reset=reset)[0]

    def late(arrays, xs, state):
        ys = outputs(arrays, xs, state, reset)
        return jnp.sum(jnp.sin(ys[AFTER:])), ys

    def alone(arrays, xs):
        ys = outputs(arrays, xs)
        return jnp.sum(jnp.sin(ys)), ys

    def lost(arrays, xs, state):
        return jnp.sum(outputs(arrays, xs, state, reset)[AFTER - 1])

    @jax.jit
    def everything(arrays, xs, states):
        spoiled = (xs.at[BAD].set(bad) for bad in (jnp.nan, jnp.inf, xs[BAD]))
        given = jnp.stack([*spoiled]), states
        grad = jax.vmap(jax.grad(late, (0, 1, 2), has_aux=True), (None, 0, 0))
        one = jax.tree.map(lambda v: v[0], given)
        sequence = jax.grad(alone, (0, 1), has_aux=True)(arrays, xs[AFTER:])
        return grad(arrays, *given), sequence, jax.grad(lost)(arrays, *one)

    # In a batch: a sequence with a NaN, one with an infinity, and a state of NaN.
    states = jax.tree.map(lambda v: jnp.stack([v, v, jnp.full_like(v, jnp.nan)]), state)
    (found, ys), (wanted, wanted_ys), of_lost = everything(arrays, xs, states)
    for i in range(3):
        assert np.all(np.isnan(ys[i, BAD:AFTER])) or i == 1
        assert_close(ys[i, AFTER:], wanted_ys, 1e-13)
        g_arrays, g_xs, g_state = jax.tree.map(lambda v, i=i: v[i], found)
        assert_close((g_arrays, g_xs[AFTER:]), wanted, 1e-12)
        assert not np.any(g_xs[:AFTER])
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(g_state))
    assert any(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves(of_lost))


@pytest.mark.parametrize("name", ["mamba", "gated_deltanet", "block_lrnn"])
def test_second_derivatives_stay_in_their_sequence(name):
    layer, xs, _ = problem(name)
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)
    tangents = jax.tree.map(jnp.cos, arrays)

    @jax.jit
    def curvature(arrays, xs, reset):
        def loss(arrays):
            ys, _ = eqx.combine(arrays, static)(xs, reset=reset)
            return jnp.sum(jnp.sin(ys[AFTER - T :]))

        return jax.jvp(jax.grad(loss), (arrays,), (tangents,))[1]

    found = curvature(arrays, xs.at[BAD].set(jnp.nan), jnp.arange(T) == AFTER)
    wanted = curvature(arrays, xs[AFTER:], jnp.zeros(T - AFTER, bool))
    assert_close(found, wanted, 1e-11)


@each_layer
def test_construction_under_vmap(name):
    """Stacks of blocks are made with one `vmap` over keys."""
    row = ROWS[name]

    @eqx.filter_vmap
    def stack(key):
        return linear.make_layer(row.layer, D_MODEL, key=key, **row.options)

    stacked = stack(jr.split(jr.key(0), 2))
    assert all(
        leaf.shape[0] == 2
        for leaf in jax.tree.leaves(eqx.filter(stacked, eqx.is_array))
    )


BAD_CALLS = {
    "batch": (lambda f: f(jnp.zeros((2, T, D_MODEL))), ValueError, "use `jax.vmap`"),
    "one step": (lambda f: f(jnp.zeros(D_MODEL)), ValueError, "expected [T, 6]"),
    "width": (lambda f: f(jnp.zeros((T, 4))), ValueError, "`d_model` is 6"),
    "tokens": (lambda f: f(jnp.zeros((T, D_MODEL), int)), ValueError, "embed them"),
    "complex": (
        lambda f: f(jnp.zeros((T, D_MODEL), complex)),
        ValueError,
        "`xs` is complex128",
    ),
    "state": (
        lambda f: f(jnp.zeros((T, D_MODEL)), jnp.zeros(1)),
        ValueError,
        "as from `init_state()`",
    ),
    "batched state": (
        lambda f: f(
            jnp.zeros((T, D_MODEL)),
            jax.tree.map(lambda v: jnp.stack([v, v]), f.init_state()),
        ),
        ValueError,
        "same `jax.vmap`",
    ),
    "list for a reset": (
        lambda f: f(jnp.zeros((T, D_MODEL)), reset=[False] * T),
        TypeError,
        "Wrap it: `jnp.asarray(reset)`",
    ),
    "list for a state": (
        lambda f: f(jnp.zeros((T, D_MODEL)), [f.init_state()]),
        ValueError,
        "a list in place of a tuple",
    ),
    "reset's length": (
        lambda f: f(jnp.zeros((T, D_MODEL)), reset=jnp.zeros(T + 1, bool)),
        ValueError,
        f"`reset` has shape ({T + 1},)",
    ),
    "reset's dtype": (
        lambda f: f(jnp.zeros((T, D_MODEL)), reset=jnp.zeros(T, int)),
        TypeError,
        "expected bool",
    ),
    "sequence as step": (
        lambda f: f.step(jnp.zeros((T, D_MODEL)), f.init_state()),
        ValueError,
        f"`x` has shape ({T}, 6), expected [6]",
    ),
    "tokens as step": (
        lambda f: f.step(jnp.zeros(D_MODEL, int), f.init_state()),
        ValueError,
        "`x` is int64",
    ),
}


@functools.cache
def by_default(layer):
    return linear.make_layer(layer, D_MODEL, key=jr.key(0))


@pytest.mark.parametrize("layer", sorted(linear.LAYERS))
@pytest.mark.parametrize("case", BAD_CALLS)
def test_refuses_calls(layer, case):
    call, error, message = BAD_CALLS[case]
    made = by_default(layer)
    with pytest.raises(error, match=re.escape(message)) as raised:
        call(made)
    assert type(made).__name__ in str(raised.value)


# What is wrong, which layers refuse it, arguments, and a part of the message.
EVERY = tuple(linear.LAYERS)
HEADED = (
    *("deltanet", "gated_deltanet", "deltaproduct", "gated_deltaproduct"),
    *("gla", "mlstm", "plstm", "rwkv7"),
)
RINGED = ("lru", "rg_lru")
STEPPED = ("s4d", "s5", "lssl", "mamba", "mamba2")
BAD_ARGUMENTS = {
    "zero model": (EVERY, {"d_model": 0}, "`d_model` must be a positive integer, got"),
    "no model": (EVERY, {"d_model": None}, "`d_model` must be a positive integer, got"),
    "bool model": (EVERY, {"d_model": True}, "got True"),
    "no key": (EVERY, {"key": None}, "`key` must be .* got None"),
    "seed as key": (EVERY, {"key": 0}, "Pass `key=jax.random.key"),
    "two keys": (EVERY, {"key": jr.split(jr.key(0))}, "several keys"),
    "floats as key": (EVERY, {"key": np.zeros(2)}, "`key` must be a key of"),
    "unknown dtype": (EVERY, {"dtype": "no"}, "`dtype` must be .* got no"),
    "integer dtype": (EVERY, {"dtype": jnp.int32}, "`dtype` must be .* got int32"),
    "complex dtype": (EVERY, {"dtype": jnp.complex64}, "real floating point"),
    "heads": (HEADED, {"heads": 4}, "6 is not divisible by `heads` = 4"),
    "heads of mamba2": (("mamba2",), {"heads": 5}, "12 is not divisible"),
    "no heads": ((*HEADED, "mamba2"), {"heads": 0}, "`heads` must be a positive"),
    "eigenvalues": (
        ("lru", "mamba", "mamba2", "gla", "deltanet", "deltaproduct"),
        {"eigenvalues": "real"},
        "unknown `eigenvalues` 'real'; there are positive, signed",
    ),
    "float state": (
        ("lru", "s4d", "s5", "lssl", "mamba", "mamba2", "min_gru", "min_lstm"),
        {"d_state": 8.0},
        "computed with `/`",
    ),
    "steps swapped": (STEPPED, {"dt_min": 1.0}, "`dt_min` = 1.0"),
    "negative step": (STEPPED, {"dt_min": -1.0}, "logarithms"),
    "initialisation": (("s4d",), {"initialisation": "hippo"}, "lin, inv, real, legs"),
    "discretisation": (("s4d", "s5"), {"discretisation": "euler"}, "zoh, bilinear"),
    "form": (("s4d",), {"form": "fft"}, "auto, scan, convolution"),
    "odd state": (("s4d",), {"d_state": 7}, "`d_state` must be even, got 7"),
    "convolution": (
        ("deltanet", "gated_deltaproduct", "mamba", "mamba2", "mlstm"),
        {"convolution": 4},
        "must be True or False, got 4",
    ),
    "odd complex": (("mamba",), {"d_state": 7, "eigenvalues": "complex"}, "even"),
    "blocks of s5": (("s5",), {"blocks": 3, "d_state": 8}, "not divisible by 2"),
    "blocks": (("rg_lru", "block_lrnn"), {"blocks": 4}, "not divisible by `blocks`"),
    "norm": (("block_lrnn",), {"p": 0.5}, "from 1 to 16, got 0.5"),
    "radii swapped": (RINGED, {"r_min": 0.9, "r_max": 0.5}, "swapped"),
    "radius above 1": (("lru",), {"r_max": 1.5}, "`r_max` = 1.5"),
    "no phase": (("lru",), {"max_phase": 0}, "`max_phase` must be positive"),
    "no reflections": (
        ("deltaproduct", "gated_deltaproduct"),
        {"householders": 0},
        "`householders` must be a positive",
    ),
    "perturbation": (
        ("s4d", "s5"),
        {"initialisation": "ptd", "perturbation": 2.0},
        r"in \[0.01, 0.78\]",
    ),
    "text as step": (
        STEPPED,
        {"dt_min": "a"},
        "`dt_min` must be a real number, got 'a'",
    ),
    "no step": (STEPPED, {"dt_max": None}, "`dt_max` must be a real number, got None"),
    "text as radius": (RINGED, {"r_min": "a"}, "`r_min` must be a real number"),
    "array as radius": (RINGED, {"r_max": np.ones(2)}, "`r_max` must be a real number"),
    "bool as phase": (("lru",), {"max_phase": True}, "`max_phase` must be a real"),
    "text as perturbation": (
        ("s4d", "s5"),
        {"perturbation": "a"},
        "`perturbation` must",
    ),
    "text as norm": (("block_lrnn",), {"p": "a"}, "`p` must be a real number"),
    "text as spectral radius": (
        ("lrnn",),
        {"spectral_radius": "a"},
        "`spectral_radius` must be a real number",
    ),
    "text as flag": (
        ("lssl",),
        {"train_hippo": "no"},
        "`train_hippo` must be True or False, got 'no'",
    ),
    "array as choice": (("lru",), {"eigenvalues": np.ones(2)}, "unknown `eigenvalues`"),
}


@pytest.mark.parametrize(
    "layer, arguments, message",
    [
        pytest.param(layer, arguments, message, id=f"{case}-{layer}")
        for case, (layers, arguments, message) in BAD_ARGUMENTS.items()
        for layer in layers
    ],
)
def test_refuses_arguments(layer, arguments, message):
    arguments = {"d_model": D_MODEL, "key": jr.key(0)} | arguments
    with pytest.raises(ValueError, match=message):
        linear.make_layer(layer, **arguments)


def test_registry_lists_what_there_is():
    with pytest.raises(ValueError, match=r"unknown layer 'gru'.*deltanet.*s4d"):
        linear.make_layer("gru", 4, key=jr.key(0))
    with pytest.raises(ValueError, match="no option nh; there are heads, householders"):
        linear.make_layer("deltaproduct", 4, key=jr.key(0), nh=2)
    layers = {
        value
        for value in vars(linear).values()
        if isinstance(value, type) and issubclass(value, linear.AbstractLayer)
    }
    assert set(linear.LAYERS.values()) == layers - {linear.AbstractLayer}
    elsewhere = {"commutative_monoid", "lrnn"}  # test_monoid.py, test_reservoir.py
    assert {row.layer for row in ROWS.values()} == set(linear.LAYERS) - elsewhere


@pytest.mark.parametrize(
    "name", ["unitary", "block_lrnn", "lssl", "commutative_monoid"]
)
def test_large_steps_are_stored_for_a_window_only(name, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    layer = linear.make_layer(name, 64, dtype="float32", key=jr.key(0))
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)

    @jax.jit
    @jax.grad
    def run(given):
        ys, _ = eqx.combine(given[0], static)(given[1])
        return jnp.sum(ys**2)

    def memory(steps):
        xs = jax.ShapeDtypeStruct((steps, 64), jnp.float32)
        return run.lower((arrays, xs)).compile().memory_analysis().temp_size_in_bytes

    window = windows._NUMBERS_PER_WINDOW // layer.numbers_per_step()
    grown = (memory(8 * window) - memory(4 * window)) / (4 * window) / 4
    # In numbers a step: of thousands, only the gradient of the inputs remains.
    assert grown < 2 * 64 < layer.numbers_per_step() / 16, grown


EXTREMES = [
    *(("mamba", "A_log", 100), ("mamba-complex", "A_log", 100)),
    *(("mamba2", "A_log", 200), ("gated_deltanet", "A_log", 200)),
    *(("lru", "nu_log", 200), ("lru-signed", "nu_log", 200)),
    *(("s4d-scan", "log_A_real", 200), ("s4d-convolution", "log_A_real", -200)),
    *(("s5", "log_A_real", 200), ("s5", "log_A_real", -50)),
]


@pytest.mark.parametrize("name, field, value", EXTREMES)
def test_rates_beyond_floating_point(name, field, value):
    """Values and derivatives are finite at a rate so extreme that decays are 0 or 1.

    Except for the derivative of the rate itself, they equal those at a rate that is as
    extreme but representable.
    """
    layer, T = make(name, dtype="float32"), 12
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(T, D_MODEL)), jnp.float32)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def run(layer):
        return jnp.sum(layer(xs)[0] ** 2)

    def put(value):
        rates = getattr(layer, field)
        changed = rates.reshape(-1).at[0].set(value).reshape(rates.shape)
        return eqx.tree_at(lambda layer: getattr(layer, field), layer, changed)

    got, wanted = run(put(value)), run(put(math.copysign(20, value)))
    for v in jax.tree.leaves(got):
        assert np.all(np.isfinite(v))
    assert_close(got, wanted, 1e-4)
