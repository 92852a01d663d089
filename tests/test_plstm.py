"""pLSTM on sequences and on images."""

import functools as ft
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.test_util import check_grads

from linear.matrix._plstm import PLSTM
from linear.matrix._plstm_grid import PLSTMGrid
from tests import linear_reference
from tests.helpers import assert_close, decoded, in_two_parts, whole
from tests.numpy_reference import parameters, sigmoid

D_MODEL, T, HEADS, K, V = 6, 11, 2, 3, 2
SIZES = {"heads": HEADS, "d_key": K, "d_value": V}
MODES = ("P", "D")


def awake(module):
    """Give the gates values that are neither closed nor constant, unlike initially."""

    def draw(path, v):
        name = jax.tree_util.keystr(path)
        if name in (".W_q", ".W_k", ".W_v", ".W_out"):
            return v
        values = np.random.default_rng(list(name.encode())).normal(size=v.shape)
        return jnp.asarray(values * (0.1 if name in (".W_t", ".b_t") else 1), v.dtype)

    arrays, static = eqx.partition(module, eqx.is_array)
    return eqx.combine(jax.tree_util.tree_map_with_path(draw, arrays), static)


# On sequences.


def sequence_layer(**arguments):
    return awake(PLSTM(D_MODEL, **SIZES | {"key": jr.key(0)} | arguments))


def sequence_problem():
    rng = np.random.default_rng(0)
    return rng.normal(size=(T, D_MODEL)), rng.normal(size=(HEADS, K, V))


@pytest.mark.parametrize("runner", [whole, decoded, in_two_parts])
@pytest.mark.parametrize("start", ["fresh", "state", "reset"])
def test_equals_the_equations(runner, start):
    layer, (xs, state) = sequence_layer(), sequence_problem()
    reset, given = None, jnp.asarray(state)
    if start == "fresh":
        given, state = None, np.zeros_like(state)
    if start == "reset":
        reset = np.zeros(T, bool)
        reset[[0, 4, 5, T - 2]] = True
    wanted = linear_reference.plstm(parameters(layer), xs, state, reset)
    got = runner(
        layer, jnp.asarray(xs), given, None if reset is None else jnp.asarray(reset)
    )
    assert_close(got, wanted)


def test_long_sequence():
    """Long enough for the chunkwise form of the derivative."""
    layer = sequence_layer()
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(70, D_MODEL)))

    @eqx.filter_jit
    @eqx.filter_grad
    def grad(layer, runner):
        ys, state = runner(layer, xs)
        return jnp.sum(ys**2) + jnp.sum(state**2)

    by_scan, by_steps = (grad(layer, runner) for runner in (whole, decoded))
    for path, v in jax.tree.leaves_with_path(by_scan):
        assert np.all(np.isfinite(v)) and np.any(v), jax.tree_util.keystr(path)
    assert_close(by_scan, by_steps, 1e-9)
    wanted = linear_reference.plstm(
        parameters(layer), np.asarray(xs), np.zeros((HEADS, K, V))
    )
    assert_close(whole(layer, xs), wanted)


def test_a_step_reads_its_past_and_itself():
    layer, (xs, _) = sequence_layer(), sequence_problem()
    shut = eqx.tree_at(
        lambda f: (f.W_m, f.b_m),
        layer,
        (jnp.zeros_like(layer.W_m), jnp.full_like(layer.b_m, -1e4)),
    )
    closed = eqx.tree_at(
        lambda f: (f.W_d, f.b_d),
        layer,
        (jnp.zeros_like(layer.W_d), jnp.full_like(layer.b_d, -1e4)),
    )
    jacobian = eqx.filter_jit(
        lambda f: jax.jacobian(lambda xs: f(xs)[0])(jnp.asarray(xs))
    )
    reached = np.any(jacobian(shut), (1, 3))
    np.testing.assert_array_equal(reached, np.eye(T, dtype=bool))
    reached = np.any(jacobian(closed), (1, 3))
    np.testing.assert_array_equal(reached[1:], np.tri(T, dtype=bool)[1:])
    assert not np.any(whole(closed, jnp.asarray(xs))[0][0])


