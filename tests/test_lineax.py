"""`BlockBidiagonalLinearOperator` and `ParallelScan` against dense linear algebra.

The dense matrix of an operator is itself compared with one that NumPy assembles from
the equation, block by block.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from pararnn import BlockDiagonal, Dense, Diagonal, Scalar
from pararnn._lineax import BlockBidiagonalLinearOperator, ParallelScan
from tests.test_transitions import STRUCTURES, Structure

STEPS = 7
TOLERANCE = {"rtol": 1e-11, "atol": 1e-11}
# One structure for each path through the code; other tests have the laws of all.
SYSTEMS = (
    "diagonal, two axes",
    "diagonal, further axis",
    "scalar",
    "scalar, one number",
    "blocks, further axis",
    "dense",
    "dense, wide",
)
# Those that are also tested without a diagonal.
PLAIN = ("diagonal, further axis", "scalar, one number", "blocks, further axis")
# name, D given, upper, dtype
DIFFERENTIATED = (
    ("diagonal, further axis", False, False, np.complex128),
    ("diagonal, further axis", True, True, np.float64),
    ("scalar, one number", True, False, np.complex128),
    ("blocks, further axis", True, False, np.complex128),
    ("dense", False, True, np.float64),
)

each_block = pytest.mark.parametrize("own", (False, True), ids=("identity", "D"))


class System(NamedTuple):
    """The arrays of one linear system; a pytree."""

    transition: Any
    diagonal: Any
    vector: Any

    def operator(self, structure: Structure, **options) -> Any:
        return BlockBidiagonalLinearOperator(
            structure.cls(self.transition),
            jax.ShapeDtypeStruct(self.vector.shape[1:], self.vector.dtype),
            None if self.diagonal is None else structure.cls(self.diagonal),
            steps=self.vector.shape[0],
            **options,
        )


def make(name, *, own, dtype=np.float64, steps=STEPS, constant=False, seed=0):
    """A well-conditioned system, and its structure."""
    structure, rng = STRUCTURES[name], np.random.default_rng(seed)

    def normal(*shape):
        value = rng.normal(size=shape)
        if np.issubdtype(dtype, np.complexfloating):
            value = value + 1j * rng.normal(size=shape)
        return value.astype(dtype)

    length = 1 if constant else steps
    is_elementwise = structure.cls in (Diagonal, Scalar)
    size = 1 if is_elementwise else structure.values[-1]
    a = normal(length, *structure.values) / dtype(2 * size**0.5)
    d = normal(length, *structure.values) / dtype(4 * size**0.5)
    d = d + dtype(2) * (dtype(1) if is_elementwise else np.eye(size, dtype=dtype))
    return structure, System(a, d if own else None, normal(steps, *structure.state))


def block(cls, values, state):
    """The matrix of one step by the definition of its class, in NumPy."""
    columns = []
    for x in np.eye(int(np.prod(state)), dtype=values.dtype):
        x = x.reshape(state)
        if cls is BlockDiagonal:
            count, size, _ = values.shape
            y = np.einsum("bij,bjk->bik", values, x.reshape(count, size, -1))
        elif cls is Dense:
            y = np.tensordot(values, x, 1)
        else:
            y = values.reshape(values.shape + (1,) * (x.ndim - values.ndim)) * x
        columns.append(y.reshape(-1))
    return np.stack(columns, axis=1)


def assemble(structure: Structure, system: System, upper: bool):
    """The matrix of the whole system, written block by block."""
    steps, size = system.vector.shape[0], int(np.prod(structure.state))
    matrix = np.zeros((steps, size, steps, size), system.vector.dtype)

    def at(values, t):
        values = values[0] if values.shape[0] == 1 else values[t]
        return block(structure.cls, values, structure.state)

    for t in range(steps):
        own = np.eye(size) if system.diagonal is None else at(system.diagonal, t)
        matrix[t, :, t, :] = own
        if t > 0:
            row, column = (t - 1, t) if upper else (t, t - 1)
            matrix[row, :, column, :] = -at(system.transition, t)
    return matrix.reshape(steps * size, steps * size)


def exact(structure: Structure, system: System, upper: bool = False):
    """The solution of the assembled system."""
    matrix, vector = assemble(structure, system, upper), system.vector
    return np.linalg.solve(matrix, vector.reshape(-1)).reshape(vector.shape)


def solve(operator, vector, **options):
    return lx.linear_solve(operator, vector, ParallelScan(**options)).value


def dense_solve(operator, vector):
    flat = jnp.linalg.solve(operator.as_matrix(), vector.reshape(-1))
    return flat.reshape(vector.shape)


@jax.jit(static_argnums=(0, 2))
def outcomes(structure: Structure, system: System, upper: bool):
    """The results of the operator and the solver."""
    operator, vector = system.operator(structure, upper=upper), system.vector
    return {
        "matrix": operator.as_matrix(),
        "matrix of the transpose": operator.T.as_matrix(),
        "matrix of the conjugate": lx.conj(operator).as_matrix(),
        "diagonal": lx.diagonal(operator),
        "mv": operator.mv(vector),
        "mv of the transpose": operator.T.mv(vector),
        "solve": solve(operator, vector),
        "transposed solve": solve(operator.T, vector),
    }


def compare(structure: Structure, system: System, upper: bool):
    matrix, vector = assemble(structure, system, upper), system.vector

    def shaped(flat):
        return flat.reshape(vector.shape)

    expected = {
        "matrix": matrix,
        "matrix of the transpose": matrix.T,
        "matrix of the conjugate": matrix.conj(),
        "diagonal": np.diagonal(matrix),
        "mv": shaped(matrix @ vector.reshape(-1)),
        "mv of the transpose": shaped(matrix.T @ vector.reshape(-1)),
        "solve": shaped(np.linalg.solve(matrix, vector.reshape(-1))),
        "transposed solve": shaped(np.linalg.solve(matrix.T, vector.reshape(-1))),
    }
    for what, found in outcomes(structure, system, upper).items():
        np.testing.assert_allclose(found, expected[what], **TOLERANCE, err_msg=what)
        assert found.dtype == vector.dtype


@pytest.mark.parametrize(
    "name, own",
    [(name, own) for name in SYSTEMS for own in (True, False) if own or name in PLAIN],
)
def test_values(name, own):
    # The transposed solve is on the other side; half of the systems are complex.
    index = SYSTEMS.index(name)
    dtype = np.complex128 if (index + own) % 2 else np.float64
    compare(*make(name, own=own, dtype=dtype), upper=index % 4 > 1)


@each_block
@pytest.mark.parametrize("steps", (0, 1))
@pytest.mark.parametrize("name", ("diagonal, further axis", "dense"))
def test_short(name, steps, own):
    compare(*make(name, own=own, steps=steps), upper=steps == 1)


@pytest.mark.parametrize(
    "name, steps, varying",
    (
        ("scalar", 1, False),
        ("scalar", STEPS, True),
        ("blocks, further axis", STEPS, False),
        ("blocks, further axis", STEPS, True),
    ),
)
def test_constant_in_time(name, steps, varying):
    """Both arrays are constant, or only one of them."""
    structure, system = make(name, own=True, steps=steps, constant=True)
    if varying:
        _, other = make(name, own=True, steps=steps, seed=1)
        part = "transition" if name == "scalar" else "diagonal"
        system = system._replace(**{part: getattr(other, part)})
    compare(structure, system, upper=name == "scalar")


def derivatives(structure: Structure, upper: bool, method):
    """First and second derivatives of a solve, in all its arrays."""

    def solution(system):
        return method(system.operator(structure, upper=upper), system.vector)

    def loss(system, weights):
        x = solution(system)
        return jnp.sum(jnp.real(x * weights) + jnp.abs(x) ** 2)

    def run(system, tangent, weights):
        _, along = jax.jvp(solution, (system,), (tangent,))
        first, second = jax.jvp(
            lambda system: jax.grad(loss)(system, weights), (system,), (tangent,)
        )
        return {"jvp": along, "grad": first, "second order": second}

    return jax.jit(run)


@pytest.mark.parametrize("name, own, upper, dtype", DIFFERENTIATED)
def test_derivatives(name, own, upper, dtype):
    structure, system = make(name, own=own, dtype=dtype)
    _, tangent = make(name, own=own, dtype=dtype, seed=1)
    weights = make(name, own=own, dtype=dtype, seed=2)[1].vector
    found, expected = (
        derivatives(structure, upper, method)(system, tangent, weights)
        for method in (solve, dense_solve)
    )
    for what in expected:
        pairs = zip(*map(jax.tree.leaves, (found[what], expected[what])), strict=True)
        for left, right in pairs:
            bound = 1e-11 * np.max(np.abs(right))
            np.testing.assert_allclose(left, right, rtol=0, atol=bound, err_msg=what)
    assert np.all(found["grad"].transition[0] == 0), "the first transition takes part"


def test_gradient_by_differences():
    """One gradient without the derivative rules of JAX or lineax."""
    structure, system = make("dense", own=True)
    weights = np.random.default_rng(5).normal(size=system.vector.shape)

    @jax.jit
    @jax.value_and_grad
    def loss(system):
        x = solve(system.operator(structure), system.vector)
        return jnp.sum(weights * jnp.sin(x))

    _, gradient = loss(system)
    rng = np.random.default_rng(6)
    for field in System._fields:
        value = getattr(system, field)
        along = rng.normal(size=value.shape)
        above, below = (
            loss(system._replace(**{field: value + step * along}))[0]
            for step in (1e-5, -1e-5)
        )
        slope = np.sum(getattr(gradient, field) * along)
        np.testing.assert_allclose(slope, (above - below) / 2e-5, rtol=1e-8)


BATCHES = {
    "all of it": System(0, 0, 0),
    "the vector": System(None, None, 0),
    "the diagonal": System(None, 0, None),
}


@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch):
    structure, single = make("blocks, further axis", own=True)
    _, other = make("blocks, further axis", own=True, seed=1)
    axes = BATCHES[batch]
    both = [
        System(
            *(
                later if axis == 0 and index else first
                for first, later, axis in zip(single, other, axes, strict=True)
            )
        )
        for index in (0, 1)
    ]
    stacked = System(
        *(
            first if axis is None else np.stack([first, later])
            for first, later, axis in zip(single, other, axes, strict=True)
        )
    )

    def run(system):
        return solve(system.operator(structure), system.vector)

    found = jax.jit(jax.vmap(run, (axes,)))(stacked)
    for x, system in zip(found, both, strict=True):
        np.testing.assert_allclose(x, exact(structure, system), **TOLERANCE)


def test_gradient_under_vmap():
    structure, system = make("scalar, one number", own=True)
    vectors = np.stack([system.vector, 2 * system.vector, system.vector[::-1]])

    def gradients(method):
        def loss(system):
            x = method(system.operator(structure, upper=True), system.vector)
            return jnp.sum(x**3)

        batched = jax.vmap(jax.grad(loss), (System(None, None, 0),))
        return jax.jit(batched)(system._replace(vector=vectors))

    found, expected = gradients(solve), gradients(dense_solve)
    for left, right in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(left, right, **TOLERANCE)


@pytest.mark.parametrize("backend", ("associative", "chunked"))
def test_backends(backend):
    structure, system = make("blocks of one", own=False, steps=13)

    @jax.jit
    def run(system):
        return [
            solve(
                system.operator(structure, upper=upper), system.vector, backend=backend
            )
            for upper in (False, True)
        ]

    for upper, found in enumerate(run(system)):
        expected = exact(structure, system, bool(upper))
        np.testing.assert_allclose(found, expected, **TOLERANCE)


@each_block
@pytest.mark.parametrize("name", ("diagonal, further axis", "dense"))
def test_state_of_the_transpose(name, own):
    """The solver's states are exactly those of the transposed, conjugated operator."""
    structure, system = make(name, own=own, dtype=np.complex128)

    @jax.jit
    def states(system):
        solver = ParallelScan()
        pairs = []
        for upper in (False, True):
            operator = system.operator(structure, upper=upper)
            state = solver.init(operator, {})
            transposed, conjugated = solver.init(operator.T, {}), lx.conj(operator)
            pairs.append((solver.transpose(state, {})[0], transposed))
            pairs.append((solver.conj(state, {})[0], solver.init(conjugated, {})))
        return pairs

    for left, right in states(system):
        assert eqx.tree_equal(left, right, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    "name, dtype",
    (
        ("diagonal, further axis", np.float32),
        ("diagonal, further axis", jnp.bfloat16),
        ("dense", np.complex64),
        ("dense", jnp.bfloat16),
    ),
)
def test_other_precisions(name, dtype):
    structure, system = make(name, own=True)
    narrow = jax.tree.map(lambda v: jnp.asarray(v, dtype), system)
    run = jax.jit(lambda system: solve(system.operator(structure), system.vector))
    found = run(narrow)
    assert found.dtype == dtype
    wide = jax.tree.map(lambda v: np.asarray(v.astype(jnp.complex128)), narrow)
    expected = exact(structure, wide)
    error = np.max(np.abs(np.asarray(found.astype(jnp.complex128)) - expected))
    assert error <= 8 * float(jnp.finfo(dtype).eps) * np.max(np.abs(expected))


