"""Cells by name, for scripts that take a cell as an argument."""

from types import MappingProxyType
from typing import Any

from jaxtyping import PRNGKeyArray

from .._registry import make_by_name
from ._alrnn import ALRNNCell
from ._base import AbstractCell
from ._cfc import CfCCell
from ._elman import ElmanCell
from ._gru import GRUCell
from ._iclrnn import ICLRNNCell
from ._lem import LEMCell
from ._lstm import LSTMCell
from ._paragru import ParaGRUCell
from ._paralstm import ParaLSTMCell
from ._plrnn import PLRNNCell
from ._qkanlstm import QKANLSTMCell
from ._slstm import SLSTMCell

CELLS: MappingProxyType[str, type[AbstractCell]] = MappingProxyType(
    {
        "alrnn": ALRNNCell,
        "cfc": CfCCell,
        "elman": ElmanCell,
        "gru": GRUCell,
        "iclrnn": ICLRNNCell,
        "lem": LEMCell,
        "lstm": LSTMCell,
        "paragru": ParaGRUCell,
        "paralstm": ParaLSTMCell,
        "plrnn": PLRNNCell,
        "qkanlstm": QKANLSTMCell,
        "slstm": SLSTMCell,
    }
)


def make_cell(
    name: str,
    d_input: int,
    d_state: int | None = None,
    *,
    key: PRNGKeyArray,
    **options: Any,
) -> AbstractCell:
    """Make a cell by its name in `pararnn.CELLS`.

    **Arguments:** `name`; `d_input`, the size of an input; `d_state`, the size of each
    array of the state, by default `d_input`; `key`, a key of `jax.random`; `options`,
    further arguments of the cell's constructor.

    **Raises:** `ValueError` on an unknown name or option, listing those that exist, and
    what the constructor raises.
    """
    sizes = {"d_input": d_input, "d_state": d_state, "key": key}
    return make_by_name("make_cell", "cell", CELLS, name, sizes, options)
