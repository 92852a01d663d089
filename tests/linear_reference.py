"""The layers of `linear/` as slow loops in float64 NumPy, from their equations.

Each is `name(p, xs, state, reset) -> (ys, state)`: `p` holds the fields of the layer by
name, `xs` is `[T, d]`, and the state is an array or a tuple of arrays. Weights are
`[out, in]`, and matrix states are `[heads, K, V]`. Where `reset` is true, the state
before that step is the fresh one. Nothing of the library is used here.
"""

import numpy as np
from scipy.linalg import expm
from scipy.special import erf

from tests.numpy_reference import block_diagonal, sigmoid


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0, x)


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def rms(x, weight):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * weight


def l2(x):
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def conv(window, u, weight, bias=0.0):
    """One step of the causal depthwise convolution, if any; oldest first."""
    if weight is None:
        return None, u
    inputs = np.concatenate([window, u[None]])
    c = bias + sum(weight[:, j] * inputs[j] for j in range(4))
    return inputs[1:], c


def outer(k, v):
    """`k vᵀ` of every head."""
    return k[:, :, None] * v[:, None, :]


def read(S, q):
    """`Sᵀ q` of every head."""
    return np.stack([S_h.T @ q_h for S_h, q_h in zip(S, q, strict=True)])


def start(state, reset, t):
    """The state before step t: zeros at a reset."""
    if reset is None or not reset[t]:
        return state
    if isinstance(state, tuple):
        return tuple(None if part is None else np.zeros_like(part) for part in state)
    return np.zeros_like(state)


# Fixed recurrences.


def lru_real(p, xs, h, reset=None):
    """The LRU with real eigenvalues, all positive or of either sign."""
    eigenvalues = np.exp(-np.exp(p.nu_log))
    if p.eigenvalues == "signed":
        eigenvalues = p.sign * eigenvalues
    ys = []
    for t, x in enumerate(xs):
        h = start(h, reset, t)
        h = eigenvalues * h + np.exp(p.gamma_log) * (p.B_re @ x)
        ys.append(p.C_re @ h + p.D * x)
    return np.stack(ys), h


def s5(p, xs, h, reset=None):
    A = -np.exp(p.log_A_real) + 1j * p.A_imag
    B, C = p.B_re + 1j * p.B_im, p.C_re + 1j * p.C_im
    dt = np.exp(p.log_dt)
    if p.discretisation == "zoh":
        A_bar = np.exp(dt * A)
        B_bar = ((A_bar - 1) / A)[:, None] * B
    else:
        A_bar = (1 + dt * A / 2) / (1 - dt * A / 2)
        B_bar = (dt / (1 - dt * A / 2))[:, None] * B
    ys = []
    for t, u in enumerate(xs):
        h = start(h, reset, t)
        h = A_bar * h + B_bar @ u
        ys.append(2 * (C @ h).real + p.D * u)
    return np.stack(ys), h


def lssl(p, xs, h, reset=None):
    features, channels, size = p.C.shape
    I = np.eye(size)
    A_bar, B_bar = [], []
    for dt in np.exp(p.log_dt):
        A_bar.append(np.linalg.solve(I - dt / 2 * p.A, I + dt / 2 * p.A))
        B_bar.append(np.linalg.solve(I - dt / 2 * p.A, dt * p.B))
    ys = []
    for t, u in enumerate(xs):
        h = start(h, reset, t)
        h = np.stack([A_bar[i] @ h[i] + B_bar[i] * u[i] for i in range(features)])
        z = np.stack([p.C[i] @ h[i] + p.D[i] * u[i] for i in range(features)])
        ys.append(p.W_out @ gelu(z.reshape(features * channels)) + p.b_out)
    return np.stack(ys), h


# Selective state spaces.


def mamba(p, xs, state, reset=None):
    rank = p.W_dt.shape[1]
    size = (len(p.W_x) - rank) // 2
    A = -np.exp(p.A_log)
    if p.eigenvalues == "complex":
        A = A + 1j * p.A_imag
    ys = []
    for t, x in enumerate(xs):
        window, s = start(state, reset, t)
        u, z = np.split(p.W_in @ x, 2)
        window, u = conv(window, u, p.conv_weight, p.conv_bias)
        u = silu(u)
        delta, B, C = np.split(p.W_x @ u, [rank, rank + size])
        dt = softplus(p.W_dt @ delta + p.b_dt)
        if p.eigenvalues == "complex":
            half = size // 2
            B, C = B[:half] + 1j * B[half:], C[:half] + 1j * C[half:]
        A_bar = np.exp(dt[:, None] * A)
        if p.eigenvalues == "signed":
            A_bar = 2 * A_bar - 1
        s = A_bar * s + np.outer(dt * u, B)
        y = 2 * (s @ C).real if p.eigenvalues == "complex" else s @ C
        ys.append(p.W_out @ ((y + p.D * u) * silu(z)))
        state = window, s
    return np.stack(ys), state


