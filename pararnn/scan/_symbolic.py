"""Sizes that are known only once a program runs, as `jax.export` has them.

JAX can compute with them, but not compare them. Every choice by size stands beside the
measurement it came from; where the size is not known, the choice is the plain one, a
loop over the whole sequence, which is right for every length.
"""

from jax.export import is_symbolic_dim


def is_symbolic(*sizes) -> bool:
    """Whether any of the sizes is not known while tracing."""
    return any(is_symbolic_dim(size) for size in sizes)


def refuse_symbolic(where: str, what: str, remedy: str, *sizes) -> None:
    """Refuse what has to know the sizes.

    **Raises:** `ValueError`.
    """
    if is_symbolic(*sizes):
        raise ValueError(
            f"{where}: {what} needs to know the number of steps, which is symbolic "
            f"here, {', '.join(map(str, filter(is_symbolic_dim, sizes)))}. Likely "
            "cause: an export by `jax.export` with `symbolic_shape` for the time axis. "
            f"{remedy}, or export for a fixed number of steps."
        )
