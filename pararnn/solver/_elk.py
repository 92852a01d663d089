"""Levenberg-Marquardt by Kalman smoothing."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from ..recurrence import Structure, from_blocks, to_blocks, transition_factors
from ..scan import Schedule, invert_matrices, multiply_matrices, prefix, run_scan
from ._methods import AbstractMethod, diagonal, make_push_diagonal, push_exactly
from ._segments import Linearization


class ELK(AbstractMethod):
    r"""Levenberg-Marquardt: Newton's method with a trust region, by Kalman smoothing.

    The correction minimises
    $\sum_t \|\delta_t - A_t \delta_{t-1} - r_t\|^2 + \lambda \|\delta_t\|^2$. It is the
    posterior mean of a linear Gaussian chain with unit noise whose states are observed
    to be zero with variance $1 / \lambda$, and a Kalman smoother solves for it in
    parallel (Gonzalez et al. 2024, 2407.19115; the filter's elements are those of
    Särkkä and García-Fernández 2021, 1905.13002). Corrections stay bounded where
    Newton's grow without limit. $\lambda = \mathrm{damping} \cdot \min(1, c)$ falls
    with the last relative correction $c$, so that convergence near the solution is
    nearly that of Newton's method.

    **Arguments:** as in [`pararnn.AbstractMethod`][], and

    - `damping`: $\lambda$ at the start, positive.
    - `diagonal`: whether to take only the diagonal of the Jacobian (quasi-ELK), which
        replaces all matrices by numbers.

    **Raises:** `ValueError` for a damping that is not positive, counts that are not
    whole numbers in range, and negative tolerances.
    """

    damping: float = eqx.field(static=True, kw_only=True, default=1.0)
    diagonal: bool = eqx.field(static=True, kw_only=True, default=False)

    def __check_init__(self):
        if not self.damping > 0:
            raise ValueError(
                f"ELK: `damping` is {self.damping!r}; expected a positive number. "
                "Without damping the method is `pararnn.Newton`."
            )

    def linearize(self, width: int, find_structure: Callable[[], Structure]):
        structure = find_structure()
        if self.diagonal:
            return Linearization(
                diagonal(width), make_push_diagonal(structure.seeds, 1.0)
            )
        return Linearization(structure, push_exactly)

    def correct(self, structure, tangents, defects, length, progress):
        kind, factors = transition_factors(structure, tangents)
        algebra = _Elementwise if kind == "elementwise" else _Matrices
        terms = to_blocks(structure, defects)
        strength = self.damping * jnp.minimum(progress, 1)
        strength = strength.reshape(
            1, *strength.shape, *(1,) * (terms.ndim - 1 - strength.ndim)
        )
        smoothed = _smooth(algebra, kind, factors, terms, strength)
        return from_blocks(structure, smoothed)


class _Elementwise:
    """Diagonal matrices, as vectors."""

    @staticmethod
    def multiply(a, b):
        return a * b

    @staticmethod
    def transpose(a):
        return a

    @staticmethod
    def identity(a):
        return jnp.ones_like(a)

    @staticmethod
    def invert(a):
        return 1 / a


class _Matrices:
    """Square matrices `[..., n, n]`, at the full precision of their dtype."""

    @staticmethod
    def multiply(a, b):
        return multiply_matrices(a, b)

    @staticmethod
    def transpose(a):
        return jnp.swapaxes(a, -1, -2)

    @staticmethod
    def identity(a):
        return jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)

    @staticmethod
    def invert(a):
        return invert_matrices(a)


def _smooth(algebra, kind, F: Array, r: Array, strength: Array) -> Array:
    """Return the mean of `δ_t = F_t δ_{t-1} + r_t + w_t`, given that `δ_t + v_t = 0`.

    `w` has unit variance, `v` variance `1 / strength`, and `δ_0 = 0`. Time is the first
    axis. The covariances of the filter are prefixes of triples (A, C, J). Given them,
    the means of filter and smoother are linear recurrences.
    """
    multiply, invert = algebra.multiply, algebra.invert
    one = algebra.identity(F)
    # The state before the first is zero, so no transition leads from it.
    F = F.at[0].set(0)
    kept = 1 / (1 + strength)
    elements = (
        kept * F,
        kept * one,
        kept * strength * multiply(algebra.transpose(F), F),
    )

    def combine(earlier, later):
        A1, C1, J1 = earlier
        A2, C2, J2 = later
        # Inverses of symmetric matrices only: (I + C J)^-1 = (C^-1 + J)^-1 C^-1.
        precision = invert(C1)
        joint = invert(precision + J2)
        forward = multiply(multiply(joint, precision), A1)
        A = multiply(A2, forward)
        C = multiply(multiply(A2, joint), algebra.transpose(A2)) + C2
        J = multiply(multiply(algebra.transpose(A1), J2), forward) + J1
        return A, C, J

    _, P, _ = prefix(combine, elements)
    before = jnp.concatenate([jnp.zeros_like(P[:1]), P[:-1]])
    predicted = multiply(multiply(F, before), algebra.transpose(F)) + one
    gain = invert(one + strength * predicted)
    m = _scan(kind, multiply(gain, F), _apply(kind, gain, r), reverse=False)
    # The last mean is not smoothed.
    smoother = multiply(
        multiply(P[:-1], algebra.transpose(F[1:])), invert(predicted[1:])
    )
    ahead = _apply(kind, F[1:], m[:-1]) + r[1:]
    first = m[:-1] - _apply(kind, smoother, ahead)
    smoother = jnp.concatenate([smoother, jnp.zeros_like(F[:1])])
    return _scan(kind, smoother, jnp.concatenate([first, m[-1:]]), reverse=True)


def _apply(kind, a, x):
    return a * x if kind == "elementwise" else multiply_matrices(a, x)


def _scan(kind, factors, terms, *, reverse: bool):
    schedule = Schedule(kind, "after", reverse)
    zero = jnp.zeros_like(terms[0])
    return run_scan(schedule, "auto", factors, terms, zero, None)[0]
