"""The layers of `linear`: chunks, bare scans, memax, and long sequences."""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax

import linear
import pararnn

from ._case import Case, Settings
from ._timing import compile_all, memory_ratio, time_in_turn

TABLES = {
    "matrix_scan": "`pararnn.matrix_scan`, 4 heads, K = V = 64: the recurrent form, "
    "the chunkwise form and the default, and the same recurrence as a plain `lax.scan` "
    "of einsums that JAX differentiates. Ratios are to the recurrent form, or to the "
    "plain loop where the column says so, of the value and of value and gradient. "
    "`floor` is the time of the four matrix products that every chunkwise form needs, "
    "in the fastest of six ways: chunks of 16, 32 and 64 steps, one after the other or "
    "all at once.",
    "batches": "`pararnn.matrix_scan`, 4 heads, K = V = 64, by default: 8 sequences "
    "by `vmap`, over 8 times one of them.",
    "layers": "Every layer, `d_model` = 64, one sequence.",
    "bare scans": "Diagonal layers against their projections and a `lax.scan` written "
    "by hand, `d_model` = 64.",
    "memax": "Layers that memax has too, at the same sizes and without the short "
    "convolutions, which it lacks: `ratio` is our time over theirs.",
    "windows": "Sequences in windows, as the layers take them on a CPU if they are "
    "long or their steps large, against all steps at once: time of the value, time of "
    "value and gradient, and temporary memory of the latter.",
    "long layers": "Time at great length, as a ratio to that of a sequence of T / 8, "
    "over 8.",
}
D = 64


def cases(settings: Settings) -> Iterator[Case]:
    for steps in settings.steps(4096):
        for kind in KINDS:
            yield Case(
                "matrix_scan",
                {"transition": kind, "T": steps},
                lambda k=kind, t=steps: _measure_forms(k, t, settings),
            )
        for kind in KINDS:
            yield Case(
                "batches",
                {"transition": kind, "T": steps},
                lambda k=kind, t=steps: _measure_batches(k, t, settings),
            )
        for name in linear.LAYERS:
            yield Case(
                "layers",
                {"layer": name, "T": steps},
                lambda n=name, t=steps: _measure_layer(n, t, settings),
            )
        for name in BARE:
            yield Case(
                "bare scans",
                {"layer": name, "T": steps},
                lambda n=name, t=steps: _measure_against_bare(n, t, settings),
            )
        for name in PEERS:
            yield Case(
                "memax",
                {"layer": name, "T": steps},
                lambda n=name, t=steps: _measure_peer(n, t, settings),
            )
    for length, names in WINDOWED.items():
        for steps in settings.steps(length):
            for name in names:
                yield Case(
                    "windows",
                    {"layer": name, "T": steps},
                    lambda n=name, t=steps: _measure_windows(n, t, settings),
                )
    for steps in settings.steps(131072):
        for name in ("lru", "min_gru", "rg_lru", "deltanet", "mamba2", "gla"):
            yield Case(
                "long layers",
                {"layer": name, "T": steps},
                lambda n=name, t=steps: _measure_length(n, t, settings),
            )


def _normal(*shape: int, seed: int = 0):
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(values)


def _with_gradient(fn: Callable) -> Callable:
    """The outputs' sum of squares, with its gradient in all arguments."""

    def loss(*args):
        return jnp.sum(fn(*args)[0] ** 2)

    def run(*args):
        arrays, static = eqx.partition(args, eqx.is_inexact_array)
        return jax.value_and_grad(lambda a: loss(*eqx.combine(a, static)))(arrays)

    return run


def _compare(programs: dict[str, Callable], arrays, steps: int, settings: Settings):
    """Compile functions of a layer's arrays and one sequence, and time them in turn.

    Each is also timed with its gradient, as `"name v&g"`.
    """
    programs = programs | {f"{n} v&g": _with_gradient(f) for n, f in programs.items()}
    xs = _normal(steps, D)
    compiled = compile_all(programs, arrays, xs)
    return compiled, time_in_turn(compiled, arrays, xs, quick=settings.quick)


# ---- chunks against steps

KINDS = {
    "delta rule": (False, False, True),
    "gated delta rule": (True, False, True),
    "decay for each head": (True, False, False),
    "decay for each key": (False, True, False),
    "decay for each key, delta rule": (False, True, True),
}


def _arguments(kind: str, *shape: int):
    """Queries, keys, values and decays, `[*shape, 4, 64]`."""
    heads, size = 4, 64
    q, k, v = (_normal(*shape, heads, size, seed=i) for i in range(3))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    gate = jax.nn.sigmoid(3 + _normal(*shape, heads, size, seed=3))
    each_head, each_key, _ = KINDS[kind]
    return q, k, v, gate[..., 0] if each_head else gate if each_key else None


