"""Parallelise a cell that the library has never seen, on real text, and train it.

    python examples/parallelize_custom_cell.py [--text FILE] [--length 131072]

The cell is the dozen lines of `FastSlowCell` below, with channels that adapt to their
own activity. Nobody has written a kernel or a Jacobian for it, which is why it is here.
The script finds the structure of its Jacobian, solves the whole sequence by Newton's
method, checks the answer against the sequential loop, trains the cell to predict the
next byte, and reports what all of this cost.
"""

import dataclasses
import pathlib
import statistics
import sysconfig
import time
from collections.abc import Callable

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

import pararnn

console = Console(width=None if Console().is_terminal else 120)


# The cell -----------------------------------------------------------------------------


class FastSlowCell(eqx.Module):
    """A fast variable u, gated, and a slow one s, which makes u tire."""

    gain: jax.Array
    fatigue: jax.Array

    def __call__(self, h, x):
        u, s = h
        keep, drive, recover = x
        gate = jax.nn.sigmoid(keep + self.gain * u)
        u_next = gate * u + (1 - gate) * jnp.tanh(drive - self.fatigue * s)
        rate = jax.nn.sigmoid(recover)
        return u_next, rate * s + (1 - rate) * u_next * u_next


class ByteModel(eqx.Module):
    """Predict the next byte from the fast variables."""

    inputs: tuple[jax.Array, jax.Array, jax.Array]  # [256, width] each
    cell: FastSlowCell
    readout: eqx.nn.Linear

    def __init__(self, width: int, *, key: jax.Array):
        keys = jax.random.split(key, 5)
        keep, drive, recover = (jax.random.normal(k, (256, width)) for k in keys[:3])
        # Time constants between one byte and a few hundred.
        spread = jnp.linspace(-1.0, 5.0, width)[None]
        self.inputs = (0.3 * keep + spread, drive, 0.3 * recover + spread)
        self.cell = FastSlowCell(
            0.5 * jax.random.normal(keys[3], (width,)), jnp.full(width, 0.5)
        )
        self.readout = eqx.nn.Linear(width, 256, key=keys[4])

    def prepare(self, text: jax.Array):
        """Return the cell's inputs: `xs`, leaves `[T, width]`, and `h0`."""
        zeros = jnp.zeros(self.cell.gain.shape)
        return tuple(table[text] for table in self.inputs), (zeros, zeros)

    def loss(self, text: jax.Array):
        """Return the mean negative log-likelihood of `text[1:]`, in bits per byte."""
        xs, h0 = self.prepare(text[:-1])
        fast, _ = pararnn.solve(self.cell, xs, h0).states
        logits = jax.vmap(self.readout)(fast)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, text[1:])
        return jnp.mean(nats) / jnp.log(2.0)


# The text -----------------------------------------------------------------------------


def load_text(path: pathlib.Path | None, least: int) -> np.ndarray:
    """Read a file, or the source of Python's standard library, as bytes."""
    if path is not None:
        data = path.read_bytes()
    else:
        library = pathlib.Path(sysconfig.get_path("stdlib"))
        files = sorted(p for p in library.glob("*.py") if p.stat().st_size > 0)
        data = b"".join(p.read_bytes() for p in files)
    if len(data) <= least:
        raise SystemExit(
            f"The text has {len(data)} bytes, but {least + 1} are needed: give a "
            "longer --text, or a smaller --length."
        )
    return np.frombuffer(data, np.uint8).astype(np.int32)


# Solving ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to compute all states of the cell."""

    name: str
    solver: pararnn.Newton | pararnn.Auto | None  # None: `lax.scan`, JAX's derivative

    def states(self, cell, xs, h0):
        if self.solver is None:

            def step(h, x):
                h = cell(h, x)
                return h, h

            return jax.lax.scan(step, h0, xs)[1]
        return self.solve(cell, xs, h0).states

    def solve(self, cell, xs, h0):
        assert self.solver is not None
        return pararnn.solve(
            cell, xs, h0, solver=self.solver, max_steps=MOST_STEPS, throw=False
        )

    def value_and_gradient(self, cell, xs, h0):
        def energy(arguments):
            fast, _ = self.states(*arguments)
            return jnp.mean(fast * fast)

        return jax.value_and_grad(energy)((cell, xs, h0))


