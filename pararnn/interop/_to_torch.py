"""Converting layers of this library to the weights of torch's."""

from typing import Any

import numpy as np

from .._rnn import RNN, Bidirectional, Stack
from ._torch_layout import LAYOUTS, Layout, names


def to_torch(
    layer: Stack | RNN | Bidirectional, *, bias: bool = True
) -> dict[str, np.ndarray]:
    r"""Return the `state_dict` of the `torch.nn.RNN`, `GRU` or `LSTM` equal to a layer.

        weights = pararnn.interop.to_torch(layer)
        module = torch.nn.GRU(8, 32, num_layers=2)
        module.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})

    Weights from [`pararnn.interop.from_torch`][] are restored bit by bit, except for
    the two biases of a `torch.nn.RNN`, which become their sum and zeros: an equal
    function. A gradient with respect to the layer, from `equinox.filter_grad`, can be
    converted in the same way.

    **Arguments:**

    - `layer`: [`pararnn.ElmanCell`][]s, [`pararnn.GRUCell`][]s or
        [`pararnn.LSTMCell`][]s, all of one kind and width, in [`pararnn.RNN`][]s, in
        [`pararnn.Bidirectional`][] pairs of these, or in a [`pararnn.Stack`][] of
        either.
    - `bias`: whether the module has biases. If not, those of the layer must be 0.

    **Returns:** NumPy arrays by torch's names and in its order, in the dtypes of the
    parameters; bfloat16, which NumPy and torch do not exchange, becomes float32. The
    caller sets the options of the module: `bidirectional`, `num_layers`, `bias`, and
    the `nonlinearity` of a `torch.nn.RNN`.

    **Raises:** `TypeError` on other layers or cells; `ValueError` on cells of several
    kinds or widths, a mixture of one and two directions, and biases that `bias=False`
    would drop.
    """
    cells = _cells(layer)
    layout = _common_layout(cells)
    state_dict = {}
    for k, directions in enumerate(cells):
        for backward, cell in enumerate(directions):
            arrays = _arrays(cell, layout)
            if not bias:
                _check_no_bias(arrays[2:], k)
            state_dict |= zip(names(k, bool(backward), bias), arrays, strict=False)
    _check_widths(state_dict, len(cells), len(cells[0]))
    return state_dict


def _cells(layer: Any) -> list[list[Any]]:
    """Return the cells of each layer, in one or two directions."""
    layers = layer.layers if isinstance(layer, Stack) else (layer,)
    cells = []
    for each in layers:
        pair = isinstance(each, Bidirectional)
        directions = [each.forward, each.backward] if pair else [each]
        for direction in directions:
            if not isinstance(direction, RNN):
                raise TypeError(
                    f"to_torch: a {type(direction).__name__} has no counterpart in "
                    "`torch.nn`. Pass an `RNN`, a `Bidirectional` pair of these, or a "
                    "`Stack` of either."
                )
        cells.append([direction.cell for direction in directions])
    if len({len(directions) for directions in cells}) > 1:
        raise ValueError(
            "to_torch: some layers have one direction and some two, and torch has no "
            "such module. Convert the layers one by one."
        )
    return cells


def _common_layout(cells: list[list[Any]]) -> Layout:
    flat = [cell for directions in cells for cell in directions]
    kinds = {f"{type(c).__name__} {getattr(c, 'activation', '')}".strip() for c in flat}
    if len(kinds) > 1:
        raise ValueError(
            f"to_torch: the cells are of several kinds, {sorted(kinds)}, and torch has "
            "no such module. Convert the layers one by one."
        )
    for layout in LAYOUTS:
        if isinstance(flat[0], layout.cell):
            return layout
    raise TypeError(
        f"to_torch: a {type(flat[0]).__name__} has no counterpart in `torch.nn`; "
        "`ElmanCell`, `GRUCell` and `LSTMCell` have. Likely causes: (a) another "
        "library's cell, (b) a custom `init_state` or `output` in `RNN`, which torch's "
        "modules do not support."
    )


def _arrays(cell: Any, layout: Layout) -> list[np.ndarray]:
    """Return `weight_ih`, `weight_hh`, `bias_ih`, `bias_hh`, gates stacked by rows."""
    groups = [
        np.concatenate([_as_numpy(getattr(cell, name)) for name in group])
        for group in layout.groups()
        if group
    ]
    return groups if layout.bias_hh else [*groups, np.zeros_like(groups[-1])]


def _as_numpy(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _check_no_bias(biases: list[np.ndarray], k: int) -> None:
    if any(np.any(bias) for bias in biases):
        raise ValueError(
            f"to_torch: the biases of layer {k} are not 0, so a module without any "
            "would compute something else. Leave out `bias=False`."
        )


def _check_widths(
    state_dict: dict[str, np.ndarray], layers: int, directions: int
) -> None:
    d_state = state_dict["weight_hh_l0"].shape[1]
    first = state_dict["weight_ih_l0"].shape[1]
    for k in range(layers):
        d_input = directions * d_state if k else first
        for backward in range(directions):
            weight_ih, weight_hh = (
                state_dict[name].shape[1] for name in names(k, bool(backward), False)
            )
            if (weight_ih, weight_hh) != (d_input, d_state):
                raise ValueError(
                    f"to_torch: a cell of layer {k} maps {weight_ih} inputs to "
                    f"{weight_hh} units, where one module of torch has {d_input} and "
                    f"{d_state}, the same width in all layers. Convert the layers one "
                    "by one."
                )
