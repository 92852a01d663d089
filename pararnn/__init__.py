from .scan import (AbstractTransition as AbstractTransition, BlockDiagonal as BlockDiagonal, Dense as Dense, Diagonal as Diagonal, Scalar as Scalar, linear_scan as linear_scan)
from .solver import *
from .solver import Auto, Newton, Sequential, RESULTS, Solution, solve, jacobian_structure, Structure
