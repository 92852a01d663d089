r"""Recurrences in the max-plus algebra, where + is max and the product is +."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._linear_scan import check_reset
from ._prefix import prefix


def max_plus_scan(
    decay: Float[Array, "T *state"],
    inputs: Float[Array, "T *state"],
    initial: Float[Array, " *state"],
    *,
    reset: Bool[Array, " T"] | None = None,
    reset_state: Float[Array, " *state"] | None = None,
) -> Float[Array, "T *state"]:
    r"""Every state of $m_t = \max(a_t + m_{t-1}, b_t)$.

    The stabiliser of exponential gates is of this form: the logarithm of the largest
    term of a sum of products.

    **Arguments:** `decay`, $a_t$; `inputs`, $b_t$; `initial`, $m_0$; `reset`, bool
    `[T]`, where true step t starts from `reset_state`, or zeros.

    **Returns:** $m_1 \dots m_T$, `[T, *state]`.

    **Raises:** `ValueError`, `TypeError` on a reset that does not fit.
    """
    check_reset("max_plus_scan", reset, reset_state, inputs.shape[0])
    if inputs.shape[0] == 0:
        return inputs
    terms = inputs.at[0].max(decay[0] + initial)
    if reset is not None:
        fresh = jnp.zeros_like(initial) if reset_state is None else reset_state
        anew = reset.reshape(-1, *(1,) * initial.ndim)
        terms = jnp.where(anew, jnp.maximum(inputs, decay + fresh[None]), terms)

    def combine(earlier, later):
        (a1, b1, r1), (a2, b2, r2) = earlier, later
        carried = jnp.maximum(a2 + b1, b2)
        if r2 is None:
            return a1 + a2, carried, None
        return jnp.where(r2, a2, a1 + a2), jnp.where(r2, b2, carried), r1 | r2

    elements = decay, terms, None if reset is None else anew
    return prefix(combine, elements)[1]
