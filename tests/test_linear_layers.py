import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

import tests.numpy_reference as reference
from linear import LRU, S4D

# name: class, further arguments, reference, shape of the state.
D_MODEL, D_STATE, T = 3, 8, 11
S4D_STATE = (D_MODEL, D_STATE // 2)
LAYERS = {
    "lru": (LRU, {}, reference.lru, (D_STATE,)),
    "lru-ring": (LRU, {"r_min": 0.9, "r_max": 0.99}, reference.lru, (D_STATE,)),
} | {
    f"s4d-{init}-{rule}": (
        S4D,
        {"initialisation": init, "discretisation": rule},
        reference.s4d,
        S4D_STATE,
    )
    for init in ("lin", "inv", "real", "legs")
    for rule in ("zoh", "bilinear")
}
S4DS = [name for name in LAYERS if name.startswith("s4d")]

each_layer = pytest.mark.parametrize("name", LAYERS)


def make(name, d_model=D_MODEL, d_state=D_STATE, **arguments):
    cls, defaults, *_ = LAYERS[name]
    return cls(d_model, d_state, **{"key": jr.key(0)} | defaults | arguments)


def problem(name):
    rng = np.random.default_rng(0)
    shape = LAYERS[name][3]
    state = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    return rng.normal(size=(T, D_MODEL)), state


def assert_close(got, wanted, rtol=1e-10):
    def check(got, wanted):
        scale = np.max(np.abs(wanted), initial=1e-300)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=rtol * scale)

    jax.tree.map(check, got, wanted)


@eqx.filter_jit
def parallel(layer, xs, state=None, reset=None):
    return layer(xs, state, reset=reset)


@eqx.filter_jit
def steps(layer, xs, state=None, reset=None):
    fresh = layer.init_state()
    reset = jnp.zeros(xs.shape[0], bool) if reset is None else reset

    def step(state, at_t):
        x, reset = at_t
        y, state = layer.step(x, jnp.where(reset, fresh, state))
        return state, y

    state, ys = lax.scan(step, fresh if state is None else state, (xs, reset))
    return ys, state


@eqx.filter_jit
def in_two_parts(layer, xs, state=None, reset=None):
    cut = T // 3
    first, second = (None, None) if reset is None else (reset[:cut], reset[cut:])
    ys, state = layer(xs[:cut], state, reset=first)
    rest, state = layer(xs[cut:], state, reset=second)
    return jnp.concatenate([ys, rest]), state


@each_layer
@pytest.mark.parametrize("runner", [parallel, steps, in_two_parts])
@pytest.mark.parametrize("start", ["fresh", "state", "reset"])
def test_equals_the_equations(name, runner, start):
    layer, (xs, state) = make(name), problem(name)
    reset = None
    if start == "fresh":
        given, state = None, np.zeros_like(state)
    else:
        given = jnp.asarray(state)
    if start == "reset":
        reset = np.zeros(T, bool)
        reset[[0, 4, 5, T - 2]] = True
    wanted = LAYERS[name][2](reference.parameters(layer), xs, state, reset)
    got = runner(
        layer, jnp.asarray(xs), given, None if reset is None else jnp.asarray(reset)
    )
    assert_close(got, wanted)


@pytest.mark.parametrize("name", S4DS)
def test_s4d_is_a_convolution(name):
    layer, (xs, _) = make(name), problem(name)
    ys, _ = parallel(layer, jnp.asarray(xs))
    wanted = reference.s4d_by_convolution(reference.parameters(layer), xs)
    assert_close(ys, wanted)
    kernel = eqx.filter_jit(lambda layer: layer.kernel(T))(layer)
    direct = np.stack(
        [sum(kernel[lag] * xs[t - lag] for lag in range(t + 1)) for t in range(T)]
    )
    assert_close(direct + np.asarray(layer.D) * xs, wanted)


@pytest.mark.parametrize("name", ["lru", "s4d-lin-zoh"])
def test_a_reset_lets_no_infinity_through(name):
    layer, (xs, state) = make(name), problem(name)
    reset = jnp.zeros(T, bool).at[0].set(True)
    got = parallel(layer, jnp.asarray(xs), jnp.full(state.shape, jnp.inf + 0j), reset)
    assert_close(got, parallel(layer, jnp.asarray(xs)), 1e-14)


@each_layer
def test_no_steps(name):
    layer, (xs, state) = make(name), problem(name)
    none = jnp.zeros(0, bool)
    ys, last = parallel(layer, jnp.asarray(xs[:0]), jnp.asarray(state), none)
    assert ys.shape == (0, D_MODEL)
    np.testing.assert_array_equal(last, state)
    _, last = parallel(layer, jnp.asarray(xs[:0]))
    np.testing.assert_array_equal(last, layer.init_state())


@each_layer
def test_fresh_state(name):
    state = make(name).init_state()
    assert state.shape == LAYERS[name][3] and state.dtype == jnp.complex128
    assert not np.any(state)


