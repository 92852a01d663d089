"""Nonlinear and linear recurrences, parallel in time, on JAX."""

from . import interop as interop
from ._block_bidiagonal import (
    BlockBidiagonalLinearOperator as BlockBidiagonalLinearOperator,
)
from ._devices import (
    Exchange as Exchange,
    communication as communication,
    gather_parameters as gather_parameters,
    make_mesh as make_mesh,
    parameter_sharding as parameter_sharding,
    shard_batch as shard_batch,
    shard_parameters as shard_parameters,
)
from ._diffrax import integrate as integrate
from ._implicit import Implicit as Implicit
from ._lineax import ParallelScan as ParallelScan
from ._optimistix import (
    Problem as Problem,
    RootFinder as RootFinder,
    residual as residual,
)
from ._rnn import RNN as RNN, Bidirectional as Bidirectional, Stack as Stack
from .cells import (
    CELLS as CELLS,
    AbstractCell as AbstractCell,
    ALRNNCell as ALRNNCell,
    CfCCell as CfCCell,
    ElmanCell as ElmanCell,
    GRUCell as GRUCell,
    ICLRNNCell as ICLRNNCell,
    LEMCell as LEMCell,
    LSTMCell as LSTMCell,
    ParaGRUCell as ParaGRUCell,
    ParaLSTMCell as ParaLSTMCell,
    PLRNNCell as PLRNNCell,
    QKANLSTMCell as QKANLSTMCell,
    SLSTMCell as SLSTMCell,
    make_cell as make_cell,
)
from .diagnosis import Diagnosis as Diagnosis, diagnose as diagnose
from .models import (
    CellMixer as CellMixer,
    LanguageModel as LanguageModel,
    cast as cast,
    generate as generate,
    list_mixers as list_mixers,
    make_mixer as make_mixer,
)
from .recurrence import (
    Structure as Structure,
    jacobian_structure as jacobian_structure,
)
from .scan import (
    AbstractTransition as AbstractTransition,
    BlockDiagonal as BlockDiagonal,
    Dense as Dense,
    Diagonal as Diagonal,
    Scalar as Scalar,
    fused_scan as fused_scan,
    grid_scan as grid_scan,
    linear_scan as linear_scan,
    matrix_scan as matrix_scan,
)
from .solver import (
    ELK as ELK,
    RESULTS as RESULTS,
    AbstractMethod as AbstractMethod,
    AbstractSolver as AbstractSolver,
    Auto as Auto,
    DampedNewton as DampedNewton,
    Jacobi as Jacobi,
    Ladder as Ladder,
    Newton as Newton,
    Picard as Picard,
    QuasiNewton as QuasiNewton,
    Sequential as Sequential,
    Solution as Solution,
    Windows as Windows,
    solve as solve,
)
