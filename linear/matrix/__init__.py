"""Layers whose state is a matrix for each head."""

from ._delta_rule import (
    DeltaNet as DeltaNet,
    DeltaProduct as DeltaProduct,
    GatedDeltaNet as GatedDeltaNet,
    GatedDeltaProduct as GatedDeltaProduct,
)
from ._gla import GLA as GLA
from ._mamba2 import Mamba2 as Mamba2
from ._mlstm import MLSTM as MLSTM
from ._plstm import PLSTM as PLSTM
from ._plstm_grid import PLSTMGrid as PLSTMGrid
from ._rwkv7 import RWKV7 as RWKV7
