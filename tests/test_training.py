"""Training: the step's arithmetic, runs that stop and resume, and refusals."""

import dataclasses
import functools
import json
import os
import signal
import threading

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import pararnn
from pararnn.training import (
    Config,
    DataConfig,
    ModelConfig,
    OptimiserConfig,
    TrainingFailed,
    load_model,
    read_metrics,
    train,
)
from pararnn.training._build import decays, make_optimiser
from pararnn.training._metrics import TIMES, MetricLog
from pararnn.training._step import fresh_state, make_train_step, summed_loss

VOCAB, T = 7, 6


@functools.cache
def small_model():
    return pararnn.LanguageModel(
        VOCAB,
        4,
        2,
        mixer=("paragru", "lru"),
        d_hidden=8,
        solver=pararnn.Newton(segments=3),
        key=jr.key(0),
    )


def some_batch(*shape, seed=0):
    rng = np.random.default_rng(seed)
    shape = (*shape, T)
    return {
        "tokens": rng.integers(0, VOCAB, shape).astype(np.int32),
        "targets": rng.integers(0, VOCAB, shape).astype(np.int32),
        "reset": rng.random(shape) < 0.2,
        "weights": (rng.random(shape) < 0.8).astype(np.float32),
    }


def copy_array(leaf):
    """Copy an array, as a step consumes its arguments' buffers."""
    return leaf.copy() if eqx.is_array(leaf) else leaf


# The step


def test_the_loss_is_that_of_the_scored_tokens():
    model, batch = small_model(), some_batch(3)
    total, stats = eqx.filter_jit(summed_loss)(model, batch, "float64")
    wanted = 0.0
    for i in range(3):
        logits = np.asarray(model(batch["tokens"][i], reset=batch["reset"][i])[0])
        chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        chosen = chances[np.arange(T), batch["targets"][i]]
        wanted -= np.sum(np.log(chosen) * batch["weights"][i])
    np.testing.assert_allclose(total, wanted, rtol=1e-10)
    assert set(stats) == {"newton_steps", "mean_newton_steps", "residual", "sequential"}
    assert 1 <= stats["mean_newton_steps"] <= stats["newton_steps"] <= 3


def test_microbatches_are_one_batch():
    optimiser = optax.sgd(0.1)
    step = make_train_step(optimiser, "float64")
    batch, states, losses = some_batch(1, 4), [], []
    for count in (1, 2, 4):
        cut = {k: jnp.asarray(v.reshape(count, -1, T)) for k, v in batch.items()}
        state = jax.tree.map(copy_array, fresh_state(small_model(), optimiser))
        state, metrics = step(state, cut)
        states.append(jax.tree.leaves(eqx.filter(state.model, eqx.is_array)))
        losses.append(metrics["loss"])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-12)
    for other in states[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), states[0], other
        )
    # And they have changed.
    before = jax.tree.leaves(eqx.filter(small_model(), eqx.is_array))
    assert all(np.any(a != b) for a, b in zip(before, states[0], strict=True))


def test_what_decays():
    model = small_model()
    marked = decays(eqx.filter(model, eqx.is_inexact_array))
    gru, lru = marked.blocks
    assert gru.mlp.W_down and gru.mixer.rnn.cell.B_z and lru.mixer.B_re
    for name in (marked.embedding, marked.norm, gru.mixer_norm, gru.mixer.rnn.cell.a_z):
        assert not name


def test_the_learning_rate():
    config = OptimiserConfig(
        learning_rate=1.0, warmup=3, weight_decay=0.0, clip=1e9, beta1=0.0, beta2=0.0
    )
    optimiser = make_optimiser(config, 9)
    parameters = {"w": jnp.zeros((2, 2))}
    state, rates = optimiser.init(parameters), []
    for _ in range(10):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimiser.update(
                {"w": jnp.ones((2, 2))}, state, parameters
            )
        # Without memory, Adam's step has the size of the learning rate.
        rates.append(-float(updates["w"][0, 0]))
    rise = [0.25, 0.5, 0.75, 1.0]
    fall = [0.1 + 0.9 * (1 + np.cos(np.pi * i / 6)) / 2 for i in range(1, 7)]
    np.testing.assert_allclose(rates, rise + fall, rtol=1e-6)


# Runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(30):
        words = rng.choice(["alpha ", "beta ", "gamma ", "delta\n"], 60)
        (folder / f"{i}.txt").write_text("".join(words))
    return folder


def configure(corpus, **changes):
    config = Config(
        model=ModelConfig(d_model=8, d_hidden=16, solver="newton", segments=4),
        data=DataConfig(
            corpus=str(corpus),
            length=16,
            batch=2,
            validation=0.2,
            validation_batches=3,
        ),
        optimiser=OptimiserConfig(warmup=3, accumulate=2),
        steps=12,
        validate_every=6,
        checkpoint_every=4,
        keep=2,
    )
    return dataclasses.replace(config, **changes)


def go(config, folder, **options):
    return train(config, folder, show_progress=False, **options)


def curve(folder):
    """The fields of a run's log that are the same in every run."""
    lines = read_metrics(folder)
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "a"
    return folder, go(configure(corpus), folder)


