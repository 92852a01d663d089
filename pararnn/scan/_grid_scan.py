"""`grid_scan`: matrix states on the edges of a grid, row by row."""

import functools as ft

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .._checks import check_floating
from ._arithmetic import promote
from ._linear_scan import linear_scan
from ._mesh_axes import vary
from ._transitions import Diagonal


def grid_scan(
    queries: Float[Array, "H W heads K"],
    keys: Float[Array, "H W heads K"],
    values: Float[Array, "H W heads V"],
    source: Float[Array, "2 H W heads"],
    mark: Float[Array, "2 H W heads"],
    direct: Float[Array, "H W heads"],
    T_rl: Float[Array, "H W heads"],
    T_ru: Float[Array, "H W heads"],
    T_dl: Float[Array, "H W heads"],
    T_du: Float[Array, "H W heads"],
) -> Float[Array, "H W heads V"]:
    r"""Solve a linear recurrence on a grid, whose states are matrices on its edges.

    The cell in row i and column j receives the state $C^r_{i,j-1}$ of the cell to its
    left and $C^d_{i-1,j}$ of the cell above it, and sends one to the right and one
    down:

    $$C^r_{ij} = T^{rl}_{ij} C^r_{i,j-1} + T^{ru}_{ij} C^d_{i-1,j}
    + S^r_{ij} k_{ij} v_{ij}^\top, \qquad
    C^d_{ij} = T^{dl}_{ij} C^r_{i,j-1} + T^{du}_{ij} C^d_{i-1,j}
    + S^d_{ij} k_{ij} v_{ij}^\top$$

    $$o_{ij} = (M^l_{ij} C^r_{i,j-1} + M^u_{ij} C^d_{i-1,j})^\top q_{ij}
    + D_{ij} (k_{ij} \cdot q_{ij}) v_{ij}$$

    A cell reads what it receives, which does not include its own key and value; the
    direct term adds these. Nothing comes in from outside the grid. There is no factor
    $K^{-1/2}$: scale the queries.

    The columns of a row are one [`pararnn.linear_scan`][], and the rows are a loop.
    Without a derivative, a few rows of states are alive at a time. A derivative stores
    the states $C^d$ of all rows, and computes everything else again. On 32 x 32 cells,
    with 4 heads and K = V = 32 in float32, that is 2 MiB and 25 MiB. States stay
    bounded where
    $|T^{rl}| + |T^{dl}| \le 1$ and $|T^{ru}| + |T^{du}| \le 1$, or where one of
    $T^{ru}, T^{dl}$ is zero everywhere and the others are at most 1.

    **Arguments:**

    - `queries`, `keys`, `values`: $q$, $k$ and $v$, `[H, W, heads, K]` twice and
        `[H, W, heads, V]`. H and W may be 0.
    - `source`: $S^r$ and $S^d$, `[2, H, W, heads]`.
    - `mark`: $M^l$, for what comes from the left, and $M^u$, for what comes from above,
        `[2, H, W, heads]`.
    - `direct`: $D$, `[H, W, heads]`.
    - `T_rl`, `T_ru`, `T_dl`, `T_du`: transitions to the right from the left and from
        above, and down from the left and from above, `[H, W, heads]` each.

    **Returns:** $o$, `[H, W, heads, V]`, in the promoted dtype of all arguments; 16-bit
    arguments are computed in float32.

    **Raises:** `ValueError`, `TypeError` on shapes and dtypes that do not fit, while
    tracing.

    ??? cite "Source"

        Pöppel et al., "pLSTM: parallelizable Linear Source Transition Mark networks"
        (2506.11997), equations 5 and 6 on the grid of section 4.3.1.
    """
    given = {
        "queries": queries,
        "keys": keys,
        "values": values,
        "source": source,
        "mark": mark,
        "direct": direct,
        "T_rl": T_rl,
        "T_ru": T_ru,
        "T_dl": T_dl,
        "T_du": T_du,
    }
    _check(given)
    dtype = promote(*given.values())
    precision = promote(dtype, jnp.float32)
    _, width, heads, size = keys.shape
    if keys.shape[0] == 0 or width == 0:
        return jnp.zeros(values.shape, dtype)
    wide = {name: jnp.asarray(v).astype(precision) for name, v in given.items()}
    # Rows first, as the loop goes over them.
    for name in ("source", "mark"):
        wide[name] = jnp.moveaxis(wide[name], 0, 1)
    top = vary(jnp.zeros((width, heads, size, values.shape[-1]), precision), wide)
    # A loop keeps the two passes apart without the barriers of `prevent_cse`.
    row = ft.partial(jax.checkpoint, prevent_cse=False)(_row)
    _, outputs = lax.scan(row, top, wide)
    return outputs.astype(dtype)


def _row(top, cells):
    """Return the states that a row sends down, and its outputs `[W, heads, V]`.

    `top` are the states that it receives from above, `[W, heads, K, V]`.
    """
    query, key, value = (cells[name] for name in ("queries", "keys", "values"))
    written = key[..., :, None] * value[..., None, :]

    def times(factor, states):
        return factor[..., None, None] * states

    right = linear_scan(
        Diagonal(cells["T_rl"]),
        times(cells["T_ru"], top) + times(cells["source"][0], written),
    )
    left = jnp.concatenate([jnp.zeros_like(right[:1]), right[:-1]])
    down = times(cells["T_dl"], left) + times(cells["T_du"], top)
    down = down + times(cells["source"][1], written)
    received = times(cells["mark"][0], left) + times(cells["mark"][1], top)
    outputs = jnp.sum(query[..., None] * received, axis=-2)
    own = cells["direct"] * jnp.sum(key * query, axis=-1)
    return down, outputs + own[..., None] * value


def _check(given: dict[str, Array]) -> None:
    check_floating("grid_scan", given)
    keys, values = given["keys"].shape, given["values"].shape
    if len(keys) != 4 or len(values) != 4:
        raise ValueError(
            f"grid_scan: `keys` has shape {keys} and `values` {values}, expected "
            "[H, W, heads, K] and [H, W, heads, V]. Likely causes: (a) a batch axis; "
            "use `jax.vmap` for it, (b) a single head; give it an axis of length 1, "
            "(c) a sequence; use `pararnn.matrix_scan` for it."
        )
    cells = keys[:-1]
    wanted = {
        "queries": keys,
        "values": (*cells, values[-1]),
        "source": (2, *cells),
        "mark": (2, *cells),
    }
    for name, v in given.items():
        if v.shape != (shape := wanted.get(name, keys if name == "keys" else cells)):
            raise ValueError(
                f"grid_scan: `{name}` has shape {v.shape}, expected {shape}, as `keys` "
                f"has shape {keys}. Likely causes: (a) the axes are in another order; "
                "rows come first, then columns, then heads, (b) the two gates of "
                "`source` or `mark` come after the cells; they go in front, (c) a "
                "constant gate; write it out with `jnp.broadcast_to`."
            )
