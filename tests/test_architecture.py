"""The shape of the source tree: imports, classes, sizes, and the depth of calls."""

import ast
import graphlib
import importlib
import inspect
import pkgutil
import re
import statistics
import sys
import tomllib
import traceback
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import pararnn

ROOT = Path(__file__).parents[1]
PACKAGES = ("pararnn", "linear")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(
        ".__init__"
    ): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}

# What each layer may import of the project, itself included; SHARED may be imported by
# all of them.
SHARED = {"pararnn._checks"}
MAY_IMPORT = {
    "pararnn._checks": set(),
    "pararnn.scan": {"pararnn.scan"},
    "pararnn.jaxprs": {"pararnn.jaxprs"},
    "pararnn._adapters": {"pararnn._adapters", "pararnn.jaxprs"},
    "pararnn.recurrence": {
        "pararnn.recurrence",
        "pararnn._adapters",
        "pararnn.jaxprs",
        "pararnn.scan",
    },
    "pararnn.solver": {
        "pararnn.solver",
        "pararnn.recurrence",
        "pararnn._adapters",
        "pararnn.jaxprs",
        "pararnn.scan",
    },
    "pararnn._parameters": {"pararnn._parameters", "pararnn.scan"},
    "pararnn._registry": {"pararnn._registry"},
    "pararnn._jsonl": {"pararnn._jsonl"},
    "pararnn._progress": {"pararnn._progress"},
    "pararnn.cells": {
        "pararnn.cells",
        "pararnn._parameters",
        "pararnn._registry",
        "pararnn.scan",
    },
    "pararnn.models": {
        "pararnn.models",
        "pararnn._devices",
        "pararnn",
        "pararnn._parameters",
        "pararnn._registry",
        "pararnn.cells",
        "pararnn.solver",
        "pararnn.scan",
    },
    "pararnn._devices": {"pararnn._devices", "pararnn.scan"},
    "pararnn.diagnosis": {
        "pararnn.diagnosis",
        "pararnn.solver",
        "pararnn.recurrence",
        "pararnn.scan",
    },
    "pararnn": {
        "pararnn",
        "pararnn._adapters",
        "pararnn.jaxprs",
        "pararnn._parameters",
        "pararnn._devices",
        "pararnn.models",
        "pararnn.diagnosis",
        "pararnn.cells",
        "pararnn.solver",
        "pararnn.recurrence",
        "pararnn.scan",
    },
    "linear": {
        "linear",
        "pararnn._checks",
        "pararnn._parameters",
        "pararnn._registry",
        "pararnn.scan",
    },
    "pararnn.training.data": {"pararnn.training.data"},
    "pararnn.training": {
        "pararnn.training",
        "pararnn.training.data",
        "pararnn.models",
        "pararnn._devices",
        "pararnn.solver",
        "pararnn._parameters",
        "pararnn._jsonl",
        "pararnn._progress",
    },
    "pararnn.comparison": {
        "pararnn.comparison",
        "pararnn.training",
        "pararnn.training.data",
        "pararnn.models",
        "pararnn.solver",
        "pararnn._parameters",
        "pararnn._jsonl",
        "pararnn._registry",
        "pararnn._progress",
    },
    "pararnn.dynamics": {
        "pararnn.dynamics",
        "pararnn.cells",
        "pararnn.solver",
        "pararnn._parameters",
        "pararnn._jsonl",
        "pararnn._progress",
        "pararnn._registry",
    },
}
# What a layer may import beside the dependencies of every installation.
EXTRAS = {
    "pararnn.training": "train",
    "pararnn.training.data": "train",
    # The extra of the comparison is this and scikit-learn.
    "pararnn.comparison": "train",
    "pararnn.dynamics": "train",
    "pararnn._progress": "train",
}


def layer_of(module: str) -> str:
    fits = [name for name in MAY_IMPORT if f"{module}.".startswith(f"{name}.")]
    return max(fits, key=len)


class AtRunTime(ast.NodeTransformer):
    """A program without what only a type checker reads."""

    def visit_If(self, node):
        self.generic_visit(node)
        only_typing = ast.unparse(node.test).endswith("TYPE_CHECKING")
        return node.orelse if only_typing else node


def imports_of(module: str, *, at_run_time: bool = False) -> set[str]:
    """Every module that a file imports, wherever in the file the import stands.

    With `at_run_time`, those under `if TYPE_CHECKING` are left out.
    """
    found = set()
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    for node in ast.walk(AtRunTime().visit(tree) if at_run_time else tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*parents, *filter(None, [source])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add(inner if inner in FILES else source)
    return found


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module):
    allowed = MAY_IMPORT[layer_of(module)] | SHARED
    project = {name for name in imports_of(module) if name.split(".")[0] in PACKAGES}
    wrong = {name for name in project if layer_of(name) not in allowed}
    assert not wrong, f"{module} may import {sorted(allowed)}, not {sorted(wrong)}"


