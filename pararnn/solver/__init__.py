"""The solver: the problem, its structure, the methods, and the derivative."""

from ._auto import Auto as Auto
from ._inputs import count_steps as count_steps
from ._newton import Newton as Newton
from ._sequential import Sequential as Sequential
from ._solution import RESULTS as RESULTS, Solution as Solution
from ._solve import solve as solve
from ._structure import (
    Structure as Structure,
    jacobian_structure as jacobian_structure,
)
