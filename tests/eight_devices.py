"""Time, batch and parameters over eight (virtual) devices; run by test_sharding.py.

Sharded results are compared with a plain loop where there is one, and otherwise with
the same function on one device, which the other tests compare with a loop.
"""

import dataclasses
import functools as ft
import shutil
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import linear
import pararnn
from pararnn import training
from tests.helpers import assert_close

MESHES = {
    "time=8": {"data": 1, "time": 8},
    "data=2,time=4": {"data": 2, "time": 4},
    "data=2,fsdp=2,time=2": {"data": 2, "fsdp": 2, "time": 2},
}
BATCH, WIDTH = 4, 4


class Case(NamedTuple):
    """A function of parameters and a sequence, and a reference for it."""

    make: object  # (key, T) -> parameters
    run: object  # (parameters, xs [T, WIDTH], reset) -> states or outputs
    reference: object = None
    reset: bool = False
    steps: int = 32


def loop(step, h0, xs, reset, *, reverse=False):
    def body(h, at_t):
        x, reset = at_t
        h = step(jnp.where(reset, jnp.zeros_like(h), h), x)
        return h, h

    return lax.scan(body, h0, (xs, reset), reverse=reverse)[1]


def scanned(cls, *axes, dtype=float, constant=False, **options):
    """`linear_scan` of one kind of transition, and a loop over its matrices."""

    def make(key, steps):
        one, two = jr.split(key)
        a = jr.normal(one, (1 if constant else steps, *axes), dtype) * 0.4
        return a, jr.normal(two, (WIDTH,), dtype)

    def run(parameters, xs, reset):
        a, h0 = parameters
        return pararnn.linear_scan(cls(a), xs.astype(dtype), h0, reset=reset, **options)

    def reference(parameters, xs, reset):
        a, h0 = parameters
        matrices = cls(a).as_matrix((WIDTH,))
        matrices = jnp.broadcast_to(matrices, (len(xs), WIDTH, WIDTH))

        def step(h, at_t):
            return at_t[0] @ h + at_t[1]

        reverse = options.get("reverse", False)
        return loop(step, h0, (matrices, xs.astype(dtype)), reset, reverse=reverse)

    return make, run, reference


def solved(cell, gain=1.0, **options):
    def make(key, steps):
        del steps
        made = cell(WIDTH, WIDTH, key=key)
        scaled = jax.tree.map(
            lambda v: gain * v if eqx.is_inexact_array(v) else v, made
        )
        return scaled, jr.normal(key, (WIDTH,)) * 0.1

    def run(parameters, xs, reset):
        cell, h0 = parameters
        return pararnn.solve(cell, xs, h0, reset=reset, **options).states

    def reference(parameters, xs, reset):
        cell, h0 = parameters
        return loop(cell, h0, xs, reset)

    return make, run, reference


def layered(build):
    def make(key, steps):
        del steps
        return build(key)

    def run(layer, xs, reset):
        return layer(xs, reset=reset)[0]

    return make, run


def attend(parameters, xs, reset, **options):
    q, k, v, d = jnp.split(xs @ parameters, 4, -1)
    k = k / (1 + jnp.sum(k**2, -1, keepdims=True))
    decay = jax.nn.sigmoid(d)
    heads = (x.reshape(len(xs), 2, -1) for x in (q, k, v, decay))
    q, k, v, decay = heads
    return pararnn.matrix_scan(q, k, v, decay, read=k, reset=reset, **options)[0]


def weights(key, steps):
    del steps
    return jr.normal(key, (WIDTH, 16)) * 0.3


