import math

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax.nn import sigmoid
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._parameters import (
    check_dtype,
    check_input,
    check_key,
    check_size,
    check_sizes,
    wide_dtype,
    widen,
    zeros,
)
from ._base import AbstractCell

GATES = 4


class _ReuploadingMap(eqx.Module):
    r"""$y_{gj} = \sum_i \varphi_{gji}(x_i)$, each $\varphi$ a circuit of one qubit.

    One map serves all gates: one for each would take four times as long to compile.

    A state of one qubit is a point on the sphere, and a rotation of the qubit is a
    rotation of the sphere. The circuit starts at $|+\rangle$, the point (1, 0, 0), and
    $\langle Z \rangle$ is the third coordinate at the end. This needs real numbers
    only, and equals what $2 \times 2$ complex matrices give.
    """

    theta_z: Float[Array, "layers+1 gates out in"]
    theta_y: Float[Array, "layers+1 gates out in"]
    w: Float[Array, "layers gates out in"]
    b: Float[Array, "layers gates out in"]

    def __init__(
        self,
        d_input: int,
        d_output: int,
        *,
        gates: int,
        layers: int,
        dtype: DTypeLike,
        key: PRNGKeyArray,
    ):
        # Glorot's normal initialisation of an array [out, in, layers + 1, 2] for each
        # gate, as in the authors' package: rotations start small, frequencies at 1.
        spread = math.sqrt(1 / ((layers + 1) * (d_input + d_output)))
        shape = (2, layers + 1, gates, d_output, d_input)
        angles = spread * jr.normal(key, shape, wide_dtype(dtype))
        self.theta_z, self.theta_y = jnp.unstack(angles.astype(dtype))
        self.w = jnp.ones((layers, gates, d_output, d_input), dtype)
        self.b = jnp.zeros((layers, gates, d_output, d_input), dtype)

    def __call__(
        self, x: Float[Array, "*time in"]
    ) -> tuple[Float[Array, "*time out"], ...]:
        """Return the sums for each gate."""
        x, theta_z, theta_y, w, b = widen(x, self.theta_z, self.theta_y, self.w, self.b)
        x = x[..., None, None, :]

        def on_every_step(parameter):
            return parameter.reshape((1,) * (x.ndim - 3) + parameter.shape)

        first = on_every_step(theta_z[0])
        point = _about_y(on_every_step(theta_y[0]), jnp.cos(first), jnp.sin(first), 0.0)
        for layer in range(w.shape[0]):
            # Turns about one axis add up: that of the data, then that of the circuit.
            turn = on_every_step(w[layer]) * x
            turn = turn + on_every_step(b[layer] + theta_z[layer + 1])
            point = _about_y(on_every_step(theta_y[layer + 1]), *_about_z(turn, *point))
        return tuple(jnp.unstack(jnp.sum(point[2], axis=-1), axis=-2))