def test_real_transition_of_complex_vectors():
    structure, system = make("dense", own=True)
    _, other = make("dense", own=True, dtype=np.complex128)
    system = system._replace(vector=other.vector)
    run = jax.jit(lambda system: solve(system.operator(structure), system.vector))
    np.testing.assert_allclose(run(system), exact(structure, system), **TOLERANCE)


def test_first_transition_is_not_looked_at():
    structure, system = make("dense", own=False)
    system.transition[0] = np.nan
    found = outcomes(structure, system, False)
    assert all(np.all(np.isfinite(value)) for value in found.values())


def test_linear_transpose():
    structure, system = make("blocks, further axis", own=True)

    @jax.jit
    def run(system):
        operator = system.operator(structure)
        transposed = jax.linear_transpose(lambda b: solve(operator, b), system.vector)
        return transposed(system.vector)[0]

    flipped = assemble(structure, system, upper=False).T
    expected = np.linalg.solve(flipped, system.vector.reshape(-1))
    np.testing.assert_allclose(run(system).reshape(-1), expected, **TOLERANCE)


#
# Among the other operators and solvers of lineax.
#


def test_composition():
    structure, system = make("dense", own=True)
    _, other = make("dense", own=False, seed=1)

    @jax.jit
    def run(system, other):
        a, b = system.operator(structure), other.operator(structure)
        combined = {
            "sum": a + b,
            "difference": a - b,
            "multiple": 3.0 * a,
            "quotient": a / 3.0,
            "composed": a @ b.T,
            "nested": lx.conj(2.0 * (a + b).T @ -a),
            "tagged": lx.TaggedLinearOperator(a, lx.symmetric_tag),
            "linearised": lx.linearise(a + b),
            "materialised": lx.materialise(a @ b),
        }
        return {
            name: (operator.mv(system.vector), operator.as_matrix())
            for name, operator in combined.items()
        }

    a, b = (assemble(structure, part, upper=False) for part in (system, other))
    expected = {
        "sum": a + b,
        "difference": a - b,
        "multiple": 3 * a,
        "quotient": a / 3,
        "composed": a @ b.T,
        "nested": 2 * (a + b).T @ -a,
        "tagged": a,
        "linearised": a + b,
        "materialised": a @ b,
    }
    for name, (product, matrix) in run(system, other).items():
        np.testing.assert_allclose(matrix, expected[name], **TOLERANCE, err_msg=name)
        flat = expected[name] @ system.vector.reshape(-1)
        np.testing.assert_allclose(product.reshape(-1), flat, **TOLERANCE, err_msg=name)