D, N = pararnn.Diagonal, pararnn.Newton
CASES = {
    "diagonal": Case(*scanned(D, WIDTH)),
    "complex": Case(*scanned(D, WIDTH, dtype=complex)),
    "constant": Case(*scanned(D, WIDTH, constant=True)),
    "constant, padded": Case(*scanned(D, WIDTH, constant=True), steps=29),
    "block, reverse": Case(*scanned(pararnn.BlockDiagonal, 2, 2, 2, reverse=True)),
    "dense, reset": Case(*scanned(pararnn.Dense, 4, 4), reset=True),
    "reverse, reset": Case(*scanned(D, WIDTH, reverse=True), reset=True),
    "reverse, padded": Case(*scanned(D, WIDTH, reverse=True), steps=29),
    "associative": Case(*scanned(D, WIDTH, backend="associative"), reset=True),
    "chunked": Case(*scanned(pararnn.Dense, 4, 4, backend="chunked"), reset=True),
    "matrix_scan": Case(weights, attend, reset=True),
    "matrix_scan, before": Case(
        weights, ft.partial(attend, emit="before", chunk=2), reset=True
    ),
    "Newton": Case(*solved(pararnn.GRUCell, solver=N(16))),
    "Newton, every step": Case(*solved(pararnn.ParaGRUCell, solver=N()), reset=True),
    "Newton, padded": Case(*solved(pararnn.GRUCell, solver=N(8)), steps=29),
    "Auto": Case(*solved(pararnn.GRUCell), reset=True),
    "Auto, chaotic": Case(*solved(pararnn.ElmanCell, gain=8.0)),
    "Sequential": Case(*solved(pararnn.GRUCell, solver=pararnn.Sequential())),
    "ELK": Case(*solved(pararnn.ParaGRUCell, solver=pararnn.ELK(16))),
    "RNN": Case(*layered(lambda key: pararnn.RNN(pararnn.ParaGRUCell(WIDTH, key=key)))),
    "LRU": Case(*layered(lambda key: linear.LRU(WIDTH, key=key)), reset=True),
    "DeltaNet": Case(*layered(lambda key: linear.DeltaNet(WIDTH, heads=2, key=key))),
    "Mamba": Case(*layered(lambda key: linear.Mamba(WIDTH, 4, key=key)), reset=True),
    "MLSTM": Case(*layered(lambda key: linear.MLSTM(WIDTH, key=key)), reset=True),
}
# Every case on a mesh of time and batch, and one case on each of the other meshes.
ROWS = [
    *((name, "time=8") for name in ("diagonal", "Auto")),
    *((name, "data=2,time=4") for name in CASES),
    ("LRU", "data=2,fsdp=2,time=2"),
]


def prepare(case: Case, steps: int):
    one, two, three = jr.split(jr.key(1), 3)
    parameters, static = eqx.partition(case.make(one, steps), eqx.is_inexact_array)
    xs = jr.normal(two, (BATCH, steps, WIDTH))
    reset = jr.bernoulli(three, 0.15, (BATCH, steps))
    return parameters, static, xs, reset


def batched(run, static, with_reset):
    def outputs(parameters, xs, reset):
        def one(xs, reset):
            return run(eqx.combine(parameters, static), xs, reset)

        reset = reset if with_reset else None
        return jax.vmap(one)(xs, reset)

    def loss(parameters, xs, reset):
        ys = outputs(parameters, xs, reset)
        return jnp.sum(jnp.sin(ys.real) + ys.imag**2), ys

    return loss


def derive(loss):
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("name, sizes", ROWS)
def test_values_and_gradients(name, sizes):
    case = CASES[name]
    parameters, static, xs, reset = prepare(case, case.steps)
    alone = case.reference or case.run
    expected = derive(batched(alone, static, case.reset or case.reference))(
        parameters, xs, reset & case.reset
    )
    mesh = pararnn.make_mesh(**MESHES[sizes])
    sharded = derive(batched(case.run, static, case.reset))
    with jax.set_mesh(mesh):
        parameters = pararnn.shard_parameters(parameters, mesh, min_size=1)
        if case.steps % mesh.shape["time"] == 0:
            xs, reset = pararnn.shard_batch((xs, reset), mesh)
        found = sharded(parameters, xs, reset)
        if case.steps % mesh.shape["time"] == 0:
            spec = found[0][1].sharding.spec
            assert spec[1] == "time", "the outputs do not lie where the inputs do"
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Chaos amplifies the rounding of a gradient, whoever computes it.
        scale = np.max(np.abs(b), initial=1.0)
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11 * scale)


