"""Train a neural differential equation whose steps are all solved at once.

    python examples/train_neural_ode.py [--train-steps 400] [--quick]

The vector field of a damped, nonlinear oscillator is learnt from its trajectories. They
come from diffrax with an adaptive step size. The model is integrated by fixed steps of
Heun's method, either one after the other, or all together by Newton's method. Newton's
method starts from the trajectories of the training step before. The script reports how
many Newton steps this takes, checks the numbers and the gradients against
`diffrax.diffeqsolve`, and says which was the fastest.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import diffrax
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
METHOD = diffrax.Heun()


# The system and the model -------------------------------------------------------------


def oscillator(t, y, args):
    """A mass on a spring that stiffens, with friction that grows with the speed."""
    x, v = y
    return jnp.stack([v, -x - 0.5 * x**3 - (0.05 + 0.1 * jnp.abs(v)) * v])


def observe(starts: jax.Array, ts: jax.Array) -> jax.Array:
    """Return the true trajectories `[batch, T, 2]` at `ts[1:]`, to six digits."""

    def trajectory(y0):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(oscillator),
            diffrax.Tsit5(),
            ts[0],
            ts[-1],
            None,
            y0,
            saveat=diffrax.SaveAt(ts=ts[1:]),
            stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-6),
        )
        return jnp.asarray(solution.ys)

    return jax.jit(jax.vmap(trajectory))(starts)


class VectorField(eqx.Module):
    """A perceptron from the state to its rate of change."""

    mlp: eqx.nn.MLP

    def __init__(self, width: int, *, key: jax.Array):
        self.mlp = eqx.nn.MLP(2, 2, width, 2, activation=jnp.tanh, key=key)

    def __call__(self, t, y, args):
        return self.mlp(y)


# Integrating it -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Integrator:
    """A way to compute all states of the model, and what it reports."""

    name: str
    solver: Any = None  # None: `diffeqsolve`
    warm: bool = False

    def __call__(self, field, ts, starts, guess) -> tuple[jax.Array, jax.Array]:
        """Return states `[batch, T, 2]` and Newton steps `[batch]`."""

        def by_diffrax(y0):
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                METHOD,
                ts[0],
                ts[-1],
                None,
                y0,
                stepsize_controller=diffrax.StepTo(ts),
                saveat=diffrax.SaveAt(ts=ts[1:]),
                max_steps=len(ts) - 1,
            )
            return jnp.asarray(solution.ys), jnp.asarray(0)

        def by_pararnn(y0, guess):
            solution = pararnn.integrate(
                field,
                METHOD,
                ts,
                y0,
                solver=self.solver,
                initial_guess=guess if self.warm else "h0",
            )
            return solution.states, solution.stats["num_steps"]

        if self.solver is None:
            return jax.vmap(by_diffrax)(starts)
        return jax.vmap(by_pararnn)(starts, guess)


@eqx.filter_jit
def value_and_gradient(integrator: Integrator, field, ts, starts, wanted, guess):
    """Return the mean squared error with (states, Newton steps), and its gradient."""

    def loss(field):
        states, steps = integrator(field, ts, starts, guess)
        return jnp.mean((states - wanted) ** 2), (states, steps)

    return eqx.filter_value_and_grad(loss, has_aux=True)(field)


LOOP = Integrator("integrate, one after the other", pararnn.Sequential())


def make_integrators(segments: int) -> tuple[Integrator, ...]:
    newton = pararnn.Newton(segments)
    return (
        Integrator("diffeqsolve"),
        LOOP,
        Integrator("integrate, default", pararnn.Auto()),
        Integrator(f"integrate, Newton({segments})", newton),
        Integrator(f"integrate, Newton({segments}), warm", newton, warm=True),
    )


# Training -----------------------------------------------------------------------------


@dataclasses.dataclass
class History:
    """What happened at each training step."""

    losses: list[float] = dataclasses.field(default_factory=list)
    newton_steps: list[int] = dataclasses.field(default_factory=list)
    horizons: list[int] = dataclasses.field(default_factory=list)


def train(field: VectorField, ts, starts, wanted, config: "Config"):
    """Train on all trajectories: at first on their beginnings, then on the whole.

    Returns the trained field, its `History`, and the states of the last step.
    """
    integrator = make_integrators(config.segments)[-1]
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.train_steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    state = optimiser.init(eqx.filter(field, eqx.is_inexact_array))

    @eqx.filter_jit
    def update(field, state, gradient):
        updates, state = optimiser.update(gradient, state)
        return eqx.apply_updates(field, updates), state

    history = History()
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("step {task.completed}/{task.total}  {task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=config.train_steps)
        for part, steps in ((4, config.beginnings), (1, config.train_steps)):
            horizon = config.steps // part
            guess = jnp.broadcast_to(starts[:, None], wanted[:, :horizon].shape)
            while len(history.losses) < steps:
                # The states of one step are the guess of the next.
                (value, (guess, newton_steps)), gradient = value_and_gradient(
                    integrator,
                    field,
                    ts[: horizon + 1],
                    starts,
                    wanted[:, :horizon],
                    guess,
                )
                field, state = update(field, state, gradient)
                history.losses.append(float(value))
                history.newton_steps.append(int(jnp.max(newton_steps)))
                history.horizons.append(horizon)
                progress.update(task, advance=1, description=f"loss {value:.2e}")
    return field, history, guess


def print_training(history: History) -> None:
    """Print losses on whole trajectories, at first and at last, and Newton steps."""
    whole = [
        loss
        for loss, horizon in zip(history.losses, history.horizons, strict=True)
        if horizon == history.horizons[-1]
    ]
    tenth = max(1, len(whole) // 10)
    console.print(
        f"Loss on whole trajectories: {np.mean(whole[:tenth]):.2e} over the first "
        f"tenth of their training, {np.mean(whole[-tenth:]):.2e} over the last. Newton "
        f"steps per training step: {max(history.newton_steps):.0f} at most, "
        f"{np.mean(history.newton_steps[-tenth:]):.1f} on average over the last tenth."
    )


# Comparing ----------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What one way of integrating cost, and how far off its numbers are."""

    integrator: Integrator
    newton_steps: int
    states_error: float
    gradient_error: float
    seconds: float