def mamba2(p, xs, state, reset=None):
    inner, heads = len(p.norm_weight), len(p.A_log)
    size = (len(p.W_in) - 2 * inner - heads) // 2
    ys = []
    for t, x in enumerate(xs):
        window, S = start(state, reset, t)
        z, xBC, delta = np.split(p.W_in @ x, [inner, 2 * inner + 2 * size])
        window, xBC = conv(window, xBC, p.conv_weight, p.conv_bias)
        u, B, C = np.split(silu(xBC), [inner, inner + size])
        u = u.reshape(heads, -1)
        dt = softplus(delta + p.dt_bias)
        a = np.exp(-np.exp(p.A_log) * dt)
        if p.eigenvalues == "signed":
            a = 2 * a - 1
        S = np.stack([a[i] * S[i] + dt[i] * np.outer(B, u[i]) for i in range(heads)])
        y = np.stack([S[i].T @ C + p.D[i] * u[i] for i in range(heads)])
        ys.append(p.W_out @ rms(y.reshape(inner) * silu(z), p.norm_weight))
        state = window, S
    return np.stack(ys), state


# Linear attention and the delta rule.


def gla(p, xs, S, reset=None):
    values = len(p.norm_weight)
    heads = len(p.W_v) // values
    keys = len(p.W_q) // heads
    ys = []
    for t, x in enumerate(xs):
        S = start(S, reset, t)
        q, k = (p.W_q @ x).reshape(heads, keys), (p.W_k @ x).reshape(heads, keys)
        v = (p.W_v @ x).reshape(heads, values)
        a = sigmoid(p.W_a2 @ (p.W_a1 @ x) + p.b_a)
        a = 2 * a - 1 if p.eigenvalues == "signed" else a ** (1 / 16)
        S = a.reshape(heads, keys, 1) * S + outer(k, v)
        o = rms(read(S, q) / np.sqrt(keys), p.norm_weight)
        ys.append(p.W_out @ (o.reshape(-1) * silu(p.W_g @ x)))
    return np.stack(ys), S


def delta_rule(p, xs, state, reset=None):
    """DeltaNet and DeltaProduct; gated where there is an `A_log`."""
    gated = getattr(p, "A_log", None) is not None
    steps, heads, d = p.W_b.shape
    values = len(p.norm_weight)
    keys = len(p.W_q) // heads
    largest = 2 if p.eigenvalues == "signed" else 1
    W_k, W_v = p.W_k.reshape(-1, d), p.W_v.reshape(-1, d)
    conv_k, conv_v = (
        None if taps is None else taps.reshape(-1, 4) for taps in (p.conv_k, p.conv_v)
    )
    ys = []
    for t, x in enumerate(xs):
        window_q, window_k, window_v, S = start(state, reset, t)
        window_q, q = conv(window_q, p.W_q @ x, p.conv_q)
        window_k, k = conv(window_k, W_k @ x, conv_k)
        window_v, v = conv(window_v, W_v @ x, conv_v)
        q = l2(silu(q).reshape(heads, keys))
        k = l2(silu(k).reshape(steps, heads, keys))
        v = silu(v).reshape(steps, heads, values)
        if gated:
            g = -np.exp(p.A_log) * softplus(p.W_a @ x + p.dt_bias)
            S = np.exp(g)[:, None, None] * S
        for j in range(steps):
            beta = largest * sigmoid(p.W_b[j] @ x)
            S = S + beta[:, None, None] * outer(k[j], v[j] - read(S, k[j]))
        y = rms(read(S, q) / np.sqrt(keys), p.norm_weight).reshape(-1)
        if gated:
            y = y * silu(p.W_g @ x)
        ys.append(p.W_out @ y)
        state = window_q, window_k, window_v, S
    return np.stack(ys), state


