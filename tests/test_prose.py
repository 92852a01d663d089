"""Plain English in comments, docstrings, messages and documentation.

A few phrases that a reader has to decode, and what to write in their place.
"""

import bisect
import functools as ft
import itertools
import re
import token
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("pararnn", "linear", "examples", "benchmarks", "tests")
PROGRAMS = [
    path
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != Path(__file__)
]
DOCUMENTS = [
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]


class Rule(NamedTuple):
    """What to write instead of a pattern; white space has become single spaces."""

    pattern: str
    instead: str


RULES = {
    "Of ...": Rule(r'""" Of \w+', "a summary that starts with a verb or a noun"),
    "is no ...": Rule(
        r"(?i)(?<!there )\bis no (?!longer|more|such)[a-z]+", "is not a ..."
    ),
    "anew": Rule(r"(?i)\banew\b", "again"),
    "in 0.65 of the time": Rule(r"\b0\.\d+ of the time\b", "35% less time"),
    "if not given": Rule(r"(?i)\bif not given\b", "Defaults to ..."),
    "stretch of time": Rule(
        r"(?i)\bstretch(es)? of time\b", "segment, chunk, window or shard"
    ),
    "in turns": Rule(r"(?i)\bin turns\b", "in turn, or one after the other"),
    "but for": Rule(r"(?i)\bbut for\b", "except for"),
    "one's own": Rule(r"(?i)\bone's own\b", "your own"),
}
# Stands for code between two comments or strings, so that no phrase reaches over it.
CODE = "\0"


def words_of_document(path: Path) -> list[tuple[str, int]]:
    """The words of a text, each with the number of its line."""
    return [
        (word, number)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for word in line.split()
    ]


def words_of_program(path: Path) -> list[tuple[str, int]]:
    """The words of comments and strings, each with the number of its line."""
    words = []
    # From Python 3.12 on, an f-string is several tokens.
    kinds = ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END")
    opens, middle, closes = (getattr(token, name, None) for name in kinds)
    with tokenize.open(path) as file:
        for kind, string, (first, _), _, _ in tokenize.generate_tokens(file.readline):
            if kind == token.COMMENT:
                string = string.lstrip("#")
            elif kind in (opens, closes):
                string = ""
            elif kind == middle:
                pass
            elif kind == token.STRING:
                # Of the quotes, only those that open a docstring are kept.
                string = re.sub(r'^\w*"""', ' """ ', string)
                string = re.sub(r"""^\w*["']|["']+$""", "", string)
            else:
                string = CODE if string.strip() else ""
            for number, line in enumerate(string.split("\n"), first):
                words += [(word, number) for word in line.split()]
    return words


@ft.cache
def words_of(path: Path) -> list[tuple[str, int]]:
    return words_of_program(path) if path.suffix == ".py" else words_of_document(path)


def places(pattern: str, path: Path) -> list[tuple[int, str]]:
    """Where a pattern occurs: the line, and what was found."""
    words = words_of(path)
    text = " ".join(word for word, _ in words)
    starts = [0, *itertools.accumulate(len(word) + 1 for word, _ in words)]
    found = []
    for match in re.finditer(pattern, text):
        _, line = words[bisect.bisect_right(starts, match.start()) - 1]
        found.append((line, match.group()))
    return found


@pytest.mark.parametrize("name", RULES)
def test_plain_english(name):
    pattern, instead = RULES[name]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in PROGRAMS + DOCUMENTS
        for line, text in places(pattern, path)
    ]
    if found:
        message = [f"Write {instead!r} in place of {name!r}:", *found]
        pytest.fail("\n".join(message), pytrace=False)


PROGRAM = '''
"""Of
things."""
x = 1  # all but
# for one
y = f"one's" "own"  # Of x
z = "but"
for y in z: pass
'''


def test_phrases_are_found_across_lines(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    found = {name: places(rule.pattern, path) for name, rule in RULES.items()}
    assert {name: where for name, where in found.items() if where} == {
        "Of ...": [(2, '""" Of things')],
        "but for": [(4, "but for")],
        "one's own": [(6, "one's own")],
    }
