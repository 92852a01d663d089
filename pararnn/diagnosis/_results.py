"""What was measured: of each method, and of the growth of perturbations."""

import dataclasses

import numpy as np
from jaxtyping import Float

from ..solver import AbstractMethod, Sequential


@dataclasses.dataclass(frozen=True, eq=False)
class MethodReport:
    """What one method did. Lengths ascend; the last one is T.

    **Attributes:**

    - `solver`: the method.
    - `lengths`: the numbers of steps n; the recurrence is cut behind the n-th.
    - `steps`: the method's steps for each length; where `converged` is false, the
        limit at which it was stopped.
    - `converged`: for each length whether the residual was certified.
    - `history`: the largest residual before each of the method's steps, at T.
    - `serial_steps`: at T, how many evaluations follow one after the other: for each
        step of the method the length of a segment and the rounds of its scans over
        the segments, and the last pass.
    - `memory`: bytes of temporary memory of the compiled forward solve at T, without
        inputs and states; `None` where the compiler does not say.
    - `seconds`: wall-clock time of the forward solve at T, here.
    """

    solver: AbstractMethod | Sequential
    lengths: tuple[int, ...]
    steps: tuple[int, ...]
    converged: tuple[bool, ...]
    history: Float[np.ndarray, " steps"]
    serial_steps: int
    memory: int | None
    seconds: float


@dataclasses.dataclass(frozen=True, eq=False)
class Growth:
    """How perturbations of the state grow under a sequence of Jacobians.

    **Attributes:**

    - `exponent`: the largest Lyapunov exponent, natural logarithm per step; minus
        infinity if every perturbation vanishes.
    - `log_growth`: natural logarithm of the largest factor by which a tangent grew
        between any two states: a lower bound of $\\max \\log \\|J_t \\cdots J_s\\|$,
        at least 0.
    - `first`, `last`: the indices, from 0, of the states between which it did.
    """

    exponent: float
    log_growth: float
    first: int
    last: int

    def is_positive(self, steps: int) -> bool:
        """Whether the exponent is above zero by more than its own uncertainty.

        Over `steps` steps the sign of one below `1 / steps` depends on the tangents.
        """
        return self.exponent * steps > 1
