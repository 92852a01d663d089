"""Cells: one step of a nonlinear recurrence each."""

from ._alrnn import ALRNNCell as ALRNNCell
from ._base import AbstractCell as AbstractCell
from ._cfc import CfCCell as CfCCell
from ._elman import ElmanCell as ElmanCell
from ._gru import GRUCell as GRUCell
from ._iclrnn import ICLRNNCell as ICLRNNCell
from ._lem import LEMCell as LEMCell
from ._lstm import LSTMCell as LSTMCell
from ._paragru import ParaGRUCell as ParaGRUCell
from ._paralstm import ParaLSTMCell as ParaLSTMCell
from ._plrnn import PLRNNCell as PLRNNCell
from ._qkanlstm import QKANLSTMCell as QKANLSTMCell
from ._registry import CELLS as CELLS, make_cell as make_cell
from ._slstm import SLSTMCell as SLSTMCell
