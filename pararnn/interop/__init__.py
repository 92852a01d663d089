"""Weights of other frameworks' recurrent layers, in and out."""

from ._torch_layout import (
    state_from_torch as state_from_torch,
    state_to_torch as state_to_torch,
)
from ._torch_weights import from_torch as from_torch, to_torch as to_torch
