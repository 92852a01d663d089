"""What a solve returns: states, statistics, and how it ended."""

from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jax.core import Tracer
from jaxtyping import Array, Bool, Int, PyTree, Real

if TYPE_CHECKING:
    from ._problem import BoundProblem


class RESULTS(optx.RESULTS):  # pyright: ignore[reportGeneralTypeIssues]
    """How a solve ended. Extends `optimistix.RESULTS`."""

    successful = ""
    not_converged = (
        "The solver did not bring the residual below the tolerance within "
        "`max_steps`. Likely causes: (a) the recurrence is chaotic or badly "
        "conditioned, so that it is not predictable over a long time: use fewer "
        "`segments`, or the default solver, which then steps sequentially; (b) "
        "`max_steps` is small: at most `segments` steps are ever needed; (c) `rtol` "
        "and `atol` are below what the dtype can resolve. With `throw=False` the best "
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


class Stats(NamedTuple):
    """The statistics of a solve, each an array over the batch.

    `Solution.stats` holds them by name and explains them. `certified` is internal:
    whether every residual is within its tolerance.
    """

    num_steps: Int[Array, "*batch"]
    residual: Real[Array, "*batch"]
    certified: Bool[Array, "*batch"]
    certified_steps: Int[Array, "*batch"]
    sequential: Bool[Array, "*batch"]
    rung: Int[Array, "*batch"]
    nonfinite: Int[Array, "*batch"]
    first_nonfinite: Int[Array, "*batch"]
    history: Real[Array, "*batch history"]

    @classmethod
    def of(
        cls, problem: "BoundProblem", *, first_nonfinite: Any, **values: Any
    ) -> "Stats":
        """Make the statistics of a problem; others default to 0, false or empty.

        `first_nonfinite` is the first step whose state is not finite, T if there is
        none.
        """
        real, shape = problem.recurrence.dtype, problem.batch_shape
        if getattr(first_nonfinite, "dtype", type(first_nonfinite)) in (
            bool,
            jnp.bool_,
        ):
            raise TypeError(
                "Stats: `first_nonfinite` is a truth value; expected the first step "
                "whose state is not finite (`pararnn.solver.find_nonfinite`), or the "
                "number of steps if there is none."
            )
        values["first_nonfinite"] = first_nonfinite
        dtypes: dict[str, Any] = {"residual": real}
        dtypes |= dict.fromkeys(_COUNTS, jnp.int32) | dict.fromkeys(_FLAGS, jnp.bool_)
        fields = {
            name: jnp.broadcast_to(jnp.asarray(values.pop(name, 0), dtype), shape)
            for name, dtype in dtypes.items()
        }
        history = values.pop("history", jnp.zeros((*shape, 0), real))
        return cls(**fields, history=history, **values)

    @classmethod
    def exact(cls, problem: "BoundProblem", first_nonfinite) -> "Stats":
        """Make the statistics of states that were computed one from the other."""
        return cls.of(
            problem,
            certified=True,
            certified_steps=problem.steps,
            sequential=True,
            first_nonfinite=first_nonfinite,
        )

    def padded(self, length: int) -> "Stats":
        """Pad the history with NaN to this length."""
        missing = length - self.history.shape[-1]
        axes = [(0, 0)] * (self.history.ndim - 1) + [(0, missing)]
        filled = jnp.pad(self.history, axes, constant_values=jnp.nan)
        return self._replace(history=filled)

    def shared(self) -> "Stats":
        """Certify coupled sequences only if all of them are certified."""
        steps = self.certified_steps
        return self._replace(
            certified=jnp.full_like(self.certified, jnp.all(self.certified)),
            certified_steps=jnp.full_like(steps, jnp.min(steps)),
        )

    def unless_certified(self, later: "Stats") -> "Stats":
        """Take the later statistics unless these are certified; add up the steps."""
        kept = self.certified

        def choose(old, new):
            return jnp.where(
                kept.reshape(*kept.shape, *(1,) * (old.ndim - kept.ndim)), old, new
            )

        return jax.tree.map(choose, self, later)._replace(
            num_steps=self.num_steps + jnp.where(kept, 0, later.num_steps),
            nonfinite=self.nonfinite + jnp.where(kept, 0, later.nonfinite),
        )

    def over_windows(
        self, starts: Int[Array, " windows"], length: int, steps: int
    ) -> "Stats":
        """Merge the statistics `[windows, *batch]` into those of the sequence."""
        starts = starts.reshape(-1, *(1,) * (self.certified.ndim - 1))
        # The steps up to the first window that is not certified, and the certified
        # steps in it.
        prefix = jnp.where(self.certified, steps, starts + self.certified_steps)
        here = self.first_nonfinite
        nonfinite = jnp.where(here < length, starts + here, steps)
        return Stats(
            num_steps=jnp.sum(self.num_steps, 0),
            residual=jnp.max(self.residual, 0),
            certified=jnp.all(self.certified, 0),
            certified_steps=jnp.min(prefix, 0),
            sequential=jnp.any(self.sequential, 0),
            rung=jnp.max(self.rung, 0),
            nonfinite=jnp.sum(self.nonfinite, 0),
            first_nonfinite=jnp.min(nonfinite, 0),
            history=jnp.nanmax(self.history, 0),
        )

    def as_dict(self) -> dict[str, Array]:
        """Return the public statistics by name."""
        public = self._asdict()
        del public["certified"]
        history = public.pop("history")
        return public | ({"residual_history": history} if history.shape[-1] else {})


_COUNTS = ("num_steps", "certified_steps", "rung", "nonfinite", "first_nonfinite")
_FLAGS = ("certified", "sequential")


class Solution(eqx.Module):
    """The trajectory of a recurrence, and how it was obtained.

    **Attributes:**

    - `states`: pytree like `h0`, leaves `[T, ...]`: $h_1 \\dots h_T$. After a failure,
        the iterate with the smallest residual.
    - `result`: a [`pararnn.RESULTS`][]; compare it with `RESULTS.successful`.
    - `stats`: a dict of arrays.
        - `"num_steps"` (int32): the method's steps; 0 if only the sequential loop ran.
        - `"residual"` (real): $\\max_t |f(h_{t-1}, x_t) - h_t|$ at the states that are
            returned; 0 for states computed one from the other.
        - `"certified_steps"` (int32): the number of steps before the first one whose
            residual exceeds the tolerance; T after a success.
        - `"sequential"` (bool): whether the states come from the sequential loop.
        - `"rung"` (int32): which method of a [`pararnn.Ladder`][] the states come from,
            counted from 0; the loop comes last. 0 for other solvers.
        - `"nonfinite"` (int32): entries of iterates that overflowed and were restarted.
        - `"first_nonfinite"` (int32): first step with a state that is not finite, T if
            there is none.
        - `"residual_history"` (real, `[history]`): the defect before each step, NaN
            after the last one; only for methods with `history=...`. For a ladder, it
            is that of the method the states come from (all NaN for the loop), and as
            long as the longest one.
    - `solver`: the solver as text.

    Under `vmap` the result and all statistics have the batch axes.
    """

    states: PyTree[Array]
    result: Any
    stats: dict[str, Array]
    solver: str = eqx.field(static=True, default="")

    @property
    def final(self) -> PyTree[Array]:
        """The last state, as `h0`; requires T >= 1."""
        return jax.tree.map(lambda s: s[-1], self.states)

    def __repr__(self) -> str:
        shapes = jax.tree.map(_describe, self.states)
        lines = [f"states {shapes}".replace("'", ""), f"by {self.solver}"]
        values = jax.tree.leaves((self.result, self.stats))
        if not any(isinstance(value, Tracer) for value in values):
            lines[:0] = [_outcome(self.result)]
            lines += _statistics(self.stats)
        return "Solution(\n" + "".join(f"  {line}\n" for line in lines) + ")"


def _describe(leaf) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _outcome(result) -> str:
    good = np.asarray(result == RESULTS.successful)
    if good.size == 1 and good:
        return "successful"
    if good.size == 1:
        return str(RESULTS[result]).split(".")[0] + "."
    return f"{good.sum()} of {good.size} sequences successful"


def _statistics(arrays: dict[str, Array]) -> list[str]:
    """Describe the statistics, leaving out those that report no problem."""
    stats = {name: np.asarray(value) for name, value in arrays.items()}
    if not stats["num_steps"].size:
        return []
    lines = [
        f"{_range(stats['num_steps'])} steps, residual {stats['residual'].max():.2g}, "
        f"certified up to step {_range(stats['certified_steps'])}"
    ]
    sequential = stats["sequential"]
    if sequential.all():
        lines.append("from the sequential loop")
    elif sequential.any():
        lines.append(f"from the sequential loop: {sequential.sum()} sequences")
    if stats["nonfinite"].any():
        lines.append(f"{stats['nonfinite'].sum()} entries overflowed and restarted")
    return lines


def _range(values: np.ndarray) -> str:
    low, high = values.min(), values.max()
    return f"{low}" if low == high else f"{low} to {high}"
