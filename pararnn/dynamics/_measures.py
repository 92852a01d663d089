"""Measures of trajectories: distances, exponents and symbolic codes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from .._parameters import check_number, check_size
from ..cells import ALRNNCell


def state_space_divergence(
    true: Float[np.ndarray, "T N"],
    generated: Float[np.ndarray, "S N"],
    *,
    bins: int = 30,
    smoothing: float = 1e-5,
) -> float:
    r"""Return $\mathrm{KL}(p \,\|\, q)$ of where two trajectories spend their time.

    $p$ and $q$ are histograms of `bins` bins for each variable, over the range of
    `true`, with `smoothing` added to every bin. Each bin holds its fraction of all
    points, including those outside of the range: a trajectory that leaves the range
    altogether has the largest divergence that one of its length can have. Zero for the
    same distribution; in nats.

    ??? cite "Source"

        Koppe et al., PLOS Computational Biology 15 (2019), binned as in Hess et al.
        (2306.04406).

    **Arguments:** `true` and `generated`, `[T, N]` and `[S, N]`, on the same scale, of
    any lengths. A point that is not finite lies outside of all bins.

    **Raises:** `ValueError` for shapes that do not fit, `true` that is not finite, or
    options out of range.
    """
    where = "state_space_divergence"
    true, generated = _check(where, true, generated)
    bins = check_size(where, "bins", bins, least=2)
    if check_number(where, "smoothing", smoothing) <= 0:
        raise ValueError(
            f"{where}: `smoothing` is {smoothing!r}, expected a number above 0: an "
            "empty bin has no logarithm."
        )
    edges = [
        np.linspace(low, high, bins + 1)
        for low, high in zip(true.min(0), true.max(0), strict=True)
    ]
    p, q = (_histogram(points, edges, smoothing) for points in (true, generated))
    return float(np.sum(p * np.log(p / q)))


def _histogram(points, edges, smoothing: float) -> np.ndarray:
    inside = points[np.all(np.isfinite(points), axis=1)]
    counts, _ = np.histogramdd(inside, edges)
    # Points outside count in the total: otherwise the smoothing would make a trajectory
    # that is nowhere inside look uniform.
    return (counts + smoothing) / (len(points) + smoothing * counts.size)


def spectrum_distance(
    true: Float[np.ndarray, "T N"],
    generated: Float[np.ndarray, "T N"],
    *,
    smoothing: float = 20.0,
) -> float:
    r"""Return the Hellinger distance of the power spectra, averaged over variables.

    $$H(p, q) = \sqrt{1 - \textstyle\sum_k \sqrt{p_k q_k}}$$

    where $p$ and $q$ are the power at each frequency, as a fraction of the total,
    smoothed by a Gaussian with a width of `smoothing` frequencies. 0 for the same
    spectra, 1 for disjoint ones, or if `generated` is not finite. A variable that is
    constant, up to 4 roundings in its own dtype, has no power: its distance is 1 if
    that is so in one of the two, and 0 if in both.

    ??? cite "Source"

        Mikhaeil et al. (2110.07238).

    **Arguments:** `true` and `generated`, `[T, N]`, of the same length; `smoothing`, 0
    for none.

    **Raises:** `ValueError` for shapes that do not fit, `true` that is not finite, or a
    negative width.
    """
    where = "spectrum_distance"
    given = true, generated
    true, generated = _check(where, true, generated)
    if len(true) != len(generated):
        raise ValueError(
            f"{where}: `true` has {len(true)} steps and `generated` {len(generated)}; "
            "spectra are compared frequency by frequency. Cut them to one length."
        )
    width = check_number(where, "smoothing", smoothing)
    if width < 0:
        raise ValueError(
            f"{where}: `smoothing` is {smoothing!r}, expected a width in frequencies."
        )
    if not np.all(np.isfinite(generated)):
        return 1.0
    p, q = (power_spectrum(points, width) for points in given)
    silent = ~np.any(p, axis=0) & ~np.any(q, axis=0)
    overlap = np.where(silent, 1, np.sum(np.sqrt(p * q), axis=0))
    return float(np.mean(np.sqrt(np.clip(1 - overlap, 0, 1))))


def power_spectrum(
    points: Float[np.ndarray, "T N"], width: float
) -> Float[np.ndarray, "T//2 N"]:
    """Return the smoothed power above frequency 0, as fractions; 0 if constant.

    A variable that varies by 4 roundings of `points`, in their dtype, counts as
    constant: it is noise, which would be scaled up to a spectrum.
    """
    points = np.asarray(points)
    floating = jnp.issubdtype(points.dtype, jnp.floating)
    epsilon = float(jnp.finfo(points.dtype if floating else np.float64).eps)
    points = points.astype(np.float64)
    rounding = 4 * epsilon * np.abs(points).max(0)
    # Divide by the largest first, since squares of extreme numbers leave the range.
    varied = points - points.mean(0)
    size = np.abs(varied).max(0)
    constant = np.ptp(points, axis=0) <= rounding
    varied = np.where(constant, 0, varied / np.where(constant, 1, size))
    power = np.abs(np.fft.rfft(varied, axis=0))[1:] ** 2
    if width:
        reach = math.ceil(4 * width)
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
        # Mirrored at both ends, so that no power is lost there.
        reach = min(reach, len(power) - 1)
        padded = np.pad(power, ((reach, reach), (0, 0)), mode="symmetric")
        middle = len(kernel) // 2
        kernel = kernel[middle - reach : middle + reach + 1]
        smooth = [np.convolve(column, kernel, mode="valid") for column in padded.T]
        power = np.stack(smooth, axis=1)
    total = power.sum(0)
    return power / np.where(total > 0, total, 1)


def _check(where: str, true, generated) -> tuple[np.ndarray, np.ndarray]:
    true, generated = (np.asarray(v, np.float64) for v in (true, generated))
    if true.ndim != 2 or generated.ndim != 2 or true.shape[1] != generated.shape[1]:
        raise ValueError(
            f"{where}: `true` has shape {true.shape} and `generated` "
            f"{generated.shape}, expected [T, N] and [S, N]. Likely cause: states "
            "with hidden units were passed; take the observed ones, `[:, :N]`."
        )
    if min(len(true), len(generated)) < 3 or not np.all(np.isfinite(true)):
        raise ValueError(
            f"{where}: `true` must be finite, and both at least three steps long; "
            f"their lengths are {len(true)} and {len(generated)}."
        )
    return true, generated


def largest_exponent(
    step: Callable[[Float[Array, " d"]], Float[Array, " d"]],
    start: Float[Array, " d"],
    steps: int,
    *,
    settle: int = 1_000,
) -> float:
    r"""Return the largest Lyapunov exponent of $u_t = g(u_{t-1})$, in nats per step.

    It is the mean growth of a tangent that is pushed along the trajectory and scaled
    back to length one after every step. The tangent starts in a random direction, the
    same in every call. Divide by the time between steps for a rate per unit of time.

    **Arguments:** `step`, $g$; `start`, `[d]`; `steps`, to average over; `settle`,
    earlier steps, in which the tangent turns to the direction that grows most.

    **Returns:** a number; -inf if all tangents vanish, as for a map onto one point; NaN
    if the trajectory does not stay finite.

    **Raises:** `ValueError` for numbers of steps that are negative or not whole.
    """
    steps = check_size("largest_exponent", "steps", steps)
    settle = check_size("largest_exponent", "settle", settle, least=0)

    def body(carry, _):
        state, tangent = carry
        state, pushed = jax.jvp(step, (state,), (tangent,))
        # Divide by the largest entry first, since squares may leave the range.
        largest = jnp.max(jnp.abs(pushed))
        scaled = pushed / jnp.where(largest == 0, 1, largest)
        norm = jnp.linalg.norm(scaled)
        tangent = scaled / jnp.where(norm == 0, 1, norm)
        return (state, tangent), jnp.log(largest) + jnp.log(norm)

    @jax.jit
    def run(start):
        # Random, since any fixed direction is turned to zero by some map.
        tangent = jr.normal(jr.key(0), start.shape, start.dtype)
        tangent = tangent / jnp.linalg.norm(tangent)
        (last, _), growth = lax.scan(body, (start, tangent), length=settle + steps)
        finite = jnp.all(jnp.isfinite(last))
        return jnp.where(finite, jnp.mean(growth[settle:]), jnp.nan)

    return float(run(jnp.asarray(start)))


class Symbols(NamedTuple):
    """A trajectory of an AL-RNN as a path between linear regions.

    **Attributes:**

    - `code`: `[T]`, for each state the index of its region in the lists below.
    - `regions`: bool `[symbols, rectified]`, which of the rectified units are positive
        in each region that was visited, the most visited first.
    - `transitions`: `[symbols, symbols]`, the fraction of the steps from the region of
        the row that lead to the region of the column.
    """

    code: Int[np.ndarray, " T"]
    regions: Bool[np.ndarray, "symbols rectified"]
    transitions: Float[np.ndarray, "symbols symbols"]


def find_symbols(cell: ALRNNCell, states: Float[np.ndarray, "T d_state"]) -> Symbols:
    """Return the symbolic code of a trajectory: the linear map of each step.

    ??? cite "Source"

        Brenner et al. (2410.14240): the graph of the symbols' transitions.

    **Arguments:** `cell`, a [`pararnn.ALRNNCell`][]; `states`, `[T, d_state]`.

    **Raises:** `TypeError` for another cell; `ValueError` for states that do not fit.
    """
    if not isinstance(cell, ALRNNCell):
        raise TypeError(
            f"find_symbols: the cell is a {type(cell).__name__}, expected an "
            "ALRNNCell, whose few rectified units make few regions."
        )
    if np.ndim(states) != 2 or len(states) < 2:
        raise ValueError(
            f"find_symbols: `states` has shape {np.shape(states)}, expected "
            "[T, d_state] with at least two states."
        )
    regions = np.asarray(cell.region(jnp.asarray(states)))
    visited, code, counts = np.unique(
        regions, axis=0, return_inverse=True, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")
    code = np.argsort(order)[code.reshape(-1)]
    pairs = np.zeros((len(visited), len(visited)))
    np.add.at(pairs, (code[:-1], code[1:]), 1)
    left = pairs.sum(1, keepdims=True)
    return Symbols(code, visited[order], pairs / np.where(left > 0, left, 1))
