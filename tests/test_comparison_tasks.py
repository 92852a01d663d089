"""The tasks of the comparison, against slow evaluators in plain Python."""

import collections
import functools
import itertools
import math
import pathlib
import sys
import sysconfig

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pararnn.comparison import Lengths, Metric, Task, draw_batch, list_tasks, make_task
from pararnn.comparison.tasks import IMAGE_TASKS, _raw as arrows
from pararnn.comparison.tasks._formal import multiplication_table
from tests.helpers import refusal

SIZE, COUNT = 24, 40


def draw(sampler, lengths, size=None):
    """Examples as lists, one for each length: inputs, targets and mask."""
    size = size or max(lengths)
    lengths = jnp.asarray(lengths, jnp.int32)
    key = jax.random.key(0)
    batch = eqx.filter_jit(draw_batch)(sampler, key, len(lengths), size, lengths)
    assert batch.mask.dtype == bool and batch.mask.shape == (len(lengths), size)
    return list(zip(*(np.asarray(a).tolist() for a in batch), strict=True))


LENGTHS = [3 + i % (SIZE - 2) for i in range(COUNT)]


def prefixes(step, start):
    """Targets of a plain loop over the tokens, one for every token."""

    def evaluate(tokens):
        states = itertools.accumulate(tokens, step, initial=start)
        return dict(enumerate(list(states)[1:]))

    return evaluate


def pairs(tokens):
    text = "".join("ab"[t] for t in tokens)

    def count(n):
        return text[:n].count("ab") + text[:n].count("ba")

    return {n - 1: int(count(n) % 2 == 0) for n in range(1, len(text) + 1)}


def arithmetic(tokens):
    """Python's arithmetic, for every prefix that is an expression."""
    found = {}
    for n in range(1, len(tokens) + 1):
        text = "".join("01234+-*()"[t] for t in tokens[:n])
        if text.count("(") == text.count(")") and text[-1] not in "+-*":
            found[n - 1] = eval(text) % 5
    return found


PARITY = prefixes(lambda odd, bit: (odd + bit) % 2, 0)
STEPS = (0, 1, -1)

# Spec, and the answers in plain Python: position and value.
REGULAR = {
    "parity": PARITY,
    "even_pairs": pairs,
    "cycle_navigation": prefixes(lambda place, step: (place + STEPS[step]) % 5, 0),
    "sum_modulo": prefixes(lambda total, digit: (total + digit) % 3, 0),
    "sum_modulo:modulus=7": prefixes(lambda total, digit: (total + digit) % 7, 0),
    "count_modulo": prefixes(lambda count, _: (count + 1) % 3, 0),
    "modular_arithmetic": arithmetic,
    "modular_arithmetic_brackets": arithmetic,
}


@pytest.mark.parametrize("spec", REGULAR)
def test_formal_languages(spec):
    task = make_task(spec)
    used = set()
    for length, (inputs, targets, mask) in zip(
        LENGTHS, draw(task.train, LENGTHS), strict=True
    ):
        if "arithmetic" in spec:
            length -= 1 - length % 2
        answers = REGULAR[spec](inputs[:length])
        assert {i: targets[i] for i in range(SIZE) if mask[i]} == answers
        assert length - 1 in answers
        used |= set(inputs[:length])
    assert used == set(range(task.vocabulary))
    assert task.outputs == round(1 / task.metric.chance)
    assert task.lengths == Lengths((3, 40), (40, 64, 96, 128, 192, 256))


def test_brackets_nest():
    """At the tested lengths brackets nest, and some tokens are outside of them."""
    depths, bare = [], 0
    for inputs, *_ in draw(make_task("modular_arithmetic_brackets").train, [41] * 20):
        depth = list(itertools.accumulate((t == 8) - (t == 9) for t in inputs))
        assert min(depth) == 0 and depth[-1] == 0
        depths.append(max(depth))
        bare += sum(d == 0 for d in depth)
    assert max(depths) >= 3 and bare > 20


def compose(p, q):
    """First p, then q."""
    return tuple(q[i] for i in p)


def is_even(p):
    swaps, p = 0, list(p)
    for i in range(len(p)):
        while p[i] != i:
            other = p[i]
            p[i], p[other] = p[other], p[i]
            swaps += 1
    return swaps % 2 == 0


