"""The solver: the problem, its structure, the methods, and the derivative."""

from ._elk import ELK as ELK
from ._inputs import count_steps as count_steps
from ._methods import (
    AbstractMethod as AbstractMethod,
    DampedNewton as DampedNewton,
    Jacobi as Jacobi,
    Newton as Newton,
    Picard as Picard,
    QuasiNewton as QuasiNewton,
    certify as certify,
)
from ._problem import BoundProblem as BoundProblem, states_before as states_before
from ._sequential import AbstractSolver as AbstractSolver, Sequential as Sequential
from ._solution import RESULTS as RESULTS, Solution as Solution, Stats as Stats
from ._solve import solve as solve
from ._solvers import (
    Auto as Auto,
    Ladder as Ladder,
    Windows as Windows,
    check_solver as check_solver,
    keep_certified as keep_certified,
)
from ._structure import (
    Structure as Structure,
    jacobian_structure as jacobian_structure,
)
