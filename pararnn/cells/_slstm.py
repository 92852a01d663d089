from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Bool, DTypeLike, Float, PRNGKeyArray

from .._parameters import (
    affine,
    check_choice,
    check_dtype,
    check_heads,
    check_input,
    check_key,
    check_size,
    check_sizes,
    is_number,
    linear,
    recurrent,
    wide_dtype,
    widen,
    zeros,
)
from ..scan import Diagonal, linear_scan, max_plus_scan
from ._base import AbstractCell

# c, n, m and h.
State = tuple[
    Float[Array, "*time d_state"],
    Float[Array, "*time d_state"],
    Float[Array, "*time d_state"],
    Float[Array, "*time d_state"],
]


# Newton's steps, by the number of sweeps that made the initial guess. Without sweeps it
# is a few steps of the cell; "-" is more than 60. T = 2048, 32 units of float32, R
# uniform or three times that:
#
# | heads, R     | segments | 0  | 1  | 2  | 3 | 5 | 8 |
# |--------------|----------|----|----|----|---|---|---|
# | 4, uniform   | 2048     | 14 | 6  | 4  | 3 | 1 | 1 |
# | 4, uniform   | 64       | 6  | 5  | 3  | 3 | 1 | 1 |
# | 32, uniform  | 2048     | 15 | 5  | 3  | 3 | 2 | 1 |
# | 32, uniform  | 64       | 6  | 3  | 2  | 2 | 1 | 1 |
# | 4, 3 times   | 2048     | -  | 12 | 10 | 9 | 5 | 3 |
# | 4, 3 times   | 64       | 7  | 6  | 6  | 5 | 4 | 3 |
# | 32, 3 times  | 2048     | -  | -  | -  | - | - | - |
# | 32, 3 times  | 64       | 26 | 9  | 9  | 8 | 8 | 7 |
#
# Without sweeps, m misses what hundreds of steps add up to. As m stands in exponents,
# iterates overflow (3 million entries in the row of 4 heads, three times R). A sweep
# took 1 ms on the CPU; a step of Newton's method took 2 to 40 ms with blocks of 4 x 4,
# and 20 to 300 ms with blocks of 32 x 32.
SWEEPS = 5

# The stabiliser of a state that holds nothing: below any other, and finite.
NOTHING = -1e30
# An exponential up to here, and its product with another, are finite in float32.
LARGEST = 80.0