MOST_STEPS = 40
METHODS = (
    Method("lax.scan", None),
    Method("solve (default)", pararnn.Auto()),
    Method("Newton, 64 segments", pararnn.Newton(64, history=MOST_STEPS)),
    Method("Newton, every step", pararnn.Newton(history=MOST_STEPS)),
)


def compile_and_time(fn: Callable, *arguments) -> tuple[float, float]:
    """Return the median seconds of a compiled call, and its temporary megabytes."""
    compiled = jax.jit(fn).lower(*arguments).compile()
    seconds = []
    # The first call is a warm-up, unless calls are so long that this does not matter.
    while len(seconds) < 6 and sum(seconds) < 2.0:
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - start)
    seconds = seconds[1:] or seconds
    memory = compiled.memory_analysis()
    megabytes = 0.0 if memory is None else memory.temp_size_in_bytes / 1e6
    return statistics.median(seconds), megabytes


@dataclasses.dataclass
class Outcome:
    """What one method did on one sequence."""

    method: Method
    steps: int
    residual: float
    error: float
    converged: bool
    history: np.ndarray
    forward: float = 0.0
    backward: float = 0.0
    memory: float = 0.0


def solve_all(model: ByteModel, text: np.ndarray) -> list[Outcome]:
    """Solve with every method, and compare each with the sequential loop."""
    xs, h0 = model.prepare(jnp.asarray(text))
    exact = jax.jit(METHODS[0].states)(model.cell, xs, h0)
    outcomes = []
    for method in METHODS:
        if method.solver is None:
            outcomes.append(Outcome(method, 0, 0.0, 0.0, True, np.zeros(0)))
            continue
        solution = jax.jit(method.solve)(model.cell, xs, h0)
        gaps = jax.tree.map(
            lambda a, b: jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)),
            solution.states,
            exact,
        )
        history = np.asarray(solution.stats.get("residual_history", np.zeros(0)))
        outcomes.append(
            Outcome(
                method,
                int(solution.stats["num_steps"]),
                float(solution.stats["residual"]),
                float(jax.tree.reduce(jnp.maximum, gaps)),
                bool(solution.result == pararnn.RESULTS.successful),
                history[np.isfinite(history)],
            )
        )
    return outcomes


def time_all(model: ByteModel, text: np.ndarray, outcomes: list[Outcome]) -> None:
    """Measure times and memory, forward and with the gradient."""
    xs, h0 = model.prepare(jnp.asarray(text))
    for outcome in outcomes:
        method = outcome.method
        outcome.forward, _ = compile_and_time(method.states, model.cell, xs, h0)
        outcome.backward, outcome.memory = compile_and_time(
            method.value_and_gradient, model.cell, xs, h0
        )


# Training -----------------------------------------------------------------------------


