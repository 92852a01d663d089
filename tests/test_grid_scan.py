"""`grid_scan` against its equations, cell by cell."""

import functools as ft
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pararnn import grid_scan, matrix_scan
from tests import linear_reference
from tests.helpers import assert_close

HEADS, K, V, T = 2, 3, 2, 11
NAMES = (
    *("queries", "keys", "values", "source", "mark", "direct"),
    *("T_rl", "T_ru", "T_dl", "T_du"),
)


def grid_problem(height, width, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    cells = (height, width, HEADS)
    shapes = [(*cells, K), (*cells, K), (*cells, V), (2, *cells), (2, *cells)]
    shapes += [cells] * 5
    return {
        name: rng.normal(size=shape).astype(dtype)
        for name, shape in zip(NAMES, shapes, strict=True)
    }


def device(given):
    return {name: jnp.asarray(v) for name, v in given.items()}


scan = jax.jit(lambda given: grid_scan(**given))


def unrolled(given):
    """The equations cell by cell, differentiated by JAX."""
    q, k, v, source, mark, direct, T_rl, T_ru, T_dl, T_du = (given[n] for n in NAMES)
    height, width, heads, size = k.shape
    zeros = jnp.zeros((heads, size, v.shape[-1]))
    right, down, rows = {}, {}, []

    def times(factor, state):
        return factor[:, None, None] * state

    for i in range(height):
        row = []
        for j in range(width):
            left, above = right.get((i, j - 1), zeros), down.get((i - 1, j), zeros)
            kv = k[i, j][:, :, None] * v[i, j][:, None, :]
            own = direct[i, j] * jnp.einsum("hk,hk->h", k[i, j], q[i, j])
            seen = times(mark[0, i, j], left) + times(mark[1, i, j], above)
            row.append(jnp.einsum("hkv,hk->hv", seen, q[i, j]) + own[:, None] * v[i, j])
            right[i, j] = times(T_rl[i, j], left) + times(T_ru[i, j], above)
            right[i, j] += times(source[0, i, j], kv)
            down[i, j] = times(T_dl[i, j], left) + times(T_du[i, j], above)
            down[i, j] += times(source[1, i, j], kv)
        rows.append(jnp.stack(row))
    return jnp.stack(rows)


GRIDS = [(1, 1), (1, 5), (5, 1), (2, 2), (3, 4), (7, 5)]


@pytest.mark.optimised
@pytest.mark.parametrize("height, width", GRIDS)
def test_grid_equals_the_equations(height, width):
    given = grid_problem(height, width)
    wanted = linear_reference.plstm_grid(*(given[name] for name in NAMES))
    assert_close(scan(device(given)), wanted * np.sqrt(K))


@pytest.mark.parametrize("height, width", [(0, 0), (0, 3), (3, 0)])
def test_empty_grid(height, width):
    out = scan(device(grid_problem(height, width)))
    assert out.shape == (height, width, HEADS, V) and out.dtype == jnp.float64


@pytest.mark.parametrize(
    "height, width",
    [(1, 3), (3, 1), pytest.param(3, 4, marks=pytest.mark.optimised)],
)
def test_grid_gradients(height, width):
    given = device(grid_problem(height, width))

    def gradient(f):
        return jax.jit(jax.grad(lambda given: jnp.sum(jnp.sin(f(given)))))(given)

    got, wanted = gradient(lambda given: grid_scan(**given)), gradient(unrolled)
    assert_close(got, wanted)
    unused = [name for name in NAMES if not np.any(got[name])]
    crossing = {"T_ru", "T_dl"} | {"T_rl" if width == 1 else "T_du"}
    assert set(unused) == (crossing if 1 in (height, width) else set())


def test_grid_derivatives_by_differences():
    given = device(grid_problem(2, 2))
    check_grads(scan, (given,), order=1, modes=("fwd",), rtol=1e-6, atol=1e-6)
    check_grads(scan, (given,), order=2, modes=("rev",), rtol=1e-5, atol=1e-5)


def test_grid_batch():
    problems = [device(grid_problem(3, 4, seed)) for seed in range(2)]
    batch = jax.tree.map(lambda *v: jnp.stack(v), *problems)
    out = jax.jit(jax.vmap(lambda given: grid_scan(**given)))(batch)
    for got, given in zip(out, problems, strict=True):
        assert_close(got, scan(given), 1e-14)


@pytest.mark.parametrize("along", ["row", "column"])
def test_a_line_is_a_sequence(along):
    given = grid_problem(*((1, T) if along == "row" else (T, 1)))
    edge, transition = (0, "T_rl") if along == "row" else (1, "T_du")
    source, mark = (given[name][edge].reshape(T, HEADS) for name in ("source", "mark"))
    direct, decay = (given[name].reshape(T, HEADS) for name in ("direct", transition))
    q, k, v = (given[name].reshape(T, HEADS, -1) for name in NAMES[:3])
    past, _ = jax.jit(ft.partial(matrix_scan, emit="before"))(
        *map(jnp.asarray, (q, k * source[..., None], v, decay))
    )
    own = direct * np.sum(q * k, axis=-1)
    wanted = mark[..., None] * past + own[..., None] * v
    assert_close(scan(device(given)).reshape(T, HEADS, V), wanted)


def critical(mode, height, width):
    """What cells receive from one source in the corner, at transitions of size 1."""
    ones = jnp.ones((height, width, 1))
    source = jnp.zeros((2, height, width, 1)).at[:, 0, 0].set(1.0)
    alpha = 0.3 * ones
    transitions = {
        "P": (alpha, alpha, 1 - alpha, 1 - alpha),
        "D": (ones, ones, 0 * ones, ones),
    }[mode]
    gates = (source, jnp.ones_like(source), 0 * ones, *transitions)
    return grid_scan(*[ones[..., None]] * 3, *gates)[..., 0, 0]


@pytest.mark.optimised
def test_propagation_conserves():
    """On each diagonal, the sum is that of the source; the mean moves on a line."""
    got = np.asarray(jax.jit(lambda: critical("P", 12, 12))())
    for diagonal in range(1, 12):
        row = np.arange(diagonal + 1)
        received = got[row, diagonal - row]
        np.testing.assert_allclose(received.sum(), 2)
        # S is 1 to the right and 1 down, then 0.3 of all goes right.
        np.testing.assert_allclose(
            received @ (diagonal - row) / 2, 0.5 + 0.3 * (diagonal - 1)
        )


def test_distribution_reaches_everything():
    got = np.array(jax.jit(lambda: critical("D", 5, 7))())
    assert got[0, 0] == 0
    got[0, 0] = 1
    np.testing.assert_array_equal(got, np.ones((5, 7)))


@pytest.mark.parametrize(
    "dtypes, wanted",
    [
        (("float32", "float32"), "float32"),
        (("bfloat16", "bfloat16"), "bfloat16"),
        (("bfloat16", "float32"), "float32"),
        (("float16", "bfloat16"), "float32"),
        (("float32", "float64"), "float64"),
    ],
)
def test_grid_dtypes(dtypes, wanted):
    given = {
        name: v.astype(dtypes[name.startswith("T_")])
        for name, v in device(grid_problem(3, 4)).items()
    }
    assert jax.eval_shape(scan, given).dtype == jnp.dtype(wanted)


@pytest.mark.optimised
def test_grid_sums_in_32_bits():
    given = device(grid_problem(4, 5))
    narrow = jax.tree.map(lambda v: v.astype(jnp.bfloat16), given)
    wide = jax.tree.map(lambda v: v.astype(jnp.float64), narrow)
    got, wanted = scan(narrow), scan(wide)
    # Only the result is rounded to bfloat16.
    np.testing.assert_allclose(got.astype(float), wanted, rtol=2**-8, atol=1e-4)


@pytest.mark.optimised
def test_gradient_stores_a_row_a_row():
    def bytes_for(height):
        width, heads, size = 16, 2, 16
        cells = (height, width, heads)
        shapes = [(*cells, size)] * 3 + [(2, *cells)] * 2 + [cells] * 5
        given = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32)
            for name, shape in zip(NAMES, shapes, strict=True)
        }
        loss = jax.grad(lambda given: jnp.sum(grid_scan(**given)))
        memory = jax.jit(loss).lower(given).compile().memory_analysis()
        return memory.temp_size_in_bytes, 4 * width * heads * size * size

    (few, row), (many, _) = bytes_for(16), bytes_for(48)
    assert (many - few) / 32 < 1.2 * row


