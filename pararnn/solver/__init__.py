"""The solver: the problem, its structure, the methods, and the derivative."""

from ._auto import Auto as Auto
from ._inputs import count_steps as count_steps
from ._ladder import Ladder as Ladder
from ._root_finding import Problem as Problem, residual as residual
from ._run import Solver as Solver
from ._sequential import Sequential as Sequential
from ._solution import RESULTS as RESULTS, Solution as Solution
from ._solve import solve as solve
from ._structure import (
    Structure as Structure,
    jacobian_structure as jacobian_structure,
)
from ._windows import Windows as Windows, check_solver as check_solver
from .methods import (
    ELK as ELK,
    AbstractMethod as AbstractMethod,
    DampedNewton as DampedNewton,
    Jacobi as Jacobi,
    Newton as Newton,
    Picard as Picard,
    QuasiNewton as QuasiNewton,
)