def rwkv7(p, xs, state, reset=None):
    heads, keys = p.r_k.shape

    def by_head(x):
        return x.reshape(heads, keys)

    ys = []
    for t, x in enumerate(xs):
        x_prev, S = start(state, reset, t)
        x_r, x_w, x_k, x_v, x_a, x_g = (x + mu * (x_prev - x) for mu in p.mu)
        r, k, v = p.W_r @ x_r, p.W_k @ x_k, p.W_v @ x_v
        w = np.exp(-np.exp(-0.5) * sigmoid(p.w0 + p.W_w2 @ np.tanh(p.W_w1 @ x_w)))
        a = sigmoid(p.a0 + p.W_a2 @ (p.W_a1 @ x_a))
        g = p.W_g2 @ sigmoid(p.W_g1 @ x_g)
        removed = by_head(k * p.k_k)
        norm = np.sqrt(np.sum(removed**2, axis=1, keepdims=True))
        removed = removed / np.maximum(norm, 1e-12)
        k = by_head(k * (1 + (a - 1) * p.k_a))
        r, v, w, a = by_head(r), by_head(v), by_head(w), by_head(a)
        S = w[:, :, None] * S - outer(a * removed, read(S, removed)) + outer(k, v)
        y = read(S, r)
        y = y - y.mean(axis=1, keepdims=True)
        y = y / np.sqrt(np.mean(y**2, axis=1, keepdims=True) + 64e-5)
        y = y * by_head(p.norm_weight) + by_head(p.norm_bias)
        y = y + np.sum(r * k * p.r_k, axis=1, keepdims=True) * v
        ys.append(p.W_out @ (y.reshape(-1) * g))
        state = x, S
    return np.stack(ys), state


# Gated recurrences.


def mlstm_inputs(p, window, x):
    """The window, and q, k, v and the gates i, f before their nonlinearities."""
    heads = len(p.W_i)
    keys = len(p.W_q) // heads
    window, c = conv(window, x, p.conv_weight, p.conv_bias)
    c = silu(c)
    q = (p.W_q @ c).reshape(heads, keys)
    k = (p.W_k @ c).reshape(heads, keys) / np.sqrt(keys)
    v = (p.W_v @ x).reshape(heads, -1)
    return window, q, k, v, p.W_i @ c + p.b_i, p.W_f @ c + p.b_f


def mlstm_output(p, x, o):
    y = rms(o, p.norm_weight.reshape(o.shape)).reshape(-1)
    return p.W_out @ (sigmoid(p.W_o @ x) * y)


def mlstm(p, xs, state, reset=None):
    ys = []
    for t, x in enumerate(xs):
        window, S, n, m = start(state, reset, t)
        window, q, k, v, i, f = mlstm_inputs(p, window, x)
        log_f = -softplus(-f)
        m_next = np.maximum(log_f + m, i)
        decay, gain = np.exp(log_f + m - m_next), np.exp(i - m_next)
        S = decay[:, None, None] * S + gain[:, None, None] * outer(k, v)
        n = decay[:, None] * n + gain[:, None] * k
        m = m_next
        normaliser = np.maximum(np.abs(np.sum(n * q, axis=1)), np.exp(-m)) + 1e-6
        ys.append(mlstm_output(p, x, read(S, q) / normaliser[:, None]))
        state = window, S, n, m
    return np.stack(ys), state


def mlstm_unstabilised(p, xs, state, reset=None):
    """`mlstm` without m in the recurrence and the state, and without the 1e-6.

    Its S and n are those of `mlstm` times exp(m).
    """
    ys = []
    for t, x in enumerate(xs):
        window, S, n = start(state, reset, t)
        window, q, k, v, i, f = mlstm_inputs(p, window, x)
        decay, gain = sigmoid(f), np.exp(i)
        S = decay[:, None, None] * S + gain[:, None, None] * outer(k, v)
        n = decay[:, None] * n + gain[:, None] * k
        normaliser = np.maximum(np.abs(np.sum(n * q, axis=1)), 1)
        ys.append(mlstm_output(p, x, read(S, q) / normaliser[:, None]))
        state = window, S, n
    return np.stack(ys), state


def positive(x):
    """The g of minGRU and minLSTM."""
    return np.where(x >= 0, x + 0.5, sigmoid(x))


def min_gru(p, xs, h, reset=None):
    ys = []
    for t, x in enumerate(xs):
        h = start(h, reset, t)
        z = sigmoid(p.W_z @ x + p.b_z)
        h = (1 - z) * h + z * positive(p.W_h @ x + p.b_h)
        ys.append(p.W_out @ h)
    return np.stack(ys), h


def min_lstm(p, xs, h, reset=None):
    ys = []
    for t, x in enumerate(xs):
        h = start(h, reset, t)
        f = sigmoid(p.W_f @ x + p.b_f)
        i = sigmoid(p.W_i @ x + p.b_i)
        h = f / (f + i) * h + i / (f + i) * positive(p.W_h @ x + p.b_h)
        ys.append(p.W_out @ h)
    return np.stack(ys), h


