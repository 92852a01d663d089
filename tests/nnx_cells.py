"""Flax NNX cells of the kinds that users write, by name."""

import jax
import jax.numpy as jnp
from flax import nnx

IN, WIDTH = 3, 4


def linear(rngs, d_in, d_out):
    return nnx.Linear(d_in, d_out, rngs=rngs, param_dtype=jnp.float64)


class Base(nnx.RNNCellBase):
    """`tanh(0.5 h + W x)`, or a part of it."""

    num_feature_axes = 1
    in_features = IN

    def __init__(self, rngs):
        self.of_x = linear(rngs, IN, WIDTH)
        self.head = linear(rngs, WIDTH, 2)
        self.gain = nnx.Param(jnp.asarray(0.5))

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return jnp.full((*input_shape[:-1], WIDTH), 0.2)

    def next(self, h, x):
        return jnp.tanh(self.gain * h[..., ::-1] + self.of_x(x))


class Head(Base):
    def __call__(self, h, x):
        h = self.next(h, x)
        return h, self.head(h)


class Pair(Base):
    """A carry of two arrays that is not an LSTM's: neither of them is emitted."""

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        h = super().initialize_carry(input_shape)
        return {"slow": h, "fast": (2 * h, 0 * h)}

    def __call__(self, carry, x):
        first, (second, count) = carry["slow"], carry["fast"]
        second = self.next(second + 0.1 * first, x)
        first = 0.9 * first + 0.1 * second
        return {"slow": first, "fast": (second, count)}, (first * second, first)


class Before(Base):
    """Emits the carry that it was given."""

    def __call__(self, h, x):
        return self.next(h, x), h


class Gated(Base):
    """Emits a function of both carries and of the input."""

    def __call__(self, h, x):
        new = self.next(h, x)
        return new, jnp.sin(new) * h + jnp.sum(x, -1, keepdims=True)


class Jitted(Base):
    """A step that is one jitted call, whose result contains the new carry."""

    def __call__(self, h, x):
        @jax.jit
        def both(gain, h, u):
            new = jnp.tanh(gain * h[..., ::-1] + u)
            return new, new - h

        new, change = both(self.gain[...], h, self.of_x(x))
        return new, change * new


class Constant(Base):
    def __call__(self, h, x):
        return self.next(h, x), jnp.ones((*h.shape[:-1], 1))


class Evaluated(Base):
    """With Dropout and BatchNorm, which change nothing after `eval()`."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        double = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs, **double)
        # Flax creates them in float32 in any case.
        self.norm.mean = nnx.BatchStat(jnp.full(WIDTH, 0.1))
        self.norm.var = nnx.BatchStat(jnp.full(WIDTH, 0.7))

    def __call__(self, h, x):
        h = self.next(h, x)
        return h, self.drop(self.norm(h[None])[0])


class Counting(Base):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.calls = 0

    def __call__(self, h, x):
        self.calls += 1
        return self.next(h, x), h


class Alone(nnx.Module):
    """Returns its carry alone, and does not say where it starts."""

    def __init__(self, rngs):
        self.of_x = linear(rngs, IN, WIDTH)

    def __call__(self, h, x):
        return {"h": jnp.tanh(0.5 * h["h"] + self.of_x(x)), "n": h["n"] + 1}


class Unstarted(nnx.Module):
    """Like Flax's cells, but without `initialize_carry`."""

    def __init__(self, rngs):
        self.of_x = linear(rngs, IN, WIDTH)

    def __call__(self, h, x):
        h = jnp.tanh(0.5 * h + self.of_x(x))
        return h, 2 * h


class Unfinished(nnx.RNNCellBase):
    """Inherits `initialize_carry` from the abstract class."""

    in_features = IN


CELLS = (Head, Pair, Before, Gated, Jitted, Constant, Evaluated)
