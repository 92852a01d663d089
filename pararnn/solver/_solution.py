"""What a solve returns."""

from typing import Any

import equinox as eqx
import jax
import optimistix as optx
from jaxtyping import Array, PyTree


class RESULTS(optx.RESULTS):  # pyright: ignore[reportGeneralTypeIssues]
    """How a solve ended. Extends `optimistix.RESULTS`."""

    successful = ""
    newton_not_converged = (
        "Newton's method did not bring the residual below the tolerance within "
        "`max_steps`. Likely causes: (a) the recurrence is chaotic or badly "
        "conditioned, so that it is not predictable over long stretches: use fewer "
        "`segments`, or the default solver, which then steps sequentially; (b) "
        "`max_steps` is small: at most `segments` steps are ever needed; (c) `rtol` "
        "and `atol` are below what the dtype can resolve. With `throw=False` the last "
        "iterate is returned, and `stats['residual']` says how far it is."
    )
    nonfinite_inputs = (
        "The states contain a NaN or an infinity, and so do the inputs `xs`. Likely "
        "causes: (a) missing values in the data: mask or fill them before the solve; "
        "(b) an overflow in the layer that made the inputs. With `throw=False` "
        "`stats['first_nonfinite']` is the first step with such a state."
    )
    nonfinite_parameters = (
        "The states contain a NaN or an infinity, and so does a value that the cell "
        "closes over or `h0` or `reset_state`. Likely causes: (a) training diverged "
        "earlier: lower the learning rate, or clip the gradient; (b) a parameter was "
        "created from invalid numbers."
    )
    nonfinite_states = (
        "The states contain a NaN or an infinity although inputs, initial state and "
        "parameters are finite. Likely causes: (a) the recurrence grows without bound, "
        "as a linear one does if an eigenvalue exceeds 1; (b) a function outside its "
        "domain in the cell (log, sqrt, a division). With `throw=False` "
        "`stats['first_nonfinite']` is the first step with such a state."
    )


class Solution(eqx.Module):
    """The trajectory of a recurrence, and how it was obtained.

    **Attributes:**

    - `states`: pytree like `h0`, leaves `[T, ...]`: $h_1 \\dots h_T$.
    - `result`: a [`pararnn.RESULTS`][]; compare with `RESULTS.successful`.
    - `stats`: a dict of arrays.
        - `"num_steps"` (int32): Newton steps taken; 0 if only the sequential loop ran.
        - `"residual"` (real): $\\max_t |f(h_{t-1}, x_t) - h_t|$ at the states that are
            returned; 0 for states computed one from the other.
        - `"sequential"` (bool): whether the states come from the sequential loop.
        - `"nonfinite"` (int32): entries of iterates that overflowed and were restarted.
        - `"first_nonfinite"` (int32): first step with a state that is not finite, T if
            there is none.
        - `"residual_history"` (real, `[history]`): defect before each Newton step, NaN
            from the last one on; only with `Newton(history=...)`.
    """

    states: PyTree[Array]
    result: Any
    stats: dict[str, Array]

    @property
    def final(self) -> PyTree[Array]:
        """The last state, as `h0`; requires T >= 1."""
        return jax.tree.map(lambda s: s[-1], self.states)
