"""Language models and mixers: equations, protocol, and generated text."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import pararnn
import tests.numpy_reference as reference
from pararnn._registry import parse_spec
from tests.helpers import assert_close, whole

VOCAB, D, T = 11, 8, 13

# name: mixers, depth.
MODELS = {
    "paragru": ("paragru", 2),
    "gru": ("gru", 1),
    "mamba2": ("mamba2:heads=2:d_state=4", 2),
    "hybrid": (("paralstm", "deltanet:heads=2"), 4),
}
each_model = pytest.mark.parametrize("name", MODELS)


@functools.cache
def make(name, **options):
    mixer, depth = MODELS[name]
    return pararnn.LanguageModel(
        VOCAB, D, depth, mixer=mixer, d_hidden=12, key=jr.key(0), **options
    )


def some_tokens(seed=1, length=T):
    return jr.randint(jr.key(seed), (length,), 0, VOCAB)


def numpy_model(model, tokens):
    """The logits of a model of ParaGRUs, in NumPy, block by block."""

    def norm(x, weight):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * weight

    def silu(x):
        return x / (1 + np.exp(-x))

    arrays = jax.tree.map(np.asarray, eqx.filter(model, eqx.is_array))
    (blocks,) = arrays.blocks
    xs = arrays.embedding[np.asarray(tokens)]
    for i in range(model.repeats):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
        cell = eqx.combine(block.mixer.rnn.cell, model.blocks[0].mixer.rnn.cell)
        hs, _ = reference.paragru(
            reference.parameters(cell), norm(xs, block.mixer_norm), np.zeros(D)
        )
        xs = xs + hs @ block.mixer.W.T
        inner = norm(xs, block.mlp_norm)
        gate, up = inner @ block.mlp.W_gate.T, inner @ block.mlp.W_up.T
        xs = xs + (silu(gate) * up) @ block.mlp.W_down.T
    return norm(xs, arrays.norm) @ arrays.embedding.T


def test_equals_the_equations():
    model, tokens = make("paragru"), some_tokens()
    assert_close(whole(model, tokens)[0], numpy_model(model, tokens), 1e-12)


@each_model
def test_steps_are_the_sequence(name):
    model, tokens = make(name), some_tokens()
    step = eqx.filter_jit(lambda model, token, state: model.step(token, state))
    wanted, last = whole(model, tokens)
    state, logits = model.init_state(), []
    for token in tokens:
        out, state = step(model, token, state)
        logits.append(out)
    assert_close(jnp.stack(logits), wanted, 1e-12)
    assert_close(state, last, 1e-12)


@each_model
def test_a_document_does_not_see_the_one_before(name):
    model, tokens = make(name), some_tokens()
    reset = jnp.zeros(T, bool).at[5].set(True)
    both, last = whole(model, tokens, reset=reset)
    first, _ = whole(model, tokens[:5])
    second, end = whole(model, tokens[5:])
    assert_close(both, jnp.concatenate([first, second]), 1e-12)
    assert_close(last, end, 1e-12)


@each_model
def test_a_sequence_may_be_continued(name):
    model, tokens = make(name), some_tokens()
    first, state = whole(model, tokens[:4])
    second, last = whole(model, tokens[4:], state)
    assert_close((jnp.concatenate([first, second]), last), whole(model, tokens), 1e-12)


def test_statistics_are_of_the_nonlinear_mixers():
    solver = pararnn.Newton(segments=4)
    model = make("hybrid", solver=solver)
    _, _, (newton, linear) = eqx.filter_jit(lambda m, t: m.run(t))(model, some_tokens())
    assert linear == {}
    assert newton["num_steps"].shape == (2,)
    assert np.all((1 <= newton["num_steps"]) & (newton["num_steps"] <= 4))


@pytest.mark.parametrize("option", [{"rematerialise": True}, {"tied": False}])
def test_gradient_reaches_every_parameter(option):
    def loss(model):
        logits, _ = model(some_tokens())
        return jnp.sum(jax.nn.log_softmax(logits)[:, 0])

    gradient = eqx.filter_jit(eqx.filter_grad(loss))
    grads = gradient(make("hybrid", **option))
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))
    if "rematerialise" in option:
        assert_close(
            jax.tree.leaves(grads), jax.tree.leaves(gradient(make("hybrid"))), 1e-12
        )


@pytest.mark.parametrize("name", ["paragru", "hybrid"])
def test_mixed_precision(name):
    model, tokens = make(name, dtype="float32"), some_tokens()
    lower = pararnn.cast(model, "bfloat16")
    assert {
        leaf.dtype for leaf in jax.tree.leaves(eqx.filter(lower, eqx.is_array))
    } == {jnp.dtype("bfloat16")}
    (logits, state), (wanted, _) = whole(lower, tokens), whole(model, tokens)
    assert logits.dtype == wanted.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    # Activations have eight bits: an error of some per cent after a few layers.
    error = np.linalg.norm(logits - wanted) / np.linalg.norm(wanted)
    assert 1e-4 < error < 0.1


def test_depth_does_not_lengthen_the_program():
    def size(depth):
        model = pararnn.LanguageModel(VOCAB, D, depth, key=jr.key(0))
        return len(str(eqx.filter_make_jaxpr(model)(some_tokens())[0]))

    assert size(12) < 1.1 * size(8)


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_an_unknown_token_is_not_taken_for_another(token):
    tokens = some_tokens().at[4].set(token)
    logits, _ = whole(make("mamba2"), tokens)
    assert np.all(np.isfinite(logits[:4])) and np.all(np.isnan(logits[4:]))
    with pytest.raises(Exception, match="so do the inputs"):
        whole(make("paragru"), tokens)


@pytest.mark.parametrize("name", pararnn.list_mixers())
def test_every_mixer_fits_a_block(name):
    model = eqx.filter_eval_shape(
        lambda: pararnn.LanguageModel(VOCAB, D, 1, mixer=name, key=jr.key(0))
    )
    logits, state = eqx.filter_eval_shape(lambda model: model(some_tokens()), model)
    assert logits.shape == (T, VOCAB)
    shapes = jax.tree.map(lambda leaf: leaf.shape, state)
    fresh = eqx.filter_eval_shape(lambda model: model.init_state(), model)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, fresh)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("gru", ("gru", {})),
        ("gru:heads=4", ("gru", {"heads": 4})),
        (
            "lru:r_min=0.9:eigenvalues=signed",
            ("lru", {"r_min": 0.9, "eigenvalues": "signed"}),
        ),
    ],
)
def test_options_of_a_mixer(text, wanted):
    assert parse_spec("make_mixer", text) == wanted


@pytest.mark.parametrize(
    "change, match",
    [
        ({"mixer": "nothing"}, "unknown mixer 'nothing'; there are .*paragru.*mamba2"),
        ({"mixer": "mamba2:colour=3"}, "no option colour; there are"),
        ({"mixer": "mamba2:heads"}, "not of the form option=value"),
        ({"mixer": ("gru", "lstm"), "depth": 3}, "cannot alternate"),
        ({"mixer": ()}, "cannot alternate"),
        ({"vocab_size": 0}, "`vocab_size` must be a positive integer"),
        ({"d_hidden": -1}, "`d_hidden` must be a positive integer"),
        ({"dtype": "int32"}, "`dtype` must be real floating point"),
        ({"key": 3}, "must be a key"),
    ],
)
def test_bad_models(change, match):
    arguments = {"vocab_size": VOCAB, "d_model": D, "key": jr.key(0)} | change
    with pytest.raises(ValueError, match=match):
        pararnn.LanguageModel(**arguments)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda model: model(jnp.zeros((2, 3), int)), "a batch axis"),
        (lambda model: model(jnp.zeros(3)), "expected integers"),
        (lambda model: model.step(jnp.zeros(3, int), model.init_state()), "one token"),
        (lambda model: model(some_tokens(), reset=jnp.zeros(2, bool)), "`reset`"),
        (lambda model: pararnn.cast(model, int), "`dtype` must be real"),
    ],
)
def test_bad_calls(call, match):
    with pytest.raises(ValueError, match=match):
        call(make("paragru"))


# Text


def sample(model, prompt, key=0, **options):
    options = {"max_tokens": 6} | options
    return list(pararnn.generate(model, prompt, key=jr.key(key), **options))


def test_the_likeliest_tokens():
    model, tokens = make("paragru"), np.asarray(some_tokens(length=7))
    drawn = sample(model, tokens, temperature=0)
    for _ in range(6):
        tokens = np.append(tokens, np.argmax(numpy_model(model, tokens)[-1]))
    assert drawn == list(map(int, tokens[7:]))


def test_a_key_decides():
    model = make("paragru")
    assert sample(model, some_tokens()) == sample(model, some_tokens())
    assert sample(model, some_tokens()) != sample(model, some_tokens(), key=1)


class Constant(eqx.Module):
    """A model whose logits are always the same."""

    logits: jax.Array

    def init_state(self):
        return ()

    def __call__(self, tokens, state=None):
        return jnp.broadcast_to(self.logits, (len(tokens), len(self.logits))), ()

    def step(self, token, state):
        return self.logits, ()


PROBABILITIES = np.array([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({}, PROBABILITIES),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 9}, PROBABILITIES),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_p": 1.0}, PROBABILITIES),
        ({"top_k": 3, "top_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 0.5}, PROBABILITIES**2 / sum(PROBABILITIES**2)),
        ({"temperature": 1e-38}, [1, 0, 0, 0]),
        ({"temperature": 1e-320}, [1, 0, 0, 0]),
    ],
)
def test_distribution_of_what_is_drawn(options, wanted):
    check_distribution(jnp.log(PROBABILITIES), options, wanted)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    "options, wanted",
    [
        ({}, [1 / 3, 0, 1 / 3, 1 / 3]),
        ({"top_k": 2}, [1 / 2, 0, 1 / 2, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_p": 0.6}, [1 / 2, 0, 1 / 2, 0]),
        ({"temperature": 1e-38}, [1 / 3, 0, 1 / 3, 1 / 3]),
        ({"temperature": 1e-50, "top_k": 2}, [1 / 2, 0, 1 / 2, 0]),
        ({"temperature": 0}, [1, 0, 0, 0]),
    ],
)
def test_distribution_of_equal_logits(dtype, options, wanted):
    """Far from zero, where dividing by a small temperature gives infinity."""
    check_distribution(jnp.array([50, -50, 50, 50], dtype), options, wanted)


def check_distribution(logits, options, wanted):
    model = Constant(logits)
    drawn = sample(model, jnp.zeros(1, int), max_tokens=600, **options)
    counts = np.bincount(drawn, minlength=4)
    deviation = np.sqrt(600 * np.array(wanted) * (1 - np.array(wanted)))
    assert np.all(np.abs(counts - 600 * np.array(wanted)) <= 4 * deviation)


def test_stops_and_goes_on():
    model = Constant(jnp.log(jnp.array([1e-9, 1.0])))
    assert sample(model, jnp.zeros(1, int), stop={1}) == []
    assert sample(model, jnp.zeros(1, int), max_tokens=0) == []
    hybrid, tokens = make("hybrid"), some_tokens()
    _, state = whole(hybrid, tokens[:5])
    continued = sample(hybrid, tokens[5:], state=state)
    assert continued == sample(hybrid, tokens)


def test_logits_that_are_not_finite():
    with pytest.raises(FloatingPointError, match="logits of token 0 are not finite"):
        sample(Constant(jnp.array([0.0, jnp.nan])), jnp.zeros(1, int))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"prompt": jnp.zeros(0, int)}, "begin-of-document"),
        ({"prompt": jnp.zeros(3)}, "not encoded"),
        ({"prompt": jnp.array([VOCAB])}, "another tokeniser"),
        ({"max_tokens": -1}, "`max_tokens` is -1"),
        ({"temperature": -0.1}, "`temperature` is -0.1"),
        ({"temperature": float("nan")}, "`temperature` is nan"),
        ({"top_k": 0}, "`top_k` is 0"),
        ({"top_p": 0}, "`top_p` is 0"),
        ({"top_p": 1.5}, "`top_p` is 1.5"),
        ({"key": 0}, "must be a key"),
    ],
)
def test_bad_options_are_refused_at_the_call(options, match):
    arguments = {"prompt": some_tokens(), "max_tokens": 3, "key": jr.key(0)} | options
    prompt = arguments.pop("prompt")
    with pytest.raises(ValueError, match=match):
        pararnn.generate(make("paragru"), prompt, **arguments)
