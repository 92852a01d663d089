"""Trained cells of published packages: which solver their dynamics allow.

The weights are read from installed packages (`pip install 'pararnn[peers]'`), which
are not imported. Inputs are made here.
"""

import functools as ft
import importlib
import importlib.util
import io
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pararnn
from pararnn.interop import from_torch

from ._case import Case, Settings
from ._timing import Program, Timings, compile_all, relative_error, time_in_turn

TABLES = {
    "trained": "Cells with published weights on one sequence, float32, 64 segments: "
    "steps until certified (64 always suffice), whether the answer is that of the loop "
    "because no method was certified, the largest error "
    "against the loop, and time over the loop's (one sample where a solve takes "
    "seconds). `voice` is the LSTM of the voice "
    "detector of `silero-vad` after its own front end, on made speech; `bases` the "
    "first layer of a GRU of `medaka`, on made counts of bases; `letters` the GRU that "
    "reads words in `g2p-en`, on words of that package, with a reset at each word, or "
    "(`text`) without."
}
SOLVERS = {
    "loop": pararnn.Sequential(),
    "Jacobi": pararnn.Jacobi(64),
    "Picard": pararnn.Picard(64),
    # (Wide dense cells, for which an estimate of the diagonal is meant.)
    "QuasiNewton": pararnn.QuasiNewton(64, probes=4),
    "Newton": pararnn.Newton(64),
    "DampedNewton": pararnn.DampedNewton(64),
    "ELK, diagonal": pararnn.ELK(64, diagonal=True),
    # The ladder of `Auto` on a GPU, and the same without its first rung.
    "Jacobi 1, Newton 8": pararnn.Ladder(
        (pararnn.Jacobi(64), pararnn.Newton(64)), (1, 8)
    ),
    "Newton 8": pararnn.Ladder((pararnn.Newton(64),), 8),
    "Auto": pararnn.Auto(),
}
# The longest sequence for methods that take minutes beyond. Up to 2048 they push as
# many tangents as the state is wide.
LONGEST = dict.fromkeys(SOLVERS, 2048) | {"QuasiNewton": 8192, "Picard": 8192}
LONGEST |= dict.fromkeys(("loop", "Jacobi", "Auto"), 131072)
# Of these, with a state of 256 numbers, even that takes minutes.
SLOWEST, WIDE = ("DampedNewton", "ELK, diagonal"), ("letters", "text")
# A solve that takes longer is timed once.
LONG_SECONDS = 3.0


class Problem(NamedTuple):
    """A trained cell with inputs `[T, D]`, and where its sequences start."""

    cell: Any
    xs: jax.Array
    reset: jax.Array | None = None


def cases(settings: Settings) -> Iterator[Case]:
    for steps in (128,) if settings.quick else (2048, 8192, 131072):
        for name, make in PROBLEMS.items():
            for solver in SOLVERS:
                yield Case(
                    "trained",
                    {"cell": name, "T": steps, "solver": solver},
                    lambda m=make, t=steps, s=solver: _measure(m, t, s, settings),
                    left_out=_why_left_out(name, solver, steps),
                )


def _why_left_out(name: str, solver: str, steps: int) -> str | None:
    package = PACKAGES[name]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if steps > LONGEST[solver] or (solver in SLOWEST and name in WIDE):
        return "minutes"
    return None


def _measure(make: Callable[[int], Problem], steps: int, solver: str, settings):
    cell, xs, reset = make(steps)
    start = cell.init_state()
    weights, static = eqx.partition(cell, eqx.is_inexact_array)
    given = weights, xs, reset

    def run(solver):
        def program(weights, xs, reset):
            cell = eqx.combine(weights, static)
            sol = pararnn.solve(
                cell, xs, start, reset=reset, solver=solver, throw=False
            )
            done = sol.result == pararnn.RESULTS.successful
            looped = sol.stats["sequential"]
            return sol.states, (sol.stats["num_steps"], done, looped)

        return program

    programs = compile_all(
        {"loop": run(SOLVERS["loop"]), solver: run(SOLVERS[solver])},
        *given,
    )
    (expected, *_), _ = _timed(programs["loop"], given)
    (states, (count, certified, looped)), seconds = _timed(programs[solver], given)
    if seconds > LONG_SECONDS and solver != "loop":
        _, loop_seconds = _timed(programs["loop"], given)
        times = Timings({"loop": [loop_seconds], solver: [seconds]})
    else:
        times = time_in_turn(programs, *given, quick=settings.quick)
    return {
        "steps": int(count),
        "certified": bool(certified),
        "by the loop": bool(looped),
        "max rel. error": relative_error(states, expected),
        "ms": times.ms(solver),
        "ratio to loop": times.ratio(solver, "loop"),
    }


def _timed(program: Program, arguments) -> tuple[Any, float]:
    start = time.perf_counter()
    out = program(*arguments)
    return out, time.perf_counter() - start


