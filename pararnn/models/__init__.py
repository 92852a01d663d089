"""Language models: recurrent layers in residual blocks, and text generation."""

from ._blocks import (
    CellMixer as CellMixer,
    list_mixers as list_mixers,
    make_mixer as make_mixer,
    registered_layers as registered_layers,
)
from ._generate import generate as generate
from ._language_model import LanguageModel as LanguageModel, cast as cast
