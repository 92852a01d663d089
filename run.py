#!/usr/bin/env python3
"""Set the project up and run it: `python3 run.py {example,test,bench} [arguments]`.

Needs Python 3.11 or later, its `venv` module, and access to PyPI, nothing else. The
packages are installed into `.venv` beside this file, and again only when
`pyproject.toml` changes.

    example   run examples/parallelize_custom_cell.py; arguments go to the script
    test      lint, types, documentation, then every test; arguments go to pytest
    bench     run `python -m benchmarks`; arguments go to it

`test --jax VERSION --python PYTHON` runs the tests alone with another JAX and another
Python, in an environment of their own: for instance `--jax 0.12.0.1 --python
python3.13`. Either may be `newest`, of what PyPI and this machine have. `--core` leaves
out what does not touch the solver, the engine, cells and layers.
"""

import sys

# Before the other imports and in old syntax: an old Python shall say what is wrong.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        "run.py: Python 3.11 or later is needed, this is %s (%s). Run it with a newer "  # noqa: UP031
        "one, for instance `python3.11 run.py test`."
        % (sys.version.split()[0], sys.executable)
    )

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

# Compile the tests' small programs in half the time: LLVM without optimisation, each
# program in one piece, and XLA's own emitters in place of MLIR's (which JAX 0.11 no
# longer has). What they compute is the same; the tests that are marked `optimised` see
# what users see.
QUICK_COMPILATION = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_use_fusion_emitters=false",
)

# What a new version of JAX can break: the engine, the solver, cells and layers.
CORE = (
    *("dependencies", "structure", "transitions", "bad_input", "export", "hoist"),
    *("products", "fused_scan", "windows", "stack", "rnn"),
)

ROOT = Path(__file__).resolve().parent


class Environment:
    """A virtual environment, made by some Python, with some version of JAX."""

    def __init__(self, python: str = sys.executable, jax: str | None = None):
        self.made_by, self.jax = python, jax
        parts = () if jax is None else (jax, Path(python).name)
        self.folder = ROOT / "-".join((".venv", *parts))
        binaries = self.folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = binaries / ("python.exe" if os.name == "nt" else "python")

    def install(self, extra: str) -> None:
        """Make it hold the project with an extra, at no cost if it already does."""
        if not self.python.exists():
            must(
                *(self.made_by, "-m", "venv", self.folder),
                purpose=f"make {self.folder.name}",
                hint=f"could not make {self.folder.name}. Likely cause: Python's venv "
                "module is missing; on Debian and Ubuntu, `apt install python3-venv`.",
            )
        metadata = (ROOT / "pyproject.toml").read_bytes()
        wanted = hashlib.sha256(metadata + sys.version.encode()).hexdigest()
        stamp = self.folder / f".installed-{extra}"
        if stamp.exists() and stamp.read_text() == wanted:
            return
        versions = () if self.jax in (None, "newest") else (f"jax=={self.jax}",)
        must(
            *(self.python, "-m", "pip", "install", "--disable-pip-version-check"),
            *("--quiet", "--editable", f".[{extra}]", *versions),
            purpose=f"install pararnn[{extra}] into {self.folder.name} (some minutes "
            "the first time)",
            hint="the installation failed. Likely causes: (a) no access to PyPI, (b) a "
            f"broken {self.folder.name}: delete it and run again.",
        )
        stamp.write_text(wanted)


def find_python(name: str) -> str:
    """The path of a Python by name, or of the newest one on this machine.

    A name that a version manager stands in for may not run, so the versions that it
    keeps are looked through too.
    """
    kept = sorted(Path.home().glob(".pyenv/versions/3.*/bin/python3.*"))
    names = [f"python3.{minor}" for minor in range(20, 10, -1)]
    for wanted in names if name == "newest" else [name]:
        paths = [shutil.which(wanted), *(str(p) for p in kept if p.name == wanted)]
        for path in filter(None, paths):
            if not subprocess.run([path, "--version"], capture_output=True).returncode:
                return path
    sys.exit(f"run.py: there is no Python called {name!r} on this machine.")