@pytest.mark.parametrize("name", ["diagonal", "matrix_scan", "Newton"])
def test_second_derivatives(name):
    case = CASES[name]
    parameters, static, xs, reset = prepare(case, 16)
    tangent = jax.tree.map(jnp.cos, parameters)

    def curvature(run, with_reset):
        loss = batched(run, static, with_reset)

        def gradient(parameters, xs, reset):
            return jax.grad(loss, has_aux=True)(parameters, xs, reset)[0]

        def along(parameters, xs, reset):
            partial = ft.partial(gradient, xs=xs, reset=reset)
            return jax.jvp(partial, (parameters,), (tangent,))[1]

        return jax.jit(along)

    alone = case.reference or case.run
    expected = curvature(alone, case.reset or case.reference)(
        parameters, xs, reset & case.reset
    )
    mesh = pararnn.make_mesh(data=2, time=4)
    with jax.set_mesh(mesh):
        placed = pararnn.shard_batch((xs, reset), mesh)
        found = curvature(case.run, case.reset)(parameters, *placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


def turned(a):
    """Factors `[T]` times a rotation."""
    c, s = np.cos(0.3), np.sin(0.3)
    return a[:, None, None] * np.array([[c, -s], [s, c]])


def sheared(a):
    """Matrices whose products have entries from the largest to the smallest."""
    return np.stack([np.stack([a, a], -1), np.stack([0 * a, 1 / a], -1)], 1)


# 32 steps on each of 8 devices: all shards grow by 1e51; or they grow and shrink
# alternately, so that a small state is neither lost nor too large; or all shrink.
GROW, TURNS = np.full(256, 40.0), np.repeat([40.0, 0.025] * 4, 32)
SHRINK = np.full(256, 0.025)
PRODUCTS = {
    "diagonal": lambda a: D(jnp.asarray(a[:, None] * [1, -1])),
    "complex": lambda a: D(jnp.asarray(a[:, None] * [1j, -1])),
    "dense": lambda a: pararnn.Dense(jnp.asarray(turned(a))),
    "dense, complex": lambda a: pararnn.Dense(jnp.asarray(1j * turned(a))),
    "blocks": lambda a: pararnn.BlockDiagonal(jnp.asarray(turned(a)[:, None])),
    "sheared": lambda a: pararnn.Dense(jnp.asarray(sheared(a))),
    "constant": lambda a: D(jnp.asarray(a[:1, None] * [1, -1])),
    "constant, dense": lambda a: pararnn.Dense(jnp.asarray(turned(a[:1]))),
}
# Factors, the first state, and the step that has a term, if any.
RANGES = {
    "overflow": (GROW, 0.0, 250),
    "underflow": (SHRINK, 0.0, 30),
    "turns": (TURNS, 1e-30, None),
}
# How the products leave the range, whether there are resets, whether time runs back,
# and whether a shard has chunks of its own.
BEYOND = [
    *((kind, "overflow", False, False, "auto") for kind in PRODUCTS),
    *((kind, "turns", False, False, "auto") for kind in ("diagonal", "complex")),
    *((kind, "overflow", True, True, "auto") for kind in ("diagonal", "constant")),
    ("dense", "underflow", False, True, "auto"),
    ("dense", "turns", True, True, "auto"),
    ("dense", "overflow", False, False, "chunked"),
    ("diagonal", "turns", False, True, "chunked"),
]


@pytest.mark.parametrize("kind, leaves, resets, reverse, backend", BEYOND)
def test_products_beyond_the_range(kind, leaves, resets, reverse, backend):
    """In float32 over devices, against the loop in float64, step by step."""
    factors, start, term = RANGES[leaves]
    steps = len(factors)
    transition = PRODUCTS[kind](factors[::-1] if reverse else factors)
    b, h0 = np.zeros((steps, 2)), np.array([start, 2 * start])
    if term is not None:
        b[steps - 1 - term if reverse else term] = 1.0, 2.0
    reset = (jnp.arange(steps) % 100 == 60) & resets
    # The first steps alone: all cotangents after them are zero.
    first = slice(steps - 10, None) if reverse else slice(10)

    def scan(transition, b, h0):
        options = {"reset": reset if resets else None, "reverse": reverse}
        return pararnn.linear_scan(transition, b, h0, backend=backend, **options)

    def plain(transition, b, h0):
        matrices = transition.as_matrix((2,))
        matrices = jnp.broadcast_to(matrices, (steps, 2, 2))
        b, h0 = (v.astype(matrices.dtype) for v in (b, h0))

        def step(h, at_t):
            return at_t[0] @ h + at_t[1]

        return loop(step, h0, (matrices, b), reset, reverse=reverse)

    def everything(run):
        def loss(transition, b, h0):
            states = run(transition, b, h0)[first] + 1
            return jnp.sum(jnp.real(states * jnp.conj(states)))

        def gradient(b, h0, transition):
            return jax.grad(loss, argnums=(1, 2))(transition, b, h0)

        @jax.jit
        def derived(transition, b, h0):
            along = ft.partial(gradient, transition=transition)
            twice = jax.jvp(along, (b, h0), (jnp.ones_like(b), jnp.ones_like(h0)))
            return run(transition, b, h0), twice

        return derived

    wide = transition, jnp.asarray(b), jnp.asarray(h0)
    wanted = everything(plain)(*wide)
    narrow = jax.tree.map(
        lambda v: v.astype("complex64" if jnp.iscomplexobj(v) else "float32"), wide
    )
    with jax.set_mesh(pararnn.make_mesh(time=8)):
        found = everything(scan)(*narrow)
    for a, w in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, w = np.asarray(a), np.asarray(w)
        size = np.abs(w).max(-1, keepdims=True)
        assert np.all(np.abs(a - w) <= 1e-4 * size + 1e-37)


def test_gradient_of_a_solve_whose_jacobians_overflow():
    """The loss is the tenth state; later Jacobians multiply to 1e170 and 1e600."""

    def gradients(dtype):
        def f(h, x):
            return 3.9 * h * (1 - h) + x

        def tenth(h0, xs):
            return pararnn.solve(f, xs, h0).states[9]

        both = jax.grad(tenth, argnums=(0, 1))
        return jax.jit(both)(jnp.asarray(0.3, dtype), jnp.zeros(1024, dtype))

    wanted = gradients("float64")
    with jax.set_mesh(pararnn.make_mesh(data=2, time=4)):
        found = gradients("float32")
    for a, w in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, w, rtol=1e-4)


