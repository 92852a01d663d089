"""Weights of other frameworks' recurrent layers, in and out."""

from ._from_torch import from_torch as from_torch
from ._to_torch import to_torch as to_torch
