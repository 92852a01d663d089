"""The comparison of recurrences: sizes, runs, records and the report."""

import base64
import dataclasses
import math
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import linear
import pararnn.comparison._train as training_module
from pararnn.comparison import (
    BUDGETS,
    Lengths,
    Protocol,
    compare,
    expand_layer,
    make_task,
    read_records,
    write_report,
)
from pararnn.comparison._compare import load_results
from pararnn.comparison._measure import Evaluator, measure_costs
from pararnn.comparison._model import SequenceModel, count_parameters
from pararnn.comparison._protocol import Data
from pararnn.comparison._sizes import fit_size
from tests.helpers import refusal

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"

TINY = Protocol(
    parameters=2_000,
    steps=4,
    batch=4,
    learning_rates=(1e-3, 1e-2),
    seeds=2,
    test_sequences=4,
    points=2,
    cost_lengths=(4, 8),
    cost_batch=2,
)
LAYERS, TASKS = ["gru", "lru:real"], ["parity"]
COMMAND = "python x.py --a 'b c'"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a comparison, and its report."""
    folder = tmp_path_factory.mktemp("comparison")
    compare(LAYERS, TASKS, folder, TINY, command=COMMAND, visible=False)
    write_report(folder)
    return folder


def trainings(folder):
    records = read_records(folder / "results.jsonl")
    return [record for record in records if record["kind"] == "training"]


# What a record has that depends on the machine's mood.
TIMES = ("seconds", "compile_seconds")


def lasting(record):
    return {name: value for name, value in record.items() if name not in TIMES}


def test_every_layer_and_rate_has_a_record(finished):
    found = [(r["layer"], r["task"], r["learning_rate"]) for r in trainings(finished)]
    assert found == [
        (la, ta, lr) for la in LAYERS for ta in TASKS for lr in (1e-3, 1e-2)
    ]
    for record in trainings(finished):
        assert record["status"] == "finished" and record["diverged"] == [None, None]
        assert record["steps"] == [2, 4]
        assert np.shape(record["losses"]) == (2, 2)
        assert np.shape(record["by_length"]) == (6, 2)
        assert record["lengths"] == [40, 64, 96, 128, 192, 256]
        assert 0 < record["seconds"][0] <= record["seconds"][1]
        nonlinear = record["layer"] == "gru"
        assert np.shape(record["newton_steps"]) == ((2, 2) if nonlinear else (0,))
        # Four steps teach nothing.
        assert all(abs(score) < 0.5 for score in record["score"])
        assert all(0.4 < loss < 1.5 for loss in record["validation"])
    gru = trainings(finished)[0]
    assert all(1 <= n <= 32 for row in gru["newton_steps"] for n in row)


def test_a_second_run_adds_nothing(finished):
    before = trainings(finished)
    assert len(read_records(finished / "results.jsonl")) == 1 + 2 + 4
    page = (finished / "report.html").read_text()
    compare(
        LAYERS, TASKS, finished, TINY, command="python x.py --a 'b c'", visible=False
    )
    assert trainings(finished) == before
    write_report(finished)
    assert (finished / "report.html").read_text() == page


def test_an_interrupted_run_goes_on(finished, tmp_path):
    """From the lines that a run had when it was killed, the last of them cut."""
    lines = (finished / "results.jsonl").read_text().splitlines(keepends=True)
    start = "".join(lines[:6]) + lines[6][:40]
    (tmp_path / "results.jsonl").write_text(start)
    compare(LAYERS, TASKS, tmp_path, TINY, visible=False)
    again, first = trainings(tmp_path), trainings(finished)
    assert again[:3] == first[:3]
    # The last was trained again, with the same numbers.
    assert list(map(lasting, again)) == list(map(lasting, first))


def test_another_protocol_is_another_result():
    task = make_task("parity")
    prints = {TINY.fingerprint(task)}
    changes = [
        {"steps": 6},
        {"seed": 1},
        {"seeds": 3},
        {"short": False},
        {"parameters": 3_000},
    ]
    prints |= {dataclasses.replace(TINY, **c).fingerprint(task) for c in changes[:3]}
    assert len(prints) == 4
    # Which rates and costs there are beside it changes nothing for a run.
    same = dataclasses.replace(TINY, learning_rates=(0.5,), cost_lengths=(3,))
    assert same.fingerprint(task) == TINY.fingerprint(task)
    group = make_task("s3")
    long = dataclasses.replace(TINY, short=False)
    assert long.lengths(group) == group.lengths != TINY.lengths(group)
    assert 4 * group.lengths.train[0] == group.lengths.test[-1]
    assert 4 * group.short.train[0] == group.short.test[-1]


def test_seeds_side_by_side_are_seeds_alone(finished, tmp_path):
    alone = dataclasses.replace(TINY, side_by_side=False, learning_rates=(1e-2,))
    compare(["lru:real"], TASKS, tmp_path, alone, visible=False)
    (record,) = trainings(tmp_path)
    np.testing.assert_allclose(record["losses"], trainings(finished)[-1]["losses"])


def test_training_is_adamw_by_hand():
    """Two steps of one seed, with gradients of a loss written independently."""
    task = make_task("parity")
    protocol = dataclasses.replace(TINY, steps=2, points=1, seeds=1, weight_decay=0.0)
    data, size = Data(task, protocol), fit_size(task, "lru", protocol)
    trainer = training_module.Trainer(data, size)
    model = jax.tree.map(lambda x: x[0] if eqx.is_array(x) else x, trainer.models)
    training = trainer.run(1e-2, lambda *_: None)
    batches = jax.tree.map(lambda x: x[0], data.training(0, 2))

    def loss(model, inputs, targets, mask):
        total = 0.0
        for i in range(len(inputs)):
            answers, _ = model(inputs[i])
            for t in range(inputs.shape[1]):
                chance = jnp.exp(answers[t]) / jnp.sum(jnp.exp(answers[t]))
                total -= jnp.where(mask[i, t], jnp.log(chance[targets[i, t]]), 0)
        return total / jnp.sum(mask.astype(float))

    parameters, static = eqx.partition(model, eqx.is_inexact_array)
    leaves, tree = jax.tree.flatten(parameters)
    first = [np.zeros(leaf.shape) for leaf in leaves]
    second = [np.zeros(leaf.shape) for leaf in leaves]
    grad = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    losses = []
    # No warm-up; a cosine from the rate to a tenth over two steps.
    for n, rate in enumerate([1.0, 0.1 + 0.9 * 0.5]):
        model = eqx.combine(jax.tree.unflatten(tree, leaves), static)
        value, gradient = grad(model, *(part[n] for part in batches))
        losses.append(float(value))
        gradients = [np.asarray(g) for g in jax.tree.leaves(gradient)]
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        gradients = [g / max(1.0, norm) for g in gradients]
        for i, g in enumerate(gradients):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.95 * second[i] + 0.05 * g**2
            mean = first[i] / (1 - 0.9 ** (n + 1))
            square = second[i] / (1 - 0.95 ** (n + 1))
            step = 1e-2 * rate * mean / (np.sqrt(square) + 1e-8)
            leaves[i] = jnp.asarray(np.asarray(leaves[i]) - step)
    np.testing.assert_allclose(training.losses, [[np.mean(losses)]], rtol=1e-9)
    trained = jax.tree.leaves(eqx.filter(training.models, eqx.is_inexact_array))
    for ours, theirs in zip(trained, leaves, strict=True):
        np.testing.assert_allclose(ours[0], theirs, rtol=1e-6, atol=1e-9)


def explode(model, metric, batch):
    """A loss that overflows at once."""
    return jnp.inf * jnp.sum(model.norm)


def test_a_seed_that_diverges_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(training_module, "_mean_loss", explode)
    protocol = dataclasses.replace(TINY, learning_rates=(1e-2,))
    compare(["lru"], TASKS, tmp_path, protocol, visible=False)
    (record,) = trainings(tmp_path)
    assert record["diverged"] == [0, 0] and record["score"] == [None, None]
    assert record["losses"] == [[None, None]] * 2
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "2 of 2 diverged" in text and "0.000 (0.000)" in text


def test_a_solver_that_refuses_is_reported(monkeypatch, tmp_path):
    def refuse(*_):
        raise RuntimeError("\nthe states are not finite\nmore")

    monkeypatch.setattr(training_module.Trainer, "run", refuse)
    protocol = dataclasses.replace(TINY, learning_rates=(1e-2,))
    compare(["lru"], TASKS, tmp_path, protocol, visible=False)
    (record,) = trainings(tmp_path)
    assert (record["status"], record["error"]) == (
        "failed",
        "the states are not finite",
    )
    write_report(tmp_path)
    assert "failed: the states are not finite" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "layer", ["gru", "paragru", "deltanet:heads=3", "lru", "mamba"]
)
@pytest.mark.parametrize("task", ["parity", "adding"])
def test_sizes_are_equal(layer, task):
    task, wanted = make_task(task), 20_000
    size = fit_size(task, layer, Protocol(parameters=wanted, depth=2))
    model = SequenceModel(
        task, layer, size.d_model, size.d_hidden, 2, key=jax.random.key(0)
    )
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    assert size.parameters == sum(leaf.size for leaf in leaves)
    assert size.parameters == count_parameters(model)
    assert abs(size.parameters - wanted) < 0.01 * wanted
    assert size.d_hidden >= 2 * size.d_model
    states = model.init_state()
    if layer.startswith(("deltanet", "mamba")):
        # Without the windows of the convolutions.
        states = states[-1]
    states = jax.tree.leaves(states)
    factors = [2 if jnp.iscomplexobj(s) else 1 for s in states]
    assert size.state == sum(s.size * f for s, f in zip(states, factors, strict=True))


# Layer, the state asked for, the option that it gets, and numbers in the state.
STATES = {
    "deltanet:noconv": (150, "d_key=12:d_value=12", 144),
    "deltanet": (150, "d_key=12:d_value=12", 144),
    "gla:heads=2": (130, "d_key=8:d_value=8", 128),
    "lru": (150, "d_state=74", 148),
    "lru:real": (150, "d_state=150", 150),
    "paralstm": (150, "d_state=74", 148),
    "s5:blocks=4": (20, "d_state=16", 16),
    "paragru:heads=4": (150, "d_state=148", 148),
}


@pytest.mark.parametrize("layer", STATES)
def test_states_are_equal(layer):
    """At equal numbers of parameters too."""
    state, options, wanted = STATES[layer]
    protocol = Protocol(parameters=20_000, state=state)
    size = fit_size(make_task("parity"), expand_layer(layer), protocol)
    assert size.layer == f"{expand_layer(layer)}:{options}"
    assert size.state == wanted
    assert abs(size.parameters - 20_000) < 300


@pytest.mark.parametrize(
    "layer, state, parts",
    [
        ("rwkv7", 100, ["cannot be set independently", "`d_key`"]),
        ("lru:n=8", 100, ["cannot be set independently", "not be given them already"]),
        ("mamba2", 20, ["at least", "`state` is 20"]),
        ("gru", 200, ["parameters at the smallest width", "'gru:d_state=200'"]),
        ("plstm_grid", 100, ["at least 0 numbers", "one on images"]),
    ],
)
def test_states_that_cannot_be(layer, state, parts):
    with refusal(ValueError, parts):
        fit_size(make_task("parity"), expand_layer(layer), Protocol(state=state))


def test_layers_on_images_are_trained():
    """A step changes parameters, and the layer is the one of `linear`."""
    task = dataclasses.replace(
        make_task("arrow_pointing"), short=Lengths((9, 9), (9, 16))
    )
    protocol = dataclasses.replace(TINY, parameters=6_000, steps=2, points=1)
    data = Data(task, protocol)
    trainer = training_module.Trainer(data, fit_size(task, "plstm_grid", protocol))
    training = trainer.run(1e-2, lambda *_: None)
    evaluation = Evaluator(data).run(training.models, training.diverged)
    assert training.diverged == [None, None] and None not in evaluation.score
    mixer = jax.tree.map(
        lambda v: v[0, 0], eqx.filter(trainer.models.blocks.mixer, eqx.is_array)
    )
    mixer = eqx.combine(mixer, trainer.models.blocks.mixer)
    assert isinstance(mixer.layer, linear.PLSTMGrid)
    xs = jax.random.normal(jax.random.key(0), (9, mixer.layer.d_model))
    image = xs.reshape(3, 3, -1)
    np.testing.assert_allclose(mixer(xs)[0].reshape(image.shape), mixer.layer(image))
    for given, message in (((xs[:8],), "not a square image"), ((xs,), "no resets")):
        reset = jnp.zeros(9, bool) if message == "no resets" else None
        with refusal(ValueError, [message]):
            mixer(*given, reset=reset)


def test_evaluation_counts_by_hand():
    """Answers that are right at known steps only."""
    task = make_task("parity")
    data = Data(task, dataclasses.replace(TINY, test_sequences=10))

    class Half(eqx.Module):
        """Knows the parity of up to `known` steps, and says 0 after that."""

        known: jax.Array

        def __call__(self, tokens):
            odd = jnp.cumsum(tokens) % 2
            early = jnp.arange(len(tokens)) < self.known
            answer = jnp.where(early, odd, 0)
            return jax.nn.one_hot(answer, 2, dtype=float), {}

    models = Half(jnp.asarray([256, 64, 0]))
    evaluation = Evaluator(data).run(models, [None, None, 7])
    (test,) = data.tests
    targets = np.asarray(test.targets).reshape(-1, 256)
    assert targets.shape == (12, 256) and np.asarray(test.mask).all()
    accuracy = (targets == 0).mean(0)
    wanted = [
        np.concatenate([np.ones(64), accuracy[64:]])[a:b].mean()
        for a, b in [(0, 40), (40, 64), (64, 96), (96, 128), (128, 192), (192, 256)]
    ]
    found = np.array(evaluation.by_length, float)
    np.testing.assert_allclose(found[:, 0], 1)
    np.testing.assert_allclose(found[:, 1], 2 * np.array(wanted) - 1)
    beyond = np.concatenate([np.ones(24), accuracy[64:]]).mean()
    assert evaluation.score == pytest.approx([1, 2 * beyond - 1, None])
    assert [row[2] for row in evaluation.by_length] == [None] * 6
    assert len(evaluation.curve) == len(evaluation.curve_lengths) == 64


def test_evaluation_of_lengths_of_their_own():
    data = Data(make_task("adding"), TINY)

    class Sum(eqx.Module):
        error: jax.Array

        def __call__(self, inputs):
            total = jnp.sum(jnp.prod(inputs, 1)).astype(float) + self.error
            return jnp.full((len(inputs), 1), total), {}

    evaluation = Evaluator(data).run(Sum(jnp.asarray([0.0, 0.5])), [None, None])
    assert evaluation.lengths == [40, 80, 160] and len(data.tests) == 3
    np.testing.assert_allclose(evaluation.by_length, [[0, 0.25]] * 3, atol=1e-6)
    np.testing.assert_allclose(evaluation.score, [0, 0.25], atol=1e-6)
    np.testing.assert_allclose(evaluation.validation, [0, 0.25], atol=1e-6)


def test_brackets_count_at_the_end_only():
    data = Data(make_task("modular_arithmetic_brackets"), TINY)
    for length, test in zip([40, 64], data.tests, strict=False):
        mask = np.asarray(test.mask).reshape(-1, length)
        assert mask.sum(1).tolist() == [1] * len(mask) and mask[:, length - 2].all()


def test_layers_see_the_same_data_and_seeds_do_not():
    first, second = (Data(make_task("parity"), TINY).training(2, 2) for _ in range(2))
    assert jnp.array_equal(first.inputs, second.inputs)
    assert first.inputs.shape == (2, 2, 4, 40)
    assert not jnp.array_equal(first.inputs[0], first.inputs[1])
    assert not jnp.array_equal(first.inputs[:, 0], first.inputs[:, 1])
    whole = Data(make_task("parity"), TINY).training(0, 4)
    assert jnp.array_equal(whole.inputs[:, 2:], first.inputs)
    lengths = np.asarray(whole.mask).sum(-1)
    assert lengths.min() >= 3 and lengths.max() <= 40 and len(np.unique(lengths)) > 5


def test_costs():
    found = measure_costs("gru", 8, TINY)
    assert found["lengths"] == [4, 8]
    for name in ("forward_seconds", "backward_seconds"):
        assert len(found[name]) == 2 and all(0 < s < 10 for s in found[name])
    for name in ("forward_bytes", "backward_bytes"):
        assert all(isinstance(b, int) and b > 0 for b in found[name])


def test_the_report_has_what_it_must(finished):
    page, text = (
        (finished / name).read_text() for name in ("report.html", "report.md")
    )
    results = load_results(finished / "results.jsonl")
    for layer in LAYERS:
        record = results.best(layer, "parity")
        losses = {
            r["learning_rate"]: np.median(r["validation"])
            for r in trainings(finished)
            if r["layer"] == layer
        }
        assert record["learning_rate"] == min(losses, key=losses.get)
        median, best = np.median(record["score"]), max(record["score"])
        shown = f"| {layer} | {median:.3f} ({best:.3f}) |".replace("-0.000", "0.000")
        assert shown in text and shown in (finished / "scores.md").read_text()
    for wanted in (COMMAND, jax.__version__, '"learning_rates"'):
        assert wanted in text
    assert "python x.py --a &#x27;b c&#x27;" in page
    for record in trainings(finished):
        layer, rate = record["layer"], record["learning_rate"]
        loss = f"{np.median(record['validation']):.3f}"
        assert f"| parity | {layer} | {rate:g} | {loss} |" in text
    # One file: nothing is loaded from elsewhere.
    assert not re.search(r'(src|href)="(?!data:)', page)
    pictures = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    names = re.findall(r"\((figures/[^)]+\.svg)\)", text)
    assert names == ["figures/parity.svg", "figures/costs.svg", "figures/newton.svg"]
    for name, picture in zip(names, pictures, strict=True):
        svg = base64.b64decode(picture).decode()
        assert (finished / name).read_text() == svg
        assert ET.fromstring(svg).tag.endswith("svg") and svg.count("<path") > 10


def test_published_numbers_stand_beside_ours(finished, tmp_path):
    """The results of another layer, as if they were Mamba's."""
    lines = (finished / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(lines.replace('"gru"', '"mamba"'))
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    (row,) = (line for line in text.splitlines() if "2411.12537), caption" in line)
    overview = next(line for line in text.splitlines() if "| mamba |" in line)
    ours = overview.split()[3]
    assert f"[0, 1]: 0.000 | mamba: {ours} | scaled accuracy" in row
    assert "https://" in row
    # Of `lru:real` there is a theorem, and no number.
    text = (finished / "report.md").read_text()
    (row,) = (line for line in text.splitlines() if "a theorem" in line)
    assert "at every length | lru:real: " in row and "caption" not in text


SPECS = {
    "gru": "gru",
    "deltanet:neg": "deltanet:eigenvalues=signed",
    "deltanet:noconv": "deltanet:convolution=False",
    "mamba:neg": "mamba:eigenvalues=signed",
    "lru:real": "lru:eigenvalues=positive",
    "lru:complex:n=16": "lru:eigenvalues=complex:d_state=16",
    "deltaproduct:nh=2": "deltaproduct:householders=2",
    "deltaproduct:nh=3:heads=2": "deltaproduct:householders=3:heads=2",
}


@pytest.mark.parametrize("layer", SPECS)
def test_short_forms(layer):
    assert expand_layer(layer) == SPECS[layer]


def call(layers=("gru",), tasks=("parity",), **changes):
    return lambda folder: compare(
        layers, tasks, folder, dataclasses.replace(TINY, **changes), visible=False
    )


# name: (call, parts of the message)
WRONG = {
    "unknown layer": (call(["grue"]), ["unknown layer 'grue'", "paragru", "deltanet"]),
    "unknown option": (call(["lru:depth=2"]), ["no option depth", "eigenvalues"]),
    "unknown flag": (call(["lru:fast"]), ["'fast'", "option=value", "neg"]),
    "wrong value": (call(["lru:eigenvalues=odd"]), ["eigenvalues", "odd"]),
    "unknown task": (call(tasks=["pairity"]), ["unknown task 'pairity'", "mqar"]),
    "unknown option of a task": (call(tasks=["s3:n=2"]), ["no option n", "tokens"]),
    "no image": (call(["plstm_grid"]), ["takes images", "digits, arrow_pointing"]),
    "no state": (call(state=0), ["`state` is 0"]),
    "no layers": (call([]), ["`layers`", "at least one"]),
    "a string": (call(tasks="parity"), ["`tasks`", "sequence"]),
    "twice": (call(["gru", "lru", "gru"]), ["gru more than once"]),
    "too small": (call(parameters=10), ["`parameters` is 10", "at least"]),
    "no steps": (call(steps=0), ["`steps` is 0"]),
    "a rate": (call(learning_rates=(0.0,)), ["`learning_rates`", "above"]),
    "no rates": (call(learning_rates=()), ["`learning_rates`"]),
    "a share": (call(weight_decay=2.0), ["`weight_decay` is 2.0"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name, tmp_path):
    function, parts = WRONG[name]
    with refusal(ValueError, parts):
        function(tmp_path / "new")
    # Refused before anything is written.
    assert not (tmp_path / "new").exists()


def test_broken_and_missing_results(tmp_path):
    with pytest.raises(ValueError, match="no comparison has begun"):
        write_report(tmp_path)
    (tmp_path / "results.jsonl").write_text('{"kind": "run"}\n{"kind"\n{}\n')
    with pytest.raises(ValueError, match=r"line 2, is not a JSON object"):
        read_records(tmp_path / "results.jsonl")


def test_budgets_grow():
    small, medium, full = (BUDGETS[name] for name in ("small", "medium", "full"))
    for field in ("parameters", "steps", "batch", "seeds", "test_sequences"):
        sizes = [getattr(budget, field) for budget in (small, medium, full)]
        assert sizes == sorted(sizes)
    assert small.short and not medium.short


@pytest.mark.slow
def test_the_script(tmp_path):
    options = {"layers": "lru,elman", "tasks": "count_modulo", "steps": "4"}
    options |= {"batch": "4", "seeds": "1", "parameters": "2000", "out": str(tmp_path)}
    command = [sys.executable, str(EXAMPLES / "compare_recurrences.py")]
    for name, value in options.items():
        command += [f"--{name}", value]
    command += ["--learning-rates", "0.01"]
    subprocess.run(command, check=True, timeout=500, stdout=subprocess.DEVNULL)
    assert len(trainings(tmp_path)) == 2
    text = (tmp_path / "report.md").read_text()
    assert "compare_recurrences.py --layers lru,elman" in text
    (tmp_path / "report.md").unlink()
    subprocess.run([*command, "--report-only"], check=True, timeout=300)
    assert (tmp_path / "report.md").read_text() == text


@pytest.mark.slow
def test_the_script_names_what_there_is():
    command = [sys.executable, str(EXAMPLES / "compare_recurrences.py")]
    processes = [
        subprocess.Popen(
            [*command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for options in (("--tasks", "chess"), ("--list",))
    ]
    (_, refused), (listed, _) = (p.communicate(timeout=300) for p in processes)
    assert [p.returncode for p in processes] == [1, 0]
    assert "parity" in refused and "Traceback" not in refused
    assert "paragru" in listed and "library_text" in listed
