"""The solver: the problem, the methods, the certificate, and the derivative."""

from ._elk import ELK as ELK
from ._methods import (
    AbstractMethod as AbstractMethod,
    DampedNewton as DampedNewton,
    Jacobi as Jacobi,
    Newton as Newton,
    Picard as Picard,
    QuasiNewton as QuasiNewton,
    certify as certify,
)
from ._problem import BoundProblem as BoundProblem
from ._sequential import (
    AbstractSolver as AbstractSolver,
    Sequential as Sequential,
    find_nonfinite as find_nonfinite,
)
from ._solution import RESULTS as RESULTS, Solution as Solution, Stats as Stats
from ._solve import solve as solve
from ._solvers import (
    Auto as Auto,
    Ladder as Ladder,
    Windows as Windows,
    check_solver as check_solver,
    keep_certified as keep_certified,
)
