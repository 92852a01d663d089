"""Refuse to export a program that raises on failure, with a message that helps.

JAX refuses any program that calls the host with "serialization of host_callbacks is not
yet implemented". Only the lowering of a primitive can tell that a program is being
exported, so there is a primitive here that only checks this.
"""

import os

import jax.extend as jex
from jax.interpreters import batching, mlir
from jaxtyping import Array

_not_exported = jex.core.Primitive("pararnn_not_exported")


def refuse_export(value: Array) -> Array:
    """Return `value`, in a program that calls the host if the solve has failed.

    **Raises:** `NotImplementedError` when `jax.export` exports the program.
    """
    return _not_exported.bind(value)


def _lower(ctx, value):
    parameters = ctx.module_context.lowering_parameters
    calls = os.environ.get("EQX_ON_ERROR", "raise") not in ("nan", "off")
    if calls and getattr(parameters, "for_export", False):
        raise NotImplementedError(
            "pararnn.solve: a program that raises if a solve fails cannot be exported "
            "by `jax.export`, since raising calls Python. Pass `throw=False` "
            "to `pararnn.solve`, or to the layer or model that calls it "
            "(`pararnn.RNN(..., throw=False)`), and export `Solution.result` or the "
            "statistics beside the states, to see failures."
        )
    return [value]


_not_exported.def_impl(lambda value: value)
_not_exported.def_abstract_eval(lambda value: value)
batching.primitive_batchers[_not_exported] = lambda args, axes: (
    _not_exported.bind(*args),
    *axes,
)
mlir.register_lowering(_not_exported, _lower)
