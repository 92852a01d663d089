"""`matrix_scan` against a loop of matrices, in every form."""

import functools as ft
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pararnn import matrix_scan
from pararnn.scan import _choose as choose, _matrix_chunks as implementation
from tests.helpers import assert_close

H, K, V = 2, 5, 3
FORMS = {
    "recurrent": {"form": "recurrent"},
    "chunkwise": {"form": "chunkwise"},
    "chunks of 12": {"form": "chunkwise", "chunk": 12},
    "auto": {},
}
DECAYS, ERASURES = ("none", "head", "key"), ("none", "keys", "write")


def problem(steps, every, decay, erasure, resets, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape)

    keys = normal(steps, H, K)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    shape = {"none": None, "head": (steps, H), "key": (steps, H, K)}[decay]
    given = {
        "queries": normal(steps // every, H, K),
        "keys": keys,
        "values": normal(steps, H, V),
        "decay": None if shape is None else rng.uniform(-1, 1, shape),
        "read": None if erasure == "none" else keys.copy(),
        "write": normal(steps, H, K) * 0.5 if erasure == "write" else None,
        "initial": normal(H, K, V),
        "reset": rng.uniform(size=steps) < 0.1 if resets else None,
    }
    if shape is not None:
        # Products of decays contain a zero and underflow.
        given["decay"][steps // 3] = 0
        given["decay"][steps // 2 :] *= 1e-30
    if erasure == "keys":
        given["keys"] = keys * rng.uniform(0, 2, (steps, H, 1))
    return {name: value for name, value in given.items() if value is not None}


def loop(
    queries,
    keys,
    values,
    initial,
    decay=None,
    read=None,
    write=None,
    reset=None,
    emit="after",
):
    state, outputs = initial.copy(), []
    every = len(keys) // len(queries)
    write = keys if write is None else write
    for t in range(len(keys)):
        if reset is not None and reset[t]:
            state = np.zeros_like(state)
        before = state.copy()
        for h in range(H):
            factor = np.eye(K) if decay is None else np.diag(decay[t, h] * np.ones(K))
            if read is not None:
                factor = factor - np.outer(write[t, h], read[t, h])
            state[h] = factor @ state[h] + np.outer(keys[t, h], values[t, h])
        if (t + 1) % every == 0:
            shown = before if emit == "before" else state
            q = queries[t // every]
            outputs.append(np.stack([shown[h].T @ q[h] for h in range(H)]))
    return np.stack(outputs), state


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("erasure", ERASURES)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("emit", ["after", "before"])
def test_equals_the_loop(decay, erasure, every, emit):
    forms = FORMS["recurrent"], FORMS["chunks of 12"]
    for resets in (True, False) if every == 1 else (True,):
        given = problem(42, every, decay, erasure, resets)
        wanted = loop(**given, emit=emit)

        @jax.jit
        def run(given):
            return [matrix_scan(**given, emit=emit, **form) for form in forms]

        for got in run(given):
            assert_close(got, wanted, 1e-12)


@pytest.mark.parametrize("steps", [1, 2, 31, 64, 65])
def test_any_length(steps):
    given = problem(steps, 1, "key", "write", False)
    wanted = loop(**given)
    for form in FORMS.values():
        assert_close(jax.jit(lambda g: matrix_scan(**g, **form))(given), wanted, 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_no_steps(form):
    given = {k: jnp.asarray(v) for k, v in problem(3, 1, "key", "write", True).items()}
    empty = {k: v if k == "initial" else v[:0] for k, v in given.items()}
    outputs, last = matrix_scan(**empty, **FORMS[form])
    assert outputs.shape == (0, H, V)
    np.testing.assert_array_equal(last, given["initial"])


@pytest.mark.parametrize(
    "decay, erasure", [("none", "keys"), ("head", "none"), ("key", "write")]
)
def test_first_and_second_derivatives(decay, erasure, monkeypatch):
    monkeypatch.setattr(choose, "_SMALL", 0)
    given = problem(40, 1, decay, erasure, True)
    reset = given.pop("reset")
    weights = np.random.default_rng(1).normal(size=(40, H, V))

    def loss(form, given):
        outputs, last = matrix_scan(**given, reset=jnp.asarray(reset), **form)
        return jnp.sum(weights * jnp.sin(outputs)) + jnp.sum(jnp.cos(last))

    def derivatives(form):
        def total_of_first(given):
            first = jax.grad(lambda g: loss(form, g))(given)
            return sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(first)), first

        # The second derivative returns the first too, which is not compiled separately.
        second, first = jax.jit(jax.grad(total_of_first, has_aux=True))(given)
        return first, second

    recurrent = derivatives({"form": "recurrent"})
    for form in ({"form": "chunkwise", "chunk": 16}, {}):
        got = derivatives(form)
        assert_close(jax.tree.leaves(got), jax.tree.leaves(recurrent), 1e-11)
    # The recurrent form itself, by finite differences of the loop.
    rng = np.random.default_rng(2)
    tangent = {name: rng.normal(size=v.shape) for name, v in given.items()}

    def value(sign):
        moved = {name: v + sign * 1e-6 * tangent[name] for name, v in given.items()}
        outputs, last = loop(**moved, reset=reset)
        return np.sum(weights * np.sin(outputs)) + np.sum(np.cos(last))

    along = sum(np.sum(recurrent[0][name] * tangent[name]) for name in given)
    np.testing.assert_allclose(along, (value(1) - value(-1)) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
@pytest.mark.parametrize("emit", ["after", "before"])
def test_what_is_not_finite_stays_where_it_belongs(form, emit):
    given = problem(70, 1, "key", "keys", False)
    given["reset"] = np.isin(np.arange(70), [30, 66])
    run = jax.jit(lambda g: matrix_scan(**g, form=form, emit=emit))
    clean, _ = run(given)
    later = 20 + (emit == "before")
    for name in ("keys", "values", "decay", "read"):
        bad = given | {name: given[name].copy()}
        bad[name][20, 0] = np.nan
        outputs, last = run(bad)
        assert np.all(np.isnan(outputs[later:30, 0])), name
        outputs = outputs.at[later:30, 0].set(clean[later:30, 0])
        np.testing.assert_allclose(outputs, clean, atol=1e-12)
        assert np.all(np.isfinite(last))
    bad = given | {"initial": given["initial"] * np.inf}
    outputs, _ = run(bad)
    assert not np.any(np.isfinite(outputs[:30]))
    np.testing.assert_allclose(outputs[30:], clean[30:], atol=1e-12)
    bad = given | {"queries": given["queries"].copy()}
    bad["queries"][20, 1, 0] = np.inf
    outputs, _ = run(bad)
    assert not np.any(np.isfinite(outputs[20, 1]))
    outputs = outputs.at[20, 1].set(clean[20, 1])
    np.testing.assert_allclose(outputs, clean, atol=1e-12)


@pytest.mark.parametrize("form", ["chunkwise", "auto"])
def test_derivatives_after_a_reset_do_not_see_what_is_not_finite(form, monkeypatch):
    # Makes "auto" use chunks for the derivative.
    monkeypatch.setattr(choose, "_SMALL", 0)
    given = problem(70, 1, "key", "write", False)
    reset = np.isin(np.arange(70), [30, 66])

    @jax.jit
    @jax.grad
    def derivative(given):
        outputs, last = matrix_scan(**given, reset=reset, form=form)
        return jnp.sum(jnp.sin(outputs[30:])) + jnp.sum(last)

    clean = derivative(given)
    for name in ("keys", "values", "decay", "read", "write"):
        bad = given | {name: given[name].copy()}
        bad[name][20, 0] = np.nan
        got = derivative(bad)
        for leaf in got:
            np.testing.assert_allclose(got[leaf], clean[leaf], atol=1e-12, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_batch(form, monkeypatch):
    # Makes "auto" use another form for the derivative than for the value.
    monkeypatch.setattr(choose, "_SMALL", 0)
    given = problem(40, 1, "head", "keys", True)
    batch = {name: np.stack([v, np.flip(v, 0)]) for name, v in given.items()}
    run = jax.jit(lambda g: matrix_scan(**g, **FORMS[form]))
    got = jax.jit(jax.vmap(lambda g: matrix_scan(**g, **FORMS[form])))(batch)
    for i in range(2):
        one = run({name: v[i] for name, v in batch.items()})
        assert_close(tuple(v[i] for v in got), one, 1e-13)


def test_sequences_of_a_batch_one_after_the_other(monkeypatch):
    """Values, derivatives of a batch, batches of derivatives, second derivatives."""
    for name in ("_SMALL", "_ALONE"):
        monkeypatch.setattr(choose, name, 0)
    given = problem(40, 1, "head", "keys", True)
    reset, shared = given.pop("reset"), given.pop("initial")
    batch = {n: np.stack([v, 0.7 * v, -0.9 * v]) for n, v in given.items()}

    def loss(form, given, initial):
        outputs, last = matrix_scan(**given, initial=initial, reset=reset, form=form)
        return jnp.sum(jnp.sin(outputs)) + jnp.sum(jnp.cos(last))

    def everything(form):
        each = jax.vmap(ft.partial(loss, form), in_axes=(0, None))
        of_each = jax.grad(ft.partial(loss, form), argnums=(0, 1))

        def along(*at):
            return jnp.sum(jax.jvp(each, at, at)[1])

        def run(*at):
            both = jnp.stack([shared, -shared])
            return (
                each(*at),
                jax.vmap(each, in_axes=(None, 0))(at[0], both),
                jax.grad(lambda *at: jnp.sum(each(*at)), argnums=(0, 1))(*at),
                jax.vmap(of_each, in_axes=(0, None))(*at),
                jax.value_and_grad(along, argnums=(0, 1))(*at),
            )

        return jax.tree.leaves(jax.jit(run)(batch, shared))

    wanted = everything("recurrent")
    for form in ("auto", "chunkwise"):
        assert_close(everything(form), wanted, 1e-11)


@pytest.mark.parametrize("decay, erasure", [("none", "keys"), ("key", "write")])
def test_chunks_that_erase_in_parallel(decay, erasure, monkeypatch):
    """As on a GPU, where transitions are multiplied out."""
    given = problem(42, 1, decay, erasure, True)
    given["reset"][13] = True

    def loss(given):
        outputs, last = matrix_scan(
            **given, reset=reset, form="chunkwise", chunk=8, emit="before"
        )
        return jnp.sum(jnp.sin(outputs)) + jnp.sum(last**2), (outputs, last)

    wanted = loop(**given, emit="before")
    reset = given.pop("reset")
    in_turn, _ = jax.jit(lambda given: jax.grad(loss, has_aux=True)(given))(given)
    parallel = choose.Choice("associative", 4)
    monkeypatch.setattr(implementation, "choose_backend", lambda *_: parallel)
    got, found = jax.jit(lambda given: jax.grad(loss, has_aux=True)(given))(given)
    assert_close(found, wanted, 1e-12)
    assert_close(jax.tree.leaves(got), jax.tree.leaves(in_turn), 1e-12)


@pytest.mark.parametrize(
    "decay, erasure, every", [("head", "none", 3), ("key", "write", 1)]
)
def test_in_windows(decay, erasure, every, monkeypatch):
    given = problem(42 * every, every, decay, erasure, True)
    given["reset"][13] = True
    wanted = loop(**given)
    given = {name: jnp.asarray(v) for name, v in given.items()}
    reset = given.pop("reset")

    def loss(given, form):
        outputs, last = matrix_scan(**given, reset=reset, **FORMS[form])
        return jnp.sum(jnp.sin(outputs)) + jnp.sum(last**2), (outputs, last)

    run = jax.grad(loss, has_aux=True)
    at_once, _ = jax.jit(lambda given: run(given, "recurrent"))(given)
    # Windows of one and a half chunks, and of 14 steps and more.
    for name, value in (("_SMALL", 0), ("_LONG", 0), ("_CHUNK", 8 * every)):
        monkeypatch.setattr(choose, name, value)
    monkeypatch.setattr(choose, "_WINDOW", 1)
    monkeypatch.setattr(choose, "_STEPPED", 14)
    for form in ("recurrent", "chunkwise", "auto"):
        got, found = jax.jit(lambda given, form=form: run(given, form))(given)
        assert_close(found, wanted, 1e-12)
        assert_close(jax.tree.leaves(got), jax.tree.leaves(at_once), 1e-12)

    # A batch as large as the sequence is long, staged before it is differentiated.
    steps = len(given["keys"])
    batch = jax.tree.map(lambda v: jnp.stack([v, *(0 * v,) * (steps - 1)]), given)
    for form in ("recurrent", "auto"):
        losses = jax.jit(jax.vmap(lambda given, form=form: loss(given, form)[0]))
        got = jax.jit(jax.grad(lambda batch, of=losses: jnp.sum(of(batch))))(batch)
        first = jax.tree.map(lambda v: v[0], got)
        assert_close(jax.tree.leaves(first), jax.tree.leaves(at_once), 1e-12)


@pytest.mark.parametrize(
    "form, arrays", [("recurrent", 8), ("chunkwise", 8), ("auto", 11)]
)
def test_windows_bound_the_memory_of_a_gradient(form, arrays):
    @jax.jit
    @jax.grad
    def run(x):
        return jnp.sum(matrix_scan(x, x, x, read=x, form=form)[0] ** 2)

    def memory(steps):
        x = jax.ShapeDtypeStruct((steps, 4, 64), jnp.float32)
        return run.lower(x).compile().memory_analysis().temp_size_in_bytes

    # In numbers a step. Inputs and outputs are 256 each, a state would be 16384, and
    # the summaries of all chunks at once are some 4000. "auto" stores the states before
    # chunks, 512, and what was written, 256.
    grown = (memory(8192) - memory(4096)) / 4096 / 4
    assert grown < arrays * 256, grown


def test_the_form_of_values_and_derivatives(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    small, large = choose._SMALL, choose._SMALL + 1
    found = [
        choose.choose_form("auto", None, *sizes, heads=4, each_key=False, erases=False)
        for sizes in ((4096, 1, small), (4096, 1, large), (31, 1, large))
    ]
    stepped = ("recurrent", None)
    again = [("recurrent", choose._STEPPED), ("chunkwise", 448), stepped]
    assert [choice[0] for choice in found] == [stepped] * 3
    assert [choice[1] for choice in found] == again
    several = [
        choose.choose_form(
            "auto", None, 4096, 1, entries, heads=heads, each_key=False, erases=False
        )
        for heads, entries in ((1, 32 * 32), (1, 64 * 64), (2, 64 * 64), (32, 64 * 64))
    ]
    windows = [choice.derivative.window for choice in several]
    assert windows == [None, 256, 128, 128]
    # A batch of small states stays an axis, as do batches across devices.
    assert [choice.in_turn for choice in several] == [False, True, True, True]
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert not choose.choose_form(
        "auto", None, 4096, 1, 64 * 64, heads=4, each_key=False, erases=False
    ).in_turn
    chunks = [
        choose.choose_form(
            "auto", None, 4096, every, entries, heads=1, each_key=False, erases=erases
        ).chunk
        for every, entries, erases in (
            (1, choose._MEDIUM, False),
            (1, choose._MEDIUM + 1, False),
            (1, choose._MEDIUM + 1, True),
            (3, large, False),
        )
    ]
    assert chunks == [32, 64, 32, 30]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    on_gpu = choose.choose_form(
        "auto", None, 4096, 1, small, heads=1, each_key=False, erases=False
    )
    assert on_gpu[:2] == (("chunkwise", None),) * 2


def test_strong_repeated_erasure_does_not_overflow():
    """Equal keys at full strength: the powers of a series for the inverse overflow."""
    steps = 128
    key = np.full((steps, 1, K), K**-0.5, np.float32)
    values = np.ones((steps, 1, V), np.float32)
    run = jax.jit(lambda k, v: matrix_scan(k, 2 * k, v, read=k, form="chunkwise"))
    outputs, _ = run(key, values)
    # The state flips between 2 v and 0, up to the rounded length of the key.
    wanted = np.where(np.arange(steps) % 2 == 0, 2.0, 0.0)
    np.testing.assert_allclose(outputs[:, 0, 0], wanted, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtypes(dtype):
    given = problem(40, 1, "head", "keys", False)
    wanted = loop(**given)
    given = {name: jnp.asarray(v, dtype) for name, v in given.items()}
    for form in FORMS.values():
        got = jax.jit(lambda g: matrix_scan(**g, **form))(given)
        assert {v.dtype for v in got} == {jnp.dtype(dtype)}
        tolerance = 5e-2 if dtype == "bfloat16" else 1e-5
        got = tuple(v.astype(jnp.float64) for v in got)
        assert_close(got, wanted, tolerance)


BAD = {
    "integers": ({"keys": jnp.ones((4, H, K), int)}, TypeError, "`keys` must be"),
    "batch": ({"keys": jnp.ones((2, 4, H, K))}, ValueError, "use `jax.vmap`"),
    "values": ({"values": jnp.ones((5, H, V))}, ValueError, "`values` has shape"),
    "decay": ({"decay": jnp.ones((4, K))}, ValueError, "`decay` has shape (4, 5)"),
    "read": ({"read": jnp.ones((4, H, V))}, ValueError, "`read` has shape"),
    "write": ({"write": jnp.ones((4, H, K))}, ValueError, "without `read`"),
    "initial": ({"initial": jnp.ones((H, V, K))}, ValueError, "`initial` has shape"),
    "queries": ({"queries": jnp.ones((3, H, K))}, ValueError, "Q divides T = 4"),
    "reset": ({"reset": jnp.ones(5, bool)}, ValueError, "`reset` has shape (5,)"),
    "emit": ({"emit": "never"}, ValueError, "unknown `emit` 'never'"),
    "form": ({"form": "parallel"}, ValueError, "recurrent, chunkwise"),
    "chunk": ({"chunk": 0}, ValueError, "positive multiple"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses(case):
    wrong, error, message = BAD[case]
    given = {
        "queries": jnp.ones((4, H, K)),
        "keys": jnp.ones((4, H, K)),
        "values": jnp.ones((4, H, V)),
    }
    with pytest.raises(error, match=re.escape(message)):
        matrix_scan(**given | wrong)
