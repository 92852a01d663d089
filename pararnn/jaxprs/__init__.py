"""Jaxprs, the programs of JAX, as data: their parts, values and dependencies."""

from ._dependencies import find_blocks as find_blocks
from ._jaxpr import (
    JITTED as JITTED,
    calls_hold_arrays as calls_hold_arrays,
    consts_to_args as consts_to_args,
    evaluate as evaluate,
    evaluate_inlined as evaluate_inlined,
    inner_programs as inner_programs,
    is_index as is_index,
    part_for as part_for,
    primitives_of as primitives_of,
    reached as reached,
    read_by as read_by,
    sub_jaxpr as sub_jaxpr,
    variables as variables,
    without_calls as without_calls,
    written_by as written_by,
)
