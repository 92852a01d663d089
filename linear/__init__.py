"""Linear recurrent layers, on the scan engine of `pararnn`.

    layer = linear.GatedDeltaNet(64, heads=4, key=jax.random.key(0))
    ys, state = layer(xs)  # xs: [T, 64]; batches by jax.vmap
    y, state = layer.step(x, state)

`linear.LAYERS` maps names to layers and `linear.make_layer` builds one by name.
`linear.AbstractLayer` is their common base class; subclass it for a layer of your own.
"""

from ._layer import AbstractLayer as AbstractLayer
from ._monoid import CommutativeMonoid as CommutativeMonoid
from ._registry import (
    IMAGE_LAYERS as IMAGE_LAYERS,
    LAYERS as LAYERS,
    make_layer as make_layer,
)
from ._state_spaces import (
    Diagonalised as Diagonalised,
    perturb_then_diagonalise as perturb_then_diagonalise,
)
from .dense import (
    LRNN as LRNN,
    LSSL as LSSL,
    BlockLRNN as BlockLRNN,
    ReducedLRNN as ReducedLRNN,
    UnitaryRNN as UnitaryRNN,
)
from .diagonal import (
    LRU as LRU,
    RGLRU as RGLRU,
    S4D as S4D,
    S5 as S5,
    Mamba as Mamba,
    MinGRU as MinGRU,
    MinLSTM as MinLSTM,
)
from .matrix import (
    GLA as GLA,
    MLSTM as MLSTM,
    PLSTM as PLSTM,
    RWKV7 as RWKV7,
    DeltaNet as DeltaNet,
    DeltaProduct as DeltaProduct,
    GatedDeltaNet as GatedDeltaNet,
    GatedDeltaProduct as GatedDeltaProduct,
    Mamba2 as Mamba2,
    PLSTMGrid as PLSTMGrid,
)
