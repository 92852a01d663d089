"""Converting torch's recurrent layers to layers of this library, and back."""

import re
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import DTypeLike

from .._rnn import RNN, Bidirectional, Stack
from ..cells import AbstractCell
from ..solver import AbstractSolver, Auto
from ._torch_layout import LAYOUTS, Layout, names

NAME = re.compile(r"(?:weight|bias)_(?:ih|hh)_l(\d+)(_reverse)?")


class _Weights(NamedTuple):
    """The parameters by torch's names, and the shape of the network."""

    arrays: dict[str, np.ndarray]
    layout: Layout
    layers: int
    directions: int
    bias: bool


def from_torch(
    source: Mapping[str, Any] | Any,
    *,
    solver: AbstractSolver = Auto(),
    nonlinearity: Literal["tanh", "relu"] | None = None,
    prefix: str = "",
    dtype: DTypeLike | None = None,
) -> Stack:
    r"""Convert a `torch.nn.RNN`, `GRU` or `LSTM` to layers of this library.

        layer = pararnn.interop.from_torch(torch.nn.GRU(8, 32, num_layers=2))
        ys, state = layer(xs)  # [T, 8] to [T, 32]

    It may have any number of layers, one or two directions, and biases or none. Nothing
    is unpickled here, and torch need not be installed: read files with
    `torch.load(path, weights_only=True)`, which refuses everything except tensors, or
    with `safetensors.numpy.load_file(path)`.

    **Arguments:**

    - `source`: the module, or its `state_dict()`: a mapping from torch's names to
        arrays or tensors, floating point.
    - `solver`: the solver of every layer, as for [`pararnn.solve`][].
    - `nonlinearity`: that of a `torch.nn.RNN`. Needed for a `state_dict`, which does
        not say it; a module does.
    - `prefix`: take only the parameters whose names start with it, and drop it from
        their names: `"encoder.rnn."` for a larger model.
    - `dtype`: dtype of the parameters. Defaults to torch's.

    **Returns:** a [`pararnn.Stack`][] with a [`pararnn.RNN`][] for each layer, or a
    [`pararnn.Bidirectional`][] pair of them: `[T, d_input]` to `([T, directions *
    d_state], state)`. It is unbatched and has time first: use `jax.vmap` for a batch.
    `batch_first` does not concern the weights. `state` is a tuple with the state of
    each layer: a pair `(forward, backward)` for two directions, and $(c, h)$ for an
    LSTM, where torch has $(h, c)$. [`pararnn.interop.state_from_torch`][] and
    [`pararnn.interop.state_to_torch`][] translate.

    A GRU or LSTM keeps both of torch's biases. A `torch.nn.RNN` gets one bias, their
    sum. `bias=False` becomes biases of zeros, which training would change; exclude them
    with `equinox.partition` to prevent that. Dropout between layers is left out, with a
    warning: the result computes what the torch module does in `eval()`.

    **Raises:** `ValueError` on parameters that are missing, that do not belong to these
    layers, whose shapes do not fit, or that are not real floating point; on an LSTM
    with `proj_size`; on float64 where JAX has only 32 bits; on a nonlinearity that is
    missing, unknown or not needed.
    `TypeError` if `source` is neither a module nor a mapping.

    ??? cite "Source"

        Documentation of `torch.nn.RNN`, `torch.nn.GRU` and `torch.nn.LSTM`.
    """
    weights = _read(source, prefix, dtype)
    options = _options(weights.layout, source, nonlinearity)
    _warn_of_dropout(source)

    def layer(k: int) -> RNN | Bidirectional:
        directions = [
            RNN(_make_cell(weights, k, bool(backward), options), solver=solver)
            for backward in range(weights.directions)
        ]
        return directions[0] if weights.directions == 1 else Bidirectional(*directions)

    return Stack(layer(k) for k in range(weights.layers))


