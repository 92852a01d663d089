"""The model of a run, for use."""

from pathlib import Path

from ..models import LanguageModel
from ._build import abstract_state
from ._checkpoints import Checkpoints
from ._config import Config, MeshConfig
from ._data import make_tokenizer
from ._placement import Placement
from ._run import CONFIG
from .data import Tokenizer


def load_model(
    folder: str | Path, *, best: bool = True
) -> tuple[LanguageModel, Tokenizer]:
    """The model of a run, and its tokenizer.

    **Arguments:** `folder` of the run; `best`, the checkpoint that validated best
    rather than the newest.

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
            f"load_model: the run in {folder} has no checkpoint yet. Let it go on."
        )
    tokenizer = make_tokenizer(config)
    state, _ = checkpoints.restore(
        step,
        Placement(MeshConfig()).describe(abstract_state(config, tokenizer.vocab_size)),
    )
    checkpoints.close()
    return state.model, tokenizer
