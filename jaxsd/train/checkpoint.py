"""Checkpoints of a training run: Orbax, in two parts that are read apart.

`model` holds what the next stage or an evaluation needs (all parameters, frozen ones too, and `extra`); `training`
holds the rest of what a resumed run needs (optimiser state, key, step, the running sums of the epoch).
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from jaxsd.errors import RunError
from jaxsd.train.state import State, merge, partition

Tree = Any


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax reports every save with dozens of INFO lines through absl; warnings and errors pass."""
    loggers = [logging.getLogger(name) for name in ("absl", "orbax")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Ss]harding info.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Checkpoints:
    """The step-numbered checkpoints in one folder; the newest `keep` stay."""

    def __init__(self, directory: Path, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
        with _quiet():
            self._manager = ocp.CheckpointManager(
                Path(directory).absolute(), item_names=("model", "training"), options=options
            )
        self.directory = Path(directory)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, sums: Tree) -> None:
        """Starts writing a checkpoint in the background; waits for the one before."""
        model = {"params": merge(state.params, state.frozen), "extra": state.extra}
        training = {"opt_state": state.opt_state, "key": state.key, "step": state.step, "sums": sums}
        args = ocp.args.Composite(model=ocp.args.StandardSave(model), training=ocp.args.StandardSave(training))
        with _quiet():
            if not self._manager.save(step, args=args, force=True):
                raise RunError(f"checkpoint of step {step} was not written to {self.directory}")

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with _quiet():
            self._manager.wait_until_finished()

    def restore(self, step: int, state: State, sums: Tree) -> tuple[State, Tree]:
        """The saved state and sums; `state` and `sums` (values are not read) say shapes, types and placement."""
        like = jax.tree.map(_abstract, (state, sums))
        model = {"params": merge(like[0].params, like[0].frozen), "extra": like[0].extra}
        training = {"opt_state": like[0].opt_state, "key": like[0].key, "step": like[0].step, "sums": like[1]}
        args = ocp.args.Composite(model=ocp.args.StandardRestore(model), training=ocp.args.StandardRestore(training))
        with _quiet():
            saved = self._manager.restore(step, args=args)
        names = ["/".join(path) for path in traverse_util.flatten_dict(state.frozen)]
        params, frozen = partition(saved["model"]["params"], names)
        training = saved["training"]
        restored = State(
            training["step"], params, frozen, saved["model"]["extra"], training["opt_state"], training["key"]
        )
        return restored, training["sums"]

    def close(self) -> None:
        """Waits for the last write and lets go of the folder."""
        with _quiet():
            self._manager.close()


def restore_model(directory: Path, model: Tree) -> Tree:
    """The newest {"params", "extra"} in a checkpoint folder, alone; `model` says shapes and types."""
    like = jax.tree.map(_abstract, model)
    with _quiet(), ocp.CheckpointManager(Path(directory).absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            raise RunError(f"no checkpoint in {directory}: remove the stage's folder to train it again")
        args = ocp.args.Composite(model=ocp.args.StandardRestore(like))
        return manager.restore(step, args=args)["model"]


def read_model(directory: Path) -> Tree:
    """The newest {"params", "extra"} in a checkpoint folder as it was saved, in numpy arrays, whatever they are."""
    with _quiet(), ocp.CheckpointManager(Path(directory).absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            raise RunError(f"no checkpoint in {directory}")
        saved = manager.restore(step, args=ocp.args.Composite(model=ocp.args.StandardRestore()))["model"]
    return jax.tree.map(np.asarray, saved)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
