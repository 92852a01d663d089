"""Reconstructing dynamical systems; needs `pip install 'pararnn[train]'`."""

from ._draw import draw_reconstruction as draw_reconstruction
from ._exponent import flow_map as flow_map, largest_exponent as largest_exponent
from ._fit import Fit as Fit, Recipe as Recipe, fit as fit
from ._forcing import (
    Forcing as Forcing,
    GeneralisedForcing as GeneralisedForcing,
    SparseForcing as SparseForcing,
)
from ._measures import (
    spectrum_distance as spectrum_distance,
    state_space_divergence as state_space_divergence,
)
from ._model import Reconstruction as Reconstruction
from ._study import (
    Study as Study,
    make_forcing as make_forcing,
    reconstruct as reconstruct,
)
from ._symbols import Symbols as Symbols, find_symbols as find_symbols
from ._systems import (
    SYSTEMS as SYSTEMS,
    Series as Series,
    System as System,
    simulate as simulate,
)
