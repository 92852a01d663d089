"""Linear recurrent layers, on the scan engine of `pararnn`."""

from ._lru import LRU as LRU
from ._s4d import S4D as S4D