def test_factors_that_are_not_finite_are_not_hidden():
    """Not by a state of zero either: as in the loop, where 0 * NaN is NaN."""
    a = jnp.full((32, 2), 0.5).at[9, 0].set(jnp.nan).at[17, 1].set(jnp.inf)
    transitions = D(a), pararnn.Dense(jax.vmap(jnp.diag)(a))
    for transition in transitions:
        run = jax.jit(lambda t: pararnn.linear_scan(t, jnp.zeros((32, 2))))
        wanted = run(transition)
        with jax.set_mesh(pararnn.make_mesh(time=8)):
            np.testing.assert_array_equal(run(transition), wanted)
    assert np.isnan(wanted[-1]).all()


EXCHANGES = {
    # The factors have as many rows as there are steps, and their gradient is summed
    # over the batch: every device must have all sequences.
    "diagonal": "time=8",
    "constant": "data=2,time=4",
    "Auto": "data=2,time=4",
    "DeltaNet": "data=2,time=4",
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_exchange_does_not_grow_with_time(name):
    case, mesh = CASES[name], pararnn.make_mesh(**MESHES[EXCHANGES[name]])

    def exchange(steps):
        parameters, static, xs, reset = prepare(case, steps)
        gradient = derive(batched(case.run, static, case.reset))
        with jax.set_mesh(mesh):
            arguments = parameters, *pararnn.shard_batch((xs, reset), mesh)
            return pararnn.communication(gradient.lower(*arguments).compile())

    # Below 32 steps to a segment the sizes of entries are sought in several of them.
    first = 128 if name == "Auto" else 64
    short, long = exchange(first), exchange(4 * first)
    assert short == long
    assert sum(found.count for found in short.values()) > 0
    # Not even one sequence of one number a step.
    largest = max(found.largest for found in long.values())
    assert largest < 8 * 256


def test_a_batch_of_matrices_is_not_gathered():
    mesh = pararnn.make_mesh(data=8)
    W = jax.random.normal(jax.random.key(0), (4, 4)) / 4
    xs = jax.random.normal(jax.random.key(1), (8, 32, 4))

    def states(x):
        cell = lambda h, x: jnp.tanh(W @ h + x)  # noqa: E731
        solver = pararnn.ELK(8)
        return pararnn.solve(cell, x, jnp.zeros(4), solver=solver, throw=False).states

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.vmap(states)).lower(pararnn.shard_batch(xs, mesh))
        found = pararnn.communication(compiled.compile())
    assert "all-gather" not in found


def test_communication_counts_bytes():
    mesh = pararnn.make_mesh(time=8)
    x = jax.device_put(jnp.ones((8, 4)), jax.NamedSharding(mesh, PartitionSpec("time")))
    compiled = jax.jit(lambda x: jnp.sum(x, 0)).lower(x).compile()
    found = pararnn.communication(compiled)
    assert found == {"all-reduce": pararnn.Exchange(1, 32, 32)}