def _measure_batches(kind: str, steps: int, settings: Settings):
    erases, count = KINDS[kind][2], 8

    def one(q, k, v, decay):
        return pararnn.matrix_scan(q, k, v, decay, read=k if erases else None)

    batch = _arguments(kind, count, steps)
    first = jax.tree.map(lambda v: v[0], batch)
    programs: dict[str, Callable] = {
        "batch": lambda batch, first: jax.vmap(one)(*batch),
        "one": lambda batch, first: one(*first),
        "batch v&g": lambda batch, first: _with_gradient(jax.vmap(one))(*batch),
        "one v&g": lambda batch, first: _with_gradient(one)(*first),
    }
    compiled = compile_all(programs, batch, first)
    times = time_in_turn(compiled, batch, first, quick=settings.quick)

    def of_each(ratio):
        return {name: value / count for name, value in ratio.items()}

    return {
        "one ms": times.ms("one"),
        "batch ratio": of_each(times.ratio("batch", "one")),
        "one v&g ms": times.ms("one v&g"),
        "batch v&g ratio": of_each(times.ratio("batch v&g", "one v&g")),
        "batch v&g temporary MB": compiled["batch v&g"].temp_bytes / 1e6,
    }


def _measure_forms(kind: str, steps: int, settings: Settings):
    q, k, v, decay = _arguments(kind, steps)
    erases = KINDS[kind][2]

    def run(form):
        def fn(q, k, v, decay):
            read = k if erases else None
            return pararnn.matrix_scan(q, k, v, decay, read=read, form=form)

        return fn

    forms = {n: run(n) for n in ("recurrent", "chunkwise", "auto")}
    forms["plain"] = functools.partial(_plain_loop, erases)
    floors = {
        f"floor {fn.__name__} {n}": functools.partial(fn, n)
        for fn in (_products_at_once, _products_in_turn)
        for n in (16, 32, 64)
    }
    gradients = {f"{n} v&g": _with_gradient(fn) for n, fn in forms.items()}
    programs = compile_all(forms | gradients | floors, q, k, v, decay)
    times = time_in_turn(programs, q, k, v, decay, quick=settings.quick)
    plain = programs["plain v&g"]
    return {
        "recurrent ms": times.ms("recurrent"),
        "chunkwise ratio": times.ratio("chunkwise", "recurrent"),
        "floor ratio": times.ratio(min(floors, key=times.ms), "recurrent"),
        "auto over plain": times.ratio("auto", "plain"),
        "recurrent v&g ms": times.ms("recurrent v&g"),
        "chunkwise v&g ratio": times.ratio("chunkwise v&g", "recurrent v&g"),
        "auto v&g ratio": times.ratio("auto v&g", "recurrent v&g"),
        "chunkwise v&g over plain": times.ratio("chunkwise v&g", "plain v&g"),
        "auto v&g over plain": times.ratio("auto v&g", "plain v&g"),
        "auto v&g memory over plain": memory_ratio(programs["auto v&g"], plain),
    }


def _plain_loop(erases: bool, q, k, v, decay):
    """The recurrence as its equation says."""

    def step(state, at_t):
        q, k, v, decay = at_t
        if erases:
            v = v - jnp.einsum("hkv,hk->hv", state, k)
        if decay is not None:
            state = state * decay.reshape(decay.shape + (1,) * (3 - decay.ndim))
        state = state + jnp.einsum("hk,hv->hkv", k, v)
        return state, jnp.einsum("hkv,hk->hv", state, q)

    start = jnp.zeros((*k.shape[1:], v.shape[-1]), v.dtype)
    last, outputs = lax.scan(step, start, (q, k, v, decay))
    return outputs, last


def _products_at_once(length: int, q, k, v, decay):
    """The products of all chunks: scores, what they read, writes, reads of the state.

    In place of the state that a chunk starts from, it reads what it writes itself.
    """
    steps, heads, size = q.shape
    shape = steps // length, length, heads, size
    q, k, v = (x.reshape(shape).transpose(2, 0, 1, 3) for x in (q, k, v))
    scores = jnp.einsum("hcik,hcjk->hcij", q, k)
    written = jnp.einsum("hcik,hciv->hckv", k, v)
    within = jnp.einsum("hcij,hcjv->hciv", scores, v)
    return within + jnp.einsum("hcik,hckv->hciv", q, written)


