"""Nonlinear and linear recurrences, parallel in time, on JAX."""

from ._rnn import RNN as RNN, Bidirectional as Bidirectional
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
    Scalar as Scalar,
    linear_scan as linear_scan,
)
from .solver import (
    RESULTS as RESULTS,
    Auto as Auto,
    Newton as Newton,
    Sequential as Sequential,
    Solution as Solution,
    Structure as Structure,
    jacobian_structure as jacobian_structure,
    solve as solve,
)
