"""What devices exchange, read from the text of a compiled program."""

import functools
import math
import re
from collections.abc import Iterator
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
# The start of a computation, the call of one, and how often a loop runs.
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(
    r"(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')


class Exchange(NamedTuple):
    """How many instructions of one kind a program runs, and the bytes of their results.

    Instructions within a loop count as often as it runs if the compiler knows this, as
    for `jax.lax.scan`, and otherwise once, as for a Newton iteration. Those of a branch
    count whether or not it is taken. Bytes are those that one device receives, its own
    shard included; for an asynchronous `all-gather-start` the operand counts too.
    """

    count: int
    bytes: int
    largest: int


def communication(compiled: Compiled) -> dict[str, Exchange]:
    """Return what devices exchange in a compiled program, by the kind of instruction.

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
    return _count(text)


def _count(text: str) -> dict[str, Exchange]:
    """Count the exchanges of the program that a text describes."""
    computations, entry = _computations(text)

    @functools.cache
    def count(name: str) -> dict[str, Exchange]:
        found: dict[str, Exchange] = {}
        for line in computations.get(name, ()):
            _add(found, _of_line(line), 1)
            for called, times in _calls(line):
                _add(found, count(called), times)
        return found

    return count(entry)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of every computation, and the name of the first to run."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head is not None:
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _calls(line: str) -> Iterator[tuple[str, int]]:
    """Yield the computations that an instruction runs, and how often."""
    trips = _TRIPS.search(line)
    for role, name in _CALLED.findall(line):
        yield name, int(trips[1]) if trips and role == "body" else 1
    for names in _BRANCHES.findall(line):
        for name in names.split(","):
            yield name.strip().removeprefix("%"), 1


def _of_line(line: str) -> dict[str, Exchange]:
    match = _LINE.search(line)
    if match is None:
        return {}
    size = sum(_bytes(*array) for array in _ARRAY.findall(match[1]))
    return {match[2]: Exchange(1, size, size)}


def _add(found: dict[str, Exchange], more: dict[str, Exchange], times: int) -> None:
    for kind, (count, size, largest) in more.items():
        before = found.get(kind, Exchange(0, 0, 0))
        found[kind] = Exchange(
            before.count + times * count,
            before.bytes + times * size,
            max(before.largest, largest),
        )


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    entries = math.prod(int(n) for n in shape.split(",") if n)
    return -(-bits * entries // 8)