def _products_in_turn(length: int, q, k, v, decay):
    """The same, one chunk after the other, from the cache."""

    def step(state, chunk):
        q, k, v = chunk
        scores = jnp.einsum("ihk,jhk->hij", q, k)
        output = jnp.einsum("hij,jhv->ihv", scores, v)
        output = output + jnp.einsum("ihk,hkv->ihv", q, state)
        return state + jnp.einsum("ihk,ihv->hkv", k, v), output

    steps, heads, size = q.shape
    shape = steps // length, length, heads, size
    start = jnp.zeros((heads, size, size), q.dtype)
    return lax.scan(step, start, tuple(x.reshape(shape) for x in (q, k, v)))[1]


# ---- layers against bare scans


def _scan(a, b):
    def step(h, at_t):
        a, b = at_t
        h = a * h + b
        return h, h

    a = jnp.broadcast_to(a, b.shape)
    return lax.scan(step, jnp.zeros_like(b[0]), (a, b))[1]


def _bare_lru(p, xs):
    drive = lax.complex(xs @ p.B_re.T, xs @ p.B_im.T)
    a = lax.complex(jnp.cos(p.theta_log), jnp.sin(p.theta_log)) * 0.9
    states = _scan(a[None], drive)
    return states.real @ p.C_re.T - states.imag @ p.C_im.T


def _bare_s5(p, xs):
    drive = lax.complex(xs @ p.B_re.T, xs @ p.B_im.T)
    a = lax.complex(jnp.cos(p.A_imag), jnp.sin(p.A_imag)) * 0.9
    states = _scan(a[None], drive)
    return states.real @ p.C_re.T - states.imag @ p.C_im.T


def _bare_s4d(p, xs):
    drive = xs[..., None] * lax.complex(p.B_re, p.B_im)[None]
    a = lax.complex(jnp.cos(p.A_imag), jnp.sin(p.A_imag)) * 0.9
    states = _scan(a[None], drive)
    return jnp.sum(p.C_re[None] * states.real - p.C_im[None] * states.imag, -1)


def _bare_min_gru(p, xs):
    z = jax.nn.sigmoid(xs @ p.W_z.T)
    return _scan(1 - z, z * jax.nn.sigmoid(xs @ p.W_h.T)) @ p.W_out.T


def _bare_min_lstm(p, xs):
    f, i = jax.nn.sigmoid(xs @ p.W_f.T), jax.nn.sigmoid(xs @ p.W_i.T)
    drive = i / (f + i) * jax.nn.sigmoid(xs @ p.W_h.T)
    return _scan(f / (f + i), drive) @ p.W_out.T


def _bare_rg_lru(p, xs):
    r, i = jax.nn.sigmoid(xs @ p.W_a[0].T), jax.nn.sigmoid(xs @ p.W_x[0].T)
    a = jnp.exp(-8 * r * p.Lambda[None])
    return _scan(a, jnp.sqrt(1 - a * a) * i * xs)


def _bare_mamba(p, xs):
    u, z = jnp.split(xs @ p.W_in.T, 2, -1)
    u = jax.nn.silu(u * p.conv_weight[:, 0][None])
    rank, n = p.W_dt.shape[1], p.d_state
    delta, B, C = jnp.split(u @ p.W_x.T, [rank, rank + n], -1)
    dt = jax.nn.softplus(delta @ p.W_dt.T)
    a = jnp.exp(-dt[..., None] * jnp.exp(p.A_log)[None])
    states = _scan(a, (dt * u)[..., None] * B[:, None])
    return (jnp.sum(states * C[:, None], -1) * jax.nn.silu(z)) @ p.W_out.T


BARE = {
    "lru": _bare_lru,
    "s5": _bare_s5,
    "s4d": _bare_s4d,
    "min_gru": _bare_min_gru,
    "min_lstm": _bare_min_lstm,
    "rg_lru": _bare_rg_lru,
    "mamba": _bare_mamba,
}


def _measure_layer(name: str, steps: int, settings: Settings):
    layer = linear.make_layer(name, D, key=jr.key(0))
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)

    def run(arrays, xs):
        return eqx.combine(arrays, static)(xs)

    xs = _normal(steps, D)
    programs = compile_all({"value": run, "v&g": _with_gradient(run)}, arrays, xs)
    times = time_in_turn(programs, arrays, xs, quick=settings.quick)
    return {
        "parameters": sum(v.size for v in jax.tree.leaves(arrays)),
        "value ms": times.ms("value"),
        "v&g ms": times.ms("v&g"),
        "v&g temporary MB": programs["v&g"].temp_bytes / 1e6,
    }


