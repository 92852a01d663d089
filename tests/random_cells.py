"""Random functions of a state, made of many operators, and the true pattern of each.

`python -m tests.random_cells 2000` looks for derivatives outside the blocks found in
2000 of them; the tests do so for a few.
"""

import functools as ft
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from pararnn import jacobian_structure

N = 8


@jax.custom_jvp
def spike(v):
    return jnp.where(v > 0, 1.0, 0.0)


@spike.defjvp
def _(primals, tangents):
    return spike(*primals), tangents[0] / (1 + primals[0] ** 2)


@jax.custom_jvp
def mixing(v):
    return jnp.floor(v)


@mixing.defjvp
def _(primals, tangents):
    return mixing(*primals), tangents[0] + 0.3 * jnp.roll(tangents[0], 1)


@jax.custom_vjp
def backwards_only(v):
    return v * jnp.roll(v, 2)


backwards_only.defvjp(lambda v: (backwards_only(v), v), lambda v, t: (t * v,))


def until_small(x):
    def going(carry):
        return (carry[0] < 5) & (jnp.sum(carry[1] * carry[1]) > 0.5)

    def halve(carry):
        return carry[0] + 1, 0.5 * carry[1] * carry[1][0]

    return lax.while_loop(going, halve, (0, x))[1]


def pool(m, operation, start, window):
    return lax.reduce_window(m, start, operation, window, (1, 1), "SAME")