class SLSTMCell(AbstractCell):
    r"""The scalar LSTM of xLSTM: exponential input gates, and heads that mix memory.

    $$\begin{aligned}
    z_t &= \tanh(W_z x_t + R_z h_{t-1} + b_z), \quad
    o_t = \sigma(W_o x_t + R_o h_{t-1} + b_o) \\
    \tilde\imath_t &= W_i x_t + R_i h_{t-1} + b_i, \quad
    \tilde f_t = W_f x_t + R_f h_{t-1} + b_f \\
    m_t &= \max(\log f_t + m_{t-1}, \tilde\imath_t), \quad
    i'_t = e^{\tilde\imath_t - m_t}, \quad
    f'_t = e^{\log f_t + m_{t-1} - m_t} \\
    c_t &= f'_t \odot c_{t-1} + i'_t \odot z_t, \quad
    n_t = f'_t \odot n_{t-1} + i'_t, \quad
    h_t = o_t \odot c_t / n_t
    \end{aligned}$$

    with $\log f_t = \log \sigma(\tilde f_t)$, or $\tilde f_t$ itself for the
    exponential forget gate. The state is the tuple $(c, n, m, h)$, each `[d_state]`,
    and a layer emits $h$. The Jacobian has a block of `4 * d_state // heads` rows for
    each head.

    The normaliser is the paper's $c/n$, neither $c/\max(n, 1)$ nor $c/(n + \epsilon)$.
    Where $n_{t-1} = 0$, the state holds nothing for $m$ to scale, and
    $m_t = \tilde\imath_t$, as in the released code. From a fresh state, $n_t \ge 1$ and
    $|h_t| < 1$ for any gates. There $b_i$ scales $c$ and $n$ alike: it only matters
    for a state that is passed in.

    ??? cite "Source"

        Beck et al., "xLSTM: Extended Long Short-Term Memory" (2405.04517); initialised
        like its released code, `NX-AI/xlstm`, with
        `bias_init="powerlaw_blockdependent"`.
    """

    W_i: Float[Array, "d_state d_input"]
    W_f: Float[Array, "d_state d_input"]
    W_z: Float[Array, "d_state d_input"]
    W_o: Float[Array, "d_state d_input"]
    R_i: Float[Array, "*heads out in"]
    R_f: Float[Array, "*heads out in"]
    R_z: Float[Array, "*heads out in"]
    R_o: Float[Array, "*heads out in"]
    b_i: Float[Array, " d_state"]
    b_f: Float[Array, " d_state"]
    b_z: Float[Array, " d_state"]
    b_o: Float[Array, " d_state"]
    d_input: int
    d_state: int
    heads: int
    forget: str = eqx.field(static=True)
    sweeps: int = eqx.field(static=True)

    def __init__(
        self,
        d_input: int,
        d_state: int | None = None,
        *,
        heads: int = 1,
        forget: Literal["sigmoid", "exponential"] = "sigmoid",
        recurrence: Literal["zeros", "uniform"] = "zeros",
        depth: float = 0.0,
        sweeps: int = SWEEPS,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        r"""**Arguments:**

        - `d_input`: size of the input.
        - `d_state`: size of each array of the state. Defaults to `d_input`.
        - `heads`: the recurrent matrices $R$ are block-diagonal with this many blocks;
            it must divide `d_state`. With `heads=d_state` they are diagonal.
        - `forget`: `"sigmoid"`, or `"exponential"`, with which $m$ may grow without
            bound over time, and lose precision.
        - `recurrence`: the initial $R$: `"zeros"`, as in the released code, or
            `"uniform"`, within one over the root of a block's width.
        - `depth`: the position of the layer in a stack, from 0 for the first to 1 for
            the last. Only the initial forget biases depend on it.
        - `sweeps`: how often `guess` goes over the sequence.
        - `dtype`: dtype of the parameters. Defaults to JAX's default floating-point
            dtype. 16-bit parameters have a float32 state.
        - `key`: a key of `jax.random`. $W$ is normal with variance
            $2 / (5 d_{input})$. The forget biases of a head of $s$ units are
            $5 - 12 (j / (s - 1))^{0.3 + 1.3\,depth}$, $j = 0 \dots s - 1$ (all units
            count as one head if `heads=d_state`), or their
            $\log \sigma$ for the exponential gate; the other biases are zero.

        **Raises:** `ValueError` on a size that is not a positive integer, heads that
        do not divide `d_state`, an unknown choice, a depth outside of [0, 1], an
        invalid key, or a dtype that is not floating point.
        """
        where = "SLSTMCell"
        self.d_input, self.d_state = check_sizes(where, d_input, d_state)
        self.heads = check_heads(where, heads, "the recurrent", d_state=self.d_state)
        check_choice(where, "forget", forget, ("sigmoid", "exponential"))
        check_choice(where, "recurrence", recurrence, ("zeros", "uniform"))
        if not is_number(depth) or not 0 <= depth <= 1:
            raise ValueError(
                f"{where}: `depth` must be a number from 0 to 1, got {depth!r}. Likely "
                "cause: a layer's index; divide it by the number of layers minus 1."
            )
        self.forget, self.sweeps = forget, check_size(where, "sweeps", sweeps)
        dtype = check_dtype(where, dtype)
        check_key(where, key)
        inputs, hidden = jr.split(key)
        n, wide = self.d_state, wide_dtype(dtype)
        draws = jr.normal(inputs, (4, n, self.d_input), wide)
        weights = ((2 / (5 * self.d_input)) ** 0.5 * draws).astype(dtype)
        self.W_i, self.W_f, self.W_z, self.W_o = jnp.unstack(weights)
        matrices = recurrent(hidden, 4, n, self.heads, dtype)
        if recurrence == "zeros":
            matrices = tuple(map(jnp.zeros_like, matrices))
        self.R_i, self.R_f, self.R_z, self.R_o = matrices
        self.b_i, self.b_z, self.b_o = (jnp.zeros(n, dtype) for _ in range(3))
        size = n if self.heads == n else n // self.heads
        place = jnp.tile(jnp.linspace(0, 1, size, dtype=wide), n // size)
        self.b_f = 5 - 12 * place ** (0.3 + 1.3 * depth)
        if forget == "exponential":
            self.b_f = log_sigmoid(self.b_f)
        self.b_f = self.b_f.astype(dtype)

    def gates(
        self, x: Float[Array, "*time d_input"]
    ) -> tuple[Float[Array, "*time d_state"], ...]:
        """`W x + b` of i, f, z and o; see [`pararnn.AbstractCell.gates`][]."""
        x = check_input("SLSTMCell", x, self.d_input)
        return (
            affine(self.W_i, x, self.b_i),
            affine(self.W_f, x, self.b_f),
            affine(self.W_z, x, self.b_z),
            affine(self.W_o, x, self.b_o),
        )

    def update(
        self,
        state: State,
        gates: tuple[Float[Array, " d_state"], ...],
    ) -> State:
        """The next $(c, n, m, h)$, each `[d_state]`, in the dtypes of `state`."""
        c, n, m, h, *values = widen(*state, *gates)
        i, log_f, z, o = self._with_memory(values, h)
        fresh = n == 0
        before, m = m, jnp.where(fresh, i, jnp.maximum(log_f + m, i))
        decay, added = _stabilised_forget(log_f, before, m), jnp.exp(i - m)
        c, n = decay * c + added * z, decay * n + added
        return _cast((c, n, m, o * c / n), state)

    def _with_memory(self, gates, h):
        """Return the gates' values, given the output `h` of the previous step."""
        g_i, g_f, g_z, g_o, h, R_i, R_f, R_z, R_o = widen(
            *gates, h, self.R_i, self.R_f, self.R_z, self.R_o
        )
        f = g_f + linear(R_f, h)
        return (
            g_i + linear(R_i, h),
            log_sigmoid(f) if self.forget == "sigmoid" else f,
            jnp.tanh(g_z + linear(R_z, h)),
            sigmoid(g_o + linear(R_o, h)),
        )

    def guess(
        self,
        gates: tuple[Float[Array, "T d_state"], ...],
        state: State,
        reset: Bool[Array, " T"] | None = None,
    ) -> State:
        """Compute all states by scans, `sweeps` times, each with the last sweep's $h$.

        See [`pararnn.AbstractCell.guess`][]. The first sweep uses the $h$ of `state`.
        The gates depend on the previous step only through $R h$, so each sweep makes
        one more step exact. Where $R$ is zero, the first makes all of them exact.
        """
        c0, n0, m0, h0, *values = widen(*state, *gates)

        def sweep(_, found):
            before = jnp.concatenate([h0[None], found[3][:-1]])
            if reset is not None:
                before = jnp.where(reset[:, None], 0, before)
            i, log_f, z, o = self._with_memory(values, before)
            c, n, m = _scan_gates(i, log_f, z, (c0, n0, m0), reset)
            return c, n, m, o * c / n

        steps = values[0].shape[0]
        still = tuple(jnp.repeat(s[None], steps, 0) for s in (c0, n0, m0, h0))
        return _cast(lax.fori_loop(0, self.sweeps, sweep, still), state)

    def init_state(self) -> State:
        """Zeros $(c, n, m, h)$, each `[d_state]`, at least float32."""
        c, n, m, h = (zeros(self.d_state, self.b_i.dtype) for _ in range(4))
        return c, n, m, h

    def output(self, state: State) -> Float[Array, " d_state"]:
        """$h$, `[d_state]`."""
        return state[3]


def _cast(values: State, like: State) -> State:
    c, n, m, h = (v.astype(s.dtype) for v, s in zip(values, like, strict=True))
    return c, n, m, h


def _stabilised_forget(
    log_f: Float[Array, "*time d_state"],
    before: Float[Array, "*time d_state"],
    m: Float[Array, "*time d_state"],
) -> Float[Array, "*time d_state"]:
    """Return the stabilised forget gate, from the stabilisers before and after a step.

    It is at most 1, except where the state held nothing: there it multiplies zeros, and
    must not be infinite.
    """
    return jnp.exp(jnp.minimum(log_f + before - m, LARGEST))


def _scan_gates(
    i: Float[Array, "T d_state"],
    log_f: Float[Array, "T d_state"],
    z: Float[Array, "T d_state"],
    initial: tuple[
        Float[Array, " d_state"], Float[Array, " d_state"], Float[Array, " d_state"]
    ],
    reset: Bool[Array, " T"] | None,
) -> tuple[
    Float[Array, "T d_state"], Float[Array, "T d_state"], Float[Array, "T d_state"]
]:
    """Return all $(c, n, m)$, given all gates.

    $m$ is a max-plus recurrence. Once it is known, $c$ and $n$ are linear ones. A reset
    starts from zeros.
    """
    c0, n0, m0 = initial
    m = max_plus_scan(
        log_f,
        i,
        jnp.where(n0 == 0, NOTHING, m0),
        reset=reset,
        reset_state=None if reset is None else jnp.full_like(m0, NOTHING),
    )
    before = jnp.concatenate([m0[None], m[:-1]])
    if reset is not None:
        before = jnp.where(reset[:, None], 0, before)
    transition = Diagonal(_stabilised_forget(log_f, before, m))
    added = jnp.exp(i - m)
    c = linear_scan(transition, added * z, c0, reset=reset)
    n = linear_scan(transition, added, n0, reset=reset)
    return c, n, m
