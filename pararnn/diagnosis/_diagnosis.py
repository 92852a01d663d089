"""`Diagnosis`: what `diagnose` returns, how it prints, and how it is drawn."""

import dataclasses
import os
from typing import Any

from ..solver import AbstractMethod, Sequential, Structure
from ._draw import draw
from ._report import describe_growth, describe_methods, describe_recommendation
from ._results import Growth, MethodReport


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Diagnosis:
    """What [`pararnn.diagnose`][] found, in numbers; prints as a report.

    **Attributes:**

    - `structure`: the [`pararnn.Structure`][] of the cell's Jacobian.
    - `width`: real numbers in the state.
    - `length`: T.
    - `dtype`: of the state, as text.
    - `platform`: where memory and times were measured.
    - `trajectory`, `at_h0`: growth of perturbations along the solution, and with every
        Jacobian taken at `h0` in place of the solution: each with `exponent`,
        `log_growth`, and the indices `first` and `last` of the states between which
        the growth was largest.
    - `methods`: by name, for each method: `solver`, `lengths`, `steps`, `converged`,
        `history` (largest residual before each step, at T), `serial_steps`, `memory`
        (bytes of temporary memory of the compiled forward solve) and `seconds`.
    - `sequential`: the same of the loop.
    - `max_steps`: where methods were stopped.
    - `recommended`: the solver to use, for [`pararnn.solve`][].
    - `reasons`: why, in sentences.
    """

    structure: Structure
    width: int
    length: int
    dtype: str
    platform: str
    trajectory: Growth
    at_h0: Growth
    methods: dict[str, MethodReport]
    sequential: MethodReport
    max_steps: int
    recommended: AbstractMethod | Sequential
    reasons: tuple[str, ...]

    @property
    def exponent(self) -> float:
        """The largest Lyapunov exponent along the solution, per step."""
        return self.trajectory.exponent

    @property
    def log_pl_bound(self) -> float:
        r"""Natural logarithm of an upper bound of $\sqrt\mu$, at most 0.

        $\mu$ is the Polyak-Łojasiewicz constant of the residual; see
        [`pararnn.diagnose`][].
        """
        return -max(0.0, self.trajectory.log_growth, self.at_h0.log_growth)

    def __repr__(self) -> str:
        title = (
            f"Diagnosis of T = {self.length} steps, width {self.width}, {self.dtype}, "
            f"{self.structure!r} Jacobian, on {self.platform}"
        )
        lines = [
            title,
            "=" * len(title),
            "",
            *describe_growth(self.trajectory, self.at_h0, self.log_pl_bound),
            "",
            *describe_methods(self.methods, self.sequential, self.max_steps),
            "",
            *describe_recommendation(self.recommended, self.reasons),
        ]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A figure: residuals by step at T, and steps against T, of each method.

        **Arguments:** `path`, a file to write, in the format of its ending.

        **Returns:** the `matplotlib.figure.Figure`.

        **Raises:** `ImportError` without matplotlib, which is not a dependency of this
        library.
        """
        figure = draw(self.methods, self.sequential.lengths, self.max_steps)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure
