"""Values and derivatives by every solver against those of `lax.scan`."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import pararnn

from ._case import Case, Settings
from ._peers import scan_states
from ._problems import (
    FIVE,
    forward,
    hessian_product,
    make_elman,
    value_and_gradient,
)
from ._timing import compile_program, relative_error

TABLES = {
    "values": "Largest difference of the states to those of `lax.scan` in the same "
    "precision, over the largest state.",
    "gradients": "The same for the gradient of the mean of the squares, by argument, "
    "in float64.",
    "second derivatives": "The same for the product of the Hessian with a random "
    "direction, reverse over reverse, in float64.",
}
SOLVERS = {
    "Sequential()": pararnn.Sequential(),
    "Auto()": pararnn.Auto(),
    "Newton(256)": pararnn.Newton(256),
    "Newton()": pararnn.Newton(),
}
PROBLEMS = (*FIVE, make_elman(16))


def cases(settings: Settings) -> Iterator[Case]:
    for problem in PROBLEMS:
        for dtype in (np.float64, np.float32):
            for steps in settings.steps(1024, 8192, 65536):
                yield Case(
                    "values",
                    {"cell": str(problem), "dtype": dtype.__name__, "T": steps},
                    lambda p=problem, d=dtype, t=steps: _measure_values(p, d, t),
                    x64=dtype is np.float64,
                )
    for problem in PROBLEMS:
        for steps in settings.steps(1024, 16384):
            for name in SOLVERS:
                yield Case(
                    "gradients",
                    {"cell": str(problem), "T": steps, "solver": name},
                    lambda p=problem, t=steps, s=name: _measure_gradients(p, t, s),
                    x64=True,
                )
    for problem in PROBLEMS:
        # Two lengths would show nothing new.
        steps = settings.steps(1024)[-1]
        for name in SOLVERS:
            yield Case(
                "second derivatives",
                {"cell": str(problem), "T": steps, "solver": name},
                lambda p=problem, t=steps, s=name: _measure_second(p, t, s),
                x64=True,
            )


def _solve(name):
    def method(f, xs, h0):
        return pararnn.solve(f, xs, h0, solver=SOLVERS[name]).states

    return method


def _measure_values(problem, dtype, steps):
    args = problem.make(steps, dtype=dtype)

    def run(method):
        return compile_program(forward(problem, method), *args)(*args)

    expected = run(scan_states)
    return {
        f"{name} error": relative_error(run(_solve(name)), expected) for name in SOLVERS
    }


def _measure_gradients(problem, steps, name):
    args = problem.make(steps, dtype=np.float64)

    def run(method):
        fn = value_and_gradient(forward(problem, method))
        return compile_program(fn, *args)(*args)[1]

    pairs = zip(run(_solve(name)), run(scan_states), strict=True)
    parameters, inputs, h0 = (relative_error(*pair) for pair in pairs)
    return {"inputs error": inputs, "h0 error": h0, "parameters error": parameters}


def _measure_second(problem, steps, name):
    args = problem.make(steps, dtype=np.float64)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), args)

    def run(method):
        fn = hessian_product(forward(problem, method))
        return compile_program(fn, args, direction)(args, direction)

    return {"error": relative_error(run(_solve(name)), run(scan_states))}
