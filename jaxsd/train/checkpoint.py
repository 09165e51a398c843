"""Checkpoints of a training run: Orbax, in two parts that are read apart.

`model` holds what the next stage or an evaluation needs (all parameters, frozen ones too, and `extra`); `training`
holds the rest of what a resumed run needs (optimiser state, key, step, the running sums of the epoch). `record` holds
a checksum of every tensor, since Orbax does not notice every damaged file, and the seconds of training so far.
"""

import contextlib
import logging
import shutil
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxsd import processes
from jaxsd.errors import RunError
from jaxsd.train.state import State, flat, merge, partition
from jaxsd.workdir import log

Tree = Any


class Saved(NamedTuple):
    """What a checkpoint of a running stage holds."""

    step: int
    state: State
    sums: Tree
    seconds: float  # of training until then


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
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        options = _options(max_to_keep=keep, cleanup_tmp_directories=True)
        with _quiet():
            self._manager = ocp.CheckpointManager(
                self.directory.absolute(), item_names=("model", "training", "record"), options=options
            )

    def latest(self) -> int | None:
        """The newest step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, sums: Tree, *, seconds: float = 0.0) -> None:
        """Starts writing a checkpoint in the background; waits for the one before.

        The arrays must not be given away (donated) until `wait` returns.
        """
        model = {"params": merge(state.params, state.frozen), "extra": state.extra}
        key = jax.random.key_data(state.key)
        training = {"opt_state": state.opt_state, "key": key, "step": state.step, "sums": sums}
        if processes.several():  # Orbax takes arrays of one process among several from the host only
            model, training = processes.host((model, training))
        record = {"model": _checksums(model), "training": _checksums(training), "seconds": seconds}
        args = ocp.args.Composite(
            model=ocp.args.StandardSave(model),
            training=ocp.args.StandardSave(training),
            record=ocp.args.JsonSave(record),
        )
        with _quiet():
            if not self._manager.save(step, args=args, force=True):
                raise RunError(f"checkpoint of step {step} was not written to {self.directory}")

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with _quiet():
            self._manager.wait_until_finished()

    def resume(self, state: State, sums: Tree) -> Saved | None:
        """The newest checkpoint that is whole, None where there is none.

        Damaged ones are named in the log and moved out of the way, to the folder `damaged` beside this one. `state`
        and `sums` (values are not read) say shapes, types and placement.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self.restore(step, state, sums)
            except RunError as error:
                aside = self.directory.parent / "damaged" / str(step)
                log.warning("%s; it is now in %s, training goes on from the one before", error, aside.parent)
                shutil.rmtree(aside, ignore_errors=True)
                aside.parent.mkdir(exist_ok=True)
                shutil.move(self.directory / str(step), aside)
                self._manager.reload()
        return None

    def restore(self, step: int, state: State, sums: Tree) -> Saved:
        """The checkpoint of a step, placed as `state` and `sums` are; RunError where it is damaged."""
        like = jax.tree.map(_abstract, (state, sums))
        model = {"params": merge(like[0].params, like[0].frozen), "extra": like[0].extra}
        key = jax.eval_shape(jax.random.key_data, like[0].key).update(sharding=like[0].key.sharding)
        training = {"opt_state": like[0].opt_state, "key": key, "step": like[0].step, "sums": like[1]}
        saved = _read(self._manager, self.directory, step, {"model": model, "training": training})
        model, training = saved["model"], saved["training"]
        names = ["/".join(path) for path in flat(state.frozen)]
        params, frozen = partition(model["params"], names)
        key = jax.random.wrap_key_data(training["key"])
        restored = State(training["step"], params, frozen, model["extra"], training["opt_state"], key)
        return Saved(step, restored, training["sums"], saved["record"]["seconds"])

    def close(self) -> None:
        """Waits for the last write and lets go of the folder."""
        with _quiet():
            self._manager.close()


def restore_model(directory: Path, model: Tree) -> Tree:
    """The newest {"params", "extra"} in a checkpoint folder, alone; `model` says shapes and types.

    Raises RunError where there is none or it is damaged.
    """
    with _quiet(), ocp.CheckpointManager(Path(directory).absolute(), options=_options()) as manager:
        step = manager.latest_step()
        if step is None:
            raise RunError(f"there is no checkpoint in {directory}")
        return _read(manager, directory, step, {"model": jax.tree.map(_abstract, model)})["model"]


def read_model(directory: Path) -> Tree:
    """The newest {"params", "extra"} in a checkpoint folder as it was saved, in numpy arrays, whatever they are."""
    with _quiet(), ocp.CheckpointManager(Path(directory).absolute(), options=_options()) as manager:
        step = manager.latest_step()
        if step is None:
            raise RunError(f"no checkpoint in {directory}")
        saved = manager.restore(step, args=ocp.args.Composite(model=ocp.args.StandardRestore()))["model"]
    return jax.tree.map(np.asarray, saved)


def _options(**options: Any) -> ocp.CheckpointManagerOptions:
    """Options of a manager; where there are several processes, of one that waits for no other."""
    if processes.several():
        only = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="first")
        options |= {"create": False, "multiprocessing_options": only}
    return ocp.CheckpointManagerOptions(**options)


def _read(manager: ocp.CheckpointManager, directory: Path, step: int, like: dict[str, Tree]) -> dict[str, Any]:
    """The named parts of a checkpoint and its record; RunError where a file or a checksum is wrong."""
    parts = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
    damaged = f"the checkpoint of step {step} in {directory} is damaged"
    try:
        with _quiet():
            saved = dict(manager.restore(step, args=ocp.args.Composite(**parts, record=ocp.args.JsonRestore())))
    except (MemoryError, RuntimeError):  # the machine's fault (jax raises the latter), not the file's
        raise
    except Exception as error:  # whatever Orbax and what is under it make of a damaged file
        raise RunError(f"{damaged} ({type(error).__name__})") from error
    for name in like:
        sums, wanted = _checksums(saved[name]), saved["record"][name]
        wrong = [path for path in {*sums, *wanted} if sums.get(path) != wanted.get(path)]
        if wrong:
            raise RunError(
                f"{damaged}: {len(wrong)} of {len(wanted)} tensors have another checksum, first {min(wrong)}"
            )
    return saved


def _checksums(tree: Tree) -> dict[str, int]:
    """A CRC-32 of the bytes of every array."""
    sums = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        sums[jax.tree_util.keystr(path)] = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return sums


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
