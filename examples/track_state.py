"""What one linear layer can track: parity, sums modulo 3, and a count modulo 3.

    python examples/track_state.py [--steps 1000] [--seeds 3] [--only NAME]

Each layer reads digits and says after every one what their sum is, modulo 2 or 3. They
are random, or all ones where it has to count only: a layer whose transitions do not
depend on the input can do no more. It is trained on sequences of up to 40 digits and
tested on 41 to 256, where only a layer that holds the state, and does not count on the
length, is right. The score is the accuracy scaled so that guessing is 0 and never wrong
is 1, as in Grazzi et al., "Unlocking State-Tracking in Linear RNNs Through Negative
Eigenvalues" (2411.12537), and Siems et al., "DeltaProduct" (2502.10297); models and
training are smaller here, and the answer is asked for at every step.
"""

import dataclasses
import json
import pathlib
import platform
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import linear

console = Console(width=None if Console().is_terminal else 120)

DELTA = {"heads": 2, "d_key": 16, "d_value": 16}
MODULI = {"parity": 2, "sum modulo 3": 3, "count modulo 3": 3}
# Task, layer, options, and whether theory says that its transitions can do it.
RUNS: dict[str, tuple[str, str, dict[str, Any], bool]] = {
    "DeltaNet, [0, 1]": (
        "parity",
        "deltanet",
        DELTA | {"eigenvalues": "positive"},
        False,
    ),
    "DeltaNet, [-1, 1]": (
        "parity",
        "deltanet",
        DELTA | {"eigenvalues": "signed"},
        True,
    ),
    "Mamba, [0, 1]": ("parity", "mamba", {"eigenvalues": "positive"}, False),
    "Mamba, [-1, 1]": ("parity", "mamba", {"eigenvalues": "signed"}, True),
    "LRU, [0, 1]": ("parity", "lru", {"eigenvalues": "positive", "d_state": 64}, False),
    "Mamba real, [-1, 1]": ("sum modulo 3", "mamba", {"eigenvalues": "signed"}, False),
    "Mamba complex": ("sum modulo 3", "mamba", {"eigenvalues": "complex"}, True),
    "DeltaNet, [-1, 1], one factor": (
        "sum modulo 3",
        "deltanet",
        DELTA | {"eigenvalues": "signed"},
        False,
    ),
    "DeltaProduct, two factors": ("sum modulo 3", "deltaproduct", DELTA, True),
    "LRU real, [-1, 1]": (
        "count modulo 3",
        "lru",
        {"eigenvalues": "signed", "d_state": 64},
        False,
    ),
    "LRU complex": ("count modulo 3", "lru", {"d_state": 64}, True),
}


@dataclasses.dataclass
class Config:
    """What to train, and for how long."""

    steps: int = 1000
    """Steps of the optimiser."""
    seeds: int = 3
    """Independent runs, trained side by side."""
    batch: int = 64
    """Sequences a step."""
    train_length: int = 40
    """Longest sequence in training; shorter ones are prefixes of it."""
    test_length: int = 256
    """Longest sequence in the test."""
    learning_rate: float = 1e-2
    """Of AdamW, after a warm-up, with a cosine to zero."""
    d_model: int = 32
    """Width of the model."""
    only: str = ""
    """Run only what has this in its name."""
    output: pathlib.Path = pathlib.Path("track_state.json")
    """Where results go after every layer, and are continued from if the settings are
    the same; the table in Markdown and the figure in PNG beside it."""


class Tracker(eqx.Module):
    """Digits, one layer, and what it says of their sum."""

    embedding: jax.Array
    layer: linear.AbstractLayer
    hidden: eqx.nn.Linear
    readout: eqx.nn.Linear

    def __init__(self, modulus: int, layer: str, options, d_model: int, key):
        keys = jax.random.split(key, 4)
        self.embedding = jax.random.normal(keys[0], (modulus, d_model))
        self.layer = linear.make_layer(layer, d_model, key=keys[1], **options)
        self.hidden = eqx.nn.Linear(d_model, 2 * d_model, key=keys[2])
        self.readout = eqx.nn.Linear(2 * d_model, modulus, key=keys[3])

    def __call__(self, digits):
        mixed, _ = self.layer(self.embedding[digits])
        return jax.vmap(lambda y: self.readout(jax.nn.silu(self.hidden(y))))(mixed)


def sample(key, batch: int, length: int, task: str):
    least = 1 if task.startswith("count") else 0
    most = 2 if task.startswith("count") else MODULI[task]
    digits = jax.random.randint(key, (batch, length), least, most)
    return digits, jnp.cumsum(digits, 1) % MODULI[task]


