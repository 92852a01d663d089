"""`diagnose`: the entry point, and the checks of what it measures."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array, Bool, PyTree

from ..solver import AbstractMethod, Sequential
from ..solver._methods import is_count
from ..solver._structure import find_structure
from ._diagnosis import Diagnosis
from ._growth import measure_growth
from ._measure import measure
from ._methods import choose_methods
from ._problem import WHERE, pose, refuse_tracers
from ._programs import compile_solves
from ._progress import Progress
from ._recommend import recommend


def diagnose(
    f: Callable[[PyTree, PyTree], PyTree],
    xs: PyTree,
    h0: PyTree,
    *,
    reset: Bool[Array, " T"] | None = None,
    reset_state: PyTree | None = None,
    methods: Sequence[AbstractMethod] | None = None,
    lengths: Sequence[int] | None = None,
    max_steps: int = 100,
    progress: bool = True,
) -> Diagnosis:
    r"""Will parallel methods converge on $h_t = f(h_{t-1}, x_t)$, and how fast?

    Runs the loop and a few methods on the recurrence, for several lengths, and measures
    how perturbations grow. Use it on a cell and data that are typical of a training
    run, before and after training: what parallelises may change with the parameters.
    Takes seconds, most of it compilation, for narrow cells. `print` the result.

    ```python
    diagnosis = pararnn.diagnose(cell, xs, h0)
    print(diagnosis)
    diagnosis.plot("diagnosis.png")
    pararnn.solve(cell, xs, h0, solver=diagnosis.recommended)
    ```

    **Growth of perturbations.** With $J_t = \partial f / \partial h$ at $h_{t-1}$,
    random unit tangents $v$ are pushed along, $v_t = J_t v_{t-1} / \|J_t v_{t-1}\|$, in
    one pass that keeps only them. The largest Lyapunov exponent is taken to be

    $$\lambda = \max_v \frac{1}{T - 1} \sum_{t=2}^{T} \log \|J_t v_{t-1}\| \le
        \frac{1}{T - 1} \log \|J_T \cdots J_2\|,$$

    over the steps that no reset interrupts. The largest growth is the largest factor by
    which one of the tangents grew between any two states, hence a lower bound of
    $\max_{s \le t} \|J_t \cdots J_s\|$, and at least 1; half of the tangents are drawn
    anew wherever they have shrunk. Both are also computed with every Jacobian at
    $h_{t-1} = h_0$: methods start from states that are not on the solution.

    **What they imply.** In the terms of Gonzalez et al. 2025, methods minimise
    $\tfrac12 \|r\|^2$ for the residual $r_t = f(h_{t-1}, x_t) - h_t$. With
    $R = \partial r / \partial h$ it satisfies the Polyak-Łojasiewicz condition with the
    constant $\mu = \inf_h \sigma_{\min}(R)^2$, the larger the better. $-R$ has the
    identity on its block diagonal and $-J_t$ below, so the blocks of its inverse are
    the identity and all $J_t \cdots J_s$. A block's norm is at most that of the whole,
    hence, at any trajectory $h$,

    $$\sqrt\mu \le \sigma_{\min}(R) = \|R^{-1}\|^{-1} \le
        \min(1, \|J_t \cdots J_s\|^{-1}),$$

    which is what the report bounds $\sqrt\mu$ by (`log_pl_bound`), from the two
    trajectories above. Where perturbations grow at the rate $\lambda > 0$, that
    is exponentially small in T: the recurrence is not predictable, and unless it is
    nearly linear, about as many steps are needed as there are segments. Conversely,
    *if* $\|J_{t+k-1} \cdots J_t\| \le a e^{\lambda k}$ for all $t$, $k$ and at all
    trajectories, then the $k$-th diagonal of blocks of $R^{-1}$ is at most that large,
    and summing them,

    $$\sqrt\mu \ge \frac{1}{a} \Big(\sum_{k=0}^{T-1} e^{\lambda k}\Big)^{-1}
        = \frac{1}{a} \cdot \frac{1 - e^\lambda}{1 - e^{\lambda T}},$$

    which for $\lambda < 0$ does not fall with T. It is not computed here: neither $a$
    nor "at all trajectories" can be had from a few of them.

    **A negative exponent alone does not promise few steps.** Measured for
    $\tanh(g W h + x)$ with normal $W$ of variance 1/8, width 8, T = 512, g = 4 in
    float64: for four $W$, exponents of -0.20 to -0.09 along the solution, and 359 to
    432 steps of `Newton()`. At $h_0 = 0$ the exponents are 0.85 to 1.16, which tells
    the difference: for g = 1 they are -0.54 to -0.23, and 5 to 9 steps suffice.

    **Steps.** Each method is given up to `max_steps` steps, and has converged once the
    residual is certified as in [`pararnn.solve`][]. To measure a shorter length the
    recurrence is reset everywhere behind it, which costs those states one step, so that
    one compiled program serves all lengths.

    **The recommendation** counts the evaluations that follow one after the other, as
    they do on hardware that takes all of time at once: the least wins, the loop unless
    another needs at most a quarter of T. It is for the forward pass. The times beside
    it are those of the machine that it runs on, once: on a CPU the loop mostly wins.

    **Arguments:**

    - `f`, `xs`, `h0`, `reset`, `reset_state`: as for [`pararnn.solve`][], with T of at
        least 16. Concrete arrays: this runs programs, and cannot be part of one.
    - `methods`: the methods to try, each an [`pararnn.AbstractMethod`][]. Default:
        `Newton()`, `Newton(segments=T // 16)`, `QuasiNewton()`, `ELK()`, `Jacobi()`
        and `Picard()`. Where the Jacobians of all steps together are large (16 MiB),
        `QuasiNewton(probes=4)` and no `ELK()`, and from 256 MiB on no `Newton()`. `[]`
        leaves the loop and the growth of perturbations.
    - `lengths`: how many steps to cut the recurrence to, besides T itself. Default:
        T/16 and T/4.
    - `max_steps`: limit on the steps of each method. A recurrence of T steps never
        needs more than T.
    - `progress`: show a progress bar on a terminal, if `rich` is installed and it takes
        longer than a second.

    **Returns:** a [`pararnn.Diagnosis`][].

    **Raises:** `TypeError` under `jax.jit`, `vmap` or `grad`, and for anything but
    methods; `ValueError` for T below 16, lengths or limits that do not fit, and states
    that are not finite; otherwise as [`pararnn.solve`][].

    ??? cite "Source"

        Gonzalez, Kozachkov, Zoltowski, Clarkson and Linderman, "Predictability enables
        parallelization of nonlinear state space models" (2025), 2508.16817: $\mu$ and
        the smallest singular value, and the bounds by the Lyapunov exponent (Theorem
        2, under the condition (10) on products of Jacobians). The published text was
        not at hand: its numbering is that of summaries, the lower bound agrees with
        the authors' code (`log_mu_numerically_stable`), and both bounds are derived
        above. Upper bounds from two trajectories, and the exponent at `h0`, are this
        library's own.
    """
    refuse_tracers((f, xs, h0, reset, reset_state))
    problem = pose(f, xs, h0, reset, reset_state)
    chosen = choose_methods(methods, problem)
    lengths = _choose_lengths(lengths, problem.length)
    _check_max_steps(max_steps)
    solvers = {"Sequential()": Sequential(), **chosen}
    with Progress(2 * len(solvers) + 1, progress) as bar:
        programs = compile_solves(problem, solvers, max_steps, bar)
        measured = {}
        for name, solver in solvers.items():
            bar.advance(f"run {name}")
            measured[name] = measure(problem, solver, programs[name], lengths)
        sequential = measured.pop("Sequential()")
        bar.advance("growth of perturbations")
        trajectory, at_h0 = measure_growth(problem)
    recommended, reasons = recommend(measured, sequential, trajectory, at_h0)
    recurrence = problem.recurrence
    return Diagnosis(
        structure=find_structure(recurrence),
        width=recurrence.width,
        length=problem.length,
        dtype=", ".join(sorted({str(s.dtype) for s in recurrence.state_leaves})),
        platform=jax.default_backend(),
        trajectory=trajectory,
        at_h0=at_h0,
        methods=measured,
        sequential=sequential,
        max_steps=max_steps,
        recommended=recommended,
        reasons=reasons,
    )


def _choose_lengths(lengths: Sequence[int] | None, steps: int) -> tuple[int, ...]:
    if lengths is None:
        lengths = [max(4, steps // 16), max(4, steps // 4)]
    wrong = [n for n in lengths if not (is_count(n) and 2 <= n <= steps)]
    if wrong:
        raise ValueError(
            f"{WHERE}: `lengths` holds {wrong[0]!r}; expected whole numbers from 2 to "
            f"T = {steps}, the number of steps of `xs`."
        )
    return tuple(sorted({*map(int, lengths), steps}))


def _check_max_steps(max_steps: Any) -> None:
    if not (is_count(max_steps) and max_steps >= 1):
        raise ValueError(
            f"{WHERE}: `max_steps` is {max_steps!r}; expected a whole number >= 1."
        )