GROUPS = {
    "s3": list(itertools.permutations(range(3))),
    "s4": list(itertools.permutations(range(4))),
    "a5": [p for p in itertools.permutations(range(5)) if is_even(p)],
    "s5": list(itertools.permutations(range(5))),
    "z60": [tuple((i + s) % 60 for i in range(60)) for s in range(60)],
}
# Spec, how many generators there are, and how many products of one length.
WORDS = {
    "s3": (6, 6),
    "s4": (24, 24),
    "a5": (60, 60),
    "s5": (120, 120),
    "z60": (60, 60),
    "s3:swaps": (3, 3),
    "s4:swaps": (6, 12),
    "s5:swaps": (10, 60),
    "s3:cycles": (2, 3),
    "s5:cycles": (20, 60),
    "a5:cycles:tokens=3": (20, 60),
    "s3:tokens=2": (6, 6),
}


@pytest.mark.parametrize("spec", WORDS)
def test_word_problems(spec):
    task, elements = make_task(spec), GROUPS[spec.split(":")[0]]
    tokens = int(spec.rpartition("tokens=")[2]) if "tokens=" in spec else 1
    moved = {"swaps": 2, "cycles": 3}
    wanted = [moved[part] for part in spec.split(":") if part in moved]
    generators = [
        e
        for e in elements
        if not wanted or sum(i != v for i, v in enumerate(e)) in wanted
    ]
    assert (len(generators), round(1 / task.metric.chance)) == WORDS[spec]
    assert task.vocabulary == len(generators) + (tokens > 1)
    for length, (inputs, targets, mask) in zip(
        LENGTHS, draw(task.train, LENGTHS), strict=True
    ):
        product = tuple(range(len(elements[0])))
        for start in range(0, length - tokens + 1, tokens):
            assert inputs[start + 1 : start + tokens] == [len(generators)] * (
                tokens - 1
            )
            product = compose(product, generators[inputs[start]])
            assert elements[targets[start + tokens - 1]] == product
        asked = [i for i in range(SIZE) if mask[i]]
        assert asked == [i for i in range(length) if (i + 1) % tokens == 0]
    lengths = task.lengths
    assert lengths.train == (128 * tokens,) * 2 and lengths.test[-1] == 512 * tokens


def test_multiplication_associates():
    table = multiplication_table(GROUPS["s4"])
    left = table[table[:, :, None], np.arange(24)[None, None, :]]
    right = table[np.arange(24)[:, None, None], table[None]]
    assert np.array_equal(left, right)


def test_recall():
    task = make_task("mqar")
    lengths = [16, 17, 31, 64, 64, 40]
    for length, (inputs, targets, mask) in zip(
        lengths, draw(task.train, lengths), strict=True
    ):
        pairs = length // 4
        keys, values = inputs[: 2 * pairs : 2], inputs[1 : 2 * pairs : 2]
        memory = dict(zip(keys, values, strict=True))
        assert len(memory) == pairs
        for i, asked in enumerate(mask):
            assert asked == (2 * pairs <= i < length)
            if asked:
                assert memory[inputs[i]] == 64 + targets[i]
        assert max(keys) < 64 <= min(values) and max(values) < task.vocabulary


@pytest.mark.parametrize("name", ["copying", "selective_copying"])
def test_copying(name):
    task, items = make_task(f"{name}:items=4"), 4
    lengths, scattered = [9, 10, 17, 30, 30, 30], 0
    for length, (inputs, targets, mask) in zip(
        lengths, draw(task.train, lengths), strict=True
    ):
        copied = [(i, t) for i, t in enumerate(inputs) if t < 8]
        assert [t for _, t in copied] == targets[length - items : length]
        assert [i for i, asked in enumerate(mask) if asked] == list(
            range(length - items, length)
        )
        assert inputs.count(9) == 1 and inputs[length - items - 1] == 9
        places = [i for i, _ in copied]
        assert max(places) < length - items - 1
        scattered += places != [0, 1, 2, 3]
    assert (scattered > 0) == (name == "selective_copying")


def test_adding():
    lengths = [2, 3, 20, 20, 31]
    for length, (inputs, targets, mask) in zip(
        lengths, draw(make_task("adding").train, lengths), strict=True
    ):
        first, second = (i for i, (_, mark) in enumerate(inputs) if mark)
        assert first < length // 2 <= second < length
        assert [i for i, asked in enumerate(mask) if asked] == [length - 1]
        wanted = inputs[first][0] + inputs[second][0]
        assert targets[length - 1] == pytest.approx(wanted, abs=1e-6)


def test_chance_of_numbers():
    """The best constant answer's error, by sampling."""
    sums = np.random.default_rng(0).uniform(size=(10**5, 2)).sum(1)
    assert make_task("adding").metric.chance == pytest.approx(sums.var(), rel=0.02)
    task = make_task("oscillators:count=3")
    values = [x for row in draw(task.train, [100] * 200) for x in row[1]]
    assert task.metric.chance == pytest.approx(np.var(values), rel=0.05)


