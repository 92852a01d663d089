"""Initialisations of layers, and the equalities that theory predicts."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import linear
import tests.linear_reference as linear_reference
import tests.numpy_reference as reference
from linear import LRU, S4D, perturb_then_diagonalise
from linear.parts import decay, share
from pararnn import Bidirectional, matrix_scan
from tests.layers import disturbed


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
    # Flipped signs in the bilinear rule invert it: the distance from 1 is that of the
    # exponential, to first order.
    layer = eqx.tree_at(lambda s: s.log_dt, layer, jnp.full(3, np.log(1e-6)))
    decay = -np.exp(np.asarray(layer.log_A_real)) * 1e-6
    np.testing.assert_allclose(np.log(np.abs(layer.transition())), decay, rtol=1e-6)


def test_s4d_kernel_is_its_impulse_response():
    layer = S4D(3, 8, key=jr.key(0))
    xs = np.random.default_rng(0).normal(size=(11, 3))
    kernel = eqx.filter_jit(lambda layer: layer.kernel(11))(layer)
    direct = np.stack(
        [sum(kernel[lag] * xs[t - lag] for lag in range(t + 1)) for t in range(11)]
    )
    wanted = reference.s4d_by_convolution(reference.parameters(layer), xs)
    np.testing.assert_allclose(direct + np.asarray(layer.D) * xs, wanted, rtol=1e-10)


@pytest.mark.parametrize("size", [16, 32, 64, 256])
@pytest.mark.parametrize("perturbation", [0.01, 0.1, 0.5])
def test_perturbed_hippo(size, perturbation):
    A, _ = reference_legs(size)
    found = perturb_then_diagonalise(size, perturbation)
    assert np.max(found.eigenvalues.real) <= -0.5 + 1e-6
    assert np.min(found.eigenvalues.imag) > 0
    assert found.condition < 3 / perturbation
    # The recombined pairs are a matrix at that distance from HiPPO, in the 2-norm.
    V, inverse = found.vectors, found.inverse
    matrix = 2 * np.real(V * found.eigenvalues[None] @ inverse)
    distance = np.linalg.norm(matrix - A, 2) / np.linalg.norm(A, 2)
    np.testing.assert_allclose(distance, perturbation, rtol=1e-6)
    np.testing.assert_allclose(inverse @ V, np.eye(size // 2), atol=1e-9)


def reference_legs(size):
    A = np.zeros((size, size))
    for n in range(size):
        for k in range(n):
            A[n, k] = -np.sqrt((2 * n + 1) * (2 * k + 1))
        A[n, n] = -(n + 1)
    return A, np.sqrt(2 * np.arange(size) + 1.0)


def test_perturbed_hippo_wants_pairs():
    with pytest.raises(ValueError, match="leaves real eigenvalues"):
        perturb_then_diagonalise(2, 0.01)


@pytest.mark.parametrize("discretisation", ["zoh", "bilinear"])
@pytest.mark.parametrize("initialisation", ["legs", "ptd"])
def test_s5_is_stable(initialisation, discretisation):
    layer = linear.S5(
        4,
        64,
        blocks=2,
        initialisation=initialisation,
        discretisation=discretisation,
        key=jr.key(0),
    )
    assert np.all(np.abs(layer.transition()) < 1)
    # A real sequence of real states, in the basis of the eigenvectors: y is real.
    assert np.all(np.isfinite(layer.B_re)) and np.any(layer.B_im)


def test_lssl_starts_from_hippo():
    layer = linear.LSSL(3, 8, key=jr.key(0))
    A, B = reference_legs(8)
    np.testing.assert_allclose(layer.A, A)
    np.testing.assert_allclose(layer.B, B)
    size = np.abs(np.linalg.eigvals(layer.discretise()[0]))
    assert np.all(size < 1)


def test_rg_lru_starts_with_a_long_memory():
    layer = linear.RGLRU(4000, blocks=4000, key=jr.key(0))
    a = np.exp(-np.logaddexp(0, np.asarray(layer.Lambda)))
    assert a.min() >= 0.9 and a.max() <= 0.999
    # Uniform in its square.
    assert 0.45 < np.mean(a**2 < (0.9**2 + 0.999**2) / 2) < 0.55


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_decays_near_one_keep_their_digits(dtype):
    log_a = -np.logspace(-8, 1.9, 500).astype(dtype)
    a, rest = jax.jit(decay)(log_a)
    slope = jax.jit(jax.grad(lambda v: jnp.sum(decay(v)[1])))(log_a)
    eps = jnp.finfo(dtype).eps
    np.testing.assert_allclose(a, np.exp(log_a.astype(float)), rtol=100 * eps)
    wanted = -np.expm1(2 * log_a.astype(float))
    np.testing.assert_allclose(rest, wanted, rtol=8 * eps)
    slopes = -2 * np.exp(2 * log_a.astype(float))
    np.testing.assert_allclose(slope, slopes, rtol=32 * eps, atol=32 * eps)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shares_of_gates_that_underflow(dtype):
    logits = np.array([-2000, -300, -95, -20, -1, 0, 2, 40, 300, 2000], dtype)
    u, w = (v.ravel() for v in np.meshgrid(logits, logits))
    forget, enter = jax.jit(share)(u, w)
    # The log of f / i; the share is its logistic function.
    ratio = np.logaddexp(0, -w.astype(float)) - np.logaddexp(0, -u.astype(float))
    never = np.full_like(logits, -np.inf)
    shut, whole = np.zeros_like(logits), np.ones_like(logits)
    np.testing.assert_array_equal(share(never, logits), (shut, whole))
    np.testing.assert_array_equal(share(logits, never), (whole, shut))
    eps, tiny = jnp.finfo(dtype).eps, jnp.finfo(dtype).tiny
    for got, sign in ((forget, 1), (enter, -1)):
        wanted = np.exp(-np.logaddexp(0, -sign * ratio))
        np.testing.assert_allclose(got, wanted, rtol=200 * eps, atol=tiny)
    slope = jax.jit(jax.grad(lambda u, w: jnp.sum(share(u, w)[0])))(u, w)
    # d(f / (f + i)) / du is f i / (f + i)^2 times 1 - sigmoid(u).
    wanted = np.exp(
        -np.logaddexp(0, -ratio) - np.logaddexp(0, ratio) - np.logaddexp(0, u)
    )
    np.testing.assert_allclose(slope, wanted, rtol=400 * eps, atol=eps)


@pytest.mark.parametrize("name, bias", [("mamba", "b_dt"), ("mamba2", "dt_bias")])
def test_step_sizes_start_log_uniform(name, bias):
    options = {"heads": 128} if name == "mamba2" else {}
    layer = linear.make_layer(name, 1024, key=jr.key(0), d_state=2, **options)
    dt = np.logaddexp(0, np.asarray(getattr(layer, bias)))
    assert dt.min() >= 1e-3 * (1 - 1e-6) and dt.max() <= 1e-1 * (1 + 1e-6)
    assert 0.35 < np.mean(dt < 1e-2) < 0.65


def test_mamba_starts_from_whole_numbers():
    layer = linear.Mamba(4, 16, key=jr.key(0))
    np.testing.assert_allclose(
        np.exp(layer.A_log), np.tile(np.arange(1, 17), (8, 1)), rtol=1e-12
    )
    np.testing.assert_array_equal(layer.D, 1)


def test_mamba2_decays_start_in_range():
    A = np.exp(linear.Mamba2(256, heads=512, key=jr.key(0)).A_log)
    assert A.min() >= 1 and A.max() <= 16 and 7.5 < A.mean() < 9.5


def test_mlstm_gates_start_open():
    layer = linear.MLSTM(8, heads=4, key=jr.key(0))
    np.testing.assert_allclose(layer.b_f, [3, 4, 5, 6])
    assert not np.any(layer.W_i) and not np.any(layer.W_f)


@pytest.mark.parametrize(
    "eigenvalues, least", [("positive", 0), ("signed", -1), ("complex", None)]
)
def test_lru_eigenvalues_are_where_they_are_asked_for(eigenvalues, least):
    layer = LRU(3, 200, eigenvalues=eigenvalues, key=jr.key(0))
    values = np.asarray(layer.transition())
    assert np.all(np.abs(values) < 1) and np.iscomplexobj(values) == (least is None)
    if least is not None:
        assert np.all(values > least) and np.any(values < 0) == (least < 0)


def problem(steps=50, d_model=6):
    return jnp.asarray(np.random.default_rng(5).normal(size=(steps, d_model)))


def test_gated_deltanet_that_forgets_nothing_is_deltanet():
    gated = linear.GatedDeltaNet(6, heads=2, d_value=3, key=jr.key(0))
    gated = eqx.tree_at(lambda m: m.A_log, gated, jnp.full(2, -jnp.inf))
    plain = linear.DeltaNet(6, heads=2, key=jr.key(1))
    for name in ("W_q", "W_k", "W_v", "W_b", "conv_q", "conv_k", "conv_v"):
        plain = eqx.tree_at(lambda m: getattr(m, name), plain, getattr(gated, name))
    xs = problem()
    (_, a), (_, b) = (eqx.filter_jit(layer)(xs) for layer in (gated, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-15), a, b)
    assert np.any(a[-1])


@pytest.mark.parametrize("n", [2, 3])
def test_deltaproduct_is_deltanet_of_a_longer_sequence(n):
    """Substep j of a token sees the token in its own slice of a wider input."""
    d, steps = 6, 20
    product = linear.DeltaProduct(d, heads=2, householders=n, key=jr.key(0))
    # No convolution over time, which the longer sequence would do over substeps.
    newest = jnp.zeros(4).at[3].set(1)
    for name in ("conv_q", "conv_k", "conv_v"):
        product = eqx.tree_at(
            lambda m: getattr(m, name),
            product,
            replace_fn=lambda v: jnp.broadcast_to(newest, v.shape),
        )
    net = linear.DeltaNet(
        n * d, heads=2, d_key=3, d_value=3, eigenvalues="signed", key=jr.key(1)
    )
    for name in ("W_k", "W_v", "W_b"):
        wide = jnp.concatenate(list(getattr(product, name)), -1)[None]
        net = eqx.tree_at(lambda m: getattr(m, name), net, wide)
    for name in ("conv_q", "conv_k", "conv_v"):
        net = eqx.tree_at(
            lambda m: getattr(m, name),
            net,
            replace_fn=lambda v: jnp.broadcast_to(newest, v.shape),
        )
    net = eqx.tree_at(lambda m: m.W_q, net, jnp.tile(product.W_q, (1, n)))
    net = eqx.tree_at(lambda m: m.W_out, net, jnp.tile(product.W_out, (n, 1)))
    xs = problem(steps, d_model=d)
    longer = jnp.einsum("td,jk->tjkd", xs, jnp.eye(n)).reshape(steps * n, n * d)
    ys, state = eqx.filter_jit(product)(xs)
    wanted, wanted_state = eqx.filter_jit(net)(longer)
    np.testing.assert_allclose(ys, wanted[n - 1 :: n, :d], atol=1e-12)
    np.testing.assert_allclose(state[-1], wanted_state[-1], atol=1e-12)


def test_products_of_reflections_do_not_grow():
    rng = np.random.default_rng(0)
    key = rng.normal(size=(64, 1, 8))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    beta = rng.uniform(0, 2, (64, 1, 1))
    _, last = jax.jit(
        lambda k, b: matrix_scan(
            k, k * b, jnp.zeros((64, 1, 8)), read=k, initial=jnp.eye(8)[None]
        )
    )(key, beta)
    assert np.linalg.norm(last[0], 2) <= 1 + 1e-12


def test_the_erasure_acts_on_keys():
    """One published library multiplies the state on the side of the values."""
    layer = linear.DeltaNet(4, d_key=4, d_value=4, key=jr.key(0))
    xs = np.asarray(problem(12, d_model=4))
    p = reference.parameters(layer)
    state = jax.tree.map(np.asarray, layer.init_state())
    ys, _ = eqx.filter_jit(layer)(jnp.asarray(xs))
    wanted, _ = linear_reference.delta_rule(p, xs, state)
    np.testing.assert_allclose(ys, wanted, atol=1e-12)


def test_a_decay_for_each_key_that_is_one_is_a_decay_for_each_head():
    """Mamba-2 is GLA with a scalar decay."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(100, 2, n))) for n in (4, 4, 3))
    decay = jnp.asarray(rng.uniform(-1, 1, (100, 2)))
    each_key = jnp.broadcast_to(decay[..., None], k.shape)
    for form in ("recurrent", "chunkwise"):
        a, b = (
            jax.jit(lambda d: matrix_scan(q, k, v, d, form=form))(d)
            for d in (decay, each_key)
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-12), a, b)