def rg_lru(p, xs, state, reset=None):
    """The first input's multiplier is 1."""
    h, fresh = state
    W_a, W_x = block_diagonal(p.W_a), block_diagonal(p.W_x)
    hs = []
    for t, x in enumerate(xs):
        r = sigmoid(W_a @ x + p.b_a)
        i = sigmoid(W_x @ x + p.b_x)
        a = np.exp(-8 * r * softplus(p.Lambda))
        if reset is not None and reset[t]:
            h = i * x
        elif t == 0 and fresh > 0:
            h = a * h + i * x
        else:
            h = a * h + np.sqrt(1 - a**2) * (i * x)
        hs.append(h)
    return np.stack(hs), (h, np.zeros(()))


# Transitions that are matrices.


def block_lrnn(p, xs, s, reset=None):
    blocks, size = p.W_A.shape[:2]
    power = 1.2
    ys = []
    for t, x in enumerate(xs):
        s = start(s, reset, t)
        u = (p.W_B @ x).reshape(blocks, size)
        s_next = []
        for b in range(blocks):
            A = p.W_A[b] @ x
            for j in range(size):
                norm = np.sum(np.abs(A[:, j]) ** power) ** (1 / power)
                A[:, j] = A[:, j] / max(1, norm)
            s_next.append(A @ s[b] + u[b])
        s = np.stack(s_next)
        ys.append(p.W_C @ s.reshape(-1))
    return np.stack(ys), s


def unitary_rnn(p, xs, s, reset=None):
    """A reset goes to the layer's own initial state."""
    size = len(p.initial)
    ys = []
    for t, x in enumerate(xs):
        if reset is not None and reset[t]:
            s = p.initial / np.sqrt(np.sum(p.initial**2))
        K = np.zeros((size, size))
        K[np.tril_indices(size, -1)] = p.W_skew @ x
        s = expm(K - K.T) @ s
        ys.append(p.W_out @ s)
    return np.stack(ys), s


# pLSTM.


def plstm(p, xs, C, reset=None):
    """pLSTM on a sequence. The mark reads the previous cell."""
    heads, values = len(p.b_s), len(p.norm_weight)
    keys = len(p.W_q) // heads
    ys = []
    for t, x in enumerate(xs):
        C = start(C, reset, t)
        q, k = (p.W_q @ x).reshape(heads, keys), (p.W_k @ x).reshape(heads, keys)
        v = (p.W_v @ x).reshape(heads, values)
        source = sigmoid(p.W_s @ x + p.b_s)
        transition = sigmoid(p.W_t @ x + p.b_t)
        mark = sigmoid(p.W_m @ x + p.b_m)
        direct = sigmoid(p.W_d @ x + p.b_d)
        kq = np.sum(k * q, axis=1)
        o = mark[:, None] * read(C, q) + (direct * kq)[:, None] * v
        C = transition[:, None, None] * C + source[:, None, None] * outer(k, v)
        ys.append(p.W_out @ rms(o / np.sqrt(keys), p.norm_weight).reshape(-1))
    return np.stack(ys), C


def plstm_grid(q, k, v, source, mark, direct, T_rl, T_ru, T_dl, T_du):
    """pLSTM on a grid, edge by edge; returns the outputs `[H, W, heads, V]`.

    q, k, v are `[H, W, heads, K or V]`, source and mark `[2, H, W, heads]` of the right
    and the down edge, and the others `[H, W, heads]`. `T_rl` leads from the left to the
    right edge, `T_ru` from the upper to the right edge, and so on.
    """
    height, width, heads, keys = q.shape
    values = v.shape[-1]
    out = np.zeros((height, width, heads, values))
    for head in range(heads):
        right, down = {}, {}
        for i in range(height):
            for j in range(width):
                at = i, j, head
                left = right.get((i, j - 1), np.zeros((keys, values)))
                up = down.get((i - 1, j), np.zeros((keys, values)))
                kv = np.outer(k[at], v[at])
                right[i, j] = T_rl[at] * left + T_ru[at] * up + source[(0, *at)] * kv
                down[i, j] = T_dl[at] * left + T_du[at] * up + source[(1, *at)] * kv
                read_out = (mark[(0, *at)] * left + mark[(1, *at)] * up).T @ q[at]
                read_out = read_out + direct[at] * (k[at] @ q[at]) * v[at]
                out[at] = read_out / np.sqrt(keys)
    return out


# Monoids.


def monoid_prefix(op, xs):
    """The reduction of every prefix by a balanced tree, `[len(xs), ...]`.

    Neighbours pair level by level, and an odd leftover passes up one level.
    """
    prefixes = []
    for n in range(1, len(xs) + 1):
        level = list(xs[:n])
        while len(level) > 1:
            paired = [op(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
            if len(level) % 2:
                paired.append(level[-1])
            level = paired
        prefixes.append(level[0])
    return np.stack(prefixes)