# From a matrix and an axis to an array that broadcasts to the matrix.
OF_MATRICES = {
    "sort": jnp.sort,
    "cumsum": jnp.cumsum,
    "cumprod": jnp.cumprod,
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "ordered": lambda m, a: jnp.take_along_axis(m, jnp.argsort(m, a), a),
    **{
        f.__name__: lambda m, a, f=f: f(m, axis=a, keepdims=True)
        for f in (
            *(jnp.sum, jnp.max, jnp.min, jnp.prod, jnp.mean, jnp.var, jnp.std),
            jnp.median,
        )
    },
    "quantile": lambda m, a: jnp.quantile(m, 0.3, axis=a, keepdims=True),
    "logsumexp": lambda m, a: jax.nn.logsumexp(m, a, keepdims=True),
    "cummax": lambda m, a: lax.cummax(m, a),
    "cummin": lambda m, a: lax.cummin(m, a, reverse=True),
    "cumlogsumexp": lambda m, a: lax.cumlogsumexp(m, a),
    "cumsum back": lambda m, a: lax.cumsum(m, a, reverse=True),
    "norm": lambda m, a: m / jnp.linalg.norm(m, axis=a, keepdims=True),
    "fft": lambda m, a: jnp.fft.fft(m, axis=a).imag,
    "rfft": lambda m, a: jnp.fft.irfft(jnp.fft.rfft(m, axis=a), axis=a, n=m.shape[a]),
    "fft2": lambda m, a: jnp.fft.fft2(m).real,
    "associative scan": lambda m, a: lax.associative_scan(
        lambda x, y: x * y + y, m, axis=a
    ),
    "top_k": lambda m, a: lax.top_k(m, 1)[0],
    "flip": jnp.flip,
    "one hot of argmax": lambda m, a: (
        m * jax.nn.one_hot(jnp.argmax(m, a), m.shape[a], axis=a)
    ),
    "scan": lambda m, a: lax.scan(
        lambda c, x: (jnp.sin(c) + x, c * x), jnp.zeros(m.shape[1]), m
    )[1],
    "scan back": lambda m, a: lax.scan(
        lambda c, x: (c * x, c), jnp.ones(m.shape[1]), m, reverse=True
    )[1],
    "map": lambda m, a: lax.map(lambda x: x * x.sum(), m),
    "sort of each": lambda m, a: jax.vmap(jnp.sort)(m),
    "index of each": lambda m, a: jax.vmap(lambda x: x + x[jnp.argmax(x)])(m),
    "cond of each": lambda m, a: jax.vmap(
        lambda x: lax.cond(x[0] > 0, lambda x: x * x[1], jnp.tanh, x)
    )(m),
    "while of each": lambda m, a: jax.vmap(until_small)(m),
    "set of each": lambda m, a: jax.vmap(lambda x: x.at[jnp.argmin(x)].set(0.0))(m),
    "solve of each": lambda m, a: jax.vmap(
        lambda x: jnp.linalg.solve(jnp.eye(m.shape[1]) + x[:, None] * x[None], x)
    )(m),
    "outer": lambda m, a: m[:, :1] * m[:1, :],
    "transpose": lambda m, a: m.T.reshape(m.shape),
    "triangular product": lambda m, a: jnp.triu(jnp.ones((m.shape[0],) * 2)) @ m,
    "gram": lambda m, a: (m @ m.T) @ m,
    "attention": lambda m, a: jax.nn.softmax(jnp.tril(m @ m.T)) @ m,
    "diff": lambda m, a: jnp.pad(jnp.diff(m, axis=1), ((0, 0), (1, 0))),
    "max pool": lambda m, a: pool(m, lax.max, -jnp.inf, (1, 2)),
    "sum pool": lambda m, a: pool(m, lax.add, 0.0, (2, 1)),
    "triangular solve": lambda m, a: jax.scipy.linalg.solve_triangular(
        jnp.eye(m.shape[0]) + 0.2, m
    ),
    "solve": lambda m, a: jnp.linalg.solve(jnp.eye(m.shape[0]) * 2 + 0.1 * m @ m.T, m),
    "cholesky": lambda m, a: jnp.linalg.cholesky(jnp.eye(m.shape[0]) + m @ m.T) @ m,
    "qr": lambda m, a: jnp.linalg.qr(m.T @ m + jnp.eye(m.shape[1]))[0][:1, :],
}
SWAPPED = np.array([1, 0, 3, 2, 5, 4, 7, 6])
# From a vector of N numbers to another.
OF_VECTORS = {
    "tanh": lambda v: jnp.tanh(1.3 * v + 0.2),
    "softplus": jax.nn.softplus,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "erf": lax.erf,
    "integer power": lambda v: v**3 - v**-2,
    "power": lambda v: jnp.abs(v) ** 1.7 * 2.0**v,
    "arctan2": lambda v: jnp.arctan2(v, v[::-1]),
    "round": lambda v: jnp.round(v) + jnp.floor(v) * v,
    "stop_gradient": lambda v: lax.stop_gradient(v[::-1]) * v,
    "custom_jvp": spike,
    "custom_jvp that mixes": mixing,
    "custom_vjp": backwards_only,
    "custom_vjp in a loop": lambda v: lax.fori_loop(
        0, 2, lambda i, v: backwards_only(v), v
    ),
    "clip": lambda v: jnp.clip(v, -0.5, jnp.roll(v, 1)),
    "sign": lambda v: jnp.sign(v[::-1]) * v,
    "jit": jax.jit(lambda v: jnp.sin(v) * jnp.roll(v, 2)),
    "checkpoint": jax.checkpoint(lambda v: jnp.sin(v) * jnp.cos(v[::-1])),
    "logaddexp": lambda v: jnp.logaddexp(v, jnp.roll(v, 3)),
    "own index": lambda v: v * v[jnp.argmax(v)],
    "own slice": lambda v: (
        v + jnp.tile(lax.dynamic_slice(v, (jnp.argmin(v),), (2,)), N // 2)
    ),
    "own update": lambda v: lax.dynamic_update_slice(v, v[:2] * 2, (jnp.argmax(v),)),
    "update": lambda v: lax.dynamic_update_slice(v, v[:2] * 2, (jnp.array(3),)),
    "interpolation": lambda v: jnp.interp(v, jnp.arange(5.0), jnp.arange(5.0) ** 2),
    "searchsorted": lambda v: v * jnp.searchsorted(jnp.arange(4.0), v).astype(v.dtype),
    "add at own index": lambda v: v.at[jnp.argmax(v)].add(v[0]),
    "set at own index": lambda v: v.at[jnp.argmax(v)].set(1.0),
    "convolve": lambda v: jnp.convolve(v, jnp.array([1.0, 2.0, 1.0]), mode="same"),
    "convolve itself": lambda v: jnp.convolve(v, v[:3], mode="same"),
    "polynomial": lambda v: jnp.polyval(v[:3], v),
    "matrix exponential": lambda v: (
        jax.scipy.linalg.expm(0.1 * v[:4].reshape(2, 2)).reshape(-1).repeat(2) * v
    ),
    "loop": lambda v: lax.fori_loop(0, 3, lambda i, w: w.at[i].add(w[i + 4] * v[i]), v),
    "loop to own end": lambda v: lax.fori_loop(
        0, jnp.argmax(v), lambda i, w: w.at[i].add(w[(i + 4) % N]), v
    ),
    "rolling loop": lambda v: lax.fori_loop(0, 2, lambda i, w: jnp.roll(w, 2) * v, v),
    "long scan": lambda v: lax.scan(
        lambda c, t: (jnp.where(t % 2 == 0, c * 0.99, c[SWAPPED]), None),
        v,
        jnp.arange(30000) % 7,
    )[0],
    "long map": lambda v: jnp.concatenate(
        [lax.map(lambda x: jnp.sin(x) * x, jnp.tile(v, 3000))[: N - 1], v[:1]]
    ),
    "gammaln": lambda v: jax.scipy.special.gammaln(jnp.abs(v) + 1),
    "nan_to_num": lambda v: jnp.where(jnp.isnan(v), 0.0, jnp.nan_to_num(v)),
    "bits": lambda v: (
        lax.bitcast_convert_type(lax.bitcast_convert_type(v, jnp.int64), v.dtype) + v
    ),
    "casts": lambda v: (
        v.astype(jnp.float32).astype(v.dtype) + v.astype(int).astype(v.dtype)
    ),
    "kron": lambda v: jnp.kron(v[:2], v[2:6]),
    "inner loop": lambda v: lax.scan(
        lambda c, x: (jnp.tanh(c + x), x * c), v, jnp.ones((4, N))
    )[0],
    "nested vmap": lambda v: jax.vmap(jax.vmap(lambda x: x * x))(
        v.reshape(4, 2)
    ).reshape(-1),
    "dropout": lambda v: jnp.where(
        jax.random.bernoulli(jax.random.key(3), shape=(N,)), jnp.roll(v, 1), v
    ),
    "layer norm": lambda v: (v - v.mean()) / jnp.sqrt(v.var() + 1e-3),
}


def dense(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape))


