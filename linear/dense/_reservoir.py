"""A random linear reservoir whose output is learned, in one solve."""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Complex, DTypeLike, Float, PRNGKeyArray

from pararnn._parameters import check_number, check_size, linear, widen
from pararnn.scan import Dense, Diagonal, linear_scan

from .._arguments import Draw
from .._layer import AbstractLayer


class LRNN(AbstractLayer):
    r"""A linear recurrent network of random weights, of which the output is learned.

    $$x_t = W_{res} x_{t-1} + W_{in} u_t, \qquad y_t = W_{out} [u_t; x_t]$$

    `fit` finds $W_{out}$ by linear least squares. Fitted to predict the next input, the
    network runs on its own (`generate`), as the linear system
    $[u; x]_{t+1} = W [u; x]_t$ (`closed`), and all it can do is a sum of the
    exponentials of the eigenvalues of $W$. `reduced` keeps the few that the series
    needs.

    The state is $x$, `[d_state]`. `W_out` is zeros until it is fitted. All three
    matrices are parameters like any other; leave `W_in` and `W_res` out of the
    gradient where the output is trained by descent after all.

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
        - `d_state`: size of the reservoir. A sum of k oscillators takes at least 2k.
        - `spectral_radius`: the largest modulus of the eigenvalues of $W_{res}$, which
            is otherwise drawn from the standard normal distribution. A smaller one
            forgets its start sooner.
        - `dtype`: of the parameters; JAX's default floating point if not given. Long
            predictions want float64.
        - `key`: a key of `jax.random`. $W_{in}$ is standard normal over the root of
            `d_state`.

        **Raises:** `ValueError` on a size that is not a positive integer, a radius that
        is not positive and finite, a key that is not one, or a dtype that is not
        floating point.
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
        weights = weights * (spectral_radius / _radius(weights))
        self.W_res = weights.astype(draw.dtype)
        self.W_out = draw.full(jnp.zeros((self.d_model, self.d_model + n)))
        self.fitted = False

    def init_state(self) -> Float[Array, " d_state"]:
        """Zeros `[d_state]`, at least float32."""
        return jnp.zeros(self.d_state, self.precision())

    def mix(self, xs, state, reset):
        features = self._features(xs, state, reset)
        return linear(self.W_out, features), features[-1, self.d_model :]

    def _features(self, xs, state, reset=None) -> Float[Array, "T features"]:
        """`[u_t; x_t]` of every step."""
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
        r"""A copy whose $W_{out}$ minimises
        $\sum_t \|W_{out} [u_t; x_t] - d_t\|^2 + \rho \|W_{out}\|^2$.

        Among all minimisers the smallest, by a singular value decomposition in float64
        on the host: not for use inside of `jax.jit`.

        **Arguments:**

        - `xs`: the inputs u, `[T, d_model]`.
        - `targets`: the outputs d wanted at the same steps, `[T, d_model]`; the next
            inputs, which is what `generate` and `reduced` need, if not given. The last
            input is then a target only.
        - `washout`: how many first steps to leave out, in which the reservoir still
            remembers that it started from zeros. With a spectral radius near 1 these
            are many.
        - `ridge`: $\rho$, at least 0. An exact series wants 0. With noise the free run
            would then explode (an eigenvalue of `closed()` is beyond 1): start at a
            hundredth of the noise's variance. With too much, the run dies out.

        **Returns:** the fitted layer.

        **Raises:** `ValueError` on shapes that do not fit, values that are not finite,
        no step left after the washout, a negative `ridge`, or a call under a
        transformation of JAX.
        """
        given = _series(self, "fit", "xs", xs)
        if targets is None:
            given, goal = given[:-1], given[1:]
        else:
            goal = _series(self, "fit", "targets", targets)
        if goal.shape != given.shape:
            raise ValueError(
                f"LRNN.fit: `targets` has shape {goal.shape} and `xs` has "
                f"{given.shape}; there is one target for each input. Likely cause: the "
                "next inputs were given as targets without dropping the last input; "
                "leave `targets` out for that."
            )
        _check_washout("fit", washout, given.shape[0], 1)
        ridge = check_number("LRNN.fit", "ridge", ridge)
        if not 0 <= ridge < math.inf:
            raise ValueError(
                f"LRNN.fit: `ridge` must be at least 0 and finite, got {ridge!r}. It "
                "is added to the squared singular values, so 1e-8 is little and 1 much."
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
        r"""$W$ of the network that is fed its own output, $[u; x]_{t+1} = W [u; x]_t$.

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
        reservoir = jnp.matmul(W_in, W_out, precision=lax.Precision.HIGHEST)
        reservoir = reservoir.at[:, self.d_model :].add(W_res)
        return jnp.concatenate([W_out, reservoir])

    def generate(
        self, xs: Float[Array, "T d_model"], steps: int
    ) -> Float[Array, "steps d_model"]:
        """What follows a series, each prediction being the next input.

        For a layer that was fitted to predict the next input, as `fit(xs)` does.

        **Arguments:** `xs`, `[T, d_model]`, the series so far, T at least 1; `steps`,
        how many to predict.

        **Returns:** the predictions of the inputs after `xs`, `[steps, d_model]`, in
        the dtype of `xs`.

        **Raises:** `ValueError` if the layer has not been fitted, on an empty series
        and on shapes and dtypes that do not fit.
        """
        transition = self.closed()
        steps = check_size("LRNN.generate", "steps", steps)
        _, state = self(xs)
        xs = jnp.asarray(xs)
        if xs.shape[0] == 0:
            raise ValueError(
                "LRNN.generate: `xs` has no steps, and there is nothing to predict "
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
        r"""The few eigenvalues of the closed network that a series consists of.

        With $W = V \Lambda V^{-1}$ the free run from the first step kept is
        $u_t = \sum_k C_k (V^{-1} [u; x]_0)_k \lambda_k^t$. Its terms are ordered by
        their size over the series, and the fewest first ones are kept whose sum, with
        amplitudes fitted again by least squares, is within `tolerance`; then each that
        can be spared. On the host, in float64: not for use inside of `jax.jit`.

        **Arguments:**

        - `xs`: the series to reproduce, `[T, d_model]`.
        - `tolerance`: of the error of the free run over the series, root mean square,
            relative to the standard deviation of the series.
        - `washout`: how many first steps to leave out, as for `fit`.

        **Returns:** the predictor of what follows `xs`.

        **Raises:** `ValueError` if the layer has not been fitted, on shapes that do not
        fit or values that are not finite, if fewer than two steps are left after the
        washout, if all eigenvalues together do not reach the tolerance, or under a
        transformation of JAX.
        """
        self._check_fitted("reduced")
        series = _series(self, "reduced", "xs", xs)
        _check_washout("reduced", washout, series.shape[0], 2)
        tolerance = check_number("LRNN.reduced", "tolerance", tolerance)
        if not 0 < tolerance < 1:
            raise ValueError(
                f"LRNN.reduced: `tolerance` must be between 0 and 1, got {tolerance!r}."
                " It is an error relative to the standard deviation of the series; no "
                "eigenvalue at all has an error of about 1."
            )
        warm = jnp.asarray(series[: washout + 1], self.precision())
        features = eqx.filter_jit(type(self)._features)(self, warm, self.init_state())
        values, vectors = np.linalg.eig(np.asarray(self.closed(), np.float64))
        start = np.asarray(features[-1], np.float64).astype(complex)
        # Least squares, as a defective matrix has too few eigenvectors.
        amplitudes = vectors[: self.d_model] * np.linalg.lstsq(vectors, start)[0]
        return _reduce(series[washout:], values, amplitudes, tolerance)

    def _check_fitted(self, method: str) -> None:
        if not self.fitted:
            raise ValueError(
                f"LRNN.{method}: the layer has not been fitted, and its output is "
                "zeros. Likely cause: the result of `fit` was dropped; it returns a "
                "new layer, `layer = layer.fit(xs)`."
            )


class ReducedLRNN(eqx.Module):
    r"""A sum of few exponentials, run as a diagonal recurrence.

    $$z_t = \lambda \odot z_{t-1}, \qquad y_t = \mathrm{Re}(C z_t)$$

    Of each pair of conjugate eigenvalues the one of positive imaginary part is kept,
    and $C$ is doubled. Made by `LRNN.reduced`.

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
        """The number of eigenvalues, of a conjugate pair both: the real dimension."""
        values = np.asarray(self.eigenvalues)
        return values.size + int(np.count_nonzero(np.imag(values)))

    def generate(self, steps: int) -> Float[Array, "steps d_model"]:
        """The steps after the series, `[steps, d_model]`.

        **Raises:** `ValueError` on `steps` that is not a positive integer.
        """
        steps = check_size("ReducedLRNN.generate", "steps", steps)
        nothing = jnp.zeros((steps, *self.state.shape), self.state.dtype)
        states = linear_scan(Diagonal(self.eigenvalues[None]), nothing, self.state)
        precision = lax.Precision.HIGHEST
        return jnp.matmul(states, self.readout.T, precision=precision).real


def _reduce(series, values, amplitudes, tolerance) -> ReducedLRNN:
    # One of each conjugate pair; LAPACK returns them as exact conjugates.
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
        """Amplitudes of the chosen terms, and the error of their sum."""
        part = powers[:, chosen]
        columns = np.concatenate([np.real(part), -np.imag(part)], 1)
        scale = np.linalg.norm(columns, axis=0)
        scale = np.where(scale > 0, scale, 1)
        weights = np.linalg.lstsq(columns / scale, series)[0]
        error = _relative(columns / scale @ weights - series, series)
        re, im = np.split(weights / scale[:, None], 2)
        return (re + 1j * im).T, error

    least = fit(order)[1]
    if not least <= tolerance:
        raise ValueError(
            f"LRNN.reduced: the {len(order)} exponentials of the closed network "
            f"reproduce the series with a relative error of {least:.3g}, above "
            f"`tolerance` = {tolerance!r}. Likely causes: (a) the layer was fitted to "
            "something else than the next input of this series, (b) too small a "
            "reservoir, (c) noise, of which at least this much must be allowed for; "
            "fit with a `ridge` of a hundredth of its variance or more, (d) a "
            "start that the reservoir still remembers; fit with a larger `washout`, or "
            "choose a spectral radius below 1."
        )
    few, many = 0, len(order)
    while many - few > 1:
        # Fewer terms never fit better, so halving finds the boundary.
        middle = (few + many) // 2
        enough = fit(order[:middle])[1] <= tolerance
        few, many = (few, middle) if enough else (middle, many)
    chosen = list(order[:many])
    for spared in reversed(order[:many]):
        rest = [k for k in chosen if k != spared]
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
    """`values**t` `[steps, k]`, scaled to end at 1 where they grow, and their ends."""
    t = np.arange(steps)[:, None] - np.where(np.abs(values) > 1, steps - 1, 0)
    powers = np.power(values.astype(complex), t)
    # The imaginary part of a real one is rounding, and no column of its own.
    powers = np.where(np.imag(values) == 0, np.real(powers), powers)
    return powers, powers[-1]


def _relative(error, series) -> float:
    spread = np.linalg.norm(series - np.mean(series, 0))
    # A constant is compared with its size, and zeros with nothing.
    scale = spread or np.linalg.norm(series) or 1.0
    return float(np.linalg.norm(error) / scale)


def _radius(matrix: Float[Array, "n n"]) -> Float[Array, ""]:
    """The spectral radius, by Gelfand's formula: squared 40 times, the norm of a power
    is that of its largest eigenvalue. Unlike an eigenvalue solver it runs anywhere."""

    def square(carry, _):
        log, matrix, weight = carry
        norm = jnp.sqrt(jnp.sum(matrix**2))
        matrix = matrix / norm
        matrix = jnp.matmul(matrix, matrix, precision=lax.Precision.HIGHEST)
        return (log + weight * jnp.log(norm), matrix, weight / 2), None

    zero = jnp.zeros((), matrix.dtype)
    (log, _, _), _ = lax.scan(square, (zero, matrix, zero + 1), length=40)
    return jnp.exp(log)


def _series(layer: LRNN, method: str, name: str, values) -> np.ndarray:
    """A finite real series as float64 on the host."""
    if isinstance(values, Tracer):
        raise ValueError(
            f"LRNN.{method}: `{name}` is traced, and this runs on the host. Call it "
            "outside of `jax.jit`, `jax.vmap` and `jax.grad`."
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
        # NumPy does not know bfloat16 as floating point.
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
    integer = isinstance(washout, int | np.integer) and not isinstance(washout, bool)
    if not integer or washout < 0:
        raise ValueError(
            f"LRNN.{method}: `washout` must be an integer of at least 0, got "
            f"{washout!r}. It is a number of steps."
        )
    if steps - washout < least:
        raise ValueError(
            f"LRNN.{method}: {steps} steps, of which the first {washout} are left out "
            f"by `washout`, leave {max(steps - washout, 0)}, and at least {least} are "
            "needed. Pass a longer series, or a smaller `washout`."
        )
