#!/usr/bin/env python3
"""Set the project up and run it: `python3 run.py {example,test,bench} [arguments]`.

Needs Python 3.11 or later, its `venv` module, and access to PyPI, nothing else. The
packages are installed into `.venv` beside this file, and again only when
`pyproject.toml` changes.

    example   run examples/parallelize_custom_cell.py; arguments go to the script
    test      lint, types, documentation, then every test; arguments go to pytest
    bench     run `python -m benchmarks`; arguments go to it
"""

import sys

# Before the other imports and in old syntax: an old Python shall say what is wrong.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        "run.py: Python 3.11 or later is needed, this is %s (%s). Run it with a newer "  # noqa: UP031
        "one, for instance `python3.11 run.py test`."
        % (sys.version.split()[0], sys.executable)
    )

import hashlib
import os
import shlex
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

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")


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


def install(extra: str) -> None:
    """Make `.venv` hold the project with an extra, at no cost if it already does."""
    if not PYTHON.exists():
        must(
            *(sys.executable, "-m", "venv", VENV),
            purpose="make .venv",
            hint="could not make .venv. Likely cause: Python's venv module is missing; "
            "on Debian and Ubuntu, `apt install python3-venv`.",
        )
    metadata = (ROOT / "pyproject.toml").read_bytes()
    wanted = hashlib.sha256(metadata + sys.version.encode()).hexdigest()
    stamp = VENV / f".installed-{extra}"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    must(
        *(PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"),
        *("--editable", f".[{extra}]"),
        purpose=f"install pararnn[{extra}] into .venv (some minutes the first time)",
        hint="the installation failed. Likely causes: (a) no access to PyPI, (b) a "
        "broken .venv: delete it and run again.",
    )
    stamp.write_text(wanted)


def example(arguments: list[str]) -> int:
    install("examples")
    script = Path("examples") / "parallelize_custom_cell.py"
    return call(PYTHON, script, *arguments, purpose="example")


def bench(arguments: list[str]) -> int:
    install("benchmarks")
    return call(PYTHON, "-m", "benchmarks", *arguments, purpose="benchmarks")


def test(arguments: list[str]) -> int:
    """Run every check, also after one has failed, and pytest last."""
    install("dev")
    python = (PYTHON, "-m")
    with tempfile.TemporaryDirectory() as site:
        checks = {
            "lint": (*python, "ruff", "check", "."),
            "format": (*python, "ruff", "format", "--check", "."),
            "types": (*python, "pyright", "--pythonpath", PYTHON),
            "documentation": (
                *(*python, "mkdocs", "build", "--strict", "--quiet"),
                *("--site-dir", site),
            ),
        }
        codes = {name: call(*check, purpose=name) for name, check in checks.items()}
    codes |= run_tests(arguments)
    failed = [name for name, code in codes.items() if code]
    if failed:
        print(f"\nrun.py: failed: {', '.join(failed)}", file=sys.stderr)
    return next((code for code in codes.values() if code), 0)


def run_tests(arguments: list[str]) -> dict[str, int]:
    """The tests asked for, or all of them, most of them compiled quickly."""
    pytest = (PYTHON, "-m", "pytest")
    if arguments:
        return {"tests": call(*pytest, *arguments, purpose="tests")}
    # Whole files to each worker: what is shared within one is then made once.
    shared = ("--dist", "loadfile", "--no-loadscope-reorder")
    both = (*pytest, "-n", "2", *shared, "-m")
    return {
        "tests": call(
            *(*both, "not optimised"),
            purpose="tests, quickly compiled",
            flags=" ".join(filter(is_known, QUICK_COMPILATION)),
        ),
        "optimised tests": call(
            *(*both, "optimised"), purpose="tests, compiled as for users"
        ),
    }


def is_known(flag: str) -> bool:
    """Whether this jaxlib has it; XLA ends a program that sets another."""
    probe = (str(PYTHON), "-c", "import jax; jax.devices()")
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
