"""Nonlinear and linear recurrences, parallel in time, on JAX."""

from ._rnn import Bidirectional as Bidirectional, RNN as RNN
from .cells import (
    AbstractCell as AbstractCell,
    ElmanCell as ElmanCell,
    GRUCell as GRUCell,
    LSTMCell as LSTMCell,
    ParaGRUCell as ParaGRUCell,
    ParaLSTMCell as ParaLSTMCell,
)
from .scan import (
    AbstractTransition as AbstractTransition,
    BlockDiagonal as BlockDiagonal,
    Dense as Dense,
    Diagonal as Diagonal,
    linear_scan as linear_scan,
    Scalar as Scalar,
)
from .solver import (
    Auto as Auto,
    jacobian_structure as jacobian_structure,
    Newton as Newton,
    RESULTS as RESULTS,
    Sequential as Sequential,
    Solution as Solution,
    solve as solve,
    Structure as Structure,
)
