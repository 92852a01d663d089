"""The model and the training state that a configuration asks for."""

import equinox as eqx
import jax.random as jr

from ..models import LanguageModel
from ..solver import AbstractSolver, Auto, Newton, Sequential
from ._config import Config, ModelConfig
from ._optimiser import make_optimiser
from ._step import TrainState, fresh_state


def make_solver(config: ModelConfig) -> AbstractSolver:
    """The solver of nonlinear mixers."""
    if config.solver == "newton":
        return Newton(segments=config.segments)
    return Sequential() if config.solver == "sequential" else Auto()


def make_model(config: ModelConfig, vocab_size: int, seed: int) -> LanguageModel:
    """The model before training. **Raises:** as [`pararnn.LanguageModel`][]."""
    return LanguageModel(
        vocab_size,
        config.d_model,
        config.depth,
        mixer=config.mixer,
        d_hidden=config.d_hidden,
        solver=make_solver(config),
        tied=config.tied,
        rematerialise=config.rematerialise,
        key=jr.key(seed),
    )


def abstract_state(config: Config, vocab_size: int) -> TrainState:
    """The shapes and dtypes of `new_state`."""
    return eqx.filter_eval_shape(lambda: new_state(config, vocab_size))


def new_state(config: Config, vocab_size: int) -> TrainState:
    """The state before the first step."""
    model = make_model(config.model, vocab_size, config.seed)
    return fresh_state(model, make_optimiser(config.optimiser, config.steps))
