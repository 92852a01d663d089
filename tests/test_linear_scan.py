"""`linear_scan` on every backend: values, resets, batches, derivatives, errors."""

import itertools as it
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pararnn import Dense, Diagonal, Scalar, linear_scan
from tests.test_transitions import STRUCTURES, Structure

BACKENDS = ("sequential", "associative", "chunked")
# One structure for each path through the engine; other tests have the laws of all.
SCANNED = (
    "diagonal, further axis",
    "scalar, one number",
    "blocks, further axis",
    "dense",
    "dense, wide",
)
RESET = (0, 4, 5, 9)

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_direction = pytest.mark.parametrize("reverse", (False, True), ids=("", "reverse"))


class Problem(NamedTuple):
    """The arrays of one recurrence; a pytree."""

    values: Any
    inputs: Any
    initial: Any = None
    reset: Any = None
    reset_state: Any = None

    def scan(self, cls, **kwargs):
        return linear_scan(
            cls(self.values),
            self.inputs,
            self.initial,
            reset=self.reset,
            reset_state=self.reset_state,
            **kwargs,
        )


def make(structure: Structure, steps, seed=0, dtype=np.float64, constant=False):
    """Every array that a recurrence can have; matrices have norms of about one."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        value = rng.normal(size=shape)
        if np.issubdtype(dtype, np.complexfloating):
            value = value + 1j * rng.normal(size=shape)
        return value.astype(dtype)

    width = structure.values[-1] if structure.cls not in (Diagonal, Scalar) else 1
    return Problem(
        normal(1 if constant else steps, *structure.values) / dtype(width**0.5),
        normal(steps, *structure.state),
        normal(*structure.state),
        np.isin(np.arange(steps), RESET),
        normal(*structure.state),
    )


@jax.jit(static_argnums=0)
def as_matrix(structure: Structure, values):
    return structure.cls(values).as_matrix(structure.state)


def loop(structure: Structure, problem: Problem, reverse: bool):
    """The definition, step by step in NumPy in double precision."""
    steps = problem.inputs.shape[0]
    if steps == 0:
        return problem.inputs
    matrices = np.asarray(as_matrix(structure, problem.values))
    matrices = np.broadcast_to(matrices, (steps, *matrices.shape[1:]))
    wide = np.result_type(matrices.dtype, problem.inputs.dtype, np.float64)
    zeros = np.zeros(structure.state)
    initial, fresh = (
        np.asarray(zeros if v is None else v, wide)
        for v in (problem.initial, problem.reset_state)
    )
    states, h = np.zeros(problem.inputs.shape, wide), initial
    for t in reversed(range(steps)) if reverse else range(steps):
        if problem.reset is not None and problem.reset[t]:
            h = fresh
        h = (matrices[t] @ h.reshape(-1)).reshape(h.shape) + problem.inputs[t]
        states[t] = h
    return states


def real(problem: Problem) -> Problem:
    return problem._replace(values=problem.values.real)


CONFIGURATIONS = {
    "zeros": lambda s: make(s, 13)._replace(initial=None, reset=None, reset_state=None),
    "resets": lambda s: make(s, 13),
    "complex": lambda s: make(s, 13, dtype=np.complex128)._replace(reset_state=None),
    "constant, real times complex": lambda s: real(
        make(s, 13, dtype=np.complex128, constant=True)
    ),
}


@pytest.mark.optimised
@each_backend
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("name", SCANNED)
def test_values(name, configuration, backend):
    structure = STRUCTURES[name]
    # Each column and each row of the table has both directions.
    reverse = (SCANNED.index(name) + list(CONFIGURATIONS).index(configuration)) % 2 > 0
    problem = CONFIGURATIONS[configuration](structure)
    scan = jax.jit(lambda p: p.scan(structure.cls, backend=backend, reverse=reverse))
    states = scan(problem)
    assert states.dtype == problem.inputs.dtype
    expected = loop(structure, problem, reverse)
    np.testing.assert_allclose(states, expected, rtol=1e-11, atol=1e-11)


@each_direction
@each_backend
@pytest.mark.parametrize("steps", (0, 1, 2))
@pytest.mark.parametrize("name", ("diagonal", "blocks"))
def test_short(name, steps, backend, reverse):
    structure = STRUCTURES[name]
    problem = make(structure, steps)
    scan = jax.jit(lambda p: p.scan(structure.cls, backend=backend, reverse=reverse))
    expected = loop(structure, problem, reverse)
    np.testing.assert_allclose(scan(problem), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.optimised
@each_backend
@pytest.mark.parametrize("dtype", (np.float32, np.complex64))
@pytest.mark.parametrize("name", ("diagonal", "dense, wide"))
def test_single_precision(name, dtype, backend):
    structure = STRUCTURES[name]
    problem = make(structure, 13, dtype=dtype)
    states = jax.jit(lambda p: p.scan(structure.cls, backend=backend))(problem)
    assert states.dtype == dtype
    expected = loop(structure, problem, False)
    np.testing.assert_allclose(states, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.optimised
@each_backend
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_half_precision_accumulates_in_single(dtype, backend):
    """A sum of 1024 terms would stall at 256 in bfloat16."""
    steps = 1024
    ones = jnp.ones((steps, 1), dtype)
    states = jax.jit(lambda a, b: linear_scan(Diagonal(a), b, backend=backend))(
        ones, ones
    )
    assert states.dtype == dtype
    np.testing.assert_array_equal(
        np.asarray(states[:, 0], np.float32),
        np.asarray(jnp.arange(1, steps + 1, dtype=jnp.float32).astype(dtype), float),
    )


def test_promotes_the_parts():
    """Parameters in bfloat16, inputs in float32, a complex state: complex64."""
    transition = Diagonal(jnp.ones((3, 2), jnp.bfloat16))
    out = jax.eval_shape(
        lambda h: linear_scan(transition, jnp.ones((3, 2), jnp.float32), h),
        jnp.ones(2, jnp.complex64),
    )
    assert out.dtype == jnp.complex64


def test_auto():
    structure = STRUCTURES["diagonal"]
    problem = make(structure, 13)
    states = jax.jit(lambda p: p.scan(structure.cls))(problem)
    np.testing.assert_allclose(states, loop(structure, problem, False), atol=1e-11)


# --- Resets ------------------------------------------------------------------------


@pytest.mark.optimised
@each_direction
@each_backend
@pytest.mark.parametrize("name", ("diagonal", "blocks"))
def test_dropped_state_leaves_no_trace(name, backend, reverse):
    """No value and no derivative after a reset depends on the dropped state."""
    structure, start = STRUCTURES[name], 5
    clean = make(structure, 13)._replace(reset=np.arange(13) == start)
    kept = slice(None, start + 1) if reverse else slice(start, None)
    before = slice(start + 1, None) if reverse else slice(None, start)
    poison = np.zeros((13, *structure.state))
    poison[before] = np.array([np.nan, np.inf, -np.inf, 1.0])[
        np.arange(poison[before].size) % 4
    ].reshape(poison[before].shape)
    bad = clean._replace(inputs=clean.inputs + poison, initial=clean.initial + np.inf)

    @jax.jit
    def run(problem):
        def loss(arrays):
            values, inputs, fresh = arrays
            p = problem._replace(values=values, inputs=inputs, reset_state=fresh)
            states = p.scan(structure.cls, backend=backend, reverse=reverse)[kept]
            return jnp.sum(jnp.sin(states)), states

        arrays = problem.values, problem.inputs, problem.reset_state
        (_, states), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
        return states, gradients

    (states, gradients), (bad_states, bad_gradients) = run(clean), run(bad)
    np.testing.assert_array_equal(bad_states, states)
    # A product with an infinite state has no finite derivative in its factor.
    np.testing.assert_array_equal(bad_gradients[0][kept], gradients[0][kept])
    np.testing.assert_array_equal(bad_gradients[1], gradients[1])
    np.testing.assert_array_equal(bad_gradients[2], gradients[2])
    assert not np.any(gradients[1][before])


@pytest.mark.optimised
@each_backend
def test_infinite_factors_are_dropped_too(backend):
    structure = STRUCTURES["blocks"]
    clean = make(structure, 13)._replace(reset=np.arange(13) == 5)
    bad = clean._replace(values=clean.values.copy())
    bad.values[:5] = np.inf
    scan = jax.jit(lambda p: p.scan(structure.cls, backend=backend)[5:])
    np.testing.assert_array_equal(scan(bad), scan(clean))


@pytest.mark.optimised
@each_backend
def test_packed_sequences_are_the_sequences(backend):
    structure = STRUCTURES["dense"]
    problem = make(structure, 13)
    packed = problem._replace(reset=np.isin(np.arange(13), (0, 7)))
    scan = jax.jit(lambda p: p.scan(structure.cls, backend=backend))
    parts = [
        scan(Problem(problem.values[part], problem.inputs[part], problem.reset_state))
        for part in (slice(0, 7), slice(7, 13))
    ]
    np.testing.assert_allclose(scan(packed), np.concatenate(parts), rtol=1e-12)


# --- Batches -----------------------------------------------------------------------

BATCHED = {
    "all": Problem(0, 0, 0, 0, 0),
    "inputs": Problem(None, 0, None, None, None),
    "transition": Problem(0, None, None, None, None),
    "initial": Problem(None, None, 0, None, None),
    "reset": Problem(None, None, None, 0, None),
    "reset state, and inputs behind time": Problem(None, 1, None, None, 0),
}


def batch(structure: Structure, in_axes: Problem, size: int) -> Problem:
    """Stack the arrays that are batched; resets differ along the batch."""
    single = [make(structure, 6, seed=i) for i in range(size)]
    single = [
        p._replace(reset=np.arange(6) % (i + 2) == 1) for i, p in enumerate(single)
    ]
    return Problem(
        *(
            parts[0] if axis is None else np.stack(parts, axis)
            for axis, *parts in zip(in_axes, *single, strict=True)
        )
    )


def take(problem: Problem, in_axes: Problem, index: int) -> Problem:
    return Problem(
        *(
            v if axis is None else np.take(v, index, axis)
            for v, axis in zip(problem, in_axes, strict=True)
        )
    )


@each_backend
@pytest.mark.parametrize(
    "batched, name", list(zip(BATCHED, it.cycle(("blocks", "diagonal")), strict=False))
)
def test_vmap(batched, name, backend):
    structure, in_axes = STRUCTURES[name], BATCHED[batched]
    reverse = batched in ("all", "initial")

    def scan(p):
        return p.scan(structure.cls, backend=backend, reverse=reverse)

    problem = batch(structure, in_axes, 3)
    one = jax.jit(scan)
    expected = [one(take(problem, in_axes, i)) for i in range(3)]
    # Each array is a separate argument, as `None` in a pytree is an empty subtree.
    found = jax.jit(jax.vmap(lambda *p: scan(Problem(*p)), tuple(in_axes)))(*problem)
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-12, atol=1e-12)


@each_backend
@pytest.mark.parametrize(
    "outer, inner",
    [
        (BATCHED["transition"], BATCHED["inputs"]),
        (BATCHED["initial"], BATCHED["reset"]),
        (BATCHED["inputs"], BATCHED["transition"]),
    ],
)
def test_nested_vmap(outer, inner, backend):
    structure = STRUCTURES["blocks"]

    def scan(*p):
        return Problem(*p).scan(structure.cls, backend=backend)

    both = Problem(*(i if o is None else o for i, o in zip(inner, outer, strict=True)))
    problem = batch(structure, both, 2)
    found = jax.jit(jax.vmap(jax.vmap(scan, tuple(inner)), tuple(outer)))(*problem)
    one = jax.jit(scan)
    for o, i in it.product(range(2), range(2)):
        expected = one(*take(take(problem, outer, o), inner, i))
        np.testing.assert_allclose(found[o, i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.optimised
@each_backend
def test_gradient_of_a_batch_with_shared_parameters(backend):
    structure, in_axes = STRUCTURES["dense"], BATCHED["inputs"]
    problem = batch(structure, in_axes, 3)

    def loss(values, p):
        p = p._replace(values=values)
        return jnp.sum(jnp.sin(p.scan(structure.cls, backend=backend)))

    def batched(values):
        axes = in_axes._replace(values=None)
        losses = jax.vmap(lambda *p: loss(values, Problem(*p)), tuple(axes))(*problem)
        return jnp.sum(losses)

    one = jax.jit(jax.grad(loss))
    expected = sum(one(problem.values, take(problem, in_axes, i)) for i in range(3))
    found = jax.jit(jax.grad(batched))(problem.values)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)


# --- Derivatives -------------------------------------------------------------------


def plain(structure: Structure, problem: Problem, reverse: bool):
    """The same recurrence as a `lax.scan` that JAX differentiates."""
    initial = jnp.zeros_like(problem.inputs[0])
    initial = initial if problem.initial is None else problem.initial
    fresh = jnp.zeros_like(initial)
    fresh = fresh if problem.reset_state is None else problem.reset_state
    steps = problem.inputs.shape[0]
    reset = jnp.zeros(steps, bool) if problem.reset is None else problem.reset
    shape = (steps, *problem.values.shape[1:])

    def step(h, at_t):
        a, b, reset = at_t
        h = jnp.where(reset, fresh, h)
        h = structure.cls(a[None]).mv(h[None])[0] + b
        return h, h

    xs = jnp.broadcast_to(problem.values, shape), problem.inputs, reset
    return jax.lax.scan(step, initial, xs, reverse=reverse)[1]


def derivatives(scan, problem: Problem, direction: Problem):
    """First and second derivatives in the arrays of `direction` that are not `None`."""
    names = [n for n, v in direction._asdict().items() if v is not None]
    point = {n: getattr(problem, n) for n in names}
    along = {n: getattr(direction, n) for n in names}

    def states(arrays):
        return scan(problem._replace(**arrays))

    def loss(arrays):
        y = states(arrays)
        weights = jnp.arange(1.0, y.size + 1).reshape(y.shape) / y.size
        return jnp.sum(weights * (y * y.conj()).real + y.real**3)

    def push(f):
        return lambda arrays: jax.jvp(f, (arrays,), (along,))[1]

    def slope(arrays):
        g = jax.grad(loss)(arrays)
        return sum(jnp.sum(g[n] * along[n]).real for n in names)

    return {
        "jvp": push(states)(point),
        "vjp": jax.grad(loss)(point),
        "forward over forward": push(push(states))(point),
        "forward over reverse": push(jax.grad(loss))(point),
        "reverse over reverse": jax.grad(slope)(point),
    }


def compare_derivatives(structure, problem, direction, backend, reverse):
    ours, jaxs = (
        jax.jit(lambda p, d, scan=scan: derivatives(scan, p, d))(problem, direction)
        for scan in (
            lambda p: p.scan(structure.cls, backend=backend, reverse=reverse),
            lambda p: plain(structure, p, reverse),
        )
    )
    for kind, expected in jaxs.items():
        scale = max(float(jnp.max(jnp.abs(v))) for v in jax.tree.leaves(expected))
        for x, y in zip(*map(jax.tree.leaves, (ours[kind], expected)), strict=True):
            np.testing.assert_allclose(
                x, y, rtol=1e-10, atol=1e-12 * max(scale, 1), err_msg=kind
            )


@pytest.mark.parametrize(
    "name, backend, reverse, dtype, constant",
    [
        pytest.param(
            *("diagonal", "sequential", False, np.complex128, False),
            marks=pytest.mark.optimised,
        ),
        ("diagonal", "associative", True, np.float64, False),
        ("scalar", "chunked", False, np.float64, True),
        ("blocks, further axis", "sequential", True, np.float64, False),
        ("blocks", "associative", False, np.float64, False),
        pytest.param(
            *("dense", "chunked", True, np.complex128, False),
            marks=pytest.mark.optimised,
        ),
        ("dense", "sequential", False, np.float64, True),
    ],
)
def test_derivatives(name, backend, reverse, dtype, constant):
    structure = STRUCTURES[name]
    problem = make(structure, 6, dtype=dtype, constant=constant)
    direction = make(structure, 6, 1, dtype, constant)._replace(reset=None)
    compare_derivatives(structure, problem, direction, backend, reverse)


@pytest.mark.parametrize("field", ("values", "inputs", "initial", "reset_state"))
def test_derivatives_in_one_argument(field):
    structure = STRUCTURES["diagonal"]
    problem = make(structure, 5)._replace(reset=np.arange(5) == 2)
    direction = Problem(None, None)._replace(
        **{field: getattr(make(structure, 5, seed=1), field)}
    )
    compare_derivatives(structure, problem, direction, "sequential", False)


# --- Wrong calls -------------------------------------------------------------------


def call(values=(4, 3), inputs=(4, 3), cls=Diagonal, **kwargs):
    return lambda: linear_scan(cls(np.ones(values)), np.ones(inputs), **kwargs)


@pytest.mark.parametrize(
    "wrong, error, match",
    [
        (
            lambda: linear_scan(np.ones((4, 3)), np.ones((4, 3))),
            TypeError,
            r"`transition` is a ndarray.*pararnn\.Diagonal\(a\)",
        ),
        (call(backend="parallel"), ValueError, r"'parallel'.*sequential, assoc"),
        (call(inputs=()), ValueError, r"leading time axis"),
        (
            lambda: linear_scan(Diagonal(np.ones((4, 3))), np.ones((4, 3), int)),
            TypeError,
            r"`inputs` are int64.*astype",
        ),
        (call(values=(5, 3)), ValueError, r"has 5 steps .* inputs have 4.*jax\.vmap"),
        (call(values=(4, 2)), ValueError, r"Diagonal: .*\(4, 2\).*\(3,\)"),
        (call(values=(4, 3, 3), cls=Dense, inputs=(4, 2)), ValueError, r"cannot act"),
        (call(initial=np.ones(2)), ValueError, r"`initial` has shape \(2,\).*\(3,\)"),
        (call(initial=np.ones((1, 3))), ValueError, r"`initial` has shape \(1, 3\)"),
        (
            call(reset=np.ones(4, bool), reset_state=np.ones(())),
            ValueError,
            r"`reset_state` has shape \(\)",
        ),
        (call(reset_state=np.ones(3)), ValueError, r"without `reset`"),
        (call(reset=np.ones(3, bool)), ValueError, r"expected \(4,\)"),
        (call(reset=np.ones((4, 3), bool)), ValueError, r"`reset` has shape \(4, 3\)"),
        (call(reset=np.ones(4, int)), TypeError, r"`reset` is int64, expected bool"),
        (call(reset=np.ones(4)), TypeError, r"`reset` is float64, expected bool"),
    ],
)
def test_errors(wrong, error, match):
    with pytest.raises(error, match=match):
        wrong()


@pytest.mark.parametrize(
    "wrong, error, match",
    [
        (call(values=(0, 3)), ValueError, r"has 0 steps"),
        (call((0, 3), (0, 3), initial=np.ones(2)), ValueError, r"`initial`"),
        (call(values=(2, 3), inputs=(0, 3)), ValueError, r"inputs have 0"),
        (call(values=(0, 2), inputs=(0, 3)), ValueError, r"cannot act"),
    ],
)
def test_errors_at_length_zero(wrong, error, match):
    with pytest.raises(error, match=match):
        wrong()