def test_sequence_start():
    p = parameters(PLSTM(8, heads=4, key=jr.key(0)))
    np.testing.assert_allclose(p.b_t, [3, 4, 5, 6])
    assert np.all(p.b_s == -4) and np.all(p.b_m == -4) and np.all(p.b_d == -6)
    assert p.W_q.shape == p.W_k.shape == p.W_v.shape == (8, 8)
    assert PLSTM(8, heads=4, key=jr.key(0)).init_state().shape == (4, 2, 2)


def test_no_steps():
    layer, (xs, state) = sequence_layer(), sequence_problem()
    ys, last = whole(layer, jnp.asarray(xs[:0]), jnp.asarray(state))
    assert ys.shape == (0, D_MODEL)
    np.testing.assert_array_equal(last, state)


DTYPES = pytest.mark.parametrize(
    "parameters_dtype, inputs, state",
    [
        ("float32", "float32", "float32"),
        ("float32", "float64", "float32"),
        ("bfloat16", "bfloat16", "float32"),
        ("float64", "bfloat16", "float64"),
    ],
)


@DTYPES
def test_sequence_dtypes(parameters_dtype, inputs, state):
    layer = sequence_layer(dtype=jnp.dtype(parameters_dtype))
    xs = jnp.ones((T, D_MODEL), inputs)
    assert layer.init_state().dtype == jnp.dtype(state)
    for runner in (whole, decoded):
        ys, last = eqx.filter_eval_shape(runner, layer, xs)
        assert (ys.dtype, last.dtype) == (jnp.dtype(inputs), jnp.dtype(state))


# On images.

HEIGHT, WIDTH = 4, 5
FLIPS = ((), (0,), (1,), (0, 1))
OF_EACH_DIRECTION = ("W_s", "W_m", "W_t", "W_a", "b_s", "b_m", "b_t", "b_a")

each_mode = pytest.mark.parametrize("mode", MODES)
run = eqx.filter_jit(lambda layer, image: layer(image))


def image_layer(mode, **arguments):
    defaults = {"mode": mode, "key": jr.key(0)}
    return awake(PLSTMGrid(D_MODEL, **SIZES | defaults | arguments))


def an_image(height=HEIGHT, width=WIDTH):
    return np.random.default_rng(0).normal(size=(height, width, D_MODEL))


def with_gates(layer, choose):
    """The layer with other gates in each direction."""

    def gates(layer):
        named = (getattr(layer, name) for name in OF_EACH_DIRECTION)
        return [v for v in named if v is not None]

    return eqx.tree_at(gates, layer, [choose(v) for v in gates(layer)])


def one_direction(layer, i):
    one = PLSTMGrid(D_MODEL, **SIZES, mode=layer.mode, directions=1, key=jr.key(0))
    shared = ("W_q", "W_k", "W_v", "W_d", "b_d", "norm_weight", "W_out")
    one = eqx.tree_at(
        lambda f: [getattr(f, name) for name in shared],
        one,
        [getattr(layer, name) for name in shared],
    )
    gates = [n for n in OF_EACH_DIRECTION if getattr(layer, n) is not None]
    return eqx.tree_at(
        lambda f: [getattr(f, name) for name in gates],
        one,
        [getattr(layer, name)[i : i + 1] for name in gates],
    )


