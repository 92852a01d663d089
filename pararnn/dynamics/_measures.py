"""How alike two trajectories on an attractor are: in place, and in time."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .._parameters import check_number, check_size


def state_space_divergence(
    true: Float[np.ndarray, "T N"],
    generated: Float[np.ndarray, "S N"],
    *,
    bins: int = 30,
    smoothing: float = 1e-5,
) -> float:
    r"""$\mathrm{KL}(p \,\|\, q)$ of where the two spend their time.

    $p$ and $q$ are histograms of `bins` bins for each variable, over the range of
    `true`, with `smoothing` added to every bin. Each bin holds its share of all points,
    so that points outside of the range take from the shares of all bins, and a
    trajectory that leaves the range altogether has the largest divergence that one of
    its length can have. Zero for the same distribution; in nats.

    ??? cite "Source"

        Koppe et al., PLOS Computational Biology 15 (2019), binned as in Hess et al.
        (2306.04406).

    **Arguments:** `true` and `generated`, `[T, N]` and `[S, N]`, on the same scale, of
    any lengths; a point that is not finite lies outside of any bin.

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
    # What lies outside is of the whole, too: without it, a trajectory that is nowhere
    # inside would seem to be everywhere alike, thanks to the smoothing.
    return (counts + smoothing) / (len(points) + smoothing * counts.size)


def spectrum_distance(
    true: Float[np.ndarray, "T N"],
    generated: Float[np.ndarray, "T N"],
    *,
    smoothing: float = 20.0,
) -> float:
    r"""Hellinger distance of the power spectra, a mean over the variables.

    $$H(p, q) = \sqrt{1 - \textstyle\sum_k \sqrt{p_k q_k}}$$

    with $p$ and $q$ the power at each frequency, as a part of all, smoothed by a
    Gaussian of `smoothing` frequencies' width. 0 for the same spectra, 1 for disjoint
    ones, or if `generated` is not finite. A variable that is constant, to 4 roundings
    in its own dtype, has no power: 1 if it is so in one of the two, 0 if in both.

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
    """The power at each frequency above 0 as a part of all, smoothed; 0 if constant.

    What varies by 4 roundings of `points`, in their dtype, counts as constant: it is
    noise, which would be scaled up to a spectrum.
    """
    points = np.asarray(points)
    floating = jnp.issubdtype(points.dtype, jnp.floating)
    epsilon = float(jnp.finfo(points.dtype if floating else np.float64).eps)
    points = points.astype(np.float64)
    rounding = 4 * epsilon * np.abs(points).max(0)
    # The largest first, as squares of numbers far from 1 leave the range.
    varied = points - points.mean(0)
    size = np.abs(varied).max(0)
    constant = np.ptp(points, axis=0) <= rounding
    varied = np.where(constant, 0, varied / np.where(constant, 1, size))
    power = np.abs(np.fft.rfft(varied, axis=0))[1:] ** 2
    if width:
        reach = math.ceil(4 * width)
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
        # Mirrored at both ends, so that none of the power is lost there.
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