@pytest.mark.parametrize("part, first", [("train", 0), ("test", 1200)])
def test_oscillators(part, first):
    task = make_task("oscillators:count=2")
    for inputs, targets, mask in draw(getattr(task, part), [20] * 6):
        signal = [x for (x,) in inputs]
        assert all(mask) and signal[1:] == targets[:-1]
        times = range(first, first + 400)
        found = [
            t
            for t in times
            if all(
                abs(math.sin(0.2 * (t + i)) + math.sin(0.311 * (t + i)) - x) < 2e-3
                for i, x in enumerate([*signal, targets[-1]])
            )
        ]
        assert len(found) == 1


@functools.cache
def real_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    return digits.data / 16, digits.target


@pytest.mark.parametrize("spec", ["digits", "digits:permuted"])
def test_digits(spec):
    pixels, classes = real_digits()
    task = make_task(spec)
    known = collections.Counter()
    for part in (task.train, task.validation, task.test):
        images, labels = part.args
        known += collections.Counter(
            (*sorted(image), label)
            for image, label in zip(images.tolist(), labels.tolist(), strict=True)
        )
    # Each image is in one split, whatever the order of its pixels.
    assert known == collections.Counter(
        (*sorted(image), label)
        for image, label in zip(pixels.tolist(), classes.tolist(), strict=True)
    )
    ordered = {
        (*image, label) for image, label in zip(pixels.tolist(), classes, strict=True)
    }
    for inputs, targets, mask in draw(task.test, [64] * 5):
        assert mask == [False] * 63 + [True]
        assert ((*[x for (x,) in inputs], targets[-1]) in ordered) == (spec == "digits")


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pararnn\[compare\]"):
        make_task("digits")


def brightness(scene, pixel):
    """One pixel, from points along the strokes."""
    arrow, disc, heading = (np.asarray(v, np.float64) for v in scene[:3])
    angle = math.atan2(heading[1], heading[0])

    def towards(turn):
        return np.array([math.cos(angle + turn), math.sin(angle + turn)])

    tip = arrow + 3 * heading
    ends = [arrow - 3 * heading, tip - 2.5 * towards(0.6), tip - 2.5 * towards(-0.6)]
    along = np.linspace(0, 1, 4001)[:, None]
    lines = [np.linalg.norm(tip + along * (end - tip) - pixel, axis=1) for end in ends]
    stroke = 0.5 - np.min(lines)
    return np.clip(max(stroke, 2 - np.linalg.norm(disc - pixel)) + 0.5, 0, 1)


def test_arrows_point_or_not():
    extent = 32.0
    keys = jax.random.split(jax.random.key(1), 400)
    scenes = jax.vmap(arrows.draw_scene, (0, None))(keys, extent)
    towards = scenes.disc - scenes.arrow
    distance = np.linalg.norm(towards, axis=1)
    assert distance.min() >= 8
    cosine = np.sum(scenes.heading * towards, 1) / distance
    points = np.asarray(scenes.points)
    assert 150 < points.sum() < 250
    np.testing.assert_allclose(cosine[points], 1, atol=1e-9)
    assert cosine[~points].max() < math.cos(math.pi / 6) + 1e-9
    for centres in (scenes.arrow, scenes.disc):
        assert 4 <= centres.min() and centres.max() <= extent - 4


