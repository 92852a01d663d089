"""What a group of benchmarks consists of."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

Value = int | float | str | bool | dict[str, float]


class Settings(NamedTuple):
    """How much to measure."""

    quick: bool = False

    def steps(self, *full: int) -> tuple[int, ...]:
        """The numbers of steps: those given, or two small ones."""
        return (256, 1024) if self.quick else full


class Case(NamedTuple):
    """One row of a table: what identifies it, and how to measure it.

    **Arguments:**

    - `table`: a name in the `TABLES` of the group.
    - `key`: what identifies the row, by column.
    - `measure`: returns the row's further columns.
    - `x64`: whether to measure with 64-bit types.
    - `left_out`: why the row is not measured, if it is not.
    """

    table: str
    key: dict[str, int | str]
    measure: Callable[[], Mapping[str, Value]]
    x64: bool = False
    left_out: str | None = None


class Row(NamedTuple):
    """A row that was measured, as it is stored.

    Exactly one of `values`, `left_out` and `failed` is not empty. `run` is the number
    of the run, among those of the same results.
    """

    group: str
    table: str
    key: dict[str, Any]
    values: dict[str, Any] = {}
    left_out: str | None = None
    failed: str | None = None
    run: int = 0

    def is_of(self, group: str, case: Case) -> bool:
        return (self.group, self.table, self.key) == (group, case.table, case.key)

    def name(self) -> str:
        return ", ".join(f"{k} {v}" for k, v in self.key.items())


class Group(Protocol):
    """A module with the rows of one group."""

    TABLES: dict[str, str]
    """Names of the tables, and what their columns mean."""

    @staticmethod
    def cases(settings: Settings) -> Iterator[Case]: ...


GIGABYTE = 10**9


def too_large(size: int) -> str | None:
    """Return why inputs of `size` bytes are left out, or `None` if they are not."""
    if size <= GIGABYTE:
        return None
    return f"inputs of {size / GIGABYTE:.1f} GB"
