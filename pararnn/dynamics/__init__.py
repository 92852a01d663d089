"""Reconstructing dynamical systems; needs `pip install 'pararnn[train]'`."""

from ._fit import (
    Fit as Fit,
    Forcing as Forcing,
    GeneralisedForcing as GeneralisedForcing,
    Recipe as Recipe,
    Reconstruction as Reconstruction,
    SparseForcing as SparseForcing,
    fit as fit,
)
from ._measures import (
    Symbols as Symbols,
    find_symbols as find_symbols,
    largest_exponent as largest_exponent,
    spectrum_distance as spectrum_distance,
    state_space_divergence as state_space_divergence,
)
from ._report import draw_reconstruction as draw_reconstruction
from ._study import (
    Study as Study,
    make_forcing as make_forcing,
    reconstruct as reconstruct,
)
from ._systems import (
    SYSTEMS as SYSTEMS,
    Series as Series,
    System as System,
    flow_map as flow_map,
    simulate as simulate,
)