@pytest.mark.parametrize("length", [49, 64], ids=["padded", "whole"])
def test_images_of_arrows(length):
    """Patch by patch against single pixels; nothing after the image."""
    task, key, patch = make_task("arrow_pointing:patch=3"), jax.random.key(3), 3
    side = math.isqrt(length)
    inputs, targets, mask = task.train(key, 64, jnp.asarray(length, jnp.int32))
    scene = arrows.draw_scene(key, float(side * patch))
    for t in range(0, length, 5):
        for n in range(patch * patch):
            row = patch * (t // side) + n // patch + 0.5
            column = patch * (t % side) + n % patch + 0.5
            wanted = brightness(scene, np.array([row, column]))
            assert float(inputs[t, n]) == pytest.approx(wanted, abs=1e-3)
    assert not np.asarray(inputs[length:]).any()
    assert np.flatnonzero(mask).tolist() == [length - 1]
    assert bool(targets[length - 1]) == bool(scene.points)


def test_images_are_square():
    sizes = {"features": 1, "outputs": 2, "metric": Metric("accuracy", 0.5)}
    for lengths in (Lengths((8, 8), (9,)), Lengths((4, 9), (9,))):
        with refusal(ValueError, ["is on images", "expected squares"]):
            Task("x", "", "", lengths=lengths, train=None, image=True, **sizes)
    images = [n for n in list_tasks() if n in IMAGE_TASKS]
    assert all(make_task(name).image for name in images) and len(images) == 2
    assert not make_task("digits:permuted").image


def test_library_text():
    task = make_task("library_text:megabytes=1")
    streams = {part: bytes(getattr(task, part).args[0]) for part in ("train", "test")}
    assert len(streams["train"]) > 8e5 and len(streams["test"]) > 1e5
    for part, stream in streams.items():
        ends = getattr(task, part).args[1].tolist()
        documents = {stream[a:b] for a, b in itertools.pairwise([0, *ends])}
        if part == "train":
            seen = documents
        for inputs, targets, mask in draw(getattr(task, part), [64] * 6):
            stop = sum(mask)
            assert mask == [True] * stop + [False] * (len(mask) - stop)
            text = bytes([*inputs[:1], *targets[:stop]])
            assert inputs[1:stop] == targets[: stop - 1] if stop else True
            assert any(text in document for document in documents)
    assert len(seen & documents) / len(documents) < 0.2


def test_library_package():
    task = make_task("library_package")
    packages = [
        word for word in task.summary.partition("(")[2].partition(")")[0].split(", ")
    ]
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    sources = [
        b"".join(p.read_bytes() for p in sorted((root / name).rglob("*.py")))
        for name in packages
    ]
    lengths, seen = set(), set()
    for inputs, targets, mask in draw(task.test, [200] * 30):
        (end,) = (i for i, asked in enumerate(mask) if asked)
        text = bytes(inputs[: end + 1])
        assert end < 200 and set(inputs[end + 1 :]) <= {256}
        assert text in sources[targets[end]]
        lengths.add(end)
        seen.add(targets[end])
    assert len(lengths) > 5 and len(seen) > 3


@pytest.mark.parametrize(
    "spec, parts",
    {
        "pairity": ["unknown task 'pairity'", "parity", "mqar"],
        "parity:modulus=2": ["'parity' has no option modulus", "none"],
        "sum_modulo:base=2": ["no option base", "modulus"],
        "sum_modulo:modulus=1": ["`modulus`", "at least 2"],
        "s3:fast": ["'fast'", "option=value", "swaps"],
        "s3:swaps:generators=all": ["'generators' is given twice"],
        "s3:generators=none": ["`generators` is 'none'", "swaps, cycles"],
        "a5:swaps": ["the group has no swaps"],
        "s3:tokens=0": ["`tokens` must be a positive integer"],
        "mqar:keys=8": ["`keys` is 8", "64 different keys"],
        "oscillators:count=99": ["`count` is 99"],
        "copying:symbols=1": ["`symbols`"],
    }.items(),
)
def test_wrong_specs(spec, parts):
    with refusal(ValueError, parts):
        make_task(spec)


def test_a_task_has_tokens_or_features():
    with pytest.raises(ValueError, match="exactly one of them"):
        Task("x", "", "", 1, Metric("accuracy", 0.5), Lengths((1, 1), (1,)), None)


@pytest.mark.parametrize("name", [n for n in list_tasks() if "library" not in n])
def test_the_same_key_gives_the_same_examples(name):
    if name == "digits":
        real_digits()
    task = make_task(name)
    assert task.name == name
    low, high = task.lengths.train
    lengths = [low, high]
    first, again = (draw(task.train, lengths) for _ in range(2))
    assert first == again
    assert any(any(mask) for *_, mask in first)


# Metric, outputs, targets, the mean of the values and the score.
SCORES = [
    (Metric("accuracy", 0.5), [[0.0, 1], [2, 1]], [1, 1], 0.5, 0.5),
    (Metric("scaled accuracy", 0.5), [[0.0, 1], [2, 1]], [1, 1], 0.5, 0.0),
    (Metric("scaled accuracy", 0.25), [[0.0, 1], [2, 1]], [1, 0], 1.0, 1.0),
    (Metric("mean squared error", 1.0), [[3.0], [1.0]], [1.0, 1.0], 2.0, 2.0),
    (Metric("bits per byte", 8.0), [[0.0, 0, 0, 0]] * 2, [1, 3], 2.0, 2.0),
]


@pytest.mark.parametrize("metric, outputs, targets, mean, score", SCORES)
def test_metrics(metric, outputs, targets, mean, score):
    values = metric.values(jnp.asarray(outputs), jnp.asarray(targets))
    assert float(jnp.mean(values)) == pytest.approx(mean)
    assert metric.score(mean) == pytest.approx(score)
    assert metric.guessing == (0 if metric.kind == "scaled accuracy" else metric.chance)
