"""How alike two trajectories on an attractor are: in place, and in time."""

import math

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
    `true`, with `smoothing` added to every bin. What lies outside is not counted, so
    that a trajectory that leaves the range altogether has an empty histogram, and the
    largest divergence. Zero for the same distribution; in nats.

    ??? cite "Source"

        Koppe et al., PLOS Computational Biology 15 (2019), binned as in Hess et al.
        (2306.04406).

    **Arguments:** `true` and `generated`, `[T, N]` and `[S, N]`, on the same scale, of
    any lengths; values that are not finite lie outside of any bin.

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
    points = points[np.all(np.isfinite(points), axis=1)]
    counts, _ = np.histogramdd(points, edges)
    counts += smoothing
    return counts / counts.sum()


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
    ones, or if `generated` is not finite, or constant.

    ??? cite "Source"

        Mikhaeil et al. (2110.07238).

    **Arguments:** `true` and `generated`, `[T, N]`, of the same length; `smoothing`, 0
    for none.

    **Raises:** `ValueError` for shapes that do not fit, `true` that is not finite, or a
    negative width.
    """
    where = "spectrum_distance"
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
    p, q = (power_spectrum(points, width) for points in (true, generated))
    overlap = np.sum(np.sqrt(p * q), axis=0)
    return float(np.mean(np.sqrt(np.clip(1 - overlap, 0, 1))))


def power_spectrum(
    points: Float[np.ndarray, "T N"], width: float
) -> Float[np.ndarray, "T//2 N"]:
    """The power at each frequency above 0 as a part of all, smoothed; 0 if constant."""
    power = np.abs(np.fft.rfft(points - points.mean(0), axis=0))[1:] ** 2
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
