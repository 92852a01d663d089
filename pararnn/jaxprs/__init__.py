"""Jaxprs, the programs of JAX, as data: their parts, values and dependencies."""

from ._dependencies import find_blocks as find_blocks
from ._jaxpr import (
    JITTED as JITTED,
    backward_slice as backward_slice,
    consts_to_args as consts_to_args,
    dependents_of as dependents_of,
    evaluate as evaluate,
    evaluate_equation as evaluate_equation,
    evaluate_inlined as evaluate_inlined,
    inline_jit as inline_jit,
    inner_jaxprs as inner_jaxprs,
    is_index as is_index,
    jit_has_consts as jit_has_consts,
    primitives_of as primitives_of,
    read as read,
    read_by as read_by,
    sub_jaxpr as sub_jaxpr,
    variables as variables,
    written_by as written_by,
)