def _folder(package: str) -> Path:
    """Where a package is installed, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"trained: {package} is not installed; `pip install 'pararnn[peers]'`."
        )
    return Path(spec.submodule_search_locations[0])


def _cell_of(weights, prefix: str = ""):
    return from_torch(weights, prefix=prefix).layers[0]


# ---- voice


def _voice(steps: int) -> Problem:
    load_file = importlib.import_module("safetensors.numpy").load_file
    path = _folder("silero_vad") / "data" / "silero_vad_16k.safetensors"
    weights = load_file(str(path))
    recurrent = {
        f"{name}_l0": weights[f"lstm_cell.{name}"]
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    sound = _make_speech(512 * steps)
    return Problem(_cell_of(recurrent).cell, _voice_features(weights, sound))


def _make_speech(samples: int, rate: int = 16000) -> np.ndarray:
    """Voiced syllables of harmonics below formants, pauses, and a floor of noise."""
    rng, time = np.random.default_rng(0), np.arange(samples) / rate
    pitch = 140 + 40 * np.sin(2 * np.pi * 0.3 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    formant = 500 + 300 * np.sin(2 * np.pi * 2.1 * time)
    sound = np.zeros(samples)
    for harmonic in range(1, 20):
        near = np.exp(-(((harmonic * pitch - formant) / 400) ** 2))
        sound += near * np.sin(harmonic * phase)
    syllables = np.clip(np.sin(2 * np.pi * 4 * time), 0, None)
    speaking = np.repeat(rng.random(samples // rate + 1) < 0.6, rate)[:samples]
    sound = 0.1 * sound * syllables * speaking + 0.005 * rng.standard_normal(samples)
    return sound.astype(np.float32)


@ft.partial(jax.jit, static_argnums=2)
def _convolve(x, weight, stride: int):
    pad = [(weight.shape[-1] // 2,) * 2] if weight.shape[-1] == 3 else [(0, 0)]
    return lax.conv_general_dilated(x, weight, (stride,), pad)


def _voice_features(weights, sound: np.ndarray) -> jax.Array:
    """The front end: spectra of windows with 64 samples before, then convolutions."""
    chunks = sound.reshape(-1, 512)
    before = np.concatenate([np.zeros((1, 64), np.float32), chunks[:-1, -64:]])
    windows = np.concatenate([before, chunks], 1)
    windows = np.pad(windows, ((0, 0), (0, 64)), mode="reflect")

    def features(windows):
        spectrum = _convolve(windows[:, None], weights["stft_conv.weight"], 128)
        real, imag = jnp.split(spectrum, 2, 1)
        x = jnp.sqrt(real**2 + imag**2)
        for layer, stride in enumerate((1, 2, 2, 1), start=1):
            bias = weights[f"conv{layer}.bias"][None, :, None]
            x = _convolve(x, weights[f"conv{layer}.weight"], stride) + bias
            x = jax.nn.relu(x)
        return x[:, :, 0]

    some = 2048  # windows at once
    parts = [features(windows[i : i + some]) for i in range(0, len(windows), some)]
    return jnp.concatenate(parts)


# ---- bases


def _bases(steps: int) -> Problem:
    torch = importlib.import_module("torch")
    model = "r1041_e82_400bps_hac_variant_v5.0.0_model_pt.tar.gz"
    with tarfile.open(_folder("medaka") / "data" / model) as archive:
        file = archive.extractfile("model/weights.pt")
        assert file is not None
        weights = torch.load(io.BytesIO(file.read()), weights_only=True)
    first = from_torch(weights, prefix="gru.").layers[0].forward
    return Problem(first.cell, jnp.asarray(_make_counts(steps)))


def _make_counts(steps: int, depth: int = 40, errors: float = 0.03) -> np.ndarray:
    """Shares of A, C, G, T and gaps among reads of both strands, `[steps, 10]`."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, steps)
    counts = np.zeros((steps, 10), np.float32)
    for strand in range(2):
        shares = np.full((steps, 5), errors / 4)
        shares[np.arange(steps), truth] = 1 - errors
        counts[:, 5 * strand : 5 * strand + 5] = rng.multinomial(depth // 2, shares)
    return counts / depth


# ---- letters


def _letters(steps: int, *, apart: bool) -> Problem:
    folder = _folder("g2p_en")
    arrays = np.load(folder / "checkpoint20.npz")
    names = {"w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih"}
    names["b_hh"] = "bias_hh"
    weights = {f"{torch}_l0": arrays[f"enc_{own}"] for own, torch in names.items()}
    lines = (folder / "homographs.en").read_text().splitlines()
    words = [line.split("|")[0].lower() for line in lines if line[:1].isalpha()]
    # The package numbers its symbols: padding, unknown, end of a word, then letters.
    numbers, starts = [], []
    for word in np.random.default_rng(0).permutation(np.tile(words, steps // 100 + 1)):
        letters = [3 + ord(c) - ord("a") for c in word if c.isalpha()]
        starts += [True, *(False for _ in letters)]
        numbers += [*letters, 2]
    xs = jnp.asarray(arrays["enc_emb"][np.asarray(numbers[:steps])], jnp.float32)
    reset = jnp.asarray(starts[:steps]) if apart else None
    return Problem(_cell_of(weights).cell, xs, reset)


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "voice": _voice,
    "bases": _bases,
    "letters": ft.partial(_letters, apart=True),
    "text": ft.partial(_letters, apart=False),
}
PACKAGES = {
    "voice": "silero_vad",
    "bases": "medaka",
    "letters": "g2p_en",
    "text": "g2p_en",
}