def test_sum_of_two_sides():
    """lineax replaces sums that it recognises as tridiagonal."""
    structure, system = make("scalar, one number", own=True)

    @jax.jit
    def run(system):
        both = system.operator(structure) + system.operator(structure, upper=True)
        return both.mv(system.vector), lx.linear_solve(both, system.vector).value

    matrix = sum(assemble(structure, system, upper) for upper in (False, True))
    product, solution = run(system)
    np.testing.assert_allclose(product, matrix @ system.vector, **TOLERANCE)
    expected = np.linalg.solve(matrix, system.vector)
    np.testing.assert_allclose(solution, expected, **TOLERANCE)


def test_preconditioner():
    """The scan inverts one part of a system that GMRES solves."""
    structure, system = make("diagonal, further axis", own=False)
    small = 0.1 * np.random.default_rng(3).normal(size=system.vector.shape)

    @jax.jit
    def run(system, small):
        part = system.operator(structure)
        return lx.linear_solve(
            part + lx.DiagonalLinearOperator(small),
            system.vector,
            lx.GMRES(rtol=1e-12, atol=1e-12),
            options={"preconditioner": lx.invert(part, ParallelScan())},
        ).value

    matrix = assemble(structure, system, upper=False) + np.diag(small.reshape(-1))
    expected = np.linalg.solve(matrix, system.vector.reshape(-1))
    found = run(system, small).reshape(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name, own, solver",
    (
        ("diagonal, further axis", True, lx.Triangular),
        ("scalar, one number", True, lx.Tridiagonal),
        ("dense", True, lx.LU),
    ),
)
def test_automatic_solver(name, own, solver):
    """The operator's properties lead lineax to a suitable solver."""
    structure, system = make(name, own=own)
    auto = lx.AutoLinearSolver(well_posed=True)

    @jax.jit
    def run(system):
        found = []
        for upper in (False, True):
            operator = system.operator(structure, upper=upper)
            assert isinstance(auto.select_solver(operator), solver)
            found.append(lx.linear_solve(operator, system.vector, auto).value)
        return found

    for upper, found in enumerate(run(system)):
        expected = exact(structure, system, bool(upper))
        np.testing.assert_allclose(found, expected, **TOLERANCE)


