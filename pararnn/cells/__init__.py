"""Cells: one step of a nonlinear recurrence each."""

from ._base import AbstractCell as AbstractCell
from ._elman import ElmanCell as ElmanCell
from ._gru import GRUCell as GRUCell
from ._lstm import LSTMCell as LSTMCell
from ._paragru import ParaGRUCell as ParaGRUCell
from ._paralstm import ParaLSTMCell as ParaLSTMCell
from ._registry import CELLS as CELLS, make_cell as make_cell
