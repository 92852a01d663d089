"""The configuration of a training run: everything that its numbers depend on."""

import dataclasses
import json
import operator
from pathlib import Path
from typing import Any, Literal

from .._checks import check_count


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model."""

    mixer: tuple[str, ...] = ("paragru",)
    """Layers that alternate, by name, with options after colons."""
    d_model: int = 192
    """Width."""
    depth: int = 2
    """Blocks."""
    d_hidden: int | None = None
    """Width of the MLPs; defaults to 8/3 of d_model, 0 for none."""
    solver: Literal["auto", "newton", "sequential"] = "auto"
    """Solver of nonlinear mixers."""
    segments: int | None = None
    """Segments of Newton's method; defaults to one for each step."""
    tied: bool = True
    """Use the embedding as the output matrix."""
    rematerialise: bool = False
    """Keep only the inputs of blocks for the gradient."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and of the parameters in their products; solves, scans,
    norms, logits and the optimiser stay in float32."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The corpus and how it is cut."""

    corpus: str | None = None
    """A file, folder or glob; defaults to Python's standard library."""
    tokenizer: str | None = None
    """A file of Hugging Face's tokenizers; defaults to bytes."""
    length: int = 1024
    """Tokens of a sequence."""
    batch: int = 8
    """Sequences of a microbatch, over all devices."""
    validation: float = 0.05
    """Fraction of the documents that is kept for validation."""
    validation_batches: int = 16
    """Batches to validate on, at most."""


@dataclasses.dataclass(frozen=True)
class OptimiserConfig:
    """AdamW with warm-up, a cosine to a tenth, and clipping."""

    learning_rate: float = 3e-3
    warmup: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Weight decay of matrices; vectors and embeddings do not decay."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    beta1: float = 0.9
    beta2: float = 0.95
    accumulate: int = 1
    """Microbatches in a step."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis has; all 1 for one device."""

    data: int = 1
    """Shards of the sequences of a batch."""
    fsdp: int = 1
    """Shards of parameters and optimiser state (and of the sequences of a batch)."""
    time: int = 1
    """Shards of the steps of a sequence."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    mesh: MeshConfig = MeshConfig()
    steps: int = 1000
    """Steps of the optimiser."""
    seed: int = 0
    """Seed of parameters, of the split and of the order of the data."""
    validate_every: int = 250
    """Steps between validations."""
    checkpoint_every: int = 250
    """Steps between checkpoints."""
    keep: int = 3
    """How many of the newest checkpoints to keep, besides the best."""

    def __post_init__(self):
        _check_counts(self)

    def to_json(self) -> str:
        """Return the configuration as JSON."""
        values = dataclasses.asdict(self)
        # The function for other types is for NumPy's integers.
        return json.dumps(values, indent=2, default=operator.index)

    def save(self, path: Path) -> None:
        """Write the JSON to a file, all at once or not at all."""
        fresh = path.with_suffix(".tmp")
        fresh.write_text(self.to_json() + "\n")
        fresh.replace(path)

    @staticmethod
    def load(path: Path) -> "Config":
        """Read what `save` wrote.

        **Raises:** `ValueError` if the file is not a configuration of this version.
        """
        try:
            return _build(Config, json.loads(path.read_text()))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f"Config.load: {path} is not a configuration of this version: {error}. "
                "Likely causes: (a) another version of pararnn wrote it, (b) it was "
                "edited by hand."
            ) from error


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ, by their dotted names: old and new value."""
    before, after = _flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(new))
    return {k: (before[k], after[k]) for k in before if before[k] != after[k]}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for name, value in tree.items():
        nested = isinstance(value, dict)
        out |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return out


def _build(cls, values: dict[str, Any]):
    made = {}
    for field in dataclasses.fields(cls):
        value = values.pop(field.name)
        if dataclasses.is_dataclass(field.type):
            value = _build(field.type, value)
        made[field.name] = tuple(value) if isinstance(value, list) else value
    if values:
        raise ValueError(f"unknown fields {', '.join(values)}")
    return cls(**made)


def _check_counts(config: Config) -> None:
    least = {
        "steps": 1,
        "validate_every": 1,
        "checkpoint_every": 1,
        "keep": 1,
        "model.d_model": 1,
        "model.depth": 1,
        "data.length": 1,
        "data.batch": 1,
        "data.validation_batches": 1,
        "optimiser.warmup": 0,
        "optimiser.accumulate": 1,
        "mesh.data": 1,
        "mesh.fsdp": 1,
        "mesh.time": 1,
    }
    values = _flat(dataclasses.asdict(config))
    for name, bound in least.items():
        check_count("Config", name, values[name], least=bound)
    positive = ("optimiser.learning_rate", "optimiser.clip")
    for name in positive:
        if not 0 < values[name] < float("inf"):
            raise ValueError(f"Config: `{name}` is {values[name]!r}, expected > 0.")
    if not 0 <= config.optimiser.weight_decay < float("inf"):
        raise ValueError(
            f"Config: `optimiser.weight_decay` is {config.optimiser.weight_decay!r}, "
            "expected >= 0."
        )
    if config.model.segments is not None and config.model.solver != "newton":
        raise ValueError(
            "Config: `model.segments` is an option of `model.solver` = newton, but the "
            f"solver is {config.model.solver}. Choose newton, or leave it out."
        )