def _measure_against_bare(name: str, steps: int, settings: Settings):
    # The layer as a scan too, like what it is compared with.
    options = {"form": "scan", "d_state": 16} if name == "s4d" else {}
    layer = linear.make_layer(name, D, key=jr.key(0), **options)
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)

    def ours(arrays, xs):
        return eqx.combine(arrays, static)(xs)

    def bare(arrays, xs):
        return (BARE[name](eqx.combine(arrays, static), xs),)

    _, times = _compare({"ours": ours, "bare": bare}, arrays, steps, settings)
    return {
        "ours ms": times.ms("ours"),
        "bare ms": times.ms("bare"),
        "ratio": times.ratio("ours", "bare"),
        "v&g ratio": times.ratio("ours v&g", "bare v&g"),
    }


# ---- layers against memax

PLAIN = {"convolution": False}
PEERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # our layer: their module and class, their sizes, our options
    "lru": ("lru", "LRU", {"recurrent_size": D}, {"d_state": D}),
    "mamba": ("s6", "S6", {"recurrent_size": D}, PLAIN | {"expand": 1, "d_state": 1}),
    "deltanet": ("delta", "DeltaNet", {"recurrent_size": 16}, PLAIN | {"d_key": 16}),
    "deltaproduct": (
        "deltap",
        "DeltaProduct",
        {"recurrent_size": 16, "rank": 2},
        PLAIN | {"d_key": 16},
    ),
    "gated_deltanet": ("gdn", "GDN", {"recurrent_size": 16}, PLAIN | {"d_key": 16}),
}


def _measure_peer(name: str, steps: int, settings: Settings):
    module, cls, sizes, options = PEERS[name]
    theirs = getattr(importlib.import_module(f"memax.equinox.semigroups.{module}"), cls)
    theirs = theirs(hidden_size=D, key=jr.key(0), **sizes)
    if "d_key" in options:
        options = options | {"d_value": options["d_key"]}
    ours = linear.make_layer(name, D, key=jr.key(0), **options)
    start = jnp.zeros(steps, bool)
    arrays, static = eqx.partition((ours, theirs), eqx.is_inexact_array)

    def run_ours(arrays, xs):
        return eqx.combine(arrays, static)[0](xs, reset=start)

    def run_theirs(arrays, xs):
        layer = eqx.combine(arrays, static)[1]
        return layer(layer.initialize_carry(), (xs, start))[::-1]

    programs = {"ours": run_ours, "theirs": run_theirs}
    compiled, times = _compare(programs, arrays, steps, settings)
    return {
        "ours ms": times.ms("ours"),
        "memax ms": times.ms("theirs"),
        "ratio": times.ratio("ours", "theirs"),
        "v&g ratio": times.ratio("ours v&g", "theirs v&g"),
        "v&g memory ratio": memory_ratio(compiled["ours v&g"], compiled["theirs v&g"]),
    }


# ---- long sequences

WINDOWED = {
    4096: ("unitary", "block_lrnn", "lssl", "commutative_monoid"),
    65536: ("lru", "s5", "min_gru", "rg_lru", "gla", "deltanet", "mamba"),
}


def _measure_windows(name: str, steps: int, settings: Settings):
    layer = linear.make_layer(name, D, key=jr.key(0))
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)

    def in_windows(arrays, xs):
        return eqx.combine(arrays, static)(xs)

    def at_once(arrays, xs):
        layer = eqx.combine(arrays, static)
        return layer.mix(xs, layer.init_state(), None)

    programs = {"windows": in_windows, "at once": at_once}
    compiled, times = _compare(programs, arrays, steps, settings)
    return {
        "at once ms": times.ms("at once"),
        "ratio": times.ratio("windows", "at once"),
        "v&g ratio": times.ratio("windows v&g", "at once v&g"),
        "at once v&g MB": compiled["at once v&g"].temp_bytes / 1e6,
        "v&g memory ratio": memory_ratio(
            compiled["windows v&g"], compiled["at once v&g"]
        ),
    }


def _measure_length(name: str, steps: int, settings: Settings):
    layer = linear.make_layer(name, D, key=jr.key(0))
    arrays, static = eqx.partition(layer, eqx.is_inexact_array)
    run = _with_gradient(lambda arrays, xs: eqx.combine(arrays, static)(xs))
    short, long = _normal(steps // 8, D), _normal(steps, D)
    programs = compile_all(
        {
            "long": lambda arrays, short, long: run(arrays, long),
            "short": lambda arrays, short, long: run(arrays, short),
        },
        arrays,
        short,
        long,
    )
    times = time_in_turn(programs, arrays, short, long, quick=settings.quick)
    ratio = times.ratio("long", "short")
    return {
        "v&g ms": times.ms("long"),
        "us a step": 1e3 * times.ms("long") / steps,
        "ratio over length": {k: v / 8 for k, v in ratio.items()},
        "v&g temporary bytes a step": programs["long"].temp_bytes / steps,
    }