def train(config: Config, run, progress, task):
    """Train all seeds side by side; return the models and the losses `[seeds, n]`."""
    kind, layer, options, _ = run
    keys = jax.random.split(jax.random.key(0), config.seeds)
    models = eqx.filter_vmap(
        lambda key: Tracker(MODULI[kind], layer, options, config.d_model, key)
    )(keys)
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.warmup_cosine_decay_schedule(
                0.0, config.learning_rate, config.steps // 20 + 1, config.steps
            ),
            weight_decay=1e-4,
        ),
    )
    state = eqx.filter_vmap(lambda m: optimiser.init(eqx.filter(m, eqx.is_array)))(
        models
    )

    def loss(model, key):
        digits, sums = sample(key, config.batch, config.train_length, kind)
        logits = jax.vmap(model)(digits)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, sums)
        return jnp.mean(losses)

    def update(model, state, key):
        value, gradient = eqx.filter_value_and_grad(loss)(model, key)
        updates, state = optimiser.update(
            gradient, state, eqx.filter(model, eqx.is_array)
        )
        return eqx.apply_updates(model, updates), state, value

    @eqx.filter_jit
    def several(models, state, keys):
        arrays, static = eqx.partition(models, eqx.is_array)

        def body(carry, keys):
            models, state, values = eqx.filter_vmap(update)(
                eqx.combine(carry[0], static), carry[1], keys
            )
            return (eqx.filter(models, eqx.is_array), state), values

        (arrays, state), values = jax.lax.scan(body, (arrays, state), keys)
        return eqx.combine(arrays, static), state, values

    losses, block = [], 50
    for start in range(0, config.steps, block):
        count = min(block, config.steps - start)
        keys = jax.random.split(jax.random.key(start + 1), (count, config.seeds))
        models, state, values = several(models, state, keys)
        losses.append(np.asarray(values))
        progress.update(task, advance=count, loss=float(losses[-1][-1].min()))
    return models, np.concatenate(losses).T


def test(config: Config, run, models) -> np.ndarray:
    """Scaled accuracy `[seeds, test_length]` after each number of digits."""
    digits, sums = sample(jax.random.key(10**6), 256, config.test_length, run[0])

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(eqx.if_array(0), None, None))
    def accuracy(model, digits, sums):
        return jnp.mean(jnp.argmax(jax.vmap(model)(digits), -1) == sums, 0)

    chance = 1 / MODULI[run[0]]
    return (np.asarray(accuracy(models, digits, sums)) - chance) / (1 - chance)


def describe(config: Config) -> dict[str, Any]:
    """What results depend on."""
    settings = {k: str(v) for k, v in dataclasses.asdict(config).items()}
    del settings["only"], settings["output"]
    machine = f"{platform.machine()}, {jax.devices()[0].device_kind}"
    return {"config": settings, "jax": jax.__version__, "machine": machine}


def load(config: Config) -> dict[str, Any]:
    """Results of an earlier run with the same settings, which goes on from there."""
    if not config.output.exists():
        return {}
    earlier = json.loads(config.output.read_text())
    results = earlier.pop("results")
    return results if earlier == describe(config) else {}


def main(config: Config) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    chosen = {n: run for n, run in RUNS.items() if config.only.lower() in n.lower()}
    if not chosen:
        raise SystemExit(f"No run has {config.only!r} in it; there are {list(RUNS)}.")
    results = load(config)
    with Progress(*columns, console=console) as progress:
        for name, run in chosen.items():
            if name in results:
                continue
            task = progress.add_task(name, total=config.steps, loss=float("nan"))
            start = time.perf_counter()
            models, losses = train(config, run, progress, task)
            scores = test(config, run, models)
            results[name] = {
                "task": run[0],
                "can": run[3],
                "scores": scores[:, config.train_length :].mean(1).tolist(),
                "at_the_end": scores[:, -16:].mean(1).tolist(),
                "curve": np.median(scores, 0).tolist(),
                "final_loss": losses[:, -20:].mean(1).tolist(),
                "seconds": time.perf_counter() - start,
            }
            saved = describe(config) | {"results": results}
            config.output.write_text(json.dumps(saved, indent=1) + "\n")
    show(config, {name: results[name] for name in RUNS if name in results})


HEADINGS = ("task", "layer", "can, in theory", "median", "best", "seeds", "s")


def cells(name: str, row) -> tuple[str, ...]:
    """A row of the table, as text."""
    return (
        row["task"],
        name,
        "yes" if row["can"] else "no",
        f"{np.median(row['scores']):.3f}",
        f"{np.max(row['scores']):.3f}",
        " ".join(f"{score:.3f}" for score in row["scores"]),
        f"{row['seconds']:.0f}",
    )


def show(config: Config, results) -> None:
    """Print the table; write it in Markdown, and the figure."""
    title = (
        f"Scaled accuracy on {config.train_length + 1} to {config.test_length} digits, "
        f"trained on up to {config.train_length}"
    )
    table = Table(*HEADINGS, title=title)
    lines = [HEADINGS, ("---",) * len(HEADINGS)]
    for name, row in results.items():
        table.add_row(*cells(name, row))
        lines.append(cells(name, row))
    console.print(table)
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    config.output.with_suffix(".md").write_text(f"{title}:\n\n{markdown}")
    draw(config, results)
    console.print(f"Written: {config.output}, and .md and .png beside it")


def draw(config: Config, results) -> None:
    """Accuracy against the number of digits, a panel for each task."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    panels = figure.subplots(1, len(MODULI), sharey=True)
    window = min(9, config.test_length)
    for axes, which in zip(panels, MODULI, strict=True):
        for name, row in results.items():
            if row["task"] == which:
                curve = np.convolve(row["curve"], np.full(window, 1 / window), "valid")
                style = "-" if row["can"] else "--"
                axes.plot(window + np.arange(len(curve)), curve, style, label=name)
        axes.axvspan(1, config.train_length, color="0.92", lw=0)
        axes.set(title=which, xlabel="digits read (shaded: lengths in training)")
        if axes.has_data() and axes.get_legend_handles_labels()[0]:
            axes.legend(loc="center right", fontsize=8)
    figure.axes[0].set_ylabel("scaled accuracy, median over seeds")
    figure.suptitle(f"Means of {window} digits")
    figure.savefig(config.output.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