def time_calls(fn: Callable, *arguments) -> tuple[Any, float]:
    """Return the result of a compiled function, and its shortest time in seconds.

    Other programs on the machine can only make a call slower.
    """
    result = jax.block_until_ready(fn(*arguments))  # compiles, and warms up
    seconds = []
    while len(seconds) < 100 and sum(seconds) < 1.0:
        start = time.perf_counter()
        jax.block_until_ready(fn(*arguments))
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def relative_error(got, wanted) -> float:
    leaves = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    return max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in leaves)


def compare(integrators, field: VectorField, ts, starts, wanted, guess):
    """Compare every way to integrate with the first one."""
    outcomes, base = [], None
    for integrator in integrators:
        result, seconds = time_calls(
            value_and_gradient, integrator, field, ts, starts, wanted, guess
        )
        (_, (states, steps)), gradient = result
        base = base or (states, gradient)
        outcomes.append(
            Outcome(
                integrator,
                int(jnp.max(steps)),
                relative_error(states, base[0]),
                relative_error(gradient, base[1]),
                seconds,
            )
        )
    return outcomes


def print_outcomes(outcomes: list[Outcome], config: "Config") -> None:
    table = Table(
        title=f"Value and gradient, {config.batch} trajectories of {config.steps} "
        "steps, after training",
        caption="Newton steps: of the slowest trajectory; differences: largest, "
        f"relative, against diffeqsolve ({jnp.result_type(float)}; training has made "
        "the gradient small, so rounding is a larger part of it); warm: started from "
        "the states of the last training step",
    )
    for column in ("", "Newton steps", "states differ", "gradients differ", "time"):
        table.add_column(column, justify="right" if column else "left")
    base = outcomes[0].seconds
    for o in outcomes:
        table.add_row(
            o.integrator.name,
            str(o.newton_steps),
            f"{o.states_error:.1e}",
            f"{o.gradient_error:.1e}",
            f"{o.seconds * 1e3:.1f} ms ({o.seconds / base:.2f} x)",
        )
    console.print(table)
    if config.quick:
        console.print("A problem of this size says nothing about time.")
    else:
        console.print(verdict(outcomes))


def verdict(outcomes: list[Outcome]) -> str:
    """Say which was the fastest here."""
    platform = jax.devices()[0].platform
    fastest = min(outcomes, key=lambda o: o.seconds)
    diffeqsolve, loop, *_, newton = outcomes
    ratio = newton.seconds / loop.seconds
    text = (
        f"Fastest on this {platform}: [bold]{fastest.integrator.name}[/bold], "
        f"{diffeqsolve.seconds / fastest.seconds:.1f} times as fast as diffeqsolve. "
        f"Newton's method takes {ratio:.2f} times as long as one step after the other: "
    )
    if ratio < 0.9:
        return text + "solving for all times at once pays off here."
    if ratio < 1.1:
        return text + "no real difference."
    return text + (
        "solving for all times at once does not pay off here. It does more arithmetic, "
        "and is meant for devices on which the number of serial operations counts."
    )