def train(
    model: ByteModel, text: np.ndarray, config: "Config"
) -> tuple[ByteModel, list]:
    """Train on random windows of the text; also return losses in bits per byte."""
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.train_steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    state = optimiser.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit(donate="all")
    def update(model, state, windows):
        def loss(model):
            return jnp.mean(jax.vmap(model.loss)(windows))

        value, gradient = eqx.filter_value_and_grad(loss)(model)
        updates, state = optimiser.update(gradient, state)
        return eqx.apply_updates(model, updates), state, value

    rng = np.random.default_rng(config.seed)
    offsets = np.arange(config.window + 1)
    losses = []
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("step {task.completed}/{task.total}  {task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=config.train_steps)
        for _ in range(config.train_steps):
            starts = rng.integers(0, len(text) - config.window - 1, config.batch)
            windows = jnp.asarray(text[starts[:, None] + offsets])
            model, state, value = update(model, state, windows)
            losses.append(float(value))
            progress.update(
                task, advance=1, description=f"{losses[-1]:.3f} bits per byte"
            )
    return model, losses


# Reporting ----------------------------------------------------------------------------


def print_table(outcomes: list[Outcome], length: int, title: str) -> None:
    table = Table(
        title=f"{title}, T = {length}",
        caption="steps: Newton iterations; residual: largest |f(h, x) - h'|; error: "
        "against lax.scan, relative; x: relative to lax.scan; memory: temporaries of "
        "the compiled gradient",
    )
    for column in (
        "method",
        "steps",
        "residual",
        "error",
        "forward",
        "with gradient",
        "memory of it",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    base = outcomes[0]
    for o in outcomes:
        table.add_row(
            o.method.name,
            str(o.steps) + ("" if o.converged else " (not converged)"),
            f"{o.residual:.1e}",
            f"{o.error:.1e}",
            f"{o.forward * 1e3:.0f} ms ({o.forward / base.forward:.2f} x)",
            f"{o.backward * 1e3:.0f} ms ({o.backward / base.backward:.2f} x)",
            f"{o.memory:.0f} MB ({o.memory / base.memory:.2f} x)",
        )
    console.print(table)


def draw(
    before: list[Outcome],
    after: list[Outcome],
    lengths: list[int],
    times: dict[str, list[tuple[float, float]]],
    losses: list[float],
    path: pathlib.Path,
) -> None:
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    residuals, scaling, training = axes
    for outcomes, style, when in ((before, "--", "at first"), (after, "-", "trained")):
        for outcome, colour in zip(outcomes[2:], ("C2", "C3"), strict=True):
            # A residual of exactly zero has no place on a logarithmic axis.
            shown = np.maximum(outcome.history, 1e-9)
            residuals.semilogy(
                range(len(shown)),
                shown,
                style,
                marker="o",
                color=colour,
                label=f"{outcome.method.name}, {when}",
            )
    residuals.set(
        xlabel="Newton step",
        ylabel="largest defect",
        title=f"Residual per iteration, T = {lengths[-1]}",
    )
    for number, (name, pairs) in enumerate(times.items()):
        forward, backward = zip(*pairs, strict=True)
        scaling.loglog(lengths, forward, marker="o", color=f"C{number}", label=name)
        scaling.loglog(lengths, backward, "--", marker="s", color=f"C{number}")
    scaling.set(
        xlabel="T",
        ylabel="seconds",
        title=f"Time on {jax.devices()[0].platform} (dashed: with gradient)",
    )
    training.plot(losses, color="C0", alpha=0.3)
    window = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    training.plot(np.arange(len(smooth)) + window - 1, smooth, color="C0")
    training.set(xlabel="update", ylabel="bits per byte", title="Training")
    for axis in axes[:2]:
        axis.legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


# The job ------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    """Parallelise a custom cell over real text."""

    text: pathlib.Path | None = None
    """A file to read. Defaults to the source of Python's standard library."""
    length: int = 2**17
    """T, the number of bytes that are solved for at once."""
    width: int = 32
    """Channels of the cell; the state has twice as many numbers."""
    train_steps: int = 300
    window: int = 512
    batch: int = 8
    learning_rate: float = 0.02
    seed: int = 0
    output: pathlib.Path = pathlib.Path("parallelize_custom_cell.png")
    """Where to write the figure."""


def main(config: Config) -> None:
    if config.length < 64 or config.train_steps < 1:
        raise SystemExit("--length must be at least 64 and --train-steps at least 1.")
    text = load_text(config.text, max(config.length, config.window + 1))
    sequence = text[: config.length]
    model = ByteModel(config.width, key=jax.random.key(config.seed))
    xs, h0 = model.prepare(jnp.asarray(sequence[:1]))
    structure = pararnn.jacobian_structure(model.cell, [x[0] for x in xs], h0)
    console.print(
        f"Jacobian of the cell, found from its program: [bold]{structure!r}[/bold] "
        f"(a state of {structure.width} numbers, {structure.size} JVPs for all of it)"
    )
    before = solve_all(model, sequence)
    model, losses = train(model, text, config)
    tenth = max(1, len(losses) // 10)
    console.print(
        f"Loss: {np.mean(losses[:tenth]):.3f} bits per byte over the first tenth of "
        f"training, {np.mean(losses[-tenth:]):.3f} over the last."
    )
    after = solve_all(model, sequence)
    lengths = sorted({max(64, config.length >> k) for k in (6, 4, 2, 0)})
    times: dict[str, list[tuple[float, float]]] = {m.name: [] for m in METHODS}
    with console.status("measuring"):
        for length in lengths:
            time_all(model, sequence[:length], after)
            for outcome in after:
                times[outcome.method.name].append((outcome.forward, outcome.backward))
    steps = ", ".join(f"{o.method.name}: {o.steps}" for o in before[2:])
    console.print(f"Newton steps before training: {steps}")
    print_table(after, config.length, f"{structure!r} cell on text, after training")
    draw(before, after, lengths, times, losses, config.output)
    console.print(f"Figure: {config.output}")


if __name__ == "__main__":
    main(tyro.cli(Config))