def test_communication_counts_loops():
    mesh = pararnn.make_mesh(time=8)
    x = jax.device_put(jnp.ones((8, 4)), jax.NamedSharding(mesh, PartitionSpec("time")))

    def turn(carry, _):
        # Five sums over the devices, each of the result of the one before.
        return jnp.sin(carry + jnp.sum(carry, 0, keepdims=True)), None

    looped = jax.jit(lambda x: jax.lax.scan(turn, x, length=5)[0])
    found = pararnn.communication(looped.lower(x).compile())
    assert found == {"all-reduce": pararnn.Exchange(5, 5 * 32, 32)}
    limit = jnp.asarray(5)
    unknown = jax.jit(
        lambda x, n: jax.lax.fori_loop(0, n, lambda _, c: turn(c, None)[0], x)
    )
    found = pararnn.communication(unknown.lower(x, limit).compile())
    assert found == {"all-reduce": pararnn.Exchange(1, 32, 32)}


def test_gathering_moves_parameters_and_not_the_batch():
    mesh = pararnn.make_mesh(fsdp=8)
    model = pararnn.LanguageModel(
        32, 64, 2, solver=pararnn.Newton(4), rematerialise=True, key=jr.key(0)
    )
    arrays, static = eqx.partition(model, eqx.is_inexact_array)

    @jax.jit
    def gradient(arrays, tokens):
        def loss(arrays):
            logits, _ = jax.vmap(eqx.combine(arrays, static))(tokens)
            return jnp.mean(jax.nn.logsumexp(logits, -1))

        return pararnn.shard_parameters(jax.grad(loss)(arrays), mesh)

    def exchange(sequences):
        tokens = jnp.zeros((sequences, 16), jnp.int32)
        with jax.set_mesh(mesh):
            inputs = pararnn.shard_parameters(arrays, mesh)
            inputs = inputs, pararnn.shard_batch(tokens, mesh)
            return pararnn.communication(gradient.lower(*inputs).compile())

    few, many = exchange(8), exchange(64)
    assert few["all-gather"] == many["all-gather"]
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    # Once forward and once backward; the embedding also where it is read out.
    assert total < many["all-gather"].bytes < 3 * total


def test_gathered_parameters_have_the_same_derivatives():
    mesh = pararnn.make_mesh(fsdp=8)
    w, x = jr.normal(jr.key(0), (64, 64)), jr.normal(jr.key(1), (8, 64))

    def loss(w, x):
        return jnp.sum(jnp.sin(pararnn.gather_parameters({"w": w})["w"] @ x.T) ** 2)

    derivatives = (
        loss,
        jax.grad(loss),
        lambda w, x: jax.jvp(lambda w: loss(w, x), (w,), (jnp.cos(w),))[1],
        jax.grad(lambda w, x: jnp.sum(jax.grad(loss)(w, x) ** 2)),
        jax.vmap(loss, (None, 0)),
    )
    for derive in derivatives:
        inputs = (w, x[:, None]) if derive is derivatives[-1] else (w, x)
        wanted = jax.jit(derive)(*inputs)
        with jax.set_mesh(mesh):
            placed = pararnn.shard_parameters(w, mesh), *inputs[1:]
            assert_close(jax.jit(derive)(*placed), wanted, 1e-12)


def test_parameters_lie_in_pieces():
    mesh = pararnn.make_mesh(data=4, fsdp=2)
    made = {"w": jnp.ones((3, 6, 4)), "b": jnp.ones(3), "f": jnp.tanh}
    placed = pararnn.shard_parameters(made, mesh, min_size=1)
    assert placed["w"].sharding.spec == PartitionSpec(None, "fsdp", None)
    assert placed["b"].sharding.is_fully_replicated
    assert placed["f"] is jnp.tanh
    whole = pararnn.shard_parameters(made, mesh)
    assert whole["w"].sharding.is_fully_replicated
    again = jax.jit(
        lambda w: pararnn.shard_parameters({"w": 2 * w}, mesh, min_size=1)["w"]
    )
    assert again(placed["w"]).sharding.spec == PartitionSpec(None, "fsdp", None)