def by_the_equations(layer, image):
    """The equations of the layer's docstring, direction by direction."""
    p = parameters(layer)
    height, width, _ = image.shape
    cells = (height, width, p.heads)

    def features(weight):
        return (image @ weight.T).reshape(*cells, -1)

    def affine(weight, bias):
        """`[..., H, W, heads]`."""
        values = np.einsum("...hd,ijd->...ijh", weight, image)
        return values + bias[..., None, None, :]

    q, k, v = features(p.W_q), features(p.W_k), features(p.W_v)
    direct = sigmoid(affine(p.W_d, p.b_d))
    total = direct[..., None] * np.sum(q * k, -1, keepdims=True) * v / np.sqrt(K)
    for i in range(p.directions):
        decay = np.tanh(5 * affine(p.W_t[i], p.b_t[i]))
        if p.mode == "P":
            alpha, (gamma,) = sigmoid(affine(p.W_a[i], p.b_a[i])), decay
            transitions = [gamma * alpha] * 2 + [gamma * (1 - alpha)] * 2
        else:
            rl, ru, du = decay
            transitions = [rl, ru, np.zeros_like(rl), du]
        source_and_mark = (p.W_s, p.b_s), (p.W_m, p.b_m)
        gates = [sigmoid(affine(w[i], b[i])) for w, b in source_and_mark]
        flip = ft.partial(np.flip, axis=FLIPS[i])
        out = linear_reference.plstm_grid(
            *(flip(u) for u in (q, k, v)),
            *(np.stack([flip(u) for u in pair]) for pair in gates),
            np.zeros(cells),
            *(flip(u) for u in transitions),
        )
        total = total + flip(out)
    normed = linear_reference.rms(total, p.norm_weight)
    return normed.reshape(height, width, -1) @ p.W_out.T


@each_mode
@pytest.mark.parametrize("directions", [1, 4])
@pytest.mark.parametrize("height, width", [(HEIGHT, WIDTH), (1, 4), (4, 1), (1, 1)])
def test_image_equals_the_equations(mode, directions, height, width):
    layer, image = image_layer(mode, directions=directions), an_image(height, width)
    assert_close(run(layer, jnp.asarray(image)), by_the_equations(layer, image))


@each_mode
def test_flips_permute_directions(mode):
    layer, image = image_layer(mode), jnp.asarray(an_image())
    straight = np.asarray(run(layer, image))
    for axis, order in ((0, [1, 0, 3, 2]), (1, [2, 3, 0, 1])):
        permuted = with_gates(layer, lambda v: v[np.array(order)])
        flipped = jnp.flip(run(permuted, jnp.flip(image, axis)), axis)
        assert_close(flipped, straight, 1e-12)
        # Without permuted gates it does not hold.
        unpermuted = jnp.flip(run(layer, jnp.flip(image, axis)), axis)
        assert np.max(np.abs(unpermuted - straight)) > 1e-2


@each_mode
def test_directions_differ(mode):
    """Even with the same gates."""
    layer, image = image_layer(mode), jnp.asarray(an_image())
    one = one_direction(layer, 0)
    views = [jnp.flip(run(one, jnp.flip(image, axes)), axes) for axes in FLIPS]
    for i in range(4):
        for j in range(i):
            assert np.max(np.abs(views[i] - views[j])) > 1e-2


@each_mode
def test_what_a_cell_sees(mode):
    at = (2, 1)
    layer, image = image_layer(mode), jnp.asarray(an_image())

    @eqx.filter_jit
    def seen(layer):
        gradient = jax.jacobian(lambda image: layer(image)[at])(image)
        return jnp.any(gradient, (0, -1))

    rows, columns = np.indices((HEIGHT, WIDTH))
    above = (rows <= at[0]) & (columns <= at[1])
    np.testing.assert_array_equal(seen(one_direction(layer, 0)), above)
    np.testing.assert_array_equal(seen(layer), np.ones((HEIGHT, WIDTH), bool))


@each_mode
def test_image_gradients(mode):
    layer, image = image_layer(mode), jnp.asarray(an_image(2, 3))

    @eqx.filter_jit
    def loss(layer):
        return jnp.sum(layer(image) ** 2)

    gradient = eqx.filter_jit(eqx.filter_grad(loss))(layer)
    for path, v in jax.tree.leaves_with_path(gradient):
        assert np.all(np.isfinite(v)) and np.any(v), jax.tree_util.keystr(path)
    arrays, static = eqx.partition(layer, eqx.is_array)
    check_grads(
        jax.jit(lambda arrays: loss(eqx.combine(arrays, static))),
        (arrays,),
        order=1,
        modes=("rev",),
        rtol=1e-5,
    )


