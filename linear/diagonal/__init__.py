"""Layers whose transition is diagonal."""

from ._lru import LRU as LRU
from ._mamba import Mamba as Mamba
from ._min_rnn import MinGRU as MinGRU, MinLSTM as MinLSTM
from ._rg_lru import RGLRU as RGLRU
from ._s4d import S4D as S4D
from ._s5 import S5 as S5