def test_a_failure_is_found_on_any_device():
    xs = jnp.zeros((2, 32, WIDTH)).at[1, 19, 2].set(jnp.nan)
    cell = pararnn.GRUCell(WIDTH, key=jr.key(0))

    def run(xs, throw):
        solution = pararnn.solve(cell, xs, cell.init_state(), throw=throw)
        return solution.states, solution.stats["first_nonfinite"]

    mesh = pararnn.make_mesh(data=2, time=4)
    with jax.set_mesh(mesh):
        xs = pararnn.shard_batch(xs, mesh)
        reported = jax.jit(jax.vmap(ft.partial(run, throw=False)))
        assert reported(xs)[1].tolist() == [32, 19]
        with pytest.raises(Exception, match="inputs"):
            jax.block_until_ready(jax.jit(jax.vmap(ft.partial(run, throw=True)))(xs))


def test_a_failure_of_one_sequence_is_found_on_any_device():
    """Cause and check are one conditional, whatever devices exchange."""
    xs = jnp.zeros((32, WIDTH)).at[19, 2].set(jnp.nan)
    cell = pararnn.GRUCell(WIDTH, key=jr.key(0))
    with jax.set_mesh(pararnn.make_mesh(time=8)):
        run = jax.jit(lambda xs: pararnn.solve(cell, xs, cell.init_state()).states)
        with pytest.raises(Exception, match="inputs"):
            jax.block_until_ready(run(xs))