# name of the system, D given, upper, steps: its properties.
PROPERTIES = {
    ("diagonal, two axes", False, False, STEPS): {"unit_diagonal", "lower_triangular"},
    ("diagonal, two axes", True, True, STEPS): {"upper_triangular"},
    ("scalar, one number", True, False, STEPS): {"lower_triangular", "tridiagonal"},
    ("scalar, one number", True, True, STEPS): {"upper_triangular", "tridiagonal"},
    ("blocks of one", True, False, STEPS): {"lower_triangular"},
    ("dense", False, True, STEPS): {"unit_diagonal", "upper_triangular"},
    ("dense", True, False, STEPS): set(),
    ("dense", True, False, 1): set(),
    ("diagonal", True, False, 1): {
        "diagonal",
        "symmetric",
        "tridiagonal",
        "lower_triangular",
        "upper_triangular",
    },
}
CHECKS = {
    "diagonal": lx.is_diagonal,
    "unit_diagonal": lx.has_unit_diagonal,
    "symmetric": lx.is_symmetric,
    "tridiagonal": lx.is_tridiagonal,
    "lower_triangular": lx.is_lower_triangular,
    "upper_triangular": lx.is_upper_triangular,
    "positive_semidefinite": lx.is_positive_semidefinite,
    "negative_semidefinite": lx.is_negative_semidefinite,
}


