"""Implicit recurrences, and loops in NumPy that solve and differentiate them.

The loops solve each step by Newton's method with Jacobians from complex steps, and
differentiate it by the implicit function theorem, both without JAX.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pararnn._implicit import Implicit

T = 23


class Equation(NamedTuple):
    F: Callable  # (numpy or jax.numpy, parameters, h_new, h, x) -> residual
    parameters: Any
    xs: Any
    h0: Any
    structure: str

    def cell(self, parameters=None, **options):
        p = self.parameters if parameters is None else parameters
        return Implicit(lambda z, h, x: self.F(jnp, p, z, h, x), **options)

    @property
    def point(self):
        return self.parameters, self.xs, self.h0


# Backward Euler of h' = L h + x.


def linear(m, p, z, h, x):
    return z - h - 0.1 * (p["L"] @ z + x)


def stiff_matrix():
    """Rates from 1 to 1e5, in directions that are far from orthogonal."""
    basis = np.array([[1.0, 0.9, 0.2], [0.0, 1.0, 0.7], [0.1, 0.0, 1.0]])
    return basis @ np.diag([-1.0, -1e2, -1e5]) @ np.linalg.inv(basis)


# Backward Euler of driven Van der Pol oscillators, the state split by kind.


def van_der_pol(m, p, z, h, x):
    force = p["mu"] * (1 - z["q"] ** 2) * z["v"] - z["q"] + x
    return {"q": z["q"] - h["q"] - 0.1 * z["v"], "v": z["v"] - h["v"] - 0.1 * force}


# Backward Euler of a pendulum with a cart's acceleration x, in Cartesian coordinates:
#   p' = v,   v' = -λ p - (x, g),   0 = d²/dt² |p|²/2 = |v|² + p·v'.


def pendulum(m, c, z, h, x, dt=0.05):
    p, v, tension = z
    gravity = m.stack([x, c["g"]])
    acceleration = -tension * p - gravity
    return (
        p - h[0] - dt * v,
        v - h[1] - dt * acceleration,
        v @ v + p @ acceleration,
    )


def pendulum_at(angle, g=9.81):
    """The pendulum at rest, with the tension that the constraint requires."""
    p = np.array([np.sin(angle), -np.cos(angle)])
    return p, np.zeros(2), np.array(g * np.cos(angle))


# Layers.


def implicit_rnn(m, p, z, h, x):
    return z - m.tanh(p["W"] @ z + p["U"] @ h + p["V"] @ x)


def diagonal(m, p, z, h, x):
    return z + p["a"] * z**3 - 0.9 * m.tanh(h) - x


def blocks_out_of_order(m, p, z, h, x):
    """Blocks of the entries (0, 3), (1, 4, 5) and (2,), each with its equations."""
    shuffled = m.stack([z[3], z[4], z[2], z[0], z[5], z[1]])
    return 2 * z + p["a"] * m.sin(shuffled) - m.tanh(h) - x


def singular(z, h, x):
    both = z[0] - z[1]
    return jnp.stack([both - h[0], both - x])


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


EQUATIONS = {
    "stiff": Equation(
        linear, {"L": stiff_matrix()}, normal(0, T, 3), normal(1, 3), "Dense"
    ),
    "van-der-pol": Equation(
        van_der_pol,
        {"mu": np.array([1.0, 5.0])},
        normal(2, T, 2),
        {"q": np.array([2.0, -1.5]), "v": np.array([0.0, 0.3])},
        "BlockDiagonal(2)",
    ),
    "pendulum": Equation(
        pendulum, {"g": np.array(9.81)}, normal(3, T), pendulum_at(1.0), "Dense"
    ),
    "implicit-rnn": Equation(
        implicit_rnn,
        {
            # Of norm 0.6, so that the fixed point is unique.
            "W": 0.6 * np.linalg.qr(normal(4, 4, 4))[0],
            "U": 0.5 * normal(5, 4, 4),
            "V": normal(6, 4, 2),
        },
        normal(7, T, 2),
        normal(8, 4),
        "Dense",
    ),
    "diagonal": Equation(
        diagonal,
        {"a": np.linspace(0.1, 2, 5)},
        normal(9, T, 5),
        normal(10, 5),
        "Diagonal",
    ),
    "blocks": Equation(
        blocks_out_of_order,
        {"a": np.linspace(0.2, 1, 6)},
        normal(11, T, 6),
        normal(12, 6),
        "BlockDiagonal(3)",
    ),
}


# The loops in NumPy.


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def like(tree, v):
    leaves, definition = jax.tree.flatten(tree)
    ends = np.cumsum([np.size(leaf) for leaf in leaves])[:-1]
    parts = np.split(v, ends)
    parts = [p.reshape(np.shape(leaf)) for p, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(definition, parts)


def numpy_step(F, p, h, x):
    """The solution as a vector, and the Jacobian there."""
    z, last = flat(h), np.inf
    unit = 1e-30j * np.eye(z.size)
    for _ in range(50):
        value = flat(F(np, p, like(h, z), h, x))
        columns = [flat(F(np, p, like(h, z + e), h, x)).imag for e in unit]
        jacobian = np.stack(columns, axis=1) / 1e-30
        change = np.linalg.solve(jacobian, value)
        z, size = z - change, np.abs(change).max()
        if (last < 1e-6 and size >= 0.1 * last) or size == 0:
            return z, jacobian
        last = size
    raise AssertionError("the reference does not converge")


def at(xs, t):
    return jax.tree.map(lambda x: x[t], xs)


def numpy_loop(equation, point=None, tangents=None, reset=None, fresh=None):
    """States `[T, width]`, and their tangents."""
    p, xs, h = equation.point if point is None else point
    states, pushed = [], []
    for t in range(T):
        x = at(xs, t)
        if reset is not None and reset[t]:
            h = fresh
        z, jacobian = numpy_step(equation.F, p, h, x)
        if tangents is not None:
            dp, dxs, dh = tangents
            here, there = (p, h, x), (dp, dh, at(dxs, t))
            p_, h_, x_ = jax.tree.map(lambda a, d: a + 1e-30j * d, here, there)
            moved = flat(equation.F(np, p_, like(h, z + 0j), h_, x_)).imag / 1e-30
            dz = -np.linalg.solve(jacobian, moved)
            pushed.append(dz)
            tangents = dp, dxs, like(h, dz)
        h = like(h, z)
        states.append(z)
    return np.stack(states), np.stack(pushed) if pushed else None


def directions(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda v: rng.standard_normal(np.shape(v)), tree)


def weights(width):
    return np.cos(np.arange(T * width)).reshape(T, width)


def numpy_slope(equation, u, moved=0.0, v=None):
    """The derivative of the loss along u, at a point shifted along v."""
    point = equation.point
    if v is not None:
        point = jax.tree.map(lambda a, d: a + moved * d, point, v)
    _, pushed = numpy_loop(equation, point, u)
    return np.sum(weights(pushed.shape[1]) * pushed)


def numpy_curvature(equation, u, v):
    """The second derivative along u and v: a central difference of order 4."""

    def central(e):
        slopes = [numpy_slope(equation, u, s * e, v) for s in (1, -1)]
        return (slopes[0] - slopes[1]) / (2 * e)

    e = 2e-4
    return (4 * central(e) - central(2 * e)) / 3
