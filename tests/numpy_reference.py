"""The recurrences as slow loops in float64 NumPy, written from their equations.

Each takes the parameters by their names in the equations, inputs `[T, d]` and a state,
and returns the outputs `[T, ...]` and the last state. A `reset` at a step replaces the
state before that step with zeros. Nothing of the library is used here.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np


def parameters(module) -> SimpleNamespace:
    """The array fields of a module in float64, and its other fields as they are."""
    fields = {}
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        fields[field.name] = (
            np.asarray(value, np.float64) if hasattr(value, "dtype") else value
        )
    return SimpleNamespace(**fields)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def block_diagonal(blocks):
    heads, rows, columns = blocks.shape
    full = np.zeros((heads * rows, heads * columns))
    for i in range(heads):
        full[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = blocks[i]
    return full


def elman(p, xs, h):
    hs = []
    for x in xs:
        h = p.W @ x + p.U @ h + p.b
        h = np.tanh(h) if p.activation == "tanh" else np.maximum(h, 0)
        hs.append(h)
    return np.stack(hs), h


def gru(p, xs, h):
    hs = []
    for x in xs:
        r = sigmoid(p.W_ir @ x + p.b_ir + matrix(p.W_hr) @ h + p.b_hr)
        z = sigmoid(p.W_iz @ x + p.b_iz + matrix(p.W_hz) @ h + p.b_hz)
        n = np.tanh(p.W_in @ x + p.b_in + r * (matrix(p.W_hn) @ h + p.b_hn))
        h = (1 - z) * n + z * h
        hs.append(h)
    return np.stack(hs), h


def lstm(p, xs, state):
    c, h = state
    hs = []
    for x in xs:
        i = sigmoid(p.W_ii @ x + p.b_ii + matrix(p.W_hi) @ h + p.b_hi)
        f = sigmoid(p.W_if @ x + p.b_if + matrix(p.W_hf) @ h + p.b_hf)
        g = np.tanh(p.W_ig @ x + p.b_ig + matrix(p.W_hg) @ h + p.b_hg)
        o = sigmoid(p.W_io @ x + p.b_io + matrix(p.W_ho) @ h + p.b_ho)
        c = f * c + i * g
        h = o * np.tanh(c)
        hs.append(h)
    return np.stack(hs), (c, h)


def matrix(blocks):
    """A recurrent matrix, given as such or by its diagonal blocks."""
    return blocks if blocks.ndim == 2 else block_diagonal(blocks)


def paragru(p, xs, h):
    B_z, B_r, B_n = (block_diagonal(B) for B in (p.B_z, p.B_r, p.B_n))
    hs = []
    for x in xs:
        z = sigmoid(p.a_z * h + B_z @ x + p.b_z)
        r = sigmoid(p.a_r * h + B_r @ x + p.b_r)
        n = np.tanh(p.a_n * h * r + B_n @ x + p.b_n)
        h = z * n + (1 - z) * h
        hs.append(h)
    return np.stack(hs), h


def paralstm(p, xs, state):
    B_f, B_c, B_o = (block_diagonal(B) for B in (p.B_f, p.B_c, p.B_o))
    c, h = state
    hs = []
    for x in xs:
        f = sigmoid(p.a_f * h + B_f @ x + p.p_f * c + p.b_f)
        c = f * c + (1 - f) * np.tanh(p.a_c * h + B_c @ x + p.b_c)
        o = sigmoid(p.a_o * h + B_o @ x + p.p_o * c + p.b_o)
        h = o * np.tanh(c)
        hs.append(h)
    return np.stack(hs), (c, h)


def slstm(p, xs, state):
    c, n, m, h = state
    R_i, R_f, R_z, R_o = (matrix(R) for R in (p.R_i, p.R_f, p.R_z, p.R_o))
    hs = []
    for x in xs:
        z = np.tanh(p.W_z @ x + R_z @ h + p.b_z)
        o = sigmoid(p.W_o @ x + R_o @ h + p.b_o)
        i = p.W_i @ x + R_i @ h + p.b_i
        f = p.W_f @ x + R_f @ h + p.b_f
        log_f = -np.log1p(np.exp(-f)) if p.forget == "sigmoid" else f
        m_new = np.maximum(log_f + m, i)
        f, i = np.exp(log_f + m - m_new), np.exp(i - m_new)
        c, n, m = f * c + i * z, f * n + i, m_new
        h = o * c / n
        hs.append(h)
    return np.stack(hs), (c, n, m, h)


def cfc(p, xs, h):
    hs = []
    for x in xs:
        x, dt = (x[:-1], x[-1]) if p.dt == "input" else (x, p.dt)
        u = 1.7159 * np.tanh(2 / 3 * (p.B_x @ x + p.B_h @ h + p.b))
        g, k = np.tanh(p.W_g @ u + p.b_g), np.tanh(p.W_k @ u + p.b_k)
        gate = sigmoid(-(p.W_f @ u + p.b_f) * dt)
        h = gate * g + (1 - gate) * k
        hs.append(h)
    return np.stack(hs), h


def lem(p, xs, state):
    z, y = state
    ys = []
    for x in xs:
        step_z = p.dt * sigmoid(p.W_1 @ y + p.V_1 @ x + p.b_1)
        step_y = p.dt * sigmoid(p.W_2 @ y + p.V_2 @ x + p.b_2)
        z = (1 - step_z) * z + step_z * np.tanh(p.W_z @ y + p.V_z @ x + p.b_z)
        y = (1 - step_y) * y + step_y * np.tanh(p.W_y @ z + p.V_y @ x + p.b_y)
        ys.append(y)
    return np.stack(ys), (z, y)


def plrnn(p, xs, z):
    zs = []
    for x in xs:
        z = p.A * z + p.W @ np.maximum(z, 0) + p.h + p.C @ x
        zs.append(z)
    return np.stack(zs), z


def alrnn(p, xs, z):
    zs = []
    for x in xs:
        phi = z.copy()
        for i in range(p.d_state - p.rectified, p.d_state):
            phi[i] = max(z[i], 0)
        z = np.diag(p.A) @ z + p.W @ phi + p.h + p.C @ x
        zs.append(z)
    return np.stack(zs), z


def schatten(matrix, order=4096):
    """A bound just above the largest singular value."""
    values = np.linalg.svd(matrix)[1]
    return values.max() * np.sum((values / values.max()) ** order) ** (1 / order)


def iclrnn(p, xs, h):
    W, U = p.W / schatten(p.W), np.abs(p.U) / schatten(np.abs(p.U))
    hs = []
    for x in xs:
        h = np.maximum(W @ x + U @ h + p.b, 0)
        hs.append(h)
    return np.stack(hs), h


def rotation_y(angle):
    c, s = np.cos(angle / 2), np.sin(angle / 2)
    return np.array([[c, -s], [s, c]])


def rotation_z(angle):
    return np.diag([np.exp(-0.5j * angle), np.exp(0.5j * angle)])


def qkan_map(p, v):
    """Sums of expectations of Z, each circuit as a product of complex matrices."""
    theta_z, theta_y, w, b = (
        np.asarray(a, np.float64) for a in (p.theta_z, p.theta_y, p.w, p.b)
    )
    layers, gates, outputs, inputs = w.shape
    total = np.zeros((gates, outputs))
    for g, j, i in np.ndindex(gates, outputs, inputs):
        qubit = np.array([1, 1]) / np.sqrt(2)
        for l in range(layers + 1):
            if l:
                turn = w[l - 1, g, j, i] * v[i] + b[l - 1, g, j, i]
                qubit = rotation_z(turn) @ qubit
            qubit = rotation_z(theta_z[l, g, j, i]) @ qubit
            qubit = rotation_y(theta_y[l, g, j, i]) @ qubit
        total[g, j] += abs(qubit[0]) ** 2 - abs(qubit[1]) ** 2
    return total


def qkanlstm(p, xs, state):
    c, h = state
    hs = []
    for x in xs:
        i, f, g, o = qkan_map(p.of_x, x) + qkan_map(p.of_h, h)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        hs.append(h)
    return np.stack(hs), (c, h)


def lru(p, xs, h, reset=None):
    eigenvalues = np.exp(-np.exp(p.nu_log) + 1j * np.exp(p.theta_log))
    B, C = p.B_re + 1j * p.B_im, p.C_re + 1j * p.C_im
    ys = []
    for t, x in enumerate(xs):
        if reset is not None and reset[t]:
            h = np.zeros_like(eigenvalues)
        h = eigenvalues * h + np.exp(p.gamma_log) * (B @ x)
        ys.append((C @ h).real + p.D * x)
    return np.stack(ys), h


def s4d_discrete(p):
    """Ā and B̄, `[channels, modes]`."""
    A = -np.exp(p.log_A_real) + 1j * p.A_imag
    B = p.B_re + 1j * p.B_im
    dt = np.exp(p.log_dt)[:, None]
    if p.discretisation == "zoh":
        return np.exp(dt * A), (np.exp(dt * A) - 1) / A * B
    return (1 + dt * A / 2) / (1 - dt * A / 2), dt * B / (1 - dt * A / 2)


def s4d(p, xs, h, reset=None):
    A_bar, B_bar = s4d_discrete(p)
    C = p.C_re + 1j * p.C_im
    ys = []
    for t, x in enumerate(xs):
        if reset is not None and reset[t]:
            h = np.zeros_like(A_bar)
        h = A_bar * h + B_bar * x[:, None]
        ys.append(2 * (C * h).sum(1).real + p.D * x)
    return np.stack(ys), h


def s4d_by_convolution(p, xs):
    """From zeros, by FFT: the impulse response of each channel applied to its input."""
    A_bar, B_bar = s4d_discrete(p)
    C = p.C_re + 1j * p.C_im
    steps = len(xs)
    powers = A_bar[None] ** np.arange(steps)[:, None, None]
    kernel = 2 * (C * powers * B_bar).sum(-1).real
    spectrum = np.fft.rfft(kernel, 2 * steps, axis=0) * np.fft.rfft(
        xs, 2 * steps, axis=0
    )
    return np.fft.irfft(spectrum, 2 * steps, axis=0)[:steps] + p.D * xs


def hippo_legs_normal(size):
    """The normal part A + P Pᵀ of HiPPO-LegS, and its B."""
    A = np.zeros((size, size))
    for n in range(size):
        for k in range(size):
            if n > k:
                A[n, k] = -np.sqrt((2 * n + 1) * (2 * k + 1))
            elif n == k:
                A[n, k] = -(n + 1)
    P = np.sqrt(np.arange(size) + 0.5)
    return A + np.outer(P, P), np.sqrt(2 * np.arange(size) + 1.0)
