"""The Jacobian's structure: found from the program, and never too sparse."""

import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

import pararnn
from pararnn import Newton, Structure, jacobian_structure, solve
from pararnn.recurrence import _structure
from tests.helpers import assert_close
from tests.problems import CELLS, instance, scan

each_cell = pytest.mark.parametrize("name", CELLS)


def one_step(name):
    """A cell and the shapes of one input and one state."""
    parameters, xs, h0 = instance(name)
    return CELLS[name].f(parameters), jax.tree.map(lambda x: x[0], xs), h0


@pytest.fixture
def searches(monkeypatch):
    """One entry for each search for blocks, from an empty cache."""
    calls = []
    original = _structure.find_blocks

    def counted(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(_structure, "find_blocks", counted)
    monkeypatch.setattr(_structure, "_cache", {})
    return calls


@each_cell
def test_found_as_expected(name):
    assert repr(jacobian_structure(*one_step(name))) == CELLS[name].structure


@each_cell
def test_covers_every_derivative_that_is_not_zero(name):
    """At random points; real and imaginary parts as the structure orders them."""
    f, x, h = one_step(name)
    structure = jacobian_structure(f, x, h)
    leaves, tree = jax.tree.flatten(h)

    def ravel(h):
        parts = []
        for leaf in jax.tree.leaves(h):
            parts.append(leaf.real.reshape(-1))
            if jnp.iscomplexobj(leaf):
                parts.append(leaf.imag.reshape(-1))
        return jnp.concatenate(parts)

    def unravel(v):
        out, at = [], 0
        for leaf in leaves:
            half = v[at : at + leaf.size].reshape(leaf.shape)
            at += leaf.size
            if jnp.iscomplexobj(leaf):
                half = jax.lax.complex(half, v[at : at + leaf.size].reshape(leaf.shape))
                at += leaf.size
            out.append(half)
        return jax.tree.unflatten(tree, out)

    jacobian = jax.jit(jax.jacfwd(lambda v, x: ravel(f(unravel(v), x))))
    width = len(ravel(h))
    assert structure.width == width
    allowed = np.zeros((width + 1, width + 1), bool)
    for block in structure.blocks:
        allowed[np.ix_(block, block)] = True
    for seed in range(3):
        keys = jr.split(jr.key(seed))
        v = jr.normal(keys[0], (width,), ravel(h).dtype)
        at = jax.tree.map(lambda leaf: jr.normal(keys[1], leaf.shape, leaf.dtype), x)
        nonzero = np.asarray(jacobian(v, at)) != 0
        assert not (nonzero & ~allowed[:width, :width]).any()


@each_cell
def test_blocks_are_a_partition(name):
    structure = jacobian_structure(*one_step(name))
    members = structure.blocks[structure.blocks < structure.width]
    np.testing.assert_array_equal(np.sort(members), np.arange(structure.width))
    assert structure.size == structure.blocks.shape[1]


def test_equality_and_hash():
    diagonal, again, dense = (
        jacobian_structure(*one_step(name))
        for name in ("tanh-diagonal", "gru-diagonal", "elman")
    )
    assert diagonal == again and hash(diagonal) == hash(again)
    assert diagonal != dense and diagonal != "Diagonal"
    assert isinstance(diagonal, Structure)


# Inside transformations, where the cell closes over tracers


def seen_inside(transform, name):
    """The structure found while `transform` traces the parameters and the state."""
    seen = []
    cell = CELLS[name]
    parameters, xs, h0 = instance(name)

    def traced(parameters):
        x = jax.tree.map(lambda x: x[0], xs)
        seen.append(jacobian_structure(cell.f(parameters), x, h0))
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(parameters))

    transform(traced)(parameters)
    return {repr(s) for s in seen}


def batched(fn):
    def call(parameters):
        return jax.vmap(fn)(jax.tree.map(lambda p: jnp.stack([p, p]), parameters))

    return call