@pytest.mark.parametrize("name", ["lru", "s4d-lin-zoh", "s4d-legs-bilinear"])
@pytest.mark.parametrize(
    "parameters, inputs, state",
    [
        ("float32", "float32", "complex64"),
        ("float32", "float64", "complex64"),
        ("bfloat16", "bfloat16", "complex64"),
        ("float64", "bfloat16", "complex128"),
    ],
)
def test_dtypes(name, parameters, inputs, state):
    layer = make(name, dtype=jnp.dtype(parameters))
    xs = jnp.ones((T, D_MODEL), inputs)
    assert layer.init_state().dtype == jnp.dtype(state)
    for runner in (parallel, steps):
        ys, last = eqx.filter_eval_shape(runner, layer, xs)
        assert (ys.dtype, last.dtype) == (jnp.dtype(inputs), jnp.dtype(state))


@pytest.mark.parametrize("name", ["lru", "s4d-lin-zoh"])
def test_float32(name):
    layer, (xs, state) = make(name, dtype=jnp.float32), problem(name)
    xs, state = xs.astype(np.float32), state.astype(np.complex64)
    wanted = LAYERS[name][2](reference.parameters(layer), xs, state)
    assert_close(parallel(layer, jnp.asarray(xs), jnp.asarray(state)), wanted, 3e-6)


@pytest.mark.parametrize("name", ["lru", "s4d-lin-zoh"])
def test_batch(name):
    layer, (xs, _) = make(name), problem(name)
    batch = jnp.stack([jnp.asarray(xs), jnp.asarray(xs[::-1])])
    ys, state = jax.jit(jax.vmap(layer))(batch)
    for i in range(2):
        assert_close((ys[i], state[i]), parallel(layer, batch[i]), 1e-14)


@pytest.mark.parametrize("name", ["lru", "s4d-lin-zoh", "s4d-inv-bilinear"])
def test_every_parameter_has_a_derivative(name):
    xs = jnp.asarray(problem(name)[0])

    @eqx.filter_jit
    @eqx.filter_grad
    def grad(layer, runner):
        ys, _ = runner(layer, xs)
        return jnp.sum(ys**2)

    by_scan, by_steps = (grad(make(name), runner) for runner in (parallel, steps))
    for (path, a), b in zip(
        jax.tree.leaves_with_path(by_scan), jax.tree.leaves(by_steps), strict=True
    ):
        assert np.all(np.isfinite(a)) and np.any(a), jax.tree_util.keystr(path)
        assert_close(a, b)


