"""The scan engine: transitions, and the linear recurrences solved with them."""

from ._arithmetic import (
    einsum as einsum,
    invert_matrices as invert_matrices,
    matmul as matmul,
    multiply_matrices as multiply_matrices,
    poison as poison,
    promote as promote,
)
from ._backends import Schedule as Schedule
from ._fused_scan import fused_scan as fused_scan
from ._grid_scan import grid_scan as grid_scan
from ._heuristics import Backend as Backend
from ._linear_scan import (
    linear_scan as linear_scan,
    run_scan as run_scan,
    solve_recurrence as solve_recurrence,
)
from ._matrix_scan import matrix_scan as matrix_scan
from ._mesh_axes import (
    refuse_explicit as refuse_explicit,
    struct as struct,
    vary as vary,
    varying_axes as varying_axes,
)
from ._prefix import (
    max_plus_scan as max_plus_scan,
    prefix as prefix,
    running_max as running_max,
)
from ._time_sharding import (
    TIME as TIME,
    delays as delays,
    join_time as join_time,
    shift as shift,
    split_time as split_time,
    spread as spread,
    time_shards as time_shards,
)
from ._transitions import (
    AbstractTransition as AbstractTransition,
    BlockDiagonal as BlockDiagonal,
    Dense as Dense,
    Diagonal as Diagonal,
    Scalar as Scalar,
)
from ._tree import (
    tree_prefix as tree_prefix,
    tree_reduce as tree_reduce,
    tree_state as tree_state,
)
from ._windows import backwards as backwards, in_windows as in_windows
