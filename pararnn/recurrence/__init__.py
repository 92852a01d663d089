"""A recurrence as data: a cell traced, its structure, and its program rewritten."""

from ._hoist import (
    SplitStep as SplitStep,
    count_numbers as count_numbers,
    merge_products as merge_products,
    split_step as split_step,
)
from ._inputs import (
    AbstractImplicitCell as AbstractImplicitCell,
    check_like as check_like,
    check_resets as check_resets,
    count_steps as count_steps,
    make_recurrence as make_recurrence,
)
from ._recurrence import (
    Recurrence as Recurrence,
    is_key as is_key,
    shape_dtype as shape_dtype,
    split_by_tangents as split_by_tangents,
    states_before as states_before,
)
from ._replay import (
    MAX_RECOMPUTED as MAX_RECOMPUTED,
    Replay as Replay,
    count_sequences as count_sequences,
    find_replay as find_replay,
)
from ._stepwise import (
    must_sweep as must_sweep,
    needs_loop as needs_loop,
    precompute_unbatchable as precompute_unbatchable,
    refuse_unbatchable as refuse_unbatchable,
    why_stepped as why_stepped,
)
from ._structure import (
    Structure as Structure,
    declared_structure as declared_structure,
    find_structure as find_structure,
    from_blocks as from_blocks,
    jacobian_structure as jacobian_structure,
    to_blocks as to_blocks,
    transition_factors as transition_factors,
)
