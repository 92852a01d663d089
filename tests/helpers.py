"""Ways to run a layer, and checks of results and refusals."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax


def assert_close(got, wanted, rtol=1e-10):
    """Compare leaf by leaf, relative to the leaf's largest number; NaN equals NaN."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    for a, b in pairs:
        assert jnp.shape(a) == jnp.shape(b) and a.dtype == b.dtype
        a, b = (np.asarray(v, complex) for v in (a, b))
        scale = np.abs(b[np.isfinite(b)]).max(initial=0.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale)


@contextlib.contextmanager
def refusal(exception, parts):
    """Expect an exception whose message contains all of the parts."""
    with pytest.raises(exception) as caught:
        yield
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@eqx.filter_jit
def whole(layer, xs, state=None, reset=None):
    """Run all steps at once."""
    return layer(xs, state, reset=reset)


@eqx.filter_jit
def decoded(layer, xs, state=None, reset=None):
    """Run the layer's own `step` on one input after the other, with resets."""
    fresh = layer.init_state()
    reset = jnp.zeros(xs.shape[0], bool) if reset is None else reset

    def step(state, at_t):
        x, reset = at_t
        state = jax.tree.map(lambda f, s: jnp.where(reset, f, s), fresh, state)
        y, state = layer.step(x, state)
        return state, y

    state, ys = lax.scan(step, fresh if state is None else state, (xs, reset))
    return ys, state


@eqx.filter_jit
def in_two_parts(layer, xs, state=None, reset=None):
    """Run the first third, then the rest from the last state of the first."""
    cut = xs.shape[0] // 3
    first, second = (None, None) if reset is None else (reset[:cut], reset[cut:])
    ys, state = layer(xs[:cut], state, reset=first)
    rest, state = layer(xs[cut:], state, reset=second)
    return jnp.concatenate([ys, rest]), state
