import warnings
from collections.abc import Mapping
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import DTypeLike

from .._rnn import RNN, Bidirectional, Stack
from ..cells import AbstractCell
from ..solver import AbstractSolver, Auto
from ._torch_arrays import Weights, read
from ._torch_layout import Layout, names


def from_torch(
    source: Mapping[str, Any] | Any,
    *,
    solver: AbstractSolver = Auto(),
    nonlinearity: Literal["tanh", "relu"] | None = None,
    prefix: str = "",
    dtype: DTypeLike | None = None,
) -> Stack:
    r"""A `torch.nn.RNN`, `GRU` or `LSTM` as layers of this library.

        layer = pararnn.interop.from_torch(torch.nn.GRU(8, 32, num_layers=2))
        ys, state = layer(xs)  # [T, 8] to [T, 32]

    Layers and directions may be any number, biases there or not. Nothing is unpickled
    here, and torch need not be installed: read files with
    `torch.load(path, weights_only=True)`, which refuses everything but tensors, or with
    `safetensors.numpy.load_file(path)`.

    **Arguments:**

    - `source`: the module, or its `state_dict()`: a mapping from torch's names to
        arrays or tensors, floating point.
    - `solver`: of every layer, as for [`pararnn.solve`][].
    - `nonlinearity`: that of a `torch.nn.RNN`. A module says it itself, its
        `state_dict` does not, and needs this.
    - `prefix`: take only the parameters whose names start with it, and drop it from
        their names: `"encoder.rnn."` of a larger model.
    - `dtype`: of the parameters; torch's if not given.

    **Returns:** a [`pararnn.Stack`][] with a [`pararnn.RNN`][] for each layer, or a
    [`pararnn.Bidirectional`][] pair of them: `[T, d_input]` to `([T, directions *
    d_state], state)`. It is unbatched and time first, whatever `batch_first` says,
    which does not concern the weights: use `jax.vmap` for a batch. `state` is a tuple
    with the state of each layer, of two directions a pair `(forward, backward)`, and of
    an LSTM $(c, h)$ where torch has $(h, c)$:
    [`pararnn.interop.state_from_torch`][] and [`pararnn.interop.state_to_torch`][]
    translate.

    GRU and LSTM hold both of torch's biases, a `torch.nn.RNN` becomes one bias, their
    sum. `bias=False` becomes biases of zeros, which training would change; leave them
    out with `equinox.partition` if it must not. Dropout between layers is not part of
    the result: it computes what the torch module does in `eval()`, and warns.

    **Raises:** `ValueError` on parameters that are missing, not of these layers, of
    shapes that do not fit or not real floating point; on an LSTM with `proj_size`; on
    float64 where JAX has only 32 bits; on a nonlinearity that is not known or needed.
    `TypeError` if `source` is neither a module nor a mapping.

    ??? cite "Source"

        The documentation of `torch.nn.RNN`, `torch.nn.GRU` and `torch.nn.LSTM`.
    """
    weights = read(source, prefix, dtype)
    options = _options(weights.layout, source, nonlinearity)
    _warn_of_dropout(source)

    def layer(k: int) -> RNN | Bidirectional:
        directions = [
            RNN(_cell(weights, k, bool(backward), options), solver=solver)
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
            f"{own!r}. Leave it out."
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
            "`module.dropout = 0`, or pass `module.state_dict()`, to say that this is "
            "meant.",
            stacklevel=3,
        )


def _cell(
    weights: Weights, layer: int, backward: bool, options: dict[str, Any]
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
    for group, stacked in zip(
        layout[2:], (weight_ih, weight_hh, *biases), strict=False
    ):
        if group:
            fields |= zip(group, np.split(stacked, len(group)), strict=True)
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