def test_a_run_leaves_what_it_promises(finished):
    folder, outcome = finished
    assert (outcome.step, outcome.finished, outcome.signal) == (12, True, None)
    assert outcome.checkpoint == folder.absolute() / "checkpoints" / "12"
    lines = read_metrics(folder)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"]
    for line in steps:
        np.testing.assert_allclose(line["bits_per_byte"], line["loss"] / np.log(2))
        assert line["tokens_per_second"] > 0 and 1 <= line["newton_steps"] <= 4
    checks = [line for line in lines if "validation_bits_per_byte" in line]
    assert [line["step"] for line in checks] == [6, 12]
    assert checks[-1]["validation_bits_per_byte"] == outcome.bits_per_byte
    # The two newest and the best, which is among them here.
    kept = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert kept == [8, 12]
    assert Config.load(folder / "config.json").steps == 12
    assert (folder / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_bit_for_bit(corpus, finished, tmp_path):
    """Stopped by a signal at any moment; the second time in another order of calls."""
    folder, config = tmp_path / "run", configure(corpus)

    def stop_after(lines):
        path = folder / "metrics.jsonl"
        while not path.exists() or path.read_text().count("\n") < lines:
            if done.wait(0.001):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    for lines in (2, 8):
        done = threading.Event()
        watcher = threading.Thread(target=stop_after, args=(lines,))
        watcher.start()
        outcome = go(config, folder, resume=True)
        done.set()
        watcher.join()
        assert outcome.signal == "SIGTERM" or outcome.finished
    go(config, folder, resume=True)
    assert curve(folder) == curve(finished[0])
    (ours, _), (theirs, _) = (
        load_model(path, best=False) for path in (folder, finished[0])
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_trained_model_is_loaded(finished):
    model, tokenizer = load_model(finished[0])
    drawn = pararnn.generate(
        model, tokenizer.encode("alp"), max_tokens=5, key=jr.key(0)
    )
    assert len(list(drawn)) == 5
    newest, _ = load_model(finished[0], best=False)
    assert eqx.tree_equal(model, newest)


def test_a_loss_that_is_not_finite_stops_the_run(corpus, tmp_path):
    rate = OptimiserConfig(learning_rate=1e38, warmup=0)
    config = configure(corpus, optimiser=rate, checkpoint_every=1, validate_every=12)
    with pytest.raises(TrainingFailed, match="learning rate is too high") as caught:
        go(config, tmp_path / "run")
    named = str(caught.value).split("last good checkpoint is ")[1].split(". ")[0]
    state = json.loads((tmp_path / "run" / "config.json").read_text())
    assert state["optimiser"]["learning_rate"] == 1e38
    assert os.path.isdir(named)
    model, _ = load_model(tmp_path / "run", best=False)
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_array))
    assert all(np.all(np.isfinite(leaf)) for leaf in leaves)


def test_a_line_cut_by_a_crash_is_dropped(tmp_path):
    log = MetricLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    log = MetricLog(tmp_path, 2)
    log.write(3, {"loss": 5.0})
    log.close()
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0, 0.5, 5.0]
    (tmp_path / "metrics.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match="not a JSON"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    "part, change, match",
    [
        ("model", {"mixer": ("nothing",)}, "unknown mixer 'nothing'; there are"),
        ("model", {"segments": 4, "solver": "auto"}, "option of `model.solver`"),
        ("data", {"corpus": "/nowhere"}, "find_corpus"),
        ("data", {"length": 10**7}, "shorter than one window"),
        ("data", {"length": 0}, "`data.length` is 0"),
        ("data", {"tokenizer": "/nowhere.json"}, "nowhere"),
        ("optimiser", {"warmup": 12}, "does not end within"),
        ("optimiser", {"learning_rate": -1.0}, "`optimiser.learning_rate` is -1.0"),
        (None, {"steps": 0}, "`steps` is 0"),
        (None, {"keep": 1.5}, "`keep` is 1.5"),
    ],
)
def test_bad_configurations(corpus, tmp_path, part, change, match):
    config = configure(corpus)
    with pytest.raises((ValueError, OSError), match=match):
        if part is not None:
            change = {part: dataclasses.replace(getattr(config, part), **change)}
        go(dataclasses.replace(config, **change), tmp_path / "run")


def test_another_run_in_the_folder(corpus, finished, tmp_path):
    folder, _ = finished
    with pytest.raises(FileExistsError, match="holds a run already"):
        go(configure(corpus), folder)
    wider = dataclasses.replace(configure(corpus).model, d_model=16)
    with pytest.raises(ValueError, match=r"model\.d_model: 8 then, 16 now"):
        go(configure(corpus, model=wider), folder, resume=True)
    # With the configuration changed by hand, the checkpoint itself is checked.
    changed = tmp_path / "copy"
    changed.mkdir()
    (changed / "checkpoints").symlink_to(folder / "checkpoints")
    configure(corpus, model=wider).save(changed / "config.json")
    with pytest.raises(ValueError, match=r"of another model:\n.*\(.*8.*\(.*16"):
        load_model(changed)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not a configuration of this version"):
        load_model(tmp_path)
