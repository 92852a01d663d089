"""Kolmogorov-Arnold maps whose functions are simulated circuits of one qubit."""

import math

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._parameters import wide_dtype, widen


class ReuploadingMap(eqx.Module):
    r"""$y_{gj} = \sum_i \varphi_{gji}(x_i)$, each $\varphi$ a circuit of one qubit.

    One map for all gates: one program for each would compile four times as long.

    A state of one qubit is a point on the sphere, and a rotation of the qubit a
    rotation of the sphere. The circuit starts at $|+\rangle$, the point (1, 0, 0), and
    $\langle Z \rangle$ is the third coordinate in the end: the same numbers as by
    $2 \times 2$ complex matrices, from real ones.
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
        # Glorot's normal law on an array [out, in, layers + 1, 2] for each gate, as in
        # the authors' package: the trainable rotations start small, frequencies at 1.
        spread = math.sqrt(1 / ((layers + 1) * (d_input + d_output)))
        shape = (2, layers + 1, gates, d_output, d_input)
        angles = spread * jr.normal(key, shape, wide_dtype(dtype))
        self.theta_z, self.theta_y = jnp.unstack(angles.astype(dtype))
        self.w = jnp.ones((layers, gates, d_output, d_input), dtype)
        self.b = jnp.zeros((layers, gates, d_output, d_input), dtype)

    def __call__(
        self, x: Float[Array, "*time in"]
    ) -> tuple[Float[Array, "*time out"], ...]:
        """The sums for each gate."""
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


def _about_z(angle, x, y, z):
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return x * cos - y * sin, x * sin + y * cos, z


def _about_y(angle, x, y, z):
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return x * cos + z * sin, y, z * cos - x * sin
