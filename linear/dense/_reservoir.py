"""A random linear reservoir whose output is learned in one solve."""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Complex, DTypeLike, Float, PRNGKeyArray

from pararnn._checks import check_count
from pararnn._parameters import check_number, check_size, linear, widen
from pararnn.scan import Dense, Diagonal, linear_scan, multiply_matrices

from .._arguments import Draw
from .._layer import AbstractLayer


class LRNN(AbstractLayer):
    r"""A linear recurrent network with random weights, except for the learned output.

    $$x_t = W_{res} x_{t-1} + W_{in} u_t, \qquad y_t = W_{out} [u_t; x_t]$$

    `fit` finds $W_{out}$ by linear least squares. A network fitted to predict the next
    input can run on its own (`generate`), as the linear system
    $[u; x]_{t+1} = W [u; x]_t$ (`closed`). Its output is then a sum of exponentials of
    the eigenvalues of $W$. `reduced` keeps the few that the series needs.

    The state is $x$, `[d_state]`. `W_out` is zero until it is fitted. All three
    matrices are ordinary parameters. To train the output by gradient descent instead,
    leave `W_in` and `W_res` out of the gradient.

    ??? cite "Source"

        Stolzenburg, Litz, Michael & Obst, "The Power of Linear Recurrent Neural
        Networks" (1802.03308).
    """

    W_in: Float[Array, "d_state d_model"]
    W_res: Float[Array, "d_state d_state"]
    W_out: Float[Array, "d_model features"]
    d_model: int
    d_state: int
    fitted: bool

    def __init__(
        self,
        d_model: int,
        d_state: int = 100,
        *,
        spectral_radius: float = 1.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_model`: size of an input and of an output.
        - `d_state`: size of the reservoir. A sum of k oscillators needs at least 2k.
        - `spectral_radius`: the largest modulus of the eigenvalues of $W_{res}$, whose
            entries are drawn from the normal distribution. A smaller radius forgets
            the start sooner.
        - `dtype`: of the parameters. Defaults to JAX's default floating point. Long
            predictions need float64.
        - `key`: a key of `jax.random`. $W_{in}$ is standard normal over the root of
            `d_state`.

        **Raises:** `ValueError` on a size that is not a positive integer, a radius that
        is not positive and finite, an invalid key, or a dtype that is not floating
        point.
        """
        draw = Draw("LRNN", dtype, key)
        self.d_model = check_size("LRNN", "d_model", d_model)
        self.d_state = n = check_size("LRNN", "d_state", d_state)
        spectral_radius = check_number("LRNN", "spectral_radius", spectral_radius)
        if not 0 < spectral_radius < math.inf:
            raise ValueError(
                "LRNN: `spectral_radius` must be positive and finite, got "
                f"{spectral_radius!r}. It is the largest modulus of the eigenvalues of "
                "the reservoir: 1 or a little less for a long memory."
            )
        self.W_in = draw.normal((n, self.d_model), n**-0.5)
        (weights,) = widen(draw.normal((n, n), n**-0.5))
        weights = weights * (spectral_radius / _spectral_radius(weights))
        self.W_res = weights.astype(draw.dtype)
        self.W_out = draw.constant(jnp.zeros((self.d_model, self.d_model + n)))
        self.fitted = False

    def init_state(self) -> Float[Array, " d_state"]:
        """Return zeros `[d_state]`, at least float32."""
        return jnp.zeros(self.d_state, self.precision())

    def mix(self, xs, state, reset):
        features = self._features(xs, state, reset)
        return linear(self.W_out, features), features[-1, self.d_model :]

    def _features(self, xs, state, reset=None) -> Float[Array, "T features"]:
        """Return `[u_t; x_t]` for every step."""
        xs = xs.astype(self.precision())
        transition = Dense(self.W_res.astype(xs.dtype)[None])
        states = linear_scan(transition, linear(self.W_in, xs), state, reset=reset)
        return jnp.concatenate([xs, states], 1)

    def fit(
        self,
        xs: Float[Array | np.ndarray, "T d_model"],
        targets: Float[Array | np.ndarray, "T d_model"] | None = None,
        *,
        washout: int = 100,
        ridge: float = 0.0,
    ) -> "LRNN":
        r"""Return a copy whose $W_{out}$ minimises
        $\sum_t \|W_{out} [u_t; x_t] - d_t\|^2 + \rho \|W_{out}\|^2$.

        It is the smallest of all minimisers, from a singular value decomposition in
        float64 on the host. Not for use inside `jax.jit`.

        **Arguments:**

        - `xs`: the inputs u, `[T, d_model]`.
        - `targets`: the desired outputs d at the same steps, `[T, d_model]`. Defaults
            to the next inputs, which `generate` and `reduced` need; the last input is
            then only a target.
        - `washout`: number of first steps to leave out, while the reservoir still
            remembers its initial zeros. A spectral radius near 1 needs many.
        - `ridge`: $\rho$, at least 0. Use 0 for an exact series. With noise, 0 would
            make the free run explode (an eigenvalue of `closed()` exceeds 1): start
            with a hundredth of the noise's variance. With too large a value, the run
            dies out.

        **Returns:** the fitted layer.

        **Raises:** `ValueError` on wrong shapes, values that are not finite, no step
        left after the washout, a negative `ridge`, or a call under a transformation of
        JAX.
        """
        given = _check_series(self, "fit", "xs", xs)
        if targets is None:
            given, goal = given[:-1], given[1:]
        else:
            goal = _check_series(self, "fit", "targets", targets)
        if goal.shape != given.shape:
            raise ValueError(
                f"LRNN.fit: `targets` has shape {goal.shape} and `xs` has "
                f"{given.shape}; each input needs one target. Likely cause: the next "
                "inputs were given as targets without dropping the last input; leave "
                "`targets` out for that."
            )
        _check_washout("fit", washout, given.shape[0], 1)
        ridge = check_number("LRNN.fit", "ridge", ridge)
        if not 0 <= ridge < math.inf:
            raise ValueError(
                f"LRNN.fit: `ridge` must be at least 0 and finite, got {ridge!r}. It "
                "is added to the squared singular values: 1e-8 is small and 1 is large."
            )
        inputs = jnp.asarray(given, self.precision())
        features = eqx.filter_jit(type(self)._features)(self, inputs, self.init_state())
        kept = np.asarray(features, np.float64)[washout:]
        goal = goal[washout:]
        if not np.all(np.isfinite(kept)):
            raise ValueError(
                f"LRNN.fit: the reservoir overflows within {len(given)} steps. Likely "
                "cause: a spectral radius above 1; choose 1 or less."
            )
        # Directions below the rounding of the features carry no information.
        rounding = max(kept.shape) * float(jnp.finfo(features.dtype).eps)
        left, sizes, right = np.linalg.svd(kept, full_matrices=False)
        used = sizes > rounding * sizes[0]
        inverse = np.where(used, sizes / np.where(used, sizes**2 + ridge, 1), 0)
        weight = ((right.T * inverse) @ (left.T @ goal)).T
        return eqx.tree_at(
            lambda layer: (layer.W_out, layer.fitted),
            self,
            (jnp.asarray(weight, self.W_out.dtype), True),
        )

    def closed(self) -> Float[Array, "features features"]:
        r"""Return $W$ of the network fed its own output, $[u; x]_{t+1} = W [u; x]_t$.

        $$W = \begin{pmatrix} W_{out} \\
        W_{in} W_{out} + (0 \;\; W_{res}) \end{pmatrix}$$

        **Returns:** `[d_model + d_state, d_model + d_state]`.

        **Raises:** `ValueError` if the layer has not been fitted.
        """
        self._check_fitted("closed")
        dtype = self.precision()
        W_in, W_res, W_out = (
            w.astype(dtype) for w in (self.W_in, self.W_res, self.W_out)
        )
        reservoir = linear(W_out.T, W_in)
        reservoir = reservoir.at[:, self.d_model :].add(W_res)
        return jnp.concatenate([W_out, reservoir])

    def generate(
        self, xs: Float[Array, "T d_model"], steps: int
    ) -> Float[Array, "steps d_model"]:
        """Predict what follows a series; each prediction is fed back as an input.

        The layer must have been fitted to predict the next input, as `fit(xs)` does.

        **Arguments:** `xs`, `[T, d_model]`, the series so far, T at least 1; `steps`,
        the number of steps to predict.

        **Returns:** the predictions of the inputs after `xs`, `[steps, d_model]`, in
        the dtype of `xs`.

        **Raises:** `ValueError` if the layer has not been fitted, on an empty series
        and on wrong shapes and dtypes.
        """
        transition = self.closed()
        steps = check_size("LRNN.generate", "steps", steps)
        _, state = self(xs)
        xs = jnp.asarray(xs)
        if xs.shape[0] == 0:
            raise ValueError(
                "LRNN.generate: `xs` has no steps, so there is nothing to predict "
                "from. Pass the series that comes before the prediction."
            )
        start = jnp.concatenate([xs[-1].astype(state.dtype), state])
        nothing = jnp.zeros((steps, start.shape[0]), start.dtype)
        states = linear_scan(Dense(transition[None]), nothing, start)
        return states[:, : self.d_model].astype(xs.dtype)

    def reduced(
        self,
        xs: Float[Array | np.ndarray, "T d_model"],
        *,
        tolerance: float = 1e-3,
        washout: int = 100,
    ) -> "ReducedLRNN":
        r"""Find the few eigenvalues of the closed network that a series consists of.

        With $W = V \Lambda V^{-1}$ the free run from the first step kept is
        $u_t = \sum_k C_k (V^{-1} [u; x]_0)_k \lambda_k^t$. The terms are sorted by
        their size over the series. As few of the largest are kept as bring their sum,
        with amplitudes fitted again by least squares, within `tolerance`. Then each
        term that is not needed is dropped. Runs on the host in float64;
        not for use inside `jax.jit`.

        **Arguments:**

        - `xs`: the series to reproduce, `[T, d_model]`.
        - `tolerance`: bounds the root-mean-square error of the free run over the
            series, relative to the standard deviation of the series.
        - `washout`: number of first steps to leave out, as for `fit`.

        **Returns:** a predictor of what follows `xs`.

        **Raises:** `ValueError` if the layer has not been fitted, on wrong shapes or
        values that are not finite, if fewer than two steps are left after the washout,
        if all eigenvalues together do not reach the tolerance, or under a
        transformation of JAX.
        """
        self._check_fitted("reduced")
        series = _check_series(self, "reduced", "xs", xs)
        _check_washout("reduced", washout, series.shape[0], 2)
        tolerance = check_number("LRNN.reduced", "tolerance", tolerance)
        if not 0 < tolerance < 1:
            raise ValueError(
                f"LRNN.reduced: `tolerance` must be between 0 and 1, got {tolerance!r}."
                " It is relative to the standard deviation of the series; with no "
                "eigenvalues at all the error is about 1."
            )
        warm = jnp.asarray(series[: washout + 1], self.precision())
        features = eqx.filter_jit(type(self)._features)(self, warm, self.init_state())
        values, vectors = np.linalg.eig(np.asarray(self.closed(), np.float64))
        start = np.asarray(features[-1], np.float64).astype(complex)
        # Least squares, as a defective matrix has too few eigenvectors.
        amplitudes = vectors[: self.d_model] * np.linalg.lstsq(vectors, start)[0]
        return _fewest_exponentials(series[washout:], values, amplitudes, tolerance)

    def _check_fitted(self, method: str) -> None:
        if not self.fitted:
            raise ValueError(
                f"LRNN.{method}: the layer has not been fitted, so its output is "
                "zero. Likely cause: the result of `fit` was dropped; it returns a "
                "new layer, `layer = layer.fit(xs)`."
            )


class ReducedLRNN(eqx.Module):
    r"""A sum of few exponentials, run as a diagonal recurrence.

    $$z_t = \lambda \odot z_{t-1}, \qquad y_t = \mathrm{Re}(C z_t)$$

    Each pair of conjugate eigenvalues is represented by the one with a positive
    imaginary part, and its $C$ is doubled. Made by `LRNN.reduced`.

    **Attributes:**

    - `eigenvalues`: $\lambda$, `[k]`, complex, the largest terms first. Angles are
        frequencies in radians a step.
    - `readout`: $C$, `[d_model, k]`, complex.
    - `state`: $z$ at the last step of the series, `[k]`, complex.
    - `error`: root mean square over the series, relative to its standard deviation.
    """

    eigenvalues: Complex[Array, " k"]
    readout: Complex[Array, "d_model k"]
    state: Complex[Array, " k"]
    error: float

    @property
    def size(self) -> int:
        """The real dimension: the number of eigenvalues, conjugates included."""
        values = np.asarray(self.eigenvalues)
        return values.size + int(np.count_nonzero(np.imag(values)))

    def generate(self, steps: int) -> Float[Array, "steps d_model"]:
        """Return the steps after the series, `[steps, d_model]`.

        **Raises:** `ValueError` on `steps` that is not a positive integer.
        """
        steps = check_size("ReducedLRNN.generate", "steps", steps)
        nothing = jnp.zeros((steps, *self.state.shape), self.state.dtype)
        states = linear_scan(Diagonal(self.eigenvalues[None]), nothing, self.state)
        return linear(self.readout, states).real


def _fewest_exponentials(series, values, amplitudes, tolerance) -> ReducedLRNN:
    # Keep one of each conjugate pair; LAPACK returns exact conjugates.
    upper = np.imag(values) >= 0
    values, amplitudes = values[upper], amplitudes[:, upper]
    powers, ends = _powers(values, len(series))
    with np.errstate(divide="ignore"):
        sizes = np.log(np.linalg.norm(amplitudes, axis=0)) + np.log(
            np.sqrt(np.mean(np.abs(powers) ** 2, 0))
        )
        sizes += np.maximum(np.log(np.abs(values)), 0) * (len(series) - 1)
    order = np.argsort(-sizes, kind="stable")

    def fit(chosen):
        """Return amplitudes of the chosen terms and the error of their sum."""
        part = powers[:, chosen]
        columns = np.concatenate([np.real(part), -np.imag(part)], 1)
        scale = np.linalg.norm(columns, axis=0)
        scale = np.where(scale > 0, scale, 1)
        weights = np.linalg.lstsq(columns / scale, series)[0]
        error = _relative_error(columns / scale @ weights - series, series)
        re, im = np.split(weights / scale[:, None], 2)
        return (re + 1j * im).T, error

    least = fit(order)[1]
    if not least <= tolerance:
        raise ValueError(
            f"LRNN.reduced: the {len(order)} exponentials of the closed network "
            f"reproduce the series with a relative error of {least:.3g}, above "
            f"`tolerance` = {tolerance!r}. Likely causes: (a) the layer was not "
            "fitted to the next input of this series, (b) the reservoir is too small, "
            "(c) noise, of which at least this much must be tolerated; fit with a "
            "`ridge` of a hundredth of its variance or more, (d) the reservoir still "
            "remembers its start; fit with a larger `washout`, or choose a spectral "
            "radius below 1."
        )
    few, many = 0, len(order)
    while many - few > 1:
        # Fewer terms never fit better, so bisection finds the boundary.
        middle = (few + many) // 2
        enough = fit(order[:middle])[1] <= tolerance
        few, many = (few, middle) if enough else (middle, many)
    chosen = list(order[:many])
    for candidate in reversed(order[:many]):
        rest = [k for k in chosen if k != candidate]
        if rest and fit(rest)[1] <= tolerance:
            chosen = rest
    readout, error = fit(chosen)
    return ReducedLRNN(
        jnp.asarray(values[chosen]),
        jnp.asarray(readout),
        jnp.asarray(ends[chosen]),
        float(error),
    )


def _powers(values: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `values**t` `[steps, k]`, ending at 1 if they grow, and the last row."""
    t = np.arange(steps)[:, None] - np.where(np.abs(values) > 1, steps - 1, 0)
    powers = np.power(values.astype(complex), t)
    # The imaginary part of a real one is only rounding.
    powers = np.where(np.imag(values) == 0, np.real(powers), powers)
    return powers, powers[-1]


def _relative_error(error, series) -> float:
    spread = np.linalg.norm(series - np.mean(series, 0))
    # The error of a constant series is relative to its size, that of zeros absolute.
    scale = spread or np.linalg.norm(series) or 1.0
    return float(np.linalg.norm(error) / scale)


def _spectral_radius(matrix: Float[Array, "n n"]) -> Float[Array, ""]:
    """Return the spectral radius by Gelfand's formula.

    After 40 squarings, the norm of the power is that of its largest eigenvalue. Unlike
    an eigenvalue solver, this runs on any device.
    """

    def square(carry, _):
        log, matrix, weight = carry
        norm = jnp.sqrt(jnp.sum(matrix**2))
        matrix = multiply_matrices(matrix / norm, matrix / norm)
        return (log + weight * jnp.log(norm), matrix, weight / 2), None

    zero = jnp.zeros((), matrix.dtype)
    (log, _, _), _ = lax.scan(square, (zero, matrix, zero + 1), length=40)
    return jnp.exp(log)


def _check_series(layer: LRNN, method: str, name: str, values) -> np.ndarray:
    """Return a finite real series as float64 on the host, or refuse it."""
    if isinstance(values, Tracer):
        raise ValueError(
            f"LRNN.{method}: `{name}` is traced, but this runs on the host. Call it "
            "outside `jax.jit`, `jax.vmap` and `jax.grad`."
        )
    values = np.asarray(values)
    if values.ndim != 2 or values.shape[1] != layer.d_model:
        raise ValueError(
            f"LRNN.{method}: `{name}` has shape {values.shape}, expected "
            f"[T, {layer.d_model}], as `d_model` is {layer.d_model}. Likely causes: "
            "(a) a series of one variable without its axis; write `xs[:, None]`, (b) a "
            "batch of series; fit them one by one, (c) the axes are in another order "
            "(time first)."
        )
    if not np.issubdtype(values.dtype, np.floating):
        # NumPy does not recognise bfloat16 as floating point.
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise ValueError(
                f"LRNN.{method}: `{name}` is {values.dtype}, expected real floating "
                "point. Cast it, for instance with `.astype(float)`."
            )
    values = values.astype(np.float64)
    if not np.all(np.isfinite(values)):
        where = int(np.argmin(np.all(np.isfinite(values), 1)))
        raise ValueError(
            f"LRNN.{method}: `{name}` is not finite, first at step {where}. Least "
            "squares would spread that to every weight. Likely causes: (a) missing "
            "values; fill or cut them, (b) a logarithm or quotient of zero upstream."
        )
    return values


def _check_washout(method: str, washout, steps: int, least: int) -> None:
    check_count(f"LRNN.{method}", "washout", washout)
    if steps - washout < least:
        raise ValueError(
            f"LRNN.{method}: {steps} steps, less the first {washout} for `washout`, "
            f"leave {max(steps - washout, 0)}, and at least {least} are "
            "needed. Pass a longer series, or a smaller `washout`."
        )
