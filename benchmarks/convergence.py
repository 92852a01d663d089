"""Steps that Newton's method needs on every cell, before and after training."""

import functools as ft
import itertools
from collections.abc import Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import pararnn

from ._byte_model import WIDTH, ByteModel, load_text, train
from ._case import Case, Settings

# So that cells which do not converge do not take hours.
MOST_STEPS = 32
TABLES = {
    "convergence": "Steps of `pararnn.Newton(segments)` until it is certified, at most "
    f"{MOST_STEPS}, on bytes of text; 32 units, float32. At first the parameters are "
    "the initial ones, then those after 200 steps of Adam on the next byte, with "
    "`bits` a byte at their end. `guess`: where it starts from, a few steps of the "
    "cell or the cell's own guess. `overflows` counts entries of iterates. `slstm` has "
    "4 heads and random recurrent weights at first.",
}
# Options that replace defaults: the Jacobian of one sLSTM head of 32 units would take
# a gigabyte at T = 16384, and without recurrent weights its guess is the answer.
OPTIONS = {"slstm": {"heads": 4, "recurrence": "uniform"}}
# A QKAN-LSTM of 32 units takes some 25000 sines and cosines a step: hours, here.
NAMES = [name for name in pararnn.CELLS if name != "qkanlstm"]
# Name of the row: name in the registry, options.
FORMS = {
    **{name: (name, OPTIONS.get(name, {})) for name in NAMES},
    "gru, 4 heads": ("gru", {"heads": 4}),
    "lstm, 4 heads": ("lstm", {"heads": 4}),
}


def cases(settings: Settings) -> Iterator[Case]:
    for form in FORMS:
        lengths = settings.steps(256, 1024, 4096, 16384)
        for steps, full in itertools.product(lengths, (True, False)):
            for guess in ("steps", "cell") if _has_guess(form) else ("steps",):
                segments = steps if full else 64
                yield Case(
                    "convergence",
                    {"cell": form, "T": steps, "segments": segments, "guess": guess},
                    lambda f=form, t=steps, s=segments, g=guess == "cell": _measure(
                        f, t, s, g
                    ),
                )


def _has_guess(form: str) -> bool:
    """Whether the cell overrides `guess`."""
    name, _ = FORMS[form]
    return pararnn.CELLS[name].guess is not pararnn.AbstractCell.guess


@ft.cache
def _models(form: str) -> tuple[ByteModel, ByteModel, float]:
    """Return the model before and after training, and its final loss."""
    name, options = FORMS[form]
    cell = pararnn.make_cell(name, WIDTH, WIDTH, key=jr.key(0), **options)
    model = ByteModel(cell)
    return model, *train(model, load_text())


def _measure(form: str, steps: int, segments: int, with_guess: bool):
    first, trained, bits = _models(form)
    text = jnp.asarray(load_text()[:steps])
    solver = pararnn.Newton(segments)

    @eqx.filter_jit
    def solve(model):
        cell = model.layer.cell
        gates, state = cell.gates(model.inputs(text)), cell.init_state()
        sol = pararnn.solve(
            cell.update,
            gates,
            state,
            solver=solver,
            initial_guess=cell.guess(gates, state) if with_guess else None,
            max_steps=MOST_STEPS,
            throw=False,
        )
        return sol.stats, sol.result == pararnn.RESULTS.successful

    values = {}
    for when, model in (("at first", first), ("trained", trained)):
        stats, certified = jax.device_get(solve(model))
        values[f"steps {when}"] = int(stats["num_steps"])
        values[f"certified {when}"] = "yes" if certified else "no"
        values[f"overflows {when}"] = int(stats["nonfinite"])
    return values | {"bits": bits}
