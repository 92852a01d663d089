"""The entry points: train a model, continue a run, load its model."""

from pathlib import Path

import equinox as eqx
import jax

from ..models import LanguageModel
from ._build import Placement, abstract_state, make_tokenizer
from ._checkpoints import Checkpoints
from ._config import Config, MeshConfig, differences
from ._run import CONFIG, Interrupts, Outcome, Run, TrainingFailed
from .data import Tokenizer


def train(
    config: Config,
    folder: str | Path,
    *,
    resume: bool = False,
    show_progress: bool = True,
) -> Outcome:
    """Train a language model, or continue a run that was stopped.

    The folder then holds `config.json`, `checkpoints/`, `metrics.jsonl` (a line for
    each step: loss in nats, bits per byte, tokens per second, Newton steps, residual,
    norm of the gradient; and the validations), `curves.png`, and TensorBoard's files
    if `tensorboardX` is installed. SIGTERM and Ctrl-C end the run after the current
    step, with a checkpoint. With `resume` the run continues from the newest checkpoint,
    bit for bit as if it had not been stopped.

    **Arguments:** `config`; `folder` of the run; `resume`, whether to continue the run
    in it, if there is one; `show_progress`, a progress bar on the terminal.

    **Raises:** `FileExistsError` if the folder has a run and `resume` is false;
    `ValueError` on an invalid configuration, or one of another model than that in the
    folder, and what the corpus and tokenizer raise; `TrainingFailed` if the loss is not
    finite, or a file cannot be written.
    """
    folder = Path(folder)
    _check_folder(config, folder, resume)
    with Interrupts() as interrupts:
        run = Run(config, folder)
        try:
            return run.train(interrupts, show_progress)
        except OSError as error:
            raise TrainingFailed(
                f"train: cannot write to {folder}: {error}. Likely cause: the disk is "
                f"full or a quota is reached. {run.resume_point()} Make room, and call "
                "again with `resume`."
            ) from error
        except (jax.errors.JaxRuntimeError, eqx.EquinoxRuntimeError) as error:
            raise TrainingFailed(
                f"train: a step after step {run.step - 1} failed: {error}\n"
                f"{run.resume_point()} Likely causes: (a) the learning rate is too "
                "high, so that parameters or states are no longer finite: lower "
                "`optimiser.learning_rate`; (b) memory: lower `data.batch` and "
                "accumulate, or set `model.rematerialise`."
            ) from error
        finally:
            run.close()


def _check_folder(config: Config, folder: Path, resume: bool) -> None:
    """Refuse a folder that holds another run, before anything is written."""
    path = folder / CONFIG
    if path.exists():
        if not resume:
            raise FileExistsError(
                f"train: {folder} holds a run already. Continue it with `resume`, or "
                "choose another folder."
            )
        changed = differences(Config.load(path), config)
        fixed = ("model.", "data.tokenizer", "data.length", "data.corpus", "seed")
        wrong = {k: v for k, v in changed.items() if k.startswith(fixed)}
        # How a model is computed may change; the model itself may not.
        free = ("model.solver", "model.segments", "model.rematerialise")
        wrong = {k: v for k, v in wrong.items() if k not in free}
        if wrong:
            listed = "; ".join(
                f"{k}: {old!r} then, {new!r} now" for k, (old, new) in wrong.items()
            )
            raise ValueError(
                f"train: {folder} holds the run of another model or other data: "
                f"{listed}. Leave these options as they were, or choose another folder."
            )


def load_model(
    folder: str | Path, *, best: bool = True
) -> tuple[LanguageModel, Tokenizer]:
    """Return the model of a run, and its tokenizer.

    **Arguments:** `folder` of the run; `best`, whether to take the checkpoint with
    the best validation rather than the newest.

    **Raises:** `FileNotFoundError` if there is no run or no checkpoint; `ValueError` if
    a checkpoint is of another model than `config.json` says.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(
            f"load_model: {folder} holds no run: there is no config.json in it."
        )
    config = Config.load(folder / CONFIG)
    checkpoints = Checkpoints(folder / "checkpoints", config.keep)
    step = checkpoints.best() if best else None
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise FileNotFoundError(
            f"load_model: the run in {folder} has no checkpoint yet. Let it run longer."
        )
    tokenizer = make_tokenizer(config)
    state, _ = checkpoints.restore(
        step,
        Placement(MeshConfig()).with_shardings(
            abstract_state(config, tokenizer.vocab_size)
        ),
    )
    checkpoints.close()
    return state.model, tokenizer
