"""Layers backwards in time."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import linear
import pararnn
from tests.helpers import assert_close

KEYS = jr.split(jr.key(0), 3)


def cell(h, x):
    return jnp.tanh(h + x)


LAYERS = {
    "cell": pararnn.RNN(pararnn.GRUCell(4, 4, key=KEYS[0])),
    "function": pararnn.RNN(cell, init_state=jnp.ones(4)),
    "linear": linear.GLA(4, heads=2, key=KEYS[1]),
    "stack": pararnn.Stack(
        [
            pararnn.RNN(pararnn.LSTMCell(4, 4, key=KEYS[0])),
            linear.RGLRU(4, key=KEYS[2]),
        ]
    ),
}
XS = jnp.asarray(np.random.default_rng(0).normal(size=(9, 4)))
# Sequences of 2, 4 and 3 steps.
RESET = jnp.isin(jnp.arange(9), jnp.array([0, 2, 6]))


@pytest.mark.parametrize("name", LAYERS)
def test_each_sequence_is_reversed(name):
    layer = LAYERS[name]
    ys, last = layer(XS, reset=RESET, reverse=True)
    for part in (slice(0, 2), slice(2, 6), slice(6, 9)):
        alone, state = layer(XS[part][::-1])
        assert_close(ys[part], alone[::-1], 1e-12)
        if part.start == 0:
            assert_close(last, state, 1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_continues_from_the_end(name):
    layer = LAYERS[name]
    ys, last = layer(XS, reverse=True)
    late, state = layer(XS[5:], reverse=True)
    early, state = layer(XS[:5], state, reverse=True)
    assert_close((jnp.concatenate([early, late]), state), (ys, last), 1e-12)
    empty, same = layer(XS[:0], state, reverse=True)
    assert empty.shape[0] == 0
    assert_close(same, state, 0)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("wrong", ["False", None, 1, np.ones(2, bool)])
def test_what_is_not_a_flag_is_refused(name, wrong):
    with pytest.raises(ValueError, match="`reverse` must be True or False, got"):
        LAYERS[name](XS, reverse=wrong)


def test_a_reset_that_does_not_fit_is_refused():
    for name, layer in LAYERS.items():
        with pytest.raises(ValueError, match="`reset` has shape"):
            layer(XS, reset=RESET[:3], reverse=True)
        with pytest.raises(TypeError, match="`reset`"):
            layer(XS, reset=np.ones(9), reverse=True), name
