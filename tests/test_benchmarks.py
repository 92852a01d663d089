"""The benchmarks run, store every row and can be continued. No time is judged here."""

import itertools
import json
import math

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks._case import Row, Settings
from benchmarks._report import Results, describe_machine, render_table
from benchmarks._summary import REQUIREMENTS, render_summary, summarise

NAMES = ("linear_scan", "scaling")
CASES = [
    (name, case)
    for name in NAMES
    for case in benchmarks.GROUPS[name].cases(Settings(quick=True))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    assert benchmarks.main([*NAMES, "--quick", "--output", str(folder)]) == 0
    return folder


def read(folder):
    return json.loads((folder / "results.json").read_text())


def ratios(row):
    """Every ratio of a row, with the least and the greatest of its pairs."""
    for column, value in row["values"].items():
        if "ratio" in column:
            yield from value.values() if isinstance(value, dict) else [value]


@pytest.mark.slow
def test_json_has_every_row_with_finite_ratios(folder):
    stored = read(folder)
    found = [(row["group"], row["table"], row["key"]) for row in stored["rows"]]
    assert found == [(name, case.table, case.key) for name, case in CASES]
    for row in stored["rows"]:
        assert not row["failed"] and not row["left_out"]
        values = list(ratios(row))
        assert values
        assert all(math.isfinite(value) and value > 0 for value in values)
    assert [row["table"] for row in stored["derived"]] == ["exponents"] * 4


@pytest.mark.slow
def test_json_says_where_and_how(folder):
    stored = read(folder)
    assert stored["machine"] == describe_machine(quick=True)
    (run,) = stored["runs"]
    assert run["command"].startswith("python -m benchmarks linear_scan scaling --quick")
    assert run["seconds"] > 0
    assert {"linear_scan: time", "scaling: exponent of time over length"} <= {
        verdict["requirement"] for verdict in stored["summary"]
    }


@pytest.mark.slow
def test_markdown_has_every_row(folder):
    text = (folder / "results.md").read_text()
    lines = text.splitlines()
    for _, case in CASES:
        start = "| " + " | ".join(map(str, case.key.values())) + " |"
        assert sum(line.startswith(start) for line in lines) >= 1, start
    # mkdocs needs a blank line before a table.
    for before, line in itertools.pairwise(lines):
        if line.startswith("|"):
            assert before.startswith("|") or not before
            if before:
                assert line.count("|") == before.count("|")


@pytest.mark.slow
def test_resume_measures_only_what_is_missing(folder, tmp_path, monkeypatch):
    stored = read(folder)
    dropped = stored["rows"].pop(3)
    (tmp_path / "results.json").write_text(json.dumps(stored))
    measured = []

    def measure(group, case):
        measured.append(case.key)
        return Row(group, case.table, case.key, values=dropped["values"])

    monkeypatch.setattr(benchmarks, "_measure", measure)
    arguments = [*NAMES, "--quick", "--resume", "--output", str(tmp_path)]
    assert benchmarks.main(arguments) == 0
    assert measured == [dropped["key"]]
    assert len(read(tmp_path)["runs"]) == 2
    assert benchmarks.main(arguments) == 0
    assert measured == [dropped["key"]]
    after = read(tmp_path)
    assert len(after["runs"]) == 2
    assert len(after["rows"]) == len(CASES)


def test_resume_refuses_results_of_another_machine(tmp_path, capsys):
    other = {**describe_machine(quick=True), "device": "another"}
    Results(tmp_path, other, "command").write_json()
    arguments = ["segments", "--quick", "--resume", "--output", str(tmp_path)]
    assert benchmarks.main(arguments) == 2
    assert "another machine" in capsys.readouterr().err


def test_unknown_group_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmarks.main(["unknown"])
    assert "no group unknown" in capsys.readouterr().err


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", benchmarks.GROUPS)
def test_rows_have_a_table_and_a_key_of_their_own(name, quick):
    group = benchmarks.GROUPS[name]
    cases = list(group.cases(Settings(quick)))
    assert {case.table for case in cases} <= set(group.TABLES)
    keys = {(case.table, *case.key.items()) for case in cases}
    assert len(keys) == len(cases)


def test_requirements_are_about_tables_that_exist():
    tables = {table for group in benchmarks.GROUPS.values() for table in group.TABLES}
    assert {requirement.table for requirement in REQUIREMENTS} <= tables


def test_summary_names_the_rows_that_miss_the_requirement():
    def row(steps, **rest):
        key = {"structure": "diagonal", "T": steps, "channels": 1}
        return Row("linear_scan", "linear_scan", key, **rest)

    def measured(steps, ratio):
        return row(
            steps, values={"ratio": {"median": ratio, "min": ratio, "max": ratio}}
        )

    good, bad = measured(10, 1.0), measured(20, 3.0)
    failed, left_out = row(30, failed="out of memory"), row(40, left_out="too large")
    (verdict,) = summarise([good, left_out])
    assert verdict.met and verdict.rows == 1
    (verdict,) = summarise([good, bad, failed])
    assert not verdict.met
    assert (verdict.median, verdict.worst) == (2.0, 3.0)
    assert verdict.not_met_by == ["structure diagonal, T 20, channels 1 (3)"]
    assert "T 30, channels 1 (failed)" in render_summary([good, bad, failed])
    # Not a number is never below a limit.
    (verdict,) = summarise([measured(10, math.nan)])
    assert not verdict.met


def test_table_lists_what_it_leaves_out():
    rows = [
        Row("g", "t", {"T": 1}, values={"ratio": 1.0}),
        Row("g", "t", {"T": 2}, left_out="inputs of 2.0 GB"),
        Row("g", "t", {"T": 3}, failed="out of memory"),
    ]
    text = render_table(rows)
    assert "| 1 | 1.000 |" in text
    assert "Left out:\n\n- T 2: inputs of 2.0 GB" in text
    assert "Failed:\n\n- T 3: out of memory" in text
