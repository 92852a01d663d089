"""State spaces: their HiPPO initialisation, in float64 NumPy, and discretisation."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from pararnn._parameters import check_number, check_size


class Diagonalised(NamedTuple):
    r"""The eigenvalues of a matrix close to HiPPO-LegS, one of each conjugate pair.

    **Attributes:**

    - `eigenvalues`: `[N / 2]`.
    - `vectors`: `[N, N / 2]`, their columns of $V$, each of length 1.
    - `inverse`: `[N / 2, N]`, their rows of $V^{-1}$.
    - `condition`: $\kappa(V)$ in the 2-norm.
    """

    eigenvalues: Complex[np.ndarray, " modes"]
    vectors: Complex[np.ndarray, "d_state modes"]
    inverse: Complex[np.ndarray, "modes d_state"]
    condition: float


def legs(
    d_state: int,
) -> tuple[Float[np.ndarray, "d_state d_state"], Float[np.ndarray, " d_state"]]:
    r"""Return A and B of HiPPO-LegS.

    $A_{nk} = -\sqrt{(2n+1)(2k+1)}$ below the diagonal, $-(n+1)$ on it and 0 above;
    $B_n = \sqrt{2n+1}$.

    ??? cite "Source"

        Gu et al., "HiPPO: Recurrent Memory with Optimal Polynomial Projections"
        (2008.07669).
    """
    n = np.arange(d_state)
    root = np.sqrt(2 * n + 1.0)
    return -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0), root


def normal_legs(d_state: int) -> Diagonalised:
    r"""Diagonalise the normal part of HiPPO-LegS, $A + P P^\top$ with
    $P_n = \sqrt{n + 1/2}$.

    It is -1/2 plus a skew-symmetric matrix, so $V$ is unitary.
    """
    n = np.arange(d_state)
    # Half of the lower triangle of the skew-symmetric part, with P_n P_k added.
    lower = np.tril(-0.5 * np.sqrt(np.outer(2 * n + 1.0, 2 * n + 1.0)), -1)
    frequency, vectors = np.linalg.eigh(-1j * (lower - lower.T))
    half = slice(d_state // 2, None)
    vectors = _fix_phase(vectors[:, half])
    return Diagonalised(-0.5 + 1j * frequency[half], vectors, vectors.conj().T, 1.0)


def perturb_then_diagonalise(d_state: int, perturbation: float = 0.1) -> Diagonalised:
    r"""Diagonalise $A_{HiPPO} + E$, with $\|E\|_2 / \|A_{HiPPO}\|_2$ = `perturbation`.

    HiPPO-LegS itself cannot be diagonalised in floating point: $\kappa(V)$ is 8e10 at
    N = 16. A random $E$ lowers it, but pushes eigenvalues to the right of the imaginary
    axis. Here $E = s P P^\top$. The symmetric part of $A + P P^\top$ is -1/2, so that
    of $A + E$ is $-1/2 - (1 - s) P P^\top$. For $s \le 1$ every eigenvalue thus has a
    real part of at most -1/2 (Bendixson). $\kappa(V)$ is below 2 / `perturbation`
    for any N.

    **Arguments:** `d_state`, N, even; `perturbation`, in [0.01, 0.78].

    **Raises:** `ValueError` on arguments out of range, or if an eigenvalue is real and
    has no conjugate (N up to 8 with a small perturbation).

    ??? cite "Source"

        Yu et al., "Robustifying State-space Models for Long Sequences via Approximate
        Diagonalization" (2310.01698), which allows any E of that size; this E is ours.
    """
    where = "perturb_then_diagonalise"
    check_size(where, "d_state", d_state)
    perturbation = check_number(where, "perturbation", perturbation)
    if d_state % 2 or not 0.01 <= perturbation <= 0.78:
        raise ValueError(
            f"{where}: `d_state` = {d_state} must be even and `perturbation` = "
            f"{perturbation!r} in [0.01, 0.78]. Smaller perturbations leave the "
            "eigenvectors ill-conditioned; 0.785 gives the normal part, which is the "
            "initialisation 'legs'."
        )
    A, _ = legs(d_state)
    P = np.sqrt(np.arange(d_state) + 0.5)
    # At N = 2 and 4 the largest perturbation would go beyond the normal part.
    s = min(1.0, perturbation * np.linalg.norm(A, 2) / (P @ P))
    E = s * np.outer(P, P)
    eigenvalues, vectors = np.linalg.eig(A + E)
    half = np.argsort(-np.imag(eigenvalues))[: d_state // 2][::-1]
    if np.any(np.imag(eigenvalues[half]) <= 0):
        raise ValueError(
            f"{where}: at N = {d_state} a perturbation of {perturbation} leaves real "
            "eigenvalues, which have no conjugate. Pass a larger one, or N from 16."
        )
    vectors = _fix_phase(vectors)
    inverse = np.linalg.inv(vectors)[half]
    return Diagonalised(
        eigenvalues[half], vectors[:, half], inverse, float(np.linalg.cond(vectors))
    )


def _fix_phase(vectors: np.ndarray) -> np.ndarray:
    """Turn the columns so that their products with B are positive.

    The phase of an eigenvector is free, and every LAPACK should give the same layer.
    """
    root = np.sqrt(2 * np.arange(len(vectors)) + 1.0)
    along = vectors.conj().T @ root
    return vectors * (along / np.abs(along))[None]


def _zoh(A: Array, dt: Array) -> tuple[Array, Array]:
    return jnp.exp(dt * A), dt * _mean_growth(dt * A)


def _mean_growth(z: Array) -> Array:
    """Return `(exp(z) - 1) / z`, with the right value and derivative at zero too."""
    small = jnp.abs(z) < _SERIES_BELOW
    near = jnp.where(small, z, 0)
    series = jnp.ones_like(z)
    for n in range(_SERIES_TERMS, 1, -1):
        series = 1 + near / n * series
    away = jnp.where(small, 1, z)
    return jnp.where(small, series, jnp.expm1(away) / away)


# The truncation error of the series is 0.01^6 / 7! = 2e-16.
_SERIES_BELOW, _SERIES_TERMS = 0.01, 6


def _bilinear(A: Array, dt: Array) -> tuple[Array, Array]:
    half = dt * A / 2
    return (1 + half) / (1 - half), dt / (1 - half)


DISCRETISATIONS = {"zoh": _zoh, "bilinear": _bilinear}


def discretise(
    rule: str, A: Complex[Array, "..."], dt: Complex[Array, "..."]
) -> tuple[Complex[Array, "..."], Complex[Array, "..."]]:
    r"""Return $\bar{A}$, and the factor of $B$ in $\bar{B}$, for diagonal $A$.

    `"zoh"`: $e^{\Delta A}$ and $(e^{\Delta A} - 1) / A$; `"bilinear"`:
    $(1 + \Delta A / 2) / (1 - \Delta A / 2)$ and $\Delta / (1 - \Delta A / 2)$.
    $|\bar{A}| < 1$ where $\mathrm{Re} A < 0$.
    """
    return DISCRETISATIONS[rule](A, dt)
