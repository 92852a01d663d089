"""The iterative methods: one file each, all on the same segments of time."""

from ._base import AbstractMethod as AbstractMethod, is_count as is_count
from ._damped_newton import DampedNewton as DampedNewton
from ._elk import ELK as ELK
from ._jacobi import Jacobi as Jacobi
from ._newton import Newton as Newton
from ._options import chosen_options as chosen_options, options_of as options_of
from ._picard import Picard as Picard
from ._quasi_newton import QuasiNewton as QuasiNewton