@pytest.mark.parametrize("case", PROPERTIES)
def test_properties(case):
    name, own, upper, steps = case
    structure, system = make(name, own=own, steps=steps)
    operator = system.operator(structure, upper=upper)
    assert {name for name, check in CHECKS.items() if check(operator)} == (
        PROPERTIES[case]
    )
    assert operator.in_structure() == operator.out_structure()
    assert operator.in_structure() == jax.eval_shape(lambda: system.vector)

    @jax.jit
    def run(system):
        return lx.tridiagonal(system.operator(structure, upper=upper))

    matrix = assemble(structure, system, upper)
    for found, offset in zip(run(system), (0, -1, 1), strict=True):
        np.testing.assert_array_equal(found, np.diagonal(matrix, offset))


def test_every_function_of_lineax_knows_the_operator():
    dispatching = [name for name in dir(lx) if hasattr(getattr(lx, name), "registry")]
    assert set(dispatching) >= {"conj", "diagonal", "linearise", "is_symmetric"}
    for name in dispatching:
        assert BlockBidiagonalLinearOperator in getattr(lx, name).registry, name


#
# Singular and badly scaled systems.
#


@jax.jit(static_argnums=(0, 2))
def attempt(structure, system, upper):
    operator = system.operator(structure, upper=upper)
    solution = lx.linear_solve(operator, system.vector, ParallelScan(), throw=False)
    return solution.value, solution.result == lx.RESULTS.successful


