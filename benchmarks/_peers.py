"""What `pararnn` is compared with, written by hand in plain JAX."""

import jax
import jax.numpy as jnp
from jax import lax


def scan_states(f, xs, h0):
    """All states of `h_t = f(h_{t-1}, x_t)`, one after the other."""

    def body(h, x):
        h = f(h, x)
        return h, h

    return lax.scan(body, h0, xs)[1]


def scan_linear(multiply, a, b, reverse: bool = False):
    """`h_t = a_t h_{t-1} + b_t` from zeros, one step after the other."""

    def body(h, at_t):
        a, b = at_t
        h = multiply(a, h) + b
        return h, h

    return lax.scan(body, jnp.zeros_like(b[0]), (a, b), reverse=reverse)[1]


def associative_linear(multiply, compose, a, b, reverse: bool = False):
    """The same by `lax.associative_scan` over pairs of factor and term."""

    def combine(first, later):
        a1, b1 = first
        a2, b2 = later
        return compose(a2, a1), multiply(a2, b1) + b2

    return lax.associative_scan(combine, (a, b), reverse=reverse)[1]


def deer(f, xs, h0, tolerance: float = 1e-4, max_iterations: int = 100):
    """Newton's method on the trajectory, as in Lim et al., 2309.12252.

    Each iteration solves `h_t = J_t h_{t-1} + (f(h_{t-1}, x_t) - J_t h_{t-1})`, with
    the Jacobians and the bracket at the trajectory before, from a guess of zeros until
    no state changes by more than the tolerance.

    **Returns:** the states `[T, width]` and the number of iterations.
    """
    steps = jax.tree.leaves(xs)[0].shape[0]
    jacobian = jax.vmap(jax.jacfwd(f))

    def multiply(matrices, vectors):
        return jnp.einsum("tij,tj->ti", matrices, vectors)

    def iterate(h):
        before = jnp.concatenate([h0[None], h[:-1]])
        matrices = jacobian(before, xs)
        terms = jax.vmap(f)(before, xs) - multiply(matrices, before)
        # h0 is known, so its contribution to the first step is a constant.
        terms = terms.at[0].add(matrices[0] @ h0)
        return associative_linear(multiply, jnp.matmul, matrices, terms)

    def unfinished(carry):
        _, change, count = carry
        return (change > tolerance) & (count < max_iterations)

    def body(carry):
        h, _, count = carry
        new = iterate(h)
        return new, jnp.max(jnp.abs(new - h)), count + 1

    guess = jnp.zeros((steps, *h0.shape), h0.dtype)
    start = guess, jnp.asarray(jnp.inf, h0.dtype), jnp.asarray(0)
    h, _, count = lax.while_loop(unfinished, body, start)
    return h, count


def newton_floor(f, xs, h0, iterations: int):
    """The work that no Newton's method of so many iterations can avoid.

    A guess, then for each iteration one evaluation of the cell and one `lax.scan` of
    one multiplication and one addition per unit. The factors of the scan are given
    (zeros, for no purpose), where Newton's method differentiates the cell. Nothing is
    checked.
    """
    factors = jnp.zeros_like(jax.tree.leaves(xs)[0])
    step = jax.vmap(f)

    def body(_, h):
        before = jnp.concatenate([h0[None], h[:-1]])
        return h + scan_linear(jnp.multiply, factors, step(before, xs) - h)

    guess = step(jnp.broadcast_to(h0, factors.shape), xs)
    return lax.fori_loop(0, iterations, body, guess)