def shape_of(rng):
    rows = int(rng.choice([2, 4]))
    return rows, N // rows


def of_matrix(function):
    def make(rng):
        shape, axis = shape_of(rng), int(rng.integers(2))
        return lambda v: jnp.broadcast_to(
            function(v.reshape(shape), axis), shape
        ).reshape(-1)

    return make


def two_wheres(rng):
    """Two calls of one jitted function, with different constants."""
    first, second = rng.integers(1, N, 2)
    a, b = map(int, rng.integers(0, N, 2))
    return lambda v: jnp.where(
        jnp.arange(N) < first,
        jnp.roll(v, a),
        jnp.where(jnp.arange(N) < second, jnp.roll(v, b), v * v),
    )


def take_along(rng):
    shape = shape_of(rng)
    at = rng.integers(0, shape[1], shape)
    return lambda v: jnp.take_along_axis(v.reshape(shape), at, 1).reshape(-1)


def switch(rng):
    number, known = int(rng.integers(3)), bool(rng.integers(2))
    branches = [jnp.sin, lambda v: jnp.roll(v, 1), lambda v: v * v[0]]
    if known:
        return lambda v: lax.switch(jnp.asarray(number), branches, v)
    return lambda v: lax.switch(jnp.argmax(v) % 3, branches, v)


def masked(rng):
    weights, mask = dense(rng, N, N), jnp.asarray(rng.random((N, N)) < 0.2)
    return lambda v: jnp.where(mask, weights, 0.0) @ v


def heads(rng):
    rows, columns = shape_of(rng)
    weights = dense(rng, rows, columns, columns)
    return lambda v: jnp.einsum(
        "nij,nj->ni", weights, v.reshape(rows, columns)
    ).reshape(-1)


def columns(rng):
    shape = shape_of(rng)
    weights = dense(rng, shape[0], shape[0])
    return lambda v: jnp.einsum("ik,kj->ij", weights, v.reshape(shape)).reshape(-1)