def changed(**new):
    given = device(grid_problem(3, 4))
    return lambda: grid_scan(**given | {n: f(given[n]) for n, f in new.items()})


BAD_GRIDS = {
    "batch": (changed(keys=lambda v: v[None]), ValueError, "use `jax.vmap`"),
    "sequence": (changed(values=lambda v: v[0]), ValueError, "pararnn.matrix_scan"),
    "queries": (changed(queries=lambda v: v[..., 1:]), ValueError, "`queries` has"),
    "values": (changed(values=lambda v: v[1:]), ValueError, "(3, 4, 2, 2), as `keys`"),
    "one gate": (changed(mark=lambda v: v[0]), ValueError, "`mark` has shape"),
    "gates last": (
        changed(source=lambda v: jnp.moveaxis(v, 0, -1)),
        ValueError,
        "they go in front",
    ),
    "constant": (changed(T_ru=lambda v: v[0, 0]), ValueError, "`jnp.broadcast_to`"),
    "swapped": (
        changed(direct=lambda v: jnp.swapaxes(v, 0, 1)),
        ValueError,
        "rows come first",
    ),
    "number": (changed(T_dl=lambda v: 0.5), TypeError, "`T_dl` must be an array"),
    "integers": (changed(keys=lambda v: v.astype(int)), TypeError, "got int64"),
}


@pytest.mark.parametrize("case", BAD_GRIDS)
def test_grid_refuses(case):
    call, error, message = BAD_GRIDS[case]
    with pytest.raises(error, match=re.escape(message)):
        call()