def test_decoding_is_not_divided():
    layer = linear.Mamba2(WIDTH, 4, heads=2, key=jr.key(0))
    x, state = jnp.ones(WIDTH), layer.init_state()
    expected = layer.step(x, state)
    with jax.set_mesh(pararnn.make_mesh(time=8)):
        found = layer.step(x, state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


@jax.custom_vjp
def identity(x):
    return x


identity.defvjp(lambda x: (x, None), lambda _, g: (g,))


def gradient_of_solve(f=None, **options):
    f = (lambda h, x: jnp.tanh(h + x)) if f is None else f
    xs, h0 = jnp.ones((32, WIDTH)), jnp.zeros(WIDTH)
    return jax.grad(lambda xs: jnp.sum(pararnn.solve(f, xs, h0, **options).states))(xs)


def recurrent():
    x = jnp.ones((32, 1, 2))
    return pararnn.matrix_scan(x, x, x, form="recurrent")


def fused():
    x = jnp.ones((32, 2))
    return pararnn.fused_scan(lambda x: (x, x), lambda h, x: h, x, x[0], form="fused")


ERRORS = {
    "sweep": (lambda: gradient_of_solve(adjoint="sweep"), "'sweep'"),
    "custom_vjp": (
        lambda: gradient_of_solve(lambda h, x: identity(jnp.tanh(h + x))),
        "custom_vjp",
    ),
    "windows": (lambda: gradient_of_solve(solver=pararnn.Windows(N(), 4)), "Windows"),
    "recurrent": (recurrent, "'recurrent'"),
    "fused": (fused, "'fused'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_only_steps_is_refused(name):
    call, match = ERRORS[name]
    with jax.set_mesh(pararnn.make_mesh(time=8)):
        with pytest.raises(ValueError, match=match):
            call()


def test_explicit_axes_are_refused():
    mesh = jax.make_mesh((8,), ("time",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="Explicit"):
        gradient_of_solve()


def test_manual_axes_are_left_alone():
    """Inside a `shard_map` over time, each device has its own sequence."""
    xs = jr.normal(jr.key(0), (64, WIDTH))
    cell = pararnn.ParaGRUCell(WIDTH, key=jr.key(1))

    def own(xs):
        return pararnn.RNN(cell, solver=pararnn.Sequential())(xs)[0]

    mesh = pararnn.make_mesh(time=8)
    over = PartitionSpec("time")
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(own, in_specs=over, out_specs=over, check_vma=False)
        found = jax.jit(mapped)(xs)
    expected = jax.vmap(own)(xs.reshape(8, 8, WIDTH)).reshape(64, WIDTH)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


METHODS = {
    "Auto": pararnn.Auto(),
    "Newton": N(5),
    "full Newton": N(),
    "Jacobi": pararnn.Jacobi(5),
    "QuasiNewton": pararnn.QuasiNewton(5, probes=2),
    "ELK": pararnn.ELK(5),
    "Windows": pararnn.Windows(N(3), 10),
    "Ladder": pararnn.Ladder((N(5),), 1),
}
# Layers and solves, as functions of parameters, a sequence and its resets.
WITHIN = {
    **{
        name: solved(pararnn.GRUCell, solver=solver)[:2]
        for name, solver in METHODS.items()
    },
    **{
        f"linear_scan, {backend}": scanned(D, WIDTH, backend=backend)[:2]
        for backend in ("sequential", "associative", "chunked")
    },
    "matrix_scan": (weights, ft.partial(attend, form="recurrent")),
    "matrix_scan in chunks": (weights, ft.partial(attend, form="chunkwise")),
    "RNN": layered(lambda key: pararnn.RNN(pararnn.LSTMCell(WIDTH, key=key))),
    "LRU": layered(lambda key: linear.LRU(WIDTH, key=key)),
    "Mamba": layered(lambda key: linear.Mamba(WIDTH, 4, key=key)),
    "MLSTM": layered(lambda key: linear.MLSTM(WIDTH, key=key)),
}


def within(name):
    """A case of `WITHIN` on a batch of eight sequences, and its arguments."""
    make, run = WITHIN[name]
    parameters, static = eqx.partition(make(jr.key(2), 20), eqx.is_inexact_array)
    xs = jr.normal(jr.key(3), (8, 20, WIDTH))
    reset = jr.bernoulli(jr.key(4), 0.15, (8, 20))

    def outputs(parameters, xs, reset):
        whole = eqx.combine(parameters, static)
        return jax.vmap(run, (None, 0, 0))(whole, xs, reset)

    def derive(outputs):
        def loss(parameters, xs):
            ys = outputs(parameters, xs, reset)
            return jnp.sum(jnp.sin(ys)), ys

        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        return jax.jit(gradient)(parameters, xs)

    return outputs, derive


@pytest.mark.parametrize("name", WITHIN)
def test_within_a_shard_map_that_checks_what_varies(name):
    """Parameters are the same on all devices, so their gradient is summed."""
    outputs, derive = within(name)
    axis = PartitionSpec("data")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (PartitionSpec(), axis, axis), "out_specs": axis}
    mapped = jax.shard_map(outputs, mesh=mesh, **specs)
    assert_close(derive(mapped), derive(outputs), 1e-9)


@pytest.mark.parametrize("name", ["Newton", "LRU"])
def test_within_a_shard_map_over_some_of_the_axes(name):
    outputs, derive = within(name)
    axis = PartitionSpec("data")
    specs = {"in_specs": (PartitionSpec(), axis, axis), "out_specs": axis}
    expected = derive(outputs)
    with jax.set_mesh(pararnn.make_mesh(data=4, fsdp=2)):
        mapped = jax.shard_map(outputs, axis_names={"data"}, **specs)
        assert_close(derive(mapped), expected, 1e-9)


def test_a_failure_within_a_shard_map():
    cell = pararnn.GRUCell(WIDTH, key=jr.key(0))
    xs = jnp.zeros((8, 12, WIDTH)).at[3, 7, 1].set(jnp.nan)
    axis = PartitionSpec("data")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def run(xs, throw):
        one = lambda xs: pararnn.solve(cell, xs, cell.init_state(), throw=throw)  # noqa: E731
        solution = jax.vmap(one)(xs)
        return solution.states, solution.stats["first_nonfinite"]

    specs = {"mesh": mesh, "in_specs": axis, "out_specs": axis}
    reported = jax.jit(jax.shard_map(ft.partial(run, throw=False), **specs))
    assert reported(xs)[1].tolist() == [12, 12, 12, 7, 12, 12, 12, 12]
    with pytest.raises(Exception, match="inputs"):
        raised = jax.jit(jax.shard_map(ft.partial(run, throw=True), **specs))
        jax.block_until_ready(raised(xs))


def test_collectives_over_devices():
    """Collectives of the state couple devices, so only a loop can solve the cell."""
    xs, h0 = jr.normal(jr.key(0), (8, 12, WIDTH)), jnp.ones((8, WIDTH))
    axis = PartitionSpec("data")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def of_state(h, x):
        return jnp.tanh(x + 0.5 * lax.pmean(h, "data"))

    def of_input(h, x):
        return jnp.tanh(h + 0.5 * lax.pmean(x, "data"))

    def derive(cell, run):
        def outputs(xs, h0):
            return run(cell, xs[0], h0[0])[None]

        mapped = jax.shard_map(outputs, mesh=mesh, in_specs=axis, out_specs=axis)
        loss = lambda *at: jnp.sum(jnp.sin(mapped(*at)))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(xs, h0)

    def stepped(cell, xs, h0):
        # The state varies from device to device, as the inputs do.
        return loop(cell, h0, xs, jnp.zeros(len(xs), bool))

    def by(solver):
        return lambda *at: pararnn.solve(*at, solver=solver).states

    rows = (of_state, pararnn.Auto()), (of_input, pararnn.Auto()), (of_input, N(4))
    for cell, solver in rows:
        assert_close(derive(cell, by(solver)), derive(cell, stepped), 1e-9)
    with pytest.raises(ValueError, match="along the axis 'data'"):
        derive(of_state, by(N(4)))


def test_a_batch_along_an_explicit_axis():
    """A scan is sharded as its arguments are; a solve says what to do."""
    xs = jr.normal(jr.key(0), (8, 12, WIDTH))
    cell = pararnn.GRUCell(WIDTH, key=jr.key(1))

    def scanned(xs):
        factors = pararnn.Diagonal(jax.nn.sigmoid(xs))
        return pararnn.linear_scan(factors, xs, backend="chunked")

    def solved(xs):
        return pararnn.solve(cell, xs, cell.init_state(), solver=N(4)).states

    def derive(run, xs):
        gradient = jax.value_and_grad(lambda xs: jnp.sum(jnp.sin(run(xs))))
        return jax.jit(gradient)(xs)

    scanned, solved = jax.vmap(scanned), jax.vmap(solved)
    expected = derive(scanned, xs), derive(solved, xs)
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        placed = jax.device_put(xs, PartitionSpec("data"))
        assert jax.typeof(jax.jit(scanned)(placed)).sharding.spec[0] == "data"
        assert_close(derive(scanned, placed), expected[0], 1e-12)
        with pytest.raises(ValueError, match=r"type Explicit.*auto_axes"):
            jax.jit(solved)(placed)
        left = jax.sharding.auto_axes(solved, out_sharding=PartitionSpec("data"))
        assert_close(derive(left, placed), expected[1], 1e-12)


BAD = {
    "batch": (lambda mesh: pararnn.shard_batch(jnp.ones((3, 8)), mesh), "data"),
    "time": (lambda mesh: pararnn.shard_batch(jnp.ones((2, 7)), mesh), "axis 1"),
    "scalar": (lambda mesh: pararnn.shard_batch(jnp.ones(()), mesh), "no batch axis"),
    "axis": (
        lambda mesh: pararnn.shard_batch(jnp.ones((2, 8)), mesh, time_axis=0),
        "swap",
    ),
    "mesh": (lambda mesh: pararnn.shard_parameters({}, jax.make_mesh((8,), "x")), "x"),
    "count": (lambda mesh: pararnn.make_mesh(data=2, time=2), "need 4 devices"),
    "size": (lambda mesh: pararnn.make_mesh(time=2.0), "positive integer"),
    "left": (lambda mesh: pararnn.make_mesh(time=3), "does not divide"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_layouts_are_refused(name):
    call, match = BAD[name]
    with pytest.raises(ValueError, match=match):
        call(pararnn.make_mesh(data=2, time=4))


LOGGED = ("loss", "validation_bits_per_byte")


def test_a_training_run_and_its_checkpoint(tmp_path):
    """The losses of one device, and a checkpoint that another mesh continues."""
    rng = np.random.default_rng(0)
    for i in range(20):
        text = "".join(rng.choice(["alpha ", "beta ", "gamma\n"], 60))
        (tmp_path / f"{i}.txt").write_text(text)
    config = training.Config(
        model=training.ModelConfig(d_model=64, d_hidden=0, depth=1),
        data=training.DataConfig(
            corpus=str(tmp_path / "*.txt"),
            length=16,
            batch=4,
            validation=0.3,
            validation_batches=2,
        ),
        optimiser=training.OptimiserConfig(warmup=1),
        steps=4,
        validate_every=2,
        checkpoint_every=2,
    )
    divided = training.MeshConfig(data=2, fsdp=2, time=2)

    def curve(name, config):
        training.train(config, tmp_path / name, resume=True, show_progress=False)
        lines = training.read_metrics(tmp_path / name)
        return [
            line.get("loss", line.get("validation_bits_per_byte")) for line in lines
        ]

    expected = curve("one", config)
    assert len(expected) == 6
    # The model computes in float32.
    shared = dataclasses.replace(config, mesh=divided)
    np.testing.assert_allclose(curve("all", shared), expected, rtol=1e-5)
    shutil.rmtree(tmp_path / "all" / "checkpoints" / "4")
    np.testing.assert_allclose(curve("all", config), expected, rtol=1e-5)
