"""How torch arranges the parameters and the states of its recurrent layers."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from .._rnn import Bidirectional, Stack
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
        """Return the fields that each of torch's parameters is split into."""
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
    """Return what torch appends to the name of a parameter."""
    return f"_l{layer}_reverse" if backward else f"_l{layer}"


def names(layer: int, backward: bool, bias: bool) -> tuple[str, ...]:
    """Name the parameters of one layer in one direction, in torch's order."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return tuple(kind + suffix(layer, backward) for kind in kinds[: 4 if bias else 2])


TorchState = (
    Float[Array, "layers d_state"]
    | tuple[Float[Array, "layers d_state"], Float[Array, "layers d_state"]]
)


def state_to_torch(layer: Stack, state: PyTree[Array]) -> TorchState:
    """Convert a state of [`pararnn.interop.from_torch`][]'s layers to torch's order.

    **Arguments:** `layer`, what `from_torch` returned; `state`, of the structure of
    `layer.init_state()`, unbatched.

    **Returns:** torch's `h_n`, `[layers * directions, d_state]`, the directions side by
    side within each layer; for an LSTM the pair `(h_n, c_n)`.

    **Raises:** `ValueError` if the structure or a shape is not that of
    `layer.init_state()`.
    """
    fresh = layer.init_state()
    leaves, structure = jtu.tree_flatten(state)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    if structure != jtu.tree_structure(fresh) or shapes != [
        leaf.shape for leaf in jtu.tree_leaves(fresh)
    ]:
        raise ValueError(
            f"state_to_torch: `state` has the structure {structure} and the shapes "
            f"{shapes}, which are not those of `layer.init_state()`. Likely causes: "
            "(a) the state of another layer, (b) a batch axis; use `jax.vmap`."
        )
    if not _is_lstm(layer):
        return jnp.stack(leaves)
    return jnp.stack(leaves[1::2]), jnp.stack(leaves[0::2])


def state_from_torch(layer: Stack, state: TorchState) -> PyTree[Array]:
    """Convert torch's state; the inverse of [`pararnn.interop.state_to_torch`][].

    **Arguments:** `layer`, what `from_torch` returned; `state`, torch's `h_0`,
    `[layers * directions, d_state]`, or `(h_0, c_0)` for an LSTM, as unbatched arrays.

    **Returns:** a state of the structure of `layer.init_state()`.

    **Raises:** `ValueError` if the shapes are not those of the layer.
    """
    leaves, structure = jtu.tree_flatten(layer.init_state())
    pair = _is_lstm(layer)
    parts = tuple(state) if isinstance(state, tuple | list) else (state,)
    shape = (len(leaves) // (1 + pair), *leaves[0].shape)
    if len(parts) != 1 + pair or any(jnp.shape(part) != shape for part in parts):
        wanted = f"two arrays (h_0, c_0) of shape {shape}" if pair else f"shape {shape}"
        given = [jnp.shape(part) for part in parts]
        raise ValueError(
            f"state_from_torch: `state` has shapes {given}, expected {wanted}. Likely "
            "causes: (a) a batch axis in the middle, as in torch; use "
            "`jax.vmap` over axis 1, (b) c without h or h without c."
        )
    arrays = [jnp.asarray(part) for part in parts]
    # c stands before h here, and after it in torch.
    flat = [row for k in range(shape[0]) for row in (part[k] for part in arrays[::-1])]
    return jtu.tree_unflatten(structure, flat)


def _is_lstm(layer: Stack) -> bool:
    first: Any = layer.layers[0]
    direction = first.forward if isinstance(first, Bidirectional) else first
    return isinstance(direction.init_state(), tuple)