def _options(layout: Layout, source: Any, nonlinearity: str | None) -> dict[str, Any]:
    own = getattr(source, "nonlinearity", None)
    if layout.torch != "RNN":
        if nonlinearity is not None:
            raise ValueError(
                f"from_torch: `nonlinearity` = {nonlinearity!r} was given for a "
                f"`torch.nn.{layout.torch}`, which has fixed ones. Leave it out."
            )
        return {}
    if own is not None and nonlinearity not in (None, own):
        raise ValueError(
            f"from_torch: `nonlinearity` = {nonlinearity!r}, but that of the module is "
            f"{own!r}. Leave out the argument."
        )
    if nonlinearity is None and own is None:
        raise ValueError(
            "from_torch: the `state_dict` of a `torch.nn.RNN` does not say which "
            "nonlinearity it has. Pass `nonlinearity='tanh'` (torch's default) or "
            "'relu', or the module itself."
        )
    return {"activation": nonlinearity or own}


def _warn_of_dropout(source: Any) -> None:
    dropout = getattr(source, "dropout", 0)
    if dropout:
        warnings.warn(
            f"from_torch: dropout={dropout} between the layers is not carried over; "
            "the result computes what the torch module does in `eval()`. Set "
            "`module.dropout = 0`, or pass `module.state_dict()`, to silence this "
            "warning.",
            stacklevel=3,
        )


def _make_cell(
    weights: _Weights, layer: int, backward: bool, options: dict[str, Any]
) -> AbstractCell:
    layout, arrays = weights.layout, weights.arrays
    weight_ih, weight_hh, *biases = (
        arrays[name] for name in names(layer, backward, weights.bias)
    )
    if not biases:
        biases = [np.zeros_like(weight_hh[:, 0])] * 2
    if not layout.bias_hh:
        biases = [biases[0] + biases[1]]
    fields = {}
    for gates, stacked in zip(
        layout[2:], (weight_ih, weight_hh, *biases), strict=False
    ):
        if gates:
            fields |= zip(gates, np.split(stacked, len(gates)), strict=True)
    make: Any = layout.cell
    cell = make(
        weight_ih.shape[1],
        weight_hh.shape[1],
        **options,
        dtype=weight_hh.dtype,
        key=jr.key(0),
    )
    return eqx.tree_at(
        lambda cell: [getattr(cell, name) for name in fields],
        cell,
        [jnp.asarray(value) for value in fields.values()],
    )


# The `state_dict`, read and checked.


def _read(source: Any, prefix: str, dtype: DTypeLike | None) -> _Weights:
    """Read the weights of a module or a `state_dict`.

    **Raises:** `TypeError`, `ValueError` if they are not those of one `torch.nn.RNN`,
    `GRU` or `LSTM`.
    """
    entries = _read_entries(source, prefix)
    found = [NAME.fullmatch(name) for name in entries]
    layers = 1 + max(int(match[1]) for match in found if match)
    directions = 1 + any(match[2] for match in found if match)
    bias = any(name.startswith("bias") for name in entries)
    arrays = {name: _read_array(name, value, dtype) for name, value in entries.items()}
    _check_names(set(arrays), layers, directions, bias)
    layout = _find_layout(arrays["weight_hh_l0"].shape)
    weights = _Weights(arrays, layout, layers, directions, bias)
    _check_shapes(weights)
    return weights


def _read_entries(source: Any, prefix: str) -> dict[str, Any]:
    mapping = source.state_dict() if hasattr(source, "state_dict") else source
    if not isinstance(mapping, Mapping):
        raise TypeError(
            f"from_torch: `source` is a {type(source).__name__}, expected a "
            "`torch.nn.RNN`, `GRU` or `LSTM` or its `state_dict()`. Likely cause: the "
            "name of a file; load it first, `torch.load(path, weights_only=True)` or "
            "`safetensors.numpy.load_file(path)`."
        )
    entries = {
        name.removeprefix(prefix): value
        for name, value in mapping.items()
        if name.startswith(prefix)
    }
    if any(name.startswith("weight_hr_l") for name in entries):
        raise ValueError(
            "from_torch: the LSTM has a projection (`proj_size` > 0, parameters "
            "`weight_hr_l...`): its hidden state is narrower than its memory, which no "
            "cell here supports. Train one with `proj_size=0`, or write the cell as a "
            "function `f(h, x) -> h` for `pararnn.RNN`."
        )
    unknown = sorted(name for name in entries if not NAME.fullmatch(name))
    if unknown or not entries:
        raise ValueError(
            f"from_torch: {unknown[:4] or 'nothing'} with the prefix {prefix!r} is "
            "not a parameter of `torch.nn.RNN`, `GRU` or `LSTM`. Likely causes: (a) "
            "the weights of a whole model: pass its recurrent module, or "
            "`prefix='rnn.'` with the module's name in the model, (b) a "
            "`GRUCell` or `LSTMCell`: append '_l0' to the names."
        )
    return entries