class QKANLSTMCell(AbstractCell):
    r"""An LSTM whose gates see sums of trigonometric series instead of affine maps.

    $$\begin{aligned}
    i_t &= \sigma(\Phi_i(x_t, h_{t-1})) \qquad
    f_t = \sigma(\Phi_f(x_t, h_{t-1})) \\
    g_t &= \tanh(\Phi_g(x_t, h_{t-1})) \qquad
    o_t = \sigma(\Phi_o(x_t, h_{t-1})) \\
    c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
    h_t &= o_t \odot \tanh(c_t)
    \end{aligned}$$

    Each $\Phi$ is a Kolmogorov-Arnold sum, for its unit $j$ over all numbers $v$ of
    $x_t$ and of $h_{t-1}$, of functions $\varphi(v) \in [-1, 1]$ of one number:

    $$\begin{aligned}
    \varphi(v) &= \langle + | V(v)^\dagger Z V(v) | + \rangle \\
    V(v) &= \Big( \prod_{l=L}^{1} R_y(\theta^y_l) R_z(\theta^z_l)
        R_z(w_l v + b_l) \Big) R_y(\theta^y_0) R_z(\theta^z_0)
    \end{aligned}$$

    a circuit of one qubit that is given $v$ in each of its $L$ = `layers` layers
    (data re-uploading), simulated exactly: a trigonometric series in $v$ with the
    frequencies $\sum_l s_l w_l$, $s_l \in \{-1, 0, 1\}$. The state is the tuple
    $(c, h)$, each `[d_state]`, a layer emits $h$, and the Jacobian is dense.

    **Chosen here**: the rotations and $|+\rangle$ are those of the authors' package
    `qkan`; every pair of an input and a unit has its own circuit; there is no affine
    bias, no weight after a circuit and no ordinary activation beside it, all of which
    that package offers. $b_l$ and $\theta^z_l$ are one angle written twice,
    as published.

    A step takes `4 * d_state * (d_input + d_state) * layers` sines and cosines, far
    more work than an LSTM of that width, so it is meant for narrow states.

    ??? cite "Source"

        Hsu et al., "QKAN-LSTM: Quantum-inspired Kolmogorov-Arnold Long Short-term
        Memory" (2512.05049); the circuit is from Jiang et al., "Quantum Variational
        Activation Functions Empower Kolmogorov-Arnold Networks" (2509.14026).
    """

    of_x: _ReuploadingMap
    of_h: _ReuploadingMap
    d_input: int
    d_state: int
    layers: int

    def __init__(
        self,
        d_input: int,
        d_state: int | None = None,
        *,
        layers: int = 3,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_input`: size of the input.
        - `d_state`: size of $c$ and of $h$. Defaults to `d_input`.
        - `layers`: $L$, how often each circuit reads its number.
        - `dtype`: dtype of the parameters. Defaults to JAX's default floating-point
            dtype. 16-bit parameters have a float32 state.
        - `key`: a key of `jax.random`. The angles $\theta$ are normal with variance
            $1 / ((L + 1)(n + d_{state}))$, where $n$ is `d_input` or `d_state`,
            whichever the circuit reads; $w_l = 1$, $b_l = 0$.

        **Raises:** `ValueError` on a size or a number of layers that is not a positive
        integer, an invalid key, or a dtype that is not floating point.
        """
        self.d_input, self.d_state = check_sizes("QKANLSTMCell", d_input, d_state)
        self.layers = check_size("QKANLSTMCell", "layers", layers)
        dtype = check_dtype("QKANLSTMCell", dtype)
        check_key("QKANLSTMCell", key)

        inputs, hidden = jr.split(key)
        options = {"gates": GATES, "layers": self.layers, "dtype": dtype}
        self.of_x = _ReuploadingMap(self.d_input, self.d_state, **options, key=inputs)
        self.of_h = _ReuploadingMap(self.d_state, self.d_state, **options, key=hidden)

    def gates(
        self, x: Float[Array, "*time d_input"]
    ) -> tuple[Float[Array, "*time d_state"], ...]:
        """What `x` adds to i, f, g and o; see [`pararnn.AbstractCell.gates`][]."""
        x = check_input("QKANLSTMCell", x, self.d_input)
        return self.of_x(x)

    def update(
        self,
        state: tuple[Float[Array, " d_state"], Float[Array, " d_state"]],
        gates: tuple[Float[Array, " d_state"], ...],
    ) -> tuple[Float[Array, " d_state"], Float[Array, " d_state"]]:
        """The next $(c, h)$, each `[d_state]`, in the dtypes of `state`."""
        c, _, *sums = widen(*state, *gates, *self.of_h(state[1]))
        i, f, g, o = (a + b for a, b in zip(sums[:GATES], sums[GATES:], strict=True))
        c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
        h = sigmoid(o) * jnp.tanh(c)
        return c.astype(state[0].dtype), h.astype(state[1].dtype)

    def init_state(self) -> tuple[Float[Array, " d_state"], Float[Array, " d_state"]]:
        """Zeros $(c, h)$, each `[d_state]`, at least float32."""
        # Two buffers, since one that appears twice could not be donated.
        dtype = self.of_h.w.dtype
        return zeros(self.d_state, dtype), zeros(self.d_state, dtype)

    def output(
        self, state: tuple[Float[Array, " d_state"], Float[Array, " d_state"]]
    ) -> Float[Array, " d_state"]:
        """$h$, `[d_state]`."""
        _, h = state
        return h


def _about_z(angle, x, y, z):
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return x * cos - y * sin, x * sin + y * cos, z


def _about_y(angle, x, y, z):
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return x * cos + z * sin, y, z * cos - x * sin
