"""Programs that run once, for which compiling costs more than running."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

# Without it, compiling the random draws of a small model took 9 s of one core, with it
# 2 s; that is more than all of its training steps.
HASTE = {"xla_backend_optimization_level": 0}


def run_once(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, compiled without optimisation.

    **Arguments:** `function`, of pytrees; `inputs`, whose arrays are traced.

    **Returns:** what the function does.
    """
    arrays, static = eqx.partition(inputs, eqx.is_array)
    rest = None

    def program(arrays):
        nonlocal rest
        found, rest = eqx.partition(
            function(*eqx.combine(arrays, static)), eqx.is_array
        )
        return found

    found = jax.jit(program, compiler_options=HASTE)(arrays)
    return eqx.combine(found, rest)
