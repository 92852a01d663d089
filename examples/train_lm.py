"""Train a language model of recurrent layers on text: bytes of files, or tokens.

    python examples/train_lm.py --out runs/gru
    python examples/train_lm.py --out runs/mamba --model.mixer mamba2
    python examples/train_lm.py --out runs/both --model.mixer paralstm deltanet:heads=4
    python examples/train_lm.py --out runs/gru --resume

Without `--data.corpus` it reads the source of Python's standard library. Ctrl-C or
SIGTERM stop it after a checkpoint, and `--resume` continues bit for bit. The folder has
the configuration, checkpoints, the log, and curves.png. `--help` lists all options.
examples/sample_lm.py continues text with the model.
"""

import dataclasses
import pathlib
import sys

import tyro

from pararnn.training import Config, TrainingFailed, train


@dataclasses.dataclass(frozen=True)
class Arguments(Config):
    """A training run."""

    out: pathlib.Path = pathlib.Path("runs/lm")
    """Folder of the run."""
    resume: bool = False
    """Continue the run in the folder, with its options where none are given."""


def parse(arguments: list[str]) -> Arguments:
    """Read the command line, with the options of a resumed run as defaults."""
    first = tyro.cli(Arguments, args=arguments, description=__doc__)
    stored = first.out / "config.json"
    if not (first.resume and stored.exists()):
        return first
    before = dataclasses.asdict(Config.load(stored))
    known = {name: getattr(Config.load(stored), name) for name in before}
    return tyro.cli(Arguments, args=arguments, default=Arguments(**known))


def main() -> int:
    arguments = parse(sys.argv[1:])
    names = [field.name for field in dataclasses.fields(Config)]
    config = Config(**{name: getattr(arguments, name) for name in names})
    try:
        outcome = train(config, arguments.out, resume=arguments.resume)
    except (TrainingFailed, ValueError, OSError) as error:
        print(f"train_lm.py: {error}", file=sys.stderr)
        return 1
    if outcome.signal:
        print(
            f"{outcome.signal}: stopped after step {outcome.step}; --resume continues"
        )
    print(f"{outcome.checkpoint}\n{arguments.out / 'curves.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