# Drawing ------------------------------------------------------------------------------


def draw(
    ts: np.ndarray,
    truth: np.ndarray,
    model: np.ndarray,
    history: History,
    path: pathlib.Path,
) -> None:
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    trajectories, loss, newton = figure.subplots(1, 3)
    for number, (true, learnt) in enumerate(zip(truth, model, strict=True)):
        colour, first = f"C{number}", number == 0
        trajectories.plot(
            ts[1:],
            true[:, 0],
            color=colour,
            alpha=0.4,
            linewidth=4,
            label="truth" if first else None,
        )
        trajectories.plot(
            ts[1:],
            learnt[:, 0],
            "--",
            color=colour,
            label="model" if first else None,
        )
    trajectories.set(
        xlabel="t", ylabel="position", title="Trajectories not seen in training"
    )
    trajectories.legend()
    steps = np.arange(len(history.losses))
    change = int(np.argmax(np.asarray(history.horizons) == history.horizons[-1]))
    loss.semilogy(steps, history.losses, color="C0")
    loss.set(xlabel="training step", ylabel="mean squared error", title="Loss")
    newton.plot(steps, history.newton_steps, ".", color="C3", markersize=3)
    newton.set(
        xlabel="training step",
        ylabel="Newton steps of the slowest trajectory",
        title="Newton steps, from the last step's states",
        ylim=(0, None),
    )
    newton.yaxis.get_major_locator().set_params(integer=True)
    for axis in (loss, newton) if change else ():
        axis.axvline(change, color="grey", linestyle=":")
        axis.annotate(
            "whole trajectories",
            (change, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            va="top",
            color="grey",
        )
    for axis in (trajectories, loss, newton):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


# The job ------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    """Train a neural differential equation on a nonlinear oscillator."""

    steps: int = 256
    """T, the steps of each trajectory."""
    end: float = 12.0
    """The time at which the trajectories end."""
    batch: int = 16
    """Trajectories in the training set."""
    width: int = 32
    """Width of the perceptron's two hidden layers."""
    segments: int = 32
    """Segments of time that Newton's method solves side by side."""
    train_steps: int = 600
    learning_rate: float = 0.005
    seed: int = 0
    output: pathlib.Path = pathlib.Path("train_neural_ode.png")
    """Where to write the figure."""
    quick: bool = False
    """A small problem and few steps, to see that everything runs."""

    @property
    def beginnings(self) -> int:
        """The number of training steps on the beginnings of trajectories."""
        return 0 if self.quick else self.train_steps // 3

    def shortened(self) -> "Config":
        return dataclasses.replace(
            self, steps=32, end=2.0, batch=4, width=8, segments=8, train_steps=40
        )


def main(config: Config) -> None:
    if config.steps < 8 or config.train_steps < 3 or config.batch < 1:
        raise SystemExit(
            "--steps must be at least 8, --train-steps at least 3 and --batch at "
            "least 1."
        )
    config = config.shortened() if config.quick else config
    begin = time.perf_counter()
    keys = jax.random.split(jax.random.key(config.seed))
    ts = jnp.linspace(0.0, config.end, config.steps + 1)
    starts = jax.random.uniform(keys[0], (config.batch + 3, 2), minval=-2, maxval=2)
    truth = observe(starts, ts)
    seen, unseen = slice(3, None), slice(3)
    field = VectorField(config.width, key=keys[1])
    field, history, states = train(field, ts, starts[seen], truth[seen], config)
    print_training(history)
    model, _ = eqx.filter_jit(LOOP)(field, ts, starts[unseen], truth[unseen])
    error = jnp.sqrt(jnp.mean((model - truth[unseen]) ** 2))
    console.print(
        f"Error on three trajectories that were not seen: {error:.1e} (root mean "
        f"square, of states of size {jnp.sqrt(jnp.mean(truth[unseen] ** 2)):.1f})."
    )
    integrators = make_integrators(config.segments)
    if config.quick:
        integrators = (*integrators[:2], integrators[-1])
    with console.status("measuring"):
        outcomes = compare(integrators, field, ts, starts[seen], truth[seen], states)
    print_outcomes(outcomes, config)
    curves = [np.asarray(a) for a in (ts, truth[unseen], model)]
    draw(curves[0], curves[1], curves[2], history, config.output)
    console.print(
        f"Figure: {config.output}. Took {time.perf_counter() - begin:.0f} seconds."
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