@each_mode
def test_image_start(mode):
    p = parameters(PLSTMGrid(16, heads=5, mode=mode, d_key=3, d_value=2, key=jr.key(0)))
    assert np.all(p.b_s == -4) and np.all(p.b_m == -4) and np.all(p.b_d == -6)
    assert np.all(p.b_t == 1) and p.b_t.shape == (4, 1 if mode == "P" else 3, 5)
    if mode == "P":
        np.testing.assert_allclose(p.b_a, np.tile([-2, -1, 0, 1, 2], (4, 1)))
        assert not np.any(p.W_a)
    else:
        assert p.W_a is None and p.b_a is None
    one = PLSTMGrid(4, mode="P", key=jr.key(0))
    assert not np.any(one.b_a), "a single head runs along the diagonal"


@each_mode
@DTYPES
def test_image_dtypes(mode, parameters_dtype, inputs, state):
    layer = image_layer(mode, dtype=jnp.dtype(parameters_dtype))
    image = jnp.asarray(an_image()).astype(inputs)
    assert eqx.filter_eval_shape(layer, image).dtype == jnp.dtype(inputs)


def test_image_in_16_bits():
    layer, image = image_layer("P", dtype=jnp.bfloat16), an_image()
    image = jnp.asarray(image, jnp.bfloat16)
    wanted = by_the_equations(layer, np.asarray(image, float))
    assert_close(run(layer, image).astype(float), wanted, 2e-2)


def test_image_batch():
    layer, image = image_layer("P"), jnp.asarray(an_image())
    batch = jnp.stack([image, -image])
    out = eqx.filter_jit(jax.vmap(layer))(batch)
    for got, image in zip(out, batch, strict=True):
        assert_close(got, run(layer, image), 1e-13)


@pytest.mark.parametrize("height, width", [(0, 0), (0, 3), (3, 0)])
def test_empty_image(height, width):
    out = run(image_layer("P"), jnp.asarray(an_image(height, width)))
    assert out.shape == (height, width, D_MODEL)


BAD_ARGUMENTS = {
    "zero model": ({"d_model": 0}, "`d_model` must be a positive integer, got 0"),
    "heads": ({"heads": 4, "d_key": None}, "not divisible by `heads` = 4"),
    "float key": ({"d_key": 1.5}, "`d_key` must be a positive integer"),
    "no key": ({"key": None}, "`key` must be .* got None"),
    "dtype": ({"dtype": jnp.int32}, "`dtype` must be .* got int32"),
}
BAD_IMAGE_ARGUMENTS = {
    "mode": ({"mode": "p"}, "unknown `mode` 'p'; there are P, D"),
    "directions": ({"directions": 2}, "`directions` must be 1 or 4, got 2"),
    "bool directions": ({"directions": True}, "`directions` must be .* got True"),
}


@pytest.mark.parametrize(
    "cls, arguments, message",
    [
        pytest.param(cls, *case, id=f"{cls.__name__}-{name}")
        for cls, cases in (
            (PLSTM, BAD_ARGUMENTS),
            (PLSTMGrid, BAD_ARGUMENTS | BAD_IMAGE_ARGUMENTS),
        )
        for name, case in cases.items()
    ],
)
def test_refuses_arguments(cls, arguments, message):
    arguments = {"d_model": D_MODEL, **SIZES, "key": jr.key(0)} | arguments
    with pytest.raises(ValueError, match=message) as error:
        cls(**arguments)
    assert cls.__name__ in str(error.value)


BAD_CALLS = {
    "sequence batch": (PLSTM, (2, T, D_MODEL), float, "use `jax.vmap`"),
    "tokens": (PLSTM, (T, D_MODEL), int, "embed them"),
    "image batch": (PLSTMGrid, (2, 4, 4, D_MODEL), float, "use `jax.vmap`"),
    "channels first": (PLSTMGrid, (D_MODEL, 4, 4), float, "channels come last"),
    "patches": (PLSTMGrid, (16, D_MODEL), float, "reshape them to rows"),
    "pixels": (PLSTMGrid, (4, 4, D_MODEL), np.uint8, "`image` is uint8"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_refuses_calls(case):
    cls, shape, dtype, message = BAD_CALLS[case]
    layer = cls(D_MODEL, **SIZES, key=jr.key(0))
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(jnp.zeros(shape, dtype))
