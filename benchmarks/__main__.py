"""`python -m benchmarks`: run groups of benchmarks, print and store their tables."""

import argparse
import gc
import shlex
import sys
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from . import (
    accuracy,
    adjoint,
    convergence,
    implicit,
    interruptions,
    language,
    layers,
    linear_scan,
    methods,
    newton,
    projections,
    reliability,
    scaling,
    segments,
    solve,
    trained,
    users,
)
from ._case import Case, Group, Row, Settings
from ._report import Results, describe_machine
from ._summary import render_summary

GROUPS: dict[str, Group] = {
    "users": users,
    "trained": trained,
    "solve": solve,
    "projections": projections,
    "linear_scan": linear_scan,
    "newton": newton,
    "segments": segments,
    "methods": methods,
    "adjoint": adjoint,
    "scaling": scaling,
    "accuracy": accuracy,
    "reliability": reliability,
    "layers": layers,
    "implicit": implicit,
    "convergence": convergence,
    "language": language,
    "interruptions": interruptions,
}
FOLDER = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    names = list(dict.fromkeys(options.groups)) or list(GROUPS)
    settings = Settings(quick=options.quick)
    machine = describe_machine(options.quick)
    suffix = "-quick" if options.quick else ""
    folder = options.output or FOLDER / f"{machine['platform']}{suffix}"
    shown = shlex.join(sys.argv[1:] if arguments is None else arguments)
    results = Results(folder, machine, f"python -m benchmarks {shown}".rstrip())
    if not results.load() and options.resume:
        print(
            f"benchmarks: {results.json_path} is from another machine, other "
            "versions or another --quick, so it cannot be continued. Leave out "
            "--resume to start again, or give another --output.",
            file=sys.stderr,
        )
        return 2

    def is_asked_for(group: str, table: str) -> bool:
        return group in names and (not options.tables or table in options.tables)

    if options.resume:
        results.rows = [row for row in results.rows if not row.failed]
    else:
        results.rows = [r for r in results.rows if not is_asked_for(r.group, r.table)]
        # Runs that no row refers to any more are dropped.
        results.runs = results.runs if results.rows else []
    results.derived = _derive(results.rows)
    missing = [
        (name, case)
        for name in names
        for case in GROUPS[name].cases(settings)
        if is_asked_for(name, case.table)
        and not any(row.is_of(name, case) for row in results.rows)
    ]
    try:
        _run(missing, results)
    except KeyboardInterrupt:
        print(
            f"benchmarks: interrupted; {results.json_path} holds the rows so far, and "
            "the same command with --resume continues.",
            file=sys.stderr,
        )
        return 130
    captions = {name: GROUPS[name].TABLES for name in GROUPS}
    results.write_markdown(captions)
    results.summary_path.write_text(render_summary(results.rows + results.derived))
    chosen = {name: captions[name] for name in names}
    print("\n\n".join(results.render_groups(chosen)))
    everything = results.rows + results.derived
    print("\n" + render_summary([row for row in everything if row.group in names]))
    print(f"\nWritten: {results.json_path} and {results.markdown_path}")
    return 1 if any(row.failed for row in results.rows if row.group in names) else 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure pararnn against JAX's own loops. Prints Markdown tables "
        "and writes results.json and results.md.",
    )
    parser.add_argument(
        "groups",
        nargs="*",
        metavar="group",
        help=f"which to run: {', '.join(GROUPS)}; all if none is given",
    )
    parser.add_argument(
        "--tables",
        nargs="+",
        default=[],
        metavar="TABLE",
        help="only these tables of the groups",
    )
    parser.add_argument(
        "--quick", action="store_true", help="short sequences and 3 repeats"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for the results (default: benchmarks/results/<platform>)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows that are there and measure the missing ones",
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.groups if name not in GROUPS]
    if unknown:
        parser.error(f"no group {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    tables = [t for name in options.groups or GROUPS for t in GROUPS[name].TABLES]
    unknown = [name for name in options.tables if name not in tables]
    if unknown:
        parser.error(f"no table {', '.join(unknown)}; there are {', '.join(tables)}")
    return options


def _run(missing: list[tuple[str, Case]], results: Results) -> None:
    """Measure the rows, and store each as soon as it is measured."""
    if missing:
        results.start_run()
    start = time.perf_counter()
    progress = Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    with progress:
        task = progress.add_task("", total=len(missing))
        for group, case in missing:
            what = ", ".join(map(str, case.key.values()))
            progress.update(task, description=f"{case.table}: {what}")
            row = _measure(group, case)
            results.derived = _derive([*results.rows, row])
            results.add(row, time.perf_counter() - start)
            progress.advance(task)
    results.write_json()


def _measure(group: str, case: Case) -> Row:
    row = Row(group, case.table, dict(case.key))
    if case.left_out:
        return row._replace(left_out=case.left_out)
    try:
        # Full precision everywhere: otherwise a peer on a GPU computes something else.
        with jax.enable_x64(case.x64), jax.default_matmul_precision("highest"):
            return row._replace(values=dict(case.measure()))
    except Exception as error:
        # A row that does not fit into memory must not end the run.
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return row._replace(failed=message[:300])
    finally:
        # Otherwise compiled programs grow to some gigabytes.
        jax.clear_caches()
        gc.collect()


def _derive(rows: list[Row]) -> list[Row]:
    return [
        derived
        for group in GROUPS.values()
        if (derive := getattr(group, "derive", None)) is not None
        for derived in derive(rows)
    ]


if __name__ == "__main__":
    sys.exit(main())