def convolution(rng):
    channels = int(rng.choice([1, 2]))
    groups, dilation = int(rng.choice([1, channels])), int(rng.integers(1, 3))
    kernel = dense(rng, channels, channels // groups, 3)
    return lambda v: lax.conv_general_dilated(
        v.reshape(1, channels, N // channels),
        *(kernel, (1,), "SAME"),
        rhs_dilation=(dilation,),
        feature_group_count=groups,
    ).reshape(-1)


def images(rng):
    kernel = dense(rng, 1, 2, 2, 1)
    layout = ("NHWC", "HWIO", "NHWC")
    return lambda v: lax.conv_general_dilated(
        v.reshape(2, 2, 2, 1),
        *(kernel.transpose(1, 2, 3, 0), (1, 1), "SAME"),
        dimension_numbers=layout,
    ).reshape(-1)


def transposed_convolution(rng):
    kernel = dense(rng, 1, 1, 2)
    return lambda v: lax.conv_general_dilated(
        v.reshape(1, 1, N), kernel, (1,), [(0, 0)], lhs_dilation=(2,)
    ).reshape(-1)[:N]


def strides(rng):
    kernel = dense(rng, 2, 1, 2)
    return lambda v: lax.conv_general_dilated(
        v.reshape(1, 1, N), kernel, (2,), "SAME"
    ).reshape(-1)


def scattered_rows(rng):
    shape = shape_of(rng)
    at = jnp.asarray(rng.integers(0, shape[0], 3))
    return lambda v: v.reshape(shape).at[at].add(v.reshape(shape)[:1]).reshape(-1)


def segments(rng):
    at = rng.integers(0, 3, N)
    return lambda v: jax.ops.segment_sum(v, at, 3)[jnp.asarray(at)]


def complex_numbers(rng):
    factor = lax.complex(dense(rng, N // 2), dense(rng, N // 2))

    def f(v):
        z = lax.complex(v[: N // 2], v[N // 2 :]) * factor
        return jnp.concatenate([z.real, jnp.abs(z)])

    return f


def conjugates(rng):
    matrix = lax.complex(dense(rng, 2, 2), dense(rng, 2, 2))

    def f(v):
        z = lax.complex(v[:4], v[4:]).reshape(2, 2)
        z = jnp.conj(matrix @ z).reshape(-1)
        return jnp.concatenate([z.real, z.imag])

    return f


def padding(rng):
    low, gap = int(rng.integers(-2, 3)), int(rng.integers(0, 3))
    return lambda v: jnp.resize(lax.pad(v, 0.0, ((low, 1, gap),)), (N,)) + v


def at_known(update):
    """Updates at random known indices, some of them out of bounds."""

    def make(rng):
        at = jnp.asarray(rng.integers(0, N + 2, 5))
        return lambda v: update(v.at[at], jnp.sin(v[:5]))

    return make


def product_at(rng):
    at = jnp.asarray(rng.permutation(N)[:5])
    return lambda v: v.at[at].multiply(v[:5], unique_indices=True)


def with_index(function, low=0, high=N):
    def make(rng):
        at = rng.integers(low, high, N)
        return lambda v: function(v, at)

    return make


def with_number(function, low=0):
    def make(rng):
        number = int(rng.integers(low, N))
        return lambda v: function(v, number)

    return make


def with_matrix(function):
    def make(rng):
        matrix = dense(rng, N, N)
        return lambda v: function(v, matrix)

    return make


def with_mask(function, *shape):
    def make(rng):
        mask = jnp.asarray(rng.random(shape) < 0.3)
        return lambda v: function(v, mask)

    return make


def cond(rng):
    which = bool(rng.integers(2))
    return lambda v: lax.cond(jnp.asarray(which), lambda v: v, lambda v: v[::-1], v)


# From random choices to a function of a vector.
OPERATORS = {
    **{name: of_matrix(function) for name, function in OF_MATRICES.items()},
    **{name: lambda rng, f=function: f for name, function in OF_VECTORS.items()},
    "two wheres": two_wheres,
    "take": with_index(lambda v, at: v[jnp.asarray(at)] * v, -N),
    "take or fill": with_index(
        lambda v, at: jnp.take(v, at, mode="fill", fill_value=0.0) + v, 0, 2 * N
    ),
    "take and clip": with_index(lambda v, at: jnp.take(v, at, mode="clip"), 0, 2 * N),
    "take of take": with_index(lambda v, at: v[jnp.asarray(at)[jnp.asarray(at)]]),
    "one hot": with_index(lambda v, at: jax.nn.one_hot(at, N) @ v),
    "take along axis": take_along,
    "look-up": with_matrix(lambda v, m: m[jnp.argmax(v)] * v),
    "switch": switch,
    "cond": cond,
    "roll": with_number(jnp.roll),
    "split": with_number(lambda v, k: jnp.concatenate(jnp.split(v, [k])[::-1]), 1),
    "insert": with_number(lambda v, k: jnp.insert(v, k, v[0])[:N]),
    "stack": lambda rng: (
        lambda v: jnp.stack([v[::2], v[1::2]]).reshape(-1) + jnp.tile(v[:2], N // 2)
    ),
    "matrix": with_matrix(lambda v, m: m @ v),
    "masked matrix": masked,
    "mask as a matrix": with_mask(lambda v, m: m.astype(float) @ v, N, N),
    "mask": with_mask(lambda v, m: m.astype(float) * jnp.roll(v, 1) + v, N),
    "heads": heads,
    "columns": columns,
    "convolution": convolution,
    "images": images,
    "transposed convolution": transposed_convolution,
    "strides": strides,
    "add at": at_known(lambda at, new: at.add(new)),
    "set at": at_known(lambda at, new: at.set(new)),
    "subtract at": at_known(lambda at, new: at.subtract(new)),
    "multiply at": product_at,
    "rows at": scattered_rows,
    "segment sum": segments,
    "complex": complex_numbers,
    "conjugate": conjugates,
    "pad": padding,
}


class Random(NamedTuple):
    """A function of a vector of N numbers, and its operators."""

    names: tuple[str, ...]
    how: str
    function: ft.partial


def one_after_the_other(v, parts):
    return ft.reduce(lambda v, part: 0.5 * part(v), parts, v)


def added(v, parts):
    return sum(part(v) for part in parts)


def multiplied(v, parts):
    return ft.reduce(lambda a, part: a * part(v), parts, v)


def selected(v, parts):
    even = jnp.arange(N) % 2 == 0
    return ft.reduce(lambda v, part: jnp.where(even, v, part(v)), parts, v)


COMBINATIONS = (one_after_the_other, added, multiplied, selected)


def single(name: str, seed: int = 0) -> Random:
    part = OPERATORS[name](np.random.default_rng(seed))
    return Random((name,), "added", ft.partial(added, parts=[part]))


def draw(seed: int) -> Random:
    """Draw one to three operators, combined in one of four ways."""
    rng = np.random.default_rng(seed)
    names = tuple(rng.choice(list(OPERATORS), rng.integers(1, 4)))
    parts = [OPERATORS[name](rng) for name in names]
    combine = COMBINATIONS[rng.integers(len(COMBINATIONS))]
    return Random(names, combine.__name__, ft.partial(combine, parts=parts))


def found_labels(random: Random) -> np.ndarray:
    """The block of each of the N states."""
    v = jnp.ones(N)
    structure = jacobian_structure(lambda h, x: random.function(h), v, v)
    labels = np.zeros(N + 1, int)
    for number, block in enumerate(structure.blocks):
        labels[block] = number
    return labels[:N]


def true_pattern(random: Random, points: int = 6) -> np.ndarray:
    """Where the Jacobian is not zero at one or more of several random points."""
    rng = np.random.default_rng(1)
    scale = rng.choice([0.3, 1.0, 3.0], (points, 1))
    at = jnp.asarray(rng.standard_normal((points, N)) * scale)
    if not any("custom_vjp" in name for name in random.names):
        values = jax.vmap(jax.jacfwd(random.function))(at)
    else:
        try:
            values = jax.vmap(jax.jacrev(random.function))(at)
        except ValueError:  # beside a loop that JAX cannot reverse
            values = jax.vmap(by_differences(random.function))(at)
    values = np.asarray(values)
    return ((values != 0) & ~np.isnan(values)).any(0)


def by_differences(function):
    """Differences where JAX has no derivative; 0 exactly where nothing depends."""
    rows = 1e-3 * jnp.eye(N)
    return lambda v: jax.vmap(lambda e: function(v + e) - function(v - e))(rows).T


def outside(labels: np.ndarray, pattern: np.ndarray) -> np.ndarray:
    """The derivatives between states of different blocks."""
    return pattern & (labels[:, None] != labels[None])


def true_labels(pattern: np.ndarray) -> np.ndarray:
    return connected_components(csr_array(pattern), directed=False)[1]


def main(count: int, first: int) -> int:
    unsound, exact, spent = [], 0, 0.0
    randoms = [single(name) for name in OPERATORS]
    randoms += [draw(first + seed) for seed in range(count)]
    for number, random in enumerate(randoms):
        start = time.perf_counter()
        labels = found_labels(random)
        spent += time.perf_counter() - start
        pattern = true_pattern(random)
        if outside(labels, pattern).any():
            unsound.append((random.names, random.how))
            print("unsound:", *unsound[-1], flush=True)
        exact += len(set(labels)) == len(set(true_labels(pattern)))
        if number % 100 == 99:
            print(f"{number + 1} of {len(randoms)}", file=sys.stderr, flush=True)
            jax.clear_caches()
    print(
        f"jax {jax.__version__}: {len(randoms)} cells of {len(OPERATORS)} operators, "
        f"{len(unsound)} unsound, blocks exact in {exact}, "
        f"{1e3 * spent / len(randoms):.1f} ms each"
    )
    return bool(unsound)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
