"""Checkpoints: the training state and the position in the data, without any code."""

import contextlib
import math
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    LatestN,
)

METRIC = "bits_per_byte"


def _score(metrics: dict[str, float]) -> float:
    """Return a score, lower is better; an unvalidated checkpoint is never the best."""
    return metrics.get(METRIC, math.inf)


class Checkpoints:
    """A folder with the newest checkpoints and the best one.

    A checkpoint appears under its name only when it is complete, so a run that is
    killed while it writes leaves no broken one. Arrays are stored by their path in the
    state, and the position in the data as JSON: loading executes no code.

    **Arguments:** `folder`, created if missing; `keep`, how many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder.absolute()
        best = BestN(
            get_metric_fn=_score,
            reverse=True,
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), best]),
            best_fn=_score,  # without it no metrics are stored
            best_mode="min",
            cleanup_tmp_directories=True,
            create=True,
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> int | None:
        """Return the step of the newest checkpoint; it may still be being written."""
        return self._manager.latest_step()

    def on_disk(self) -> int | None:
        """Return the step of the newest checkpoint that is completely on disk."""
        names = [path.name for path in self.folder.iterdir()]
        return max((int(name) for name in names if name.isdigit()), default=None)

    def best(self) -> int | None:
        """Return the step with the best validation; `None` if there was none."""
        step = self._manager.best_step()
        validated = step is not None and METRIC in (self._manager.metrics(step) or {})
        return step if validated else None

    def path(self, step: int) -> Path:
        """Return the folder of one checkpoint."""
        return self.folder / str(step)

    def save(
        self, step: int, state: PyTree, data: Any, bits_per_byte: float | None
    ) -> None:
        """Start writing a checkpoint; the arrays may be donated afterwards.

        **Arguments:** `state`, any pytree; `data`, the position in the data, for JSON;
        `bits_per_byte`, the result of the validation at this step, if there was one.

        **Raises:** `OSError` if this or an earlier one cannot be written.
        """
        with _as_os_errors():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_by_path(state)),  # pyright: ignore[reportCallIssue]
                    data=ocp.args.JsonSave(data),  # pyright: ignore[reportCallIssue]
                ),
                metrics={} if bits_per_byte is None else {METRIC: bits_per_byte},
            )

    def restore(self, step: int, like: PyTree) -> tuple[PyTree, Any]:
        """Return the state and the position in the data of a checkpoint.

        **Arguments:** `like`, a pytree of the shapes, dtypes and shardings to restore;
        its arrays are not read.

        **Raises:** `ValueError` if the checkpoint is of another model; it lists some
        differences.
        """
        arrays, rest = eqx.partition(like, _has_shape)
        wanted = _by_path(arrays)
        stored = self._stored(step)
        _check_same(self.path(step), stored, wanted)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(  # pyright: ignore[reportCallIssue]
                    jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
                ),
                data=ocp.args.JsonRestore(),
            ),
        )
        leaves = [restored["state"][path] for path in wanted]
        arrays = jax.tree.unflatten(jax.tree.structure(arrays), leaves)
        return eqx.combine(arrays, rest), restored["data"]

    def _stored(self, step: int) -> dict[str, Any]:
        metadata = self._manager.item_metadata(step)
        tree = metadata["state"]
        return dict(getattr(tree, "tree", tree))

    def wait(self) -> None:
        """Wait for all writes to finish. **Raises:** `OSError` if one failed."""
        with _as_os_errors():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Wait, and release the folder. **Raises:** as `wait`."""
        with _as_os_errors():
            self._manager.close()


@contextlib.contextmanager
def _as_os_errors():
    """Turn all errors of the file system into `OSError`.

    Those of tensorstore are `ValueError`s; the next call raises some of them again.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise OSError(f"a checkpoint could not be written: {error}") from error


def _has_shape(leaf: Any) -> bool:
    return eqx.is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _by_path(tree: PyTree) -> dict[str, Any]:
    """Return the array leaves by their paths, such as `.model.embedding`."""
    leaves, _ = jtu.tree_flatten_with_path(eqx.filter(tree, _has_shape))
    return {jtu.keystr(path): leaf for path, leaf in leaves}


def _check_same(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    def describe(tree, place):
        return str(tuple(tree[place].shape)) if place in tree else "missing"

    places = sorted(stored.keys() | wanted.keys())
    wrong = [
        f"{place}: {describe(stored, place)} in the checkpoint, "
        f"{describe(wanted, place)} in the model"
        for place in places
        if describe(stored, place) != describe(wanted, place)
    ]
    if wrong:
        shown = "\n  ".join(wrong[:5] + ["..."] * (len(wrong) > 5))
        raise ValueError(
            f"the checkpoint {path} is of another model:\n  {shown}\nLikely causes: "
            "(a) options of the model or optimiser that differ from those of the run, "
            "(b) the folder of another run. `config.json` says how it was made."
        )
