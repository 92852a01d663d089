"""A ladder of solvers: the next one where the one before was not certified."""

import equinox as eqx

from .methods import AbstractMethod, is_count


class Ladder(eqx.Module):
    """Several methods, from cheap to sure, and at last the sequential loop.

    Each is given a few steps. Sequences that are certified by then are done; the others
    go on with the next method, from where they are. What no method has certified is
    computed by the loop, so the answer is always right. `stats["rung"]` says for each
    sequence which rung its answer comes from, counted from 0, the loop last.

    **Arguments:**

    - `methods`: from cheap to sure, each an [`pararnn.AbstractMethod`][].
    - `max_steps`: how many steps each of them may take: one number, or one for each.

    **Raises:** `TypeError` for anything but methods, `ValueError` for counts that do
    not fit.
    """

    methods: tuple[AbstractMethod, ...]
    max_steps: int | tuple[int, ...] = eqx.field(static=True, default=8)

    def __check_init__(self):
        if not isinstance(self.methods, tuple) or not all(
            isinstance(method, AbstractMethod) for method in self.methods
        ):
            raise TypeError(
                f"Ladder: `methods` is {self.methods!r:.200}; expected a tuple of "
                "methods, for instance (pararnn.Jacobi(64), pararnn.Newton(64)). The "
                "sequential loop comes last by itself."
                + " Did you forget to call the class?"
                * self._holds_a_class()
            )
        if len(self.steps) != len(self.methods) or not all(
            is_count(n) and n >= 1 for n in self.steps
        ):
            raise ValueError(
                f"Ladder: `max_steps` is {self.max_steps!r} for {len(self.methods)} "
                "methods; expected a whole number >= 1, or one for each method."
            )

    def _holds_a_class(self) -> bool:
        among = self.methods if isinstance(self.methods, tuple | list) else ()
        return any(isinstance(method, type) for method in among)

    @property
    def steps(self) -> tuple[int, ...]:
        if isinstance(self.max_steps, tuple):
            return self.max_steps
        return (self.max_steps,) * len(self.methods)
