"""How torch names the parameters of its recurrent layers, and stacks their gates."""

from typing import NamedTuple

from ..cells import AbstractCell, ElmanCell, GRUCell, LSTMCell


class Layout(NamedTuple):
    """A kind of layer: its cell, and the cell's fields in torch's order of gates."""

    torch: str
    cell: type[AbstractCell]
    weight_ih: tuple[str, ...]
    weight_hh: tuple[str, ...]
    bias_ih: tuple[str, ...]
    bias_hh: tuple[str, ...]  # Empty if the cell holds the sum of both in `bias_ih`.

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The fields that each of torch's parameters is cut into."""
        return self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh


LAYOUTS = (
    Layout("RNN", ElmanCell, ("W",), ("U",), ("b",), ()),
    Layout(
        "GRU",
        GRUCell,
        ("W_ir", "W_iz", "W_in"),
        ("W_hr", "W_hz", "W_hn"),
        ("b_ir", "b_iz", "b_in"),
        ("b_hr", "b_hz", "b_hn"),
    ),
    Layout(
        "LSTM",
        LSTMCell,
        ("W_ii", "W_if", "W_ig", "W_io"),
        ("W_hi", "W_hf", "W_hg", "W_ho"),
        ("b_ii", "b_if", "b_ig", "b_io"),
        ("b_hi", "b_hf", "b_hg", "b_ho"),
    ),
)


def suffix(layer: int, backward: bool) -> str:
    """What torch appends to the name of a parameter."""
    return f"_l{layer}_reverse" if backward else f"_l{layer}"


def names(layer: int, backward: bool, bias: bool) -> tuple[str, ...]:
    """The parameters of one layer in one direction, in torch's order."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return tuple(kind + suffix(layer, backward) for kind in kinds[: 4 if bias else 2])
