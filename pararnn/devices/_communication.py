"""What devices exchange, read from a compiled program."""

import math
import re
from typing import NamedTuple

from jax.stages import Compiled

_OPERATIONS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "reduce-scatter",
)
# An instruction: its results, then its name. The second half of an asynchronous pair
# (`-done`) repeats the results of the first.
_LINE = re.compile(rf"= (.+?) ({'|'.join(_OPERATIONS)})(-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


class Exchange(NamedTuple):
    """How many instructions of one kind a program has, and the bytes of their results.

    Those within a loop are counted once, however often it runs, and those of a branch
    whether or not it is taken. Bytes are those that one device receives, its own part
    included; of an asynchronous `all-gather-start` its operand counts too.
    """

    count: int
    bytes: int
    largest: int


def communication(compiled: Compiled) -> dict[str, Exchange]:
    """What the devices exchange in a compiled program, by the kind of instruction.

    **Arguments:** `compiled`, from `jax.jit(f).lower(*arguments).compile()`, within
    `jax.set_mesh(mesh)` where there is a mesh.

    **Returns:** for each kind of instruction that occurs, such as `"all-gather"`, its
    [`pararnn.Exchange`][]: their number, the bytes of all, and those of the largest.

    **Raises:** `ValueError` if the program's text is not available.
    """
    text = compiled.as_text()
    if not text:
        raise ValueError(
            "communication: the compiled program has no text. Likely cause: a backend "
            "that does not keep it."
        )
    found: dict[str, Exchange] = {}
    for line in text.splitlines():
        match = _LINE.search(line)
        if match is None:
            continue
        size = sum(_bytes(*array) for array in _ARRAY.findall(match[1]))
        count, total, largest = found.get(match[2], Exchange(0, 0, 0))
        found[match[2]] = Exchange(count + 1, total + size, max(largest, size))
    return found


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    entries = math.prod(int(n) for n in shape.split(",") if n)
    return -(-bits * entries // 8)