def singular_block(rng, size):
    """Whole numbers of rank below `size`, rows and columns in any order."""
    matrix = rng.integers(-4, 5, (size, size)).astype(float)
    matrix[:, -1] = matrix[:, :-1] @ rng.integers(-2, 3, size - 1)
    order = rng.permutation(size)
    return matrix[order][:, order]


@pytest.mark.parametrize("size", (1, 4))
def test_singular_blocks_are_reported(size):
    structure = Structure(Dense, (size, size), (size,))
    rng = np.random.default_rng(size)
    for trial in range(40):
        values = np.stack([np.eye(size)] * 3)
        system = System(0.5 * values, values.copy(), np.ones((3, size)))
        # Divided by 3 or 7, it is singular only up to rounding.
        system.diagonal[trial % 3] = singular_block(rng, size) / (1, 3, 7)[trial % 3]
        _, successful = attempt(structure, system, size > 1)
        assert not successful, system.diagonal[trial % 3]


@pytest.mark.parametrize(
    "name, upper",
    (("scalar", True), ("diagonal, further axis", False), ("blocks", True)),
)
def test_bad_entries_are_reported(name, upper):
    structure, system = make(name, own=True)
    assert attempt(structure, system, upper)[1]
    for bad in (0.0, np.inf, np.nan):
        for step in (0, 3, STEPS - 1):
            broken = system.diagonal.copy()
            # A whole row of a block: one zero alone would do no harm.
            row = broken.reshape(STEPS, -1)[:, : 2 if name == "blocks" else 1]
            row[step] = bad
            assert np.shares_memory(row, broken)
            _, successful = attempt(structure, system._replace(diagonal=broken), upper)
            assert not successful


def test_singular_systems_raise():
    structure, system = make("diagonal", own=True)
    system.diagonal[2] = 0.0
    run = jax.jit(lambda system: solve(system.operator(structure), system.vector))
    with pytest.raises(RuntimeError, match="singular"):
        run(system)


def test_bad_scales_are_not_a_singularity():
    structure, system = make("dense", own=True)
    rows, columns = np.logspace(-30, 30, 3), np.logspace(40, -10, 3)
    scaled = System(
        rows[:, None] * system.transition * columns,
        rows[:, None] * system.diagonal * columns,
        rows * system.vector,
    )
    value, successful = attempt(structure, scaled, False)
    assert successful
    expected = exact(structure, system)
    found = np.asarray(value) * columns
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
