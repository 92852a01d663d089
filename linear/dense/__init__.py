"""Layers whose transition is a full matrix, or blocks of one."""

from ._block_lrnn import BlockLRNN as BlockLRNN
from ._lssl import LSSL as LSSL
from ._reservoir import LRNN as LRNN, ReducedLRNN as ReducedLRNN
from ._unitary import UnitaryRNN as UnitaryRNN
