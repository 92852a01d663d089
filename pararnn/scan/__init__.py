"""The scan engine: transitions, and the linear recurrences solved with them."""

from ._linear_scan import Backend as Backend, linear_scan as linear_scan
from ._transitions import (
    AbstractTransition as AbstractTransition,
    BlockDiagonal as BlockDiagonal,
    Dense as Dense,
    Diagonal as Diagonal,
    Scalar as Scalar,
)
from ._linear_scan import check_reset as check_reset, solve_recurrence as solve_recurrence, run_scan as run_scan
from ._backends import Schedule as Schedule
from ._arithmetic import promote as promote
