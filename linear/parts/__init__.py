"""What several layers are made of."""

from pararnn._parameters import leading as leading, rms_norm as rms_norm

from ._arguments import (
    Draw as Draw,
    check_choice as check_choice,
    check_divisor as check_divisor,
    check_range as check_range,
    check_sizes as check_sizes,
    head_size as head_size,
)
from ._complex import (
    as_complex as as_complex,
    complex_zeros as complex_zeros,
    full_product as full_product,
    real_product as real_product,
)
from ._discretise import DISCRETISATIONS as DISCRETISATIONS, discretise as discretise
from ._gates import decay as decay, rate as rate, share as share
from ._heads import (
    log_decay as log_decay,
    merge_heads as merge_heads,
    read_out as read_out,
    signed as signed,
    split_heads as split_heads,
)
from ._hippo import (
    Diagonalised as Diagonalised,
    legs as legs,
    normal_legs as normal_legs,
    perturb_then_diagonalise as perturb_then_diagonalise,
)
from ._norms import group_norm as group_norm, l2_norm as l2_norm
from ._short_convolution import (
    WIDTH as WIDTH,
    draw_convolution as draw_convolution,
    empty_window as empty_window,
    shifted as shifted,
    short_convolution as short_convolution,
)
