from types import MappingProxyType

from ._elman import ElmanCell
from ._gru import GRUCell
from ._lstm import LSTMCell
from ._paragru import ParaGRUCell
from ._paralstm import ParaLSTMCell

CELLS = MappingProxyType(
    {
        "elman": ElmanCell,
        "gru": GRUCell,
        "lstm": LSTMCell,
        "paragru": ParaGRUCell,
        "paralstm": ParaLSTMCell,
    }
)


def make_cell(name, d_input, d_state=None, *, key, **options):
    return CELLS[name](d_input, d_state, key=key, **options)