def call(*command: str | Path, purpose: str, flags: str = "") -> int:
    """Print a command, run it at the top of the project, return its exit code.

    `flags` are added to those that the environment has for XLA.
    """
    shown = f"XLA_FLAGS={shlex.quote(flags)} " if flags else ""
    print(f"\n== {purpose}\n$ {shown}{shlex.join(map(str, command))}", flush=True)
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    environment = os.environ | ({"XLA_FLAGS": flags} if flags else {})
    try:
        return subprocess.run(
            [str(part) for part in command], cwd=ROOT, env=environment
        ).returncode
    except KeyboardInterrupt:
        return 130


def must(*command: str | Path, purpose: str, hint: str) -> None:
    code = call(*command, purpose=purpose)
    if code:
        print(f"run.py: {hint}", file=sys.stderr)
        sys.exit(code)


def example(arguments: list[str]) -> int:
    environment = Environment()
    environment.install("examples")
    script = Path("examples") / "parallelize_custom_cell.py"
    return call(environment.python, script, *arguments, purpose="example")


def bench(arguments: list[str]) -> int:
    environment = Environment()
    environment.install("benchmarks")
    python = environment.python
    return call(python, "-m", "benchmarks", *arguments, purpose="benchmarks")


def test(arguments: list[str]) -> int:
    """Run every check, also after one has failed, and pytest last."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--jax")
    parser.add_argument("--python")
    parser.add_argument("--core", action="store_true")
    options, arguments = parser.parse_known_args(arguments)
    quick = options.core
    if options.core:
        files = (f"tests/test_{name}.py" for name in CORE)
        arguments = ["-m", "not slow and not optimised", "-n", "2", *files, *arguments]
    if options.jax or options.python:
        python = find_python(options.python) if options.python else sys.executable
        environment = Environment(python, options.jax or "newest")
        environment.install("tests")
        codes = run_tests(environment.python, arguments, quick)
    else:
        environment = Environment()
        environment.install("dev")
        codes = run_checks(environment.python)
        codes |= run_tests(environment.python, arguments, quick)
    failed = [name for name, code in codes.items() if code]
    if failed:
        print(f"\nrun.py: failed: {', '.join(failed)}", file=sys.stderr)
    return next((code for code in codes.values() if code), 0)


def run_checks(python: Path) -> dict[str, int]:
    module = (python, "-m")
    with tempfile.TemporaryDirectory() as site:
        checks = {
            "lint": (*module, "ruff", "check", "."),
            "format": (*module, "ruff", "format", "--check", "."),
            "types": (*module, "pyright", "--pythonpath", python),
            "documentation": (
                *(*module, "mkdocs", "build", "--strict", "--quiet"),
                *("--site-dir", site),
            ),
        }
        return {name: call(*check, purpose=name) for name, check in checks.items()}


def run_tests(python: Path, arguments: list[str], quick: bool) -> dict[str, int]:
    """The tests asked for, or all of them, most of them compiled quickly."""
    pytest = (python, "-m", "pytest")
    flags = " ".join(flag for flag in QUICK_COMPILATION if is_known(python, flag))
    if arguments:
        used = flags if quick else ""
        return {"tests": call(*pytest, *arguments, purpose="tests", flags=used)}
    # Whole files to each worker: what is shared within one is then made once.
    shared = ("--dist", "loadfile", "--no-loadscope-reorder")
    # A worker that crashes ends the run, which would otherwise wait for it for ever.
    both = (*pytest, "-n", "2", "--max-worker-restart=0", *shared, "-m")
    return {
        "tests": call(
            *(*both, "not optimised"), purpose="tests, quickly compiled", flags=flags
        ),
        "optimised tests": call(
            *(*both, "optimised"), purpose="tests, compiled as for users"
        ),
    }


def is_known(python: Path, flag: str) -> bool:
    """Whether this jaxlib has it; XLA ends a program that sets another."""
    probe = (str(python), "-c", "import jax; jax.devices()")
    environment = os.environ | {"XLA_FLAGS": flag}
    return not subprocess.run(probe, env=environment, capture_output=True).returncode


COMMANDS = {"example": example, "test": test, "bench": bench}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(__doc__)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    return COMMANDS[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
