"""Time, compile time and memory of programs that are compared."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np

# A sample is as many calls as take this long, so that the clock's resolution and a
# single interruption do not show.
SAMPLE_SECONDS = 2e-3


class Program(NamedTuple):
    """A compiled function."""

    call: Any
    compile_seconds: float
    temp_bytes: int

    def __call__(self, *args):
        return jax.block_until_ready(self.call(*args))


def compile_program(fn, *args) -> Program:
    """Trace and compile `fn` for `args`, without running it."""
    # A new function, so that none of it is compiled already.
    jitted = jax.jit(lambda *args: fn(*args))
    start = time.perf_counter()
    compiled = jitted.lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError("This platform does not report the memory of a program.")
    # What a user calls, and what dispatches fastest; it reuses the compiled program.
    return Program(jitted, seconds, memory.temp_size_in_bytes)


def compile_all(fns: dict[str, Any], *args) -> dict[str, Program]:
    return {name: compile_program(fn, *args) for name, fn in fns.items()}


class Timings:
    """Seconds of several programs, sampled in turn: samples of one turn are pairs."""

    def __init__(self, samples: dict[str, list[float]]):
        self._samples = {name: np.asarray(times) for name, times in samples.items()}

    def ms(self, name: str) -> float:
        """Median time."""
        return float(np.median(self._samples[name])) * 1e3

    def ratio(self, name: str, *against: str) -> dict[str, float]:
        """Median, least and greatest ratio of pairs, to the fastest of `against`."""
        fastest = min(against, key=self.ms)
        ratios = self._samples[name] / self._samples[fastest]
        return {
            "median": float(np.median(ratios)),
            "min": float(np.min(ratios)),
            "max": float(np.max(ratios)),
        }


def time_in_turn(programs: dict[str, Program], *args, quick: bool) -> Timings:
    """Run the programs A B A B ..., each sample after an untimed call."""
    for program in programs.values():
        program(*args)
    once = {name: _sample(program, args, 1) for name, program in programs.items()}
    slowest = max(once.values())
    if quick or slowest > 0.5:
        repeats = 3
    else:
        repeats = 15 if slowest < 0.05 else 7
    calls = {name: max(1, round(SAMPLE_SECONDS / s)) for name, s in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            # The previous program may leave the caches and the allocator in another
            # state than this one does: two compilations of one program differed by
            # half where one of them always followed the associative scan.
            program(*args)
            samples[name].append(_sample(program, args, calls[name]))
    return Timings(samples)


def _sample(program: Program, args, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        program(*args)
    return (time.perf_counter() - start) / calls


def memory_ratio(program: Program, against: Program) -> float:
    """The ratio of temporary memory; a program that needs none counts as one byte."""
    return max(program.temp_bytes, 1) / max(against.temp_bytes, 1)


def megabytes(program: Program) -> float:
    return program.temp_bytes / 1e6


def relative_error(found, expected) -> float:
    """The largest `max|found - expected| / max|expected|` over the leaves."""

    def one(found, expected) -> float:
        # In NumPy, which has nothing to compile; differences in the given dtype.
        found, expected = np.asarray(found), np.asarray(expected)
        if not np.all(np.isfinite(found)):
            return float("inf")
        scale = float(np.max(np.abs(expected), initial=0))
        difference = float(np.max(np.abs(found - expected), initial=0))
        return difference / scale if scale else difference

    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(one(*pair) for pair in pairs)
