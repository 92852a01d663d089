"""`Stack`: layers one after the other."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import linear
import pararnn
from pararnn import RNN, Bidirectional, Stack
from tests.helpers import assert_close, decoded, whole

IN, WIDTH, T = 3, 4, 13


def rnn(cell, d_input, seed=0):
    layer = getattr(pararnn, cell)(d_input, WIDTH, key=jr.key(seed))
    return RNN(layer)


STACKS = {
    "one": lambda: Stack([rnn("GRUCell", IN)]),
    "GRU, LSTM": lambda: Stack([rnn("GRUCell", IN), rnn("LSTMCell", WIDTH)]),
    "LSTM, LRU, GRU": lambda: Stack(
        [
            rnn("LSTMCell", IN),
            linear.LRU(WIDTH, 5, key=jr.key(1)),
            rnn("GRUCell", WIDTH, 2),
        ]
    ),
    "a stack in a stack": lambda: Stack(
        [Stack([rnn("GRUCell", IN)]), rnn("ElmanCell", WIDTH)]
    ),
}
each_stack = pytest.mark.parametrize("name", STACKS)


def inputs(steps=T):
    return jr.normal(jr.key(3), (steps, IN))


@each_stack
def test_equals_the_layers_in_turn(name):
    stack, xs = STACKS[name](), inputs()
    ys, states = xs, []
    for layer in stack.layers:
        ys, state = whole(layer, ys)
        states.append(state)
    assert_close(whole(stack, xs), (ys, tuple(states)), 1e-12)


@each_stack
def test_decodes_and_continues(name):
    stack, xs = STACKS[name](), inputs()
    wanted = whole(stack, xs)
    assert_close(decoded(stack, xs, stack.init_state()), wanted, 1e-11)
    first, between = whole(stack, xs[:5])
    second, last = whole(stack, xs[5:], between)
    assert_close((jnp.concatenate([first, second]), last), wanted, 1e-11)


@each_stack
def test_a_reset_is_one_of_every_layer(name):
    stack, xs = STACKS[name](), inputs()
    ys, state = whole(stack, xs, None, jnp.zeros(T, bool).at[6].set(True))
    first, _ = whole(stack, xs[:6])
    second, last = whole(stack, xs[6:])
    assert_close((ys, state), (jnp.concatenate([first, second]), last), 1e-11)


def test_no_steps():
    stack = STACKS["LSTM, LRU, GRU"]()
    ys, state = whole(stack, inputs(0))
    assert ys.shape == (0, WIDTH)
    assert_close(state, stack.init_state(), 0)


def test_the_gradient_reaches_every_layer():
    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(stack):
        return jnp.sum(stack(inputs())[0] ** 2)

    for leaf in jax.tree.leaves(gradient(STACKS["LSTM, LRU, GRU"]())):
        assert np.all(np.isfinite(leaf)) and np.any(leaf)


def test_both_directions_do_not_decode():
    both = Bidirectional(rnn("GRUCell", IN), rnn("GRUCell", IN, 1))
    stack = Stack([both, rnn("GRUCell", 2 * WIDTH)])
    assert whole(stack, inputs())[0].shape == (T, WIDTH)
    with pytest.raises(NotImplementedError, match="Bidirectional"):
        stack.step(inputs()[0], stack.init_state())


TWO = STACKS["GRU, LSTM"]()
WRONG = {
    "nothing": (lambda: Stack([]), ValueError, "`layers` is empty"),
    "a function": (lambda: Stack([jnp.tanh]), TypeError, r"`layers\[0\]` is a "),
    "no function": (lambda: Stack([TWO, 3]), TypeError, r"`layers\[1\]` is a int"),
    "state of one": (lambda: TWO(inputs(), jnp.zeros(WIDTH)), ValueError, "2 layers"),
    "too many": (
        lambda: TWO.step(inputs()[0], (*TWO.init_state(), jnp.zeros(WIDTH))),
        ValueError,
        "got 3 of them",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses(case):
    wrong, exception, message = WRONG[case]
    with pytest.raises(exception, match=message):
        wrong()