TRANSFORMS = {
    "jit": jax.jit,
    "grad": jax.grad,
    "vmap": batched,
    "jit of grad": lambda fn: jax.jit(jax.grad(fn)),
    "jit of grad of vmap": lambda fn: jax.jit(
        jax.grad(lambda p: jnp.sum(batched(fn)(p)))
    ),
    "checkpoint": lambda fn: jax.jit(jax.grad(jax.checkpoint(fn))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    "name", ["gru-diagonal", "interleaved", "index-table", "control-flow", "relu"]
)
def test_found_inside(transform, name):
    assert seen_inside(TRANSFORMS[transform], name) == {CELLS[name].structure}


@pytest.mark.parametrize("table", [jnp.array([1, 0, 3, 2])], ids=["jax array"])
def test_a_closed_over_table_is_known_under_jit(table):
    seen = []

    @jax.jit
    def trace(h):
        seen.append(repr(jacobian_structure(lambda h, x: h[table] + x, h, h)))
        return h

    trace(jnp.ones(4))
    assert seen == ["BlockDiagonal(2)"]


def test_a_traced_index_is_conservative():
    """The table could hold any index, so every state may depend on every other."""
    h, x = jnp.ones(4), jnp.ones(4)
    seen = []

    @jax.jit
    def trace(table):
        seen.append(jacobian_structure(lambda h, x: 0.5 * h[table] + x, x, h))
        xs = jnp.ones((9, 4))
        return solve(lambda h, x: 0.5 * h[table] + x, xs, h, solver=Newton()).states

    states = trace(jnp.array([1, 2, 3, 0]))
    assert [repr(s) for s in seen] == ["Dense"]
    table = np.array([1, 2, 3, 0])
    wanted = jax.jit(lambda xs: scan(lambda h, x: 0.5 * h[table] + x, xs, h))
    assert_close(states, wanted(jnp.ones((9, 4))), 1e-12)


def test_an_index_from_the_input_is_conservative():
    structure = jacobian_structure(
        lambda h, x: jnp.tanh(h).at[x].add(h[0]), jnp.asarray(1), jnp.ones(4)
    )
    assert repr(structure) == "Dense"


def test_zero_weights_do_not_sharpen_the_pattern():
    W = jnp.zeros((4, 4))
    structure = jacobian_structure(lambda h, x: W @ h + x, jnp.ones(4), jnp.ones(4))
    assert repr(structure) == "Dense"


def test_constant_and_empty_states():
    constant = jacobian_structure(lambda h, x: x, jnp.ones(4), jnp.ones(4))
    assert repr(constant) == "Diagonal"
    empty = jacobian_structure(lambda h, x: h, jnp.ones(4), jnp.ones(0))
    assert empty.width == 0 and repr(empty) == "Diagonal"


# Caching


def test_the_same_program_is_worked_out_once(searches):
    def cell(scale):
        return lambda h, x: jnp.tanh(scale * h) + x

    for scale in (jnp.ones(4), 2 * jnp.ones(4)):
        jacobian_structure(cell(scale), jnp.ones(4), jnp.ones(4))
    assert len(searches) == 1


def test_another_program_is_worked_out_again(searches):
    arguments = jnp.ones(4), jnp.ones(4)
    jacobian_structure(lambda h, x: jnp.tanh(h) + x, *arguments)
    jacobian_structure(lambda h, x: jnp.tanh(h[::-1]) + x, *arguments)
    assert len(searches) == 2


@pytest.mark.parametrize("how", ["constant", "argument of a loop"])
def test_another_index_table_is_another_program(searches, how):
    def cell(table):
        def once(h, _):
            return h[jnp.asarray(table)], None

        if how == "constant":
            return lambda h, x: h[jnp.asarray(table)] + x
        return lambda h, x: jax.lax.scan(once, h, None, length=1)[0] + x

    arguments = jnp.ones(4), jnp.ones(4)
    pairs = jacobian_structure(cell(np.array([1, 0, 3, 2])), *arguments)
    same = jacobian_structure(cell(np.array([0, 1, 2, 3])), *arguments)
    assert repr(pairs) == "BlockDiagonal(2)"
    assert repr(same) == "Diagonal"


def test_a_sequential_solve_needs_no_structure(searches):
    f = lambda h, x: jnp.tanh(h) + x  # noqa: E731
    xs = jnp.ones((5, 4))
    jax.jit(lambda xs: solve(f, xs, xs[0], solver=pararnn.Sequential()).states)(xs)
    assert not searches


def test_the_memory_is_bounded(searches, monkeypatch):
    monkeypatch.setattr(_structure, "_CACHE_SIZE", 2)
    h = jnp.ones(3)
    for shift in (1, 2, 3, 4, 4):
        jacobian_structure(lambda h, x, k=shift: jnp.roll(h, 1) * k + x, h, h)
    assert len(searches) == 4 and len(_structure._cache) == 2


# Wide cells


def dense_gru(width):
    W = jnp.zeros((width, width))

    def gru(h, x):
        z = jax.nn.sigmoid(W @ h + x)
        return (1 - z) * jnp.tanh(W @ h + x) + z * h

    return gru


WIDE = {
    "dense": (dense_gru(1024), 1024, "Dense"),
    "diagonal": (lambda h, x: jnp.tanh(h) * x, 16384, "Diagonal"),
    "a domain error": (lambda h, x: h * jnp.log(x), 16384, "Diagonal"),
    "heads": (
        lambda h, x: jnp.tanh(
            (jnp.ones((8, 10, 10)) @ h.reshape(8, 10, 1)).ravel() + x
        ),
        80,
        "BlockDiagonal(10)",
    ),
}


@pytest.mark.parametrize("cell, width, expected", WIDE.values(), ids=WIDE)
def test_a_wide_cell_is_recognised_at_once(searches, cell, width, expected):
    h = jnp.zeros(width)
    took = []
    for _ in range(3):
        _structure._cache.clear()
        start = time.perf_counter()
        structure = jacobian_structure(cell, h, h)
        took.append(time.perf_counter() - start)
    assert repr(structure) == expected
    # Measured: 0.06 s, tracing included. The rest is room for a busy machine.
    assert min(took) < 0.5


# Declared structures


@pytest.mark.parametrize(
    "name, declared",
    [
        ("tanh-diagonal", "diagonal"),
        ("tanh-diagonal", "dense"),
        ("interleaved", "dense"),
        ("elman", "dense"),
        ("unequal-blocks", "found"),
        ("dict-state", "found"),
        ("nonholomorphic", "dense"),
    ],
)
def test_a_right_declaration_is_accepted(name, declared):
    cell, (parameters, xs, h0) = CELLS[name], instance(name)
    if declared == "found":
        declared = jacobian_structure(*one_step(name))

    def run(parameters, xs, h0):
        f = cell.f(parameters)
        return solve(f, xs, h0, solver=Newton(7), structure=declared).states

    wanted = jax.jit(lambda p, xs, h0: scan(cell.f(p), xs, h0))(parameters, xs, h0)
    assert_close(jax.jit(run)(parameters, xs, h0), wanted, 1e-11)


@pytest.mark.parametrize("solver", [pararnn.Sequential(), Newton()])
def test_a_wrong_declaration_is_refused_with_the_pattern(solver):
    cell, (parameters, xs, h0) = CELLS["interleaved"], instance("interleaved")
    with pytest.raises(ValueError, match="declared 'diagonal'") as caught:
        solve(cell.f(parameters), xs, h0, solver=solver, structure="diagonal")
    assert "x.x.x.\n.x.x.x\n" in str(caught.value)
    assert "BlockDiagonal(3)" in str(caught.value)


def test_a_declaration_of_other_blocks_is_refused():
    cell, (parameters, xs, h0) = CELLS["interleaved"], instance("interleaved")
    halves = Structure(np.array([[0, 1, 2], [3, 4, 5]]), 6)
    with pytest.raises(ValueError, match="couples the states"):
        solve(cell.f(parameters), xs, h0, structure=halves)


@pytest.mark.parametrize("width", [4, 8])
def test_a_declaration_of_another_width_is_refused(width):
    cell, (parameters, xs, h0) = CELLS["interleaved"], instance("interleaved")
    dense = Structure(np.arange(width)[None], width)
    with pytest.raises(ValueError, match="of a state with"):
        solve(cell.f(parameters), xs, h0, solver=Newton(), structure=dense)


def test_a_primitive_without_a_rule_counts_as_coupling_everything():
    def cell(h, x):
        return lax.reduce_window(h, 0.0, lax.add, (2,), (2,), [(0, 1)])[x]

    structure = jacobian_structure(cell, jnp.array([0, 0, 1, 1, 2]), jnp.zeros(5))
    assert repr(structure) == "Dense"


def test_a_cell_without_a_derivative_counts_as_coupling_everything():
    def cell(h, x):
        return jax.pure_callback(np.tanh, h, h) + x

    assert repr(jacobian_structure(cell, jnp.zeros(5), jnp.zeros(5))) == "Dense"


@pytest.mark.parametrize("blocks", [[[0, 1], [1, 2]], [[0], [1]], [0, 1, 2]])
def test_blocks_that_are_not_a_partition_are_refused(blocks):
    with pytest.raises(ValueError, match="exactly once"):
        Structure(np.array(blocks), 3)
