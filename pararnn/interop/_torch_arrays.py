"""A `state_dict` as NumPy arrays, checked: which layers it describes."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from ._torch_layout import LAYOUTS, Layout, names

NAME = re.compile(r"(?:weight|bias)_(?:ih|hh)_l(\d+)(_reverse)?")


class Weights(NamedTuple):
    """The parameters by torch's names, and the shape of the network they make."""

    arrays: dict[str, np.ndarray]
    layout: Layout
    layers: int
    directions: int
    bias: bool


def read(source: Any, prefix: str, dtype: DTypeLike | None) -> Weights:
    """The weights of a module or a `state_dict`.

    **Raises:** `TypeError`, `ValueError` if they are not those of one `torch.nn.RNN`,
    `GRU` or `LSTM`.
    """
    entries = _entries(source, prefix)
    found = [NAME.fullmatch(name) for name in entries]
    layers = 1 + max(int(match[1]) for match in found if match)
    directions = 1 + any(match[2] for match in found if match)
    bias = any(name.startswith("bias") for name in entries)
    arrays = {name: _array(name, value, dtype) for name, value in entries.items()}
    _check_names(set(arrays), layers, directions, bias)
    layout = _layout(arrays["weight_hh_l0"].shape)
    weights = Weights(arrays, layout, layers, directions, bias)
    _check_shapes(weights)
    return weights


def _entries(source: Any, prefix: str) -> dict[str, Any]:
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
            "`weight_hr_l...`), which no cell here has: its hidden state is narrower "
            "than its memory. Train one with `proj_size=0`, or write the cell as a "
            "function `f(h, x) -> h` for `pararnn.RNN`."
        )
    unknown = sorted(name for name in entries if not NAME.fullmatch(name))
    if unknown or not entries:
        raise ValueError(
            f"from_torch: {unknown[:4] or 'nothing'} with the prefix {prefix!r} is "
            "not a parameter of `torch.nn.RNN`, `GRU` or `LSTM`. Likely causes: (a) "
            "the weights of a whole model: pass its recurrent module, or "
            "`prefix='rnn.'` with the name that this has in the model, (b) a "
            "`GRUCell` or `LSTMCell`: append '_l0' to the names."
        )
    return entries


def _array(name: str, value: Any, dtype: DTypeLike | None) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if "bfloat16" in str(value.dtype):  # Not a dtype that torch gives to NumPy.
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


def _layout(shape: tuple[int, ...]) -> Layout:
    for layout in LAYOUTS:
        if len(shape) == 2 and shape[0] == len(layout.weight_hh) * shape[1]:
            return layout
    raise ValueError(
        f"from_torch: `weight_hh_l0` has shape {shape}, expected [k * d, d] with k = 1 "
        "(RNN), 3 (GRU) or 4 (LSTM). Likely cause: a transposed matrix, as of another "
        "framework."
    )


def _check_shapes(weights: Weights) -> None:
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