def gated_mlstm(scale):
    layer = disturbed(linear.MLSTM(6, heads=2, key=jr.key(0)))
    return eqx.tree_at(
        lambda m: (m.W_i, m.W_f), layer, (scale * layer.W_i, scale * layer.W_f)
    )


def test_mlstm_is_the_unstabilised_one_where_that_is_finite():
    layer, xs = gated_mlstm(1.0), problem()
    ys, _ = eqx.filter_jit(layer)(xs)
    window, matrix, normaliser, _ = jax.tree.map(np.asarray, layer.init_state())
    wanted, _ = linear_reference.mlstm_unstabilised(
        reference.parameters(layer), np.asarray(xs), (window, matrix, normaliser)
    )
    # The stabilised one has an epsilon in its normaliser.
    np.testing.assert_allclose(ys, wanted, atol=1e-5 * np.max(np.abs(wanted)))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_mlstm_stays_finite(dtype):
    layer = linear.MLSTM(6, heads=2, dtype=dtype, key=jr.key(0))
    xs = problem(40).astype(dtype)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(layer):
        return jnp.sum(layer(xs)[0] ** 2)

    for gates in itertools.product((-200.0, -50.0, 0.0, 50.0, 200.0), repeat=2):
        biases = tuple(jnp.full(2, gate, dtype) for gate in gates)
        value, gradient = loss(eqx.tree_at(lambda m: (m.b_i, m.b_f), layer, biases))
        assert np.isfinite(value)
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", linear.LAYERS)
def test_bidirectional_and_packed(name):
    """Packed sequences equal the sequences alone, in both directions.

    Their first steps may be marked or not.
    """
    keys = jr.split(jr.key(0))
    both = Bidirectional(*(linear.make_layer(name, 6, key=key) for key in keys))
    xs = problem(24)
    first = jnp.arange(24) % 12 == 0

    @eqx.filter_jit
    def run(both, xs):
        marked = [both(xs, reset=reset)[0] for reset in (first, first.at[0].set(False))]
        return marked, jax.vmap(lambda xs: both(xs)[0])(xs.reshape(2, 12, -1))

    marked, alone = run(both, xs)
    for packed in marked:
        np.testing.assert_allclose(packed, alone.reshape(24, -1), atol=1e-12)


@pytest.mark.parametrize("name", linear.LAYERS)
def test_no_two_parameters_are_one_array(name):
    """Otherwise the layer could not be donated to a compiled function."""
    arrays = jax.tree.leaves(
        eqx.filter(linear.make_layer(name, 6, key=jr.key(0)), eqx.is_array)
    )
    assert len({id(v) for v in arrays}) == len(arrays)