def _read_array(name: str, value: Any, dtype: DTypeLike | None) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if "bfloat16" in str(value.dtype):  # torch does not convert it to NumPy.
            value = np.asarray(value.float()).astype(jnp.bfloat16)
    array = np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"from_torch: `{name}` is {array.dtype}, expected real floating point. "
            "Likely cause: a quantised network; dequantise it first."
        )
    if dtype is not None:
        array = array.astype(jnp.dtype(dtype))
    if array.dtype == np.float64 and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            f"from_torch: `{name}` is float64, which JAX would round to float32 here. "
            'Call `jax.config.update("jax_enable_x64", True)` at the start of the '
            "program, or pass `dtype=jnp.float32`."
        )
    return array


def _check_names(given: set[str], layers: int, directions: int, bias: bool) -> None:
    wanted = {
        name
        for layer in range(layers)
        for backward in range(directions)
        for name in names(layer, bool(backward), bias)
    }
    if given != wanted:
        raise ValueError(
            f"from_torch: {sorted(wanted - given)} are missing from what looks like "
            f"{layers} layer(s) in {directions} direction(s) "
            f"{'with' if bias else 'without'} biases. Likely cause: a `state_dict` "
            "that was filtered, or saved in parts."
        )


def _find_layout(shape: tuple[int, ...]) -> Layout:
    for layout in LAYOUTS:
        if len(shape) == 2 and shape[0] == len(layout.weight_hh) * shape[1]:
            return layout
    raise ValueError(
        f"from_torch: `weight_hh_l0` has shape {shape}, expected [k * d, d] with k = 1 "
        "(RNN), 3 (GRU) or 4 (LSTM). Likely cause: a transposed matrix, from another "
        "framework."
    )


def _check_shapes(weights: _Weights) -> None:
    rows, d_state = weights.arrays["weight_hh_l0"].shape
    first = weights.arrays["weight_ih_l0"].shape[-1:]
    for layer in range(weights.layers):
        d_input = first if layer == 0 else (weights.directions * d_state,)
        shapes = ((rows, *d_input), (rows, d_state), (rows,), (rows,))
        for backward in range(weights.directions):
            for name, shape in zip(
                names(layer, bool(backward), weights.bias), shapes, strict=False
            ):
                if weights.arrays[name].shape != shape:
                    raise ValueError(
                        f"from_torch: `{name}` has shape {weights.arrays[name].shape}, "
                        f"expected {shape}, as `weight_hh_l0` is {(rows, d_state)}. "
                        "Likely cause: parameters of two networks in one `state_dict`."
                    )


# From layers to a `state_dict`.


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
    cells = _list_cells(layer)
    layout = _common_layout(cells)
    state_dict = {}
    for k, directions in enumerate(cells):
        for backward, cell in enumerate(directions):
            arrays = _stack_gates(cell, layout)
            if not bias:
                _check_no_bias(arrays[2:], k)
            state_dict |= zip(names(k, bool(backward), bias), arrays, strict=False)
    _check_widths(state_dict, len(cells), len(cells[0]))
    return state_dict


def _list_cells(layer: Any) -> list[list[Any]]:
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


def _stack_gates(cell: Any, layout: Layout) -> list[np.ndarray]:
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