@pytest.mark.parametrize("r_min, r_max, max_phase", [(0, 1, 6.28), (0.9, 0.99, 0.3)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lru_starts_in_the_ring(r_min, r_max, max_phase, dtype):
    layer = LRU(
        2,
        500,
        r_min=r_min,
        r_max=r_max,
        max_phase=max_phase,
        dtype=dtype,
        key=jr.key(3),
    )
    eigenvalues = np.asarray(layer.transition(), complex)
    size, phase = np.abs(eigenvalues), np.angle(eigenvalues) % (2 * np.pi)
    slack = 1e-6
    assert size.min() >= r_min - slack and size.max() <= r_max + slack
    assert phase.max() <= max_phase + slack
    # Uniform on the ring: half of the area inside of the radius of half the area.
    inner = np.mean(size**2 < (r_min**2 + r_max**2) / 2)
    assert 0.4 < inner < 0.6 and 0.4 < np.mean(phase < max_phase / 2) < 0.6
    gamma = np.exp(np.asarray(layer.gamma_log, float))
    assert np.all(np.isfinite(layer.gamma_log))
    np.testing.assert_allclose(gamma**2, 1 - size**2, atol=1e-6)


def legs(n):
    A, B = reference.hippo_legs_normal(len(n) * 2)
    eigenvalues, vectors = np.linalg.eig(A)
    order = np.argsort(eigenvalues.imag)[len(n) :]
    # A is normal: its eigenvectors are orthonormal, each up to its phase.
    return eigenvalues[order], np.abs(vectors[:, order].conj().T @ B)


N = 16
INITIALISATIONS = {
    "lin": lambda n: (-0.5 + 1j * np.pi * n, np.ones(len(n))),
    "inv": lambda n: (
        -0.5 + 1j * N / np.pi * (N / (2 * n + 1) - 1),
        np.ones(len(n)),
    ),
    "real": lambda n: (-(n + 1.0), np.ones(len(n))),
    "legs": legs,
}


@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_s4d_initialisation(initialisation):
    layer = S4D(2, N, initialisation=initialisation, key=jr.key(0))
    p = reference.parameters(layer)
    A, B = INITIALISATIONS[initialisation](np.arange(N // 2))
    for channel in range(2):
        got = -np.exp(p.log_A_real[channel]) + 1j * p.A_imag[channel]
        np.testing.assert_allclose(got, A, rtol=1e-10, atol=1e-10)
        got = p.B_re[channel] + 1j * p.B_im[channel]
        np.testing.assert_allclose(got, B, rtol=1e-10, atol=1e-10)


def test_s4d_random_parameters():
    layer = S4D(400, 4, dt_min=1e-3, dt_max=1e-1, key=jr.key(0))
    p = reference.parameters(layer)
    assert p.log_dt.min() >= np.log(1e-3) and p.log_dt.max() <= np.log(1e-1)
    assert 0.4 < np.mean(np.exp(p.log_dt) < 1e-2) < 0.6
    for values, variance in ((p.C_re, 0.5), (p.C_im, 0.5), (p.D, 1)):
        np.testing.assert_allclose(np.var(values), variance, rtol=0.25)


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
@pytest.mark.parametrize("initialisation", INITIALISATIONS)
def test_s4d_is_stable(initialisation, rule):
    layer = S4D(
        3,
        64,
        initialisation=initialisation,
        discretisation=rule,
        dt_max=10.0,
        key=jr.key(0),
    )
    size = np.abs(layer.transition())
    assert np.all(size < 1)
    # The signs of the bilinear rule flipped are the inverse: the distance from 1 is
    # that of the exponential, to first order.
    layer = eqx.tree_at(lambda s: s.log_dt, layer, jnp.full(3, np.log(1e-6)))
    decay = -np.exp(np.asarray(layer.log_A_real)) * 1e-6
    np.testing.assert_allclose(np.log(np.abs(layer.transition())), decay, rtol=1e-6)


BOTH = ("lru", "s4d-lin-zoh")
# What is wrong, which layers refuse it, arguments, and what the message must say.
BAD_ARGUMENTS = {
    "zero model": (BOTH, {"d_model": 0}, "`d_model` must be a positive integer, got 0"),
    "float state": (BOTH, {"d_state": 8.0}, "computed with `/`"),
    "bool model": (BOTH, {"d_model": True}, "got True"),
    "no key": (BOTH, {"key": None}, "`key` must be .* got None"),
    "seed as key": (BOTH, {"key": 0}, "Pass `key=jax.random.key"),
    "integer dtype": (BOTH, {"dtype": jnp.int32}, "`dtype` must be .* got int32"),
    "complex dtype": (BOTH, {"dtype": jnp.complex64}, "two real arrays"),
    "radii swapped": (BOTH[:1], {"r_min": 0.9, "r_max": 0.5}, "swapped"),
    "radius above 1": (BOTH[:1], {"r_max": 1.5}, "`r_max` = 1.5"),
    "no phase": (BOTH[:1], {"max_phase": 0}, "`max_phase` must be positive"),
    "odd state": (BOTH[1:], {"d_state": 7}, "`d_state` must be even, got 7"),
    "initialisation": (BOTH[1:], {"initialisation": "hippo"}, "lin, inv, real, legs"),
    "discretisation": (BOTH[1:], {"discretisation": "euler"}, "zoh, bilinear"),
    "steps swapped": (BOTH[1:], {"dt_min": 1.0}, "`dt_min` = 1.0"),
    "negative step": (BOTH[1:], {"dt_min": -1.0}, "logarithms"),
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
    with pytest.raises(ValueError, match=message) as error:
        make(name, **arguments)
    assert LAYERS[name][0].__name__ in str(error.value)


BAD_CALLS = {
    "batch": (lambda f: f(jnp.zeros((2, T, D_MODEL))), ValueError, "use `jax.vmap`"),
    "one step": (lambda f: f(jnp.zeros(D_MODEL)), ValueError, "expected [T, 3]"),
    "width": (lambda f: f(jnp.zeros((T, 4))), ValueError, "`d_model` is 3"),
    "tokens": (lambda f: f(jnp.zeros((T, D_MODEL), int)), ValueError, "embed them"),
    "complex": (
        lambda f: f(jnp.zeros((T, D_MODEL), complex)),
        ValueError,
        "`xs` is complex128",
    ),
    "state": (
        lambda f: f(jnp.zeros((T, D_MODEL)), jnp.zeros(2)),
        ValueError,
        "`state` has shape (2,)",
    ),
    "reset's length": (
        lambda f: f(jnp.zeros((T, D_MODEL)), reset=jnp.zeros(T + 1, bool)),
        ValueError,
        "`reset` has shape (12,)",
    ),
    "reset's dtype": (
        lambda f: f(jnp.zeros((T, D_MODEL)), reset=jnp.zeros(T, int)),
        TypeError,
        "expected bool",
    ),
    "sequence as step": (
        lambda f: f.step(jnp.zeros((T, D_MODEL)), f.init_state()),
        ValueError,
        "`x` has shape (11, 3), expected [3]",
    ),
    "tokens as step": (
        lambda f: f.step(jnp.zeros(D_MODEL, int), f.init_state()),
        ValueError,
        "`x` is int64",
    ),
    "step's state": (
        lambda f: f.step(jnp.zeros(D_MODEL), jnp.zeros((2, D_STATE))),
        ValueError,
        "`state` has shape (2, 8)",
    ),
}


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("case", BAD_CALLS)
def test_refuses_calls(name, case):
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=re.escape(message)):
        call(make(name))