def test_no_import_cycle():
    graph = {name: imports_of(name, at_run_time=True) & set(FILES) for name in FILES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        # graphlib lists each module before the one that imports it.
        cycle = " -> ".join(reversed(error.args[1]))
        pytest.fail(f"Each of these modules imports the next: {cycle}", pytrace=False)


@pytest.mark.parametrize("module", FILES)
def test_every_import_is_a_declared_dependency(module):
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = list(metadata["dependencies"])
    if extra := EXTRAS.get(layer_of(module)):
        needed += metadata["optional-dependencies"][extra]
    names = {re.split(r"[^\w-]", name)[0].replace("-", "_") for name in needed}
    # A distribution is imported by its name, or by the first part (orbax-checkpoint).
    declared = names | {name.split("_")[0] for name in names}
    known = declared | set(PACKAGES) | sys.stdlib_module_names
    used = {name.split(".")[0] for name in imports_of(module)}
    assert used <= known


@pytest.mark.parametrize(
    "module", [name for name, path in FILES.items() if path.name == "__init__.py"]
)
def test_packages_only_export(module):
    for number, node in enumerate(ast.parse(FILES[module].read_text()).body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                assert alias.asname == alias.name.rpartition(".")[2], (
                    f"{FILES[module]}:{node.lineno}: write `{alias.name} as ...`"
                )
            continue
        docstring = (
            number == 0
            and isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        )
        assert docstring, f"{FILES[module]}:{node.lineno}: only imports belong here"


def project_modules() -> list[type[eqx.Module]]:
    found = {}
    for package in map(importlib.import_module, PACKAGES):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            for _, cls in inspect.getmembers(module, inspect.isclass):
                if issubclass(cls, eqx.Module) and cls.__module__ == info.name:
                    found[f"{cls.__module__}.{cls.__qualname__}"] = cls
    return list(found.values())


def is_abstract(cls: type) -> bool:
    missing = ("__abstractvars__", "__abstractclassvars__")
    return inspect.isabstract(cls) or any(getattr(cls, name, ()) for name in missing)


def test_every_class_is_abstract_or_final():
    """Equinox's pattern, which it no longer enforces itself."""
    classes = project_modules()
    assert classes
    for cls in classes:
        named = cls.__name__.lstrip("_").startswith("Abstract")
        assert is_abstract(cls) == named, (
            f"{cls.__qualname__}: the name of a class starts with `Abstract` if and "
            "only if the class is abstract"
        )
        for base in cls.__bases__:
            if base.__module__.split(".")[0] in PACKAGES:
                assert is_abstract(base), (
                    f"{cls.__qualname__} inherits from the concrete class "
                    f"{base.__qualname__}"
                )


# Enough rooms that each has one job, and few enough that a reader finds it. There may
# be any number of cells, layers and tasks.
MOST_MODULES, MEAN_LINES, MOST_LINES = 105, (150, 220), 500
MOST_LINES_OF_SOLVER = 3600
LISTS = ("pararnn.cells.", "linear.", "pararnn.comparison.tasks.")


def test_sizes_of_modules():
    lines = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    long = {name: count for name, count in lines.items() if count > MOST_LINES}
    assert not long, f"split these modules: {long}"
    solver = sum(count for name, count in lines.items() if ".solver" in name)
    assert solver <= MOST_LINES_OF_SOLVER
    rooms = [name for name in lines if not name.startswith(LISTS)]
    assert len(rooms) <= MOST_MODULES, f"merge some of {len(rooms)} modules"
    assert MEAN_LINES[0] <= statistics.mean(lines.values()) <= MEAN_LINES[1]


def test_few_exceptions_for_the_type_checker():
    folders = (*PACKAGES, "examples", "benchmarks")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "pyright: ignore" in line
    ]
    assert len(found) <= 8, "\n".join(["too many `pyright: ignore`:", *found])


@pytest.fixture
def calls_of_scan(monkeypatch) -> list[list[str]]:
    """The own frames from `solve` to each call of `jax.lax.scan`, filled in by calls.

    Scans that look for the cause of a failure are left out.
    """
    calls, scan = [], jax.lax.scan
    own = ROOT / "pararnn"

    def spy(*args, **kwargs):
        stack = [(Path(f.filename), f.name) for f in traceback.extract_stack()]
        frames = [f"{path.name}:{name}" for path, name in stack if own in path.parents]
        if not any(frame.startswith("_failure.py:") for frame in frames):
            calls.append(frames[frames.index("_solve.py:solve") :])
        return scan(*args, **kwargs)

    monkeypatch.setattr(jax.lax, "scan", spy)
    return calls


@pytest.mark.parametrize(
    "solver, most", [(pararnn.Newton(4), 12), (pararnn.Sequential(), 6)], ids=repr
)
def test_frames_from_solve_to_the_deepest_scan(solver, most, calls_of_scan):
    def cell(h, x):
        return jnp.tanh(0.5 * h + x)

    pararnn.solve(cell, jnp.ones((64, 3)), jnp.zeros(3), solver=solver)
    deepest = max(calls_of_scan, key=len)
    assert len(deepest) <= most, f"{len(deepest)} frames: " + " -> ".join(deepest)
