"""Checkpoints of a training run: Orbax's files in two parts that are read apart, sealed by a manifest.

`model` holds what the next stage or an evaluation needs (all parameters, frozen ones too, and `extra`); `training`
holds the rest of what a resumed run needs (optimiser state, key, step, the running sums of the epoch); `record` the
shape and type of every tensor and the seconds of training so far.

A checkpoint is written to a folder `STEP.part`, sealed there, then renamed to `STEP`: what has that name is complete.
Orbax does not notice most damage to its files and casts other types silently, so both are checked before it reads.
"""

import errno
import json
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxsd import processes
from jaxsd.errors import Damaged, RunError
from jaxsd.train.manifest import damage, flush, seal
from jaxsd.train.state import State, flat, merge, partition
from jaxsd.workdir import log

Tree = Any


def _worth_saying(record: logging.LogRecord) -> bool:
    """Orbax reports each of its steps through absl, and its failures once more than it raises them."""
    return "orbax" not in Path(record.pathname).parts


logging.getLogger("absl").addFilter(_worth_saying)


class Saved(NamedTuple):
    """What a checkpoint of a running stage holds."""

    step: int
    state: State
    sums: Tree
    seconds: float  # of training until then


class Checkpoints:
    """The step-numbered checkpoints in one folder; the newest `keep` stay, and the one with the highest score."""

    def __init__(self, directory: Path, *, keep: int = 2):
        self.directory, self.keep = Path(directory).absolute(), keep
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob("*.part*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._scores = {step: _record(self.directory / str(step)).get("score") for step in steps(self.directory)}

    def latest(self, *, wait: bool = True) -> int | None:
        """The newest step, or None; waits for a write under way, or does without what that writes."""
        if wait:
            self.wait()
        return max(steps(self.directory), default=None)

    def best(self) -> tuple[int, float] | None:
        """The step with the highest score, the first of equals, and the score; None where none has one."""
        scored = [(step, score) for step, score in sorted(self._scores.items()) if score is not None]
        return max(scored, key=lambda pair: pair[1], default=None)

    def save(self, step: int, state: State, sums: Tree, *, seconds: float = 0.0, score: float | None = None) -> None:
        """Starts writing a checkpoint in the background; waits for the one before.

        The arrays must not be given away (donated) until `wait` returns. RunError where the one before could not be
        written.
        """
        self.wait()
        model = {"params": merge(state.params, state.frozen), "extra": state.extra}
        key = jax.random.key_data(state.key)
        training = {"opt_state": state.opt_state, "key": key, "step": state.step, "sums": sums}
        if processes.several():  # Orbax takes arrays of one process among several from the host only
            model, training = processes.host((model, training))
        record = {"seconds": seconds, "score": score, "model": _kinds(model), "training": _kinds(training)}
        args = ocp.args.Composite(
            model=ocp.args.StandardSave(model),
            training=ocp.args.StandardSave(training),
            record=ocp.args.JsonSave(record),
        )
        self._scores[step] = score
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((model, training)))
        self._writing = self._thread.submit(self._write, step, args, size)

    def wait(self) -> None:
        """Returns when everything is on disk; RunError where it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, args: ocp.args.Composite, size: int) -> None:
        part = self.directory / f"{step}.part"
        try:
            if not self.directory.is_dir():  # Orbax would make it anew, without what was in it
                raise FileNotFoundError(None, "the folder has vanished")
            if size > shutil.disk_usage(self.directory).free:  # where tensorstore fails, its threads go on complaining
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with _composite() as checkpointer:
                checkpointer.save(part, args=args, force=True)
            seal(part)
            os.rename(part, self.directory / str(step))
            flush(self.directory)  # else the name may be lost with the power, and older ones are removed next
        except Exception as error:  # tensorstore raises ValueError for a full disk
            for leftover in self.directory.glob("*.part*"):
                shutil.rmtree(leftover, ignore_errors=True)
            self._scores.pop(step)
            kept = max(steps(self.directory), default=None)
            raise RunError(
                f"the checkpoint of step {step} could not be written to {self.directory} ({_reason(error)}); "
                + ("there is none before it" if kept is None else f"the one of step {kept} stays")
                + "; once that is mended give the same command again"
            ) from error
        self._drop_old()

    def _drop_old(self) -> None:
        present = steps(self.directory)
        best = self.best()
        for step in {*present} - {*present[-self.keep :], best[0] if best else None}:
            part = self.directory / f"{step}.part"  # never half a checkpoint under its name
            os.rename(self.directory / str(step), part)
            shutil.rmtree(part, ignore_errors=True)
            self._scores.pop(step, None)

    def resume(self, state: State, sums: Tree) -> Saved | None:
        """The newest checkpoint that is whole, None where there is no checkpoint at all.

        Newer ones, which are damaged, are named in the log and moved out of the way, to the folder `damaged` beside
        this one. With none left RunError, and nothing is touched. `state` and `sums` (values are not read) say shapes,
        types and placement.
        """
        damaged: dict[int, str] = {}
        for step in reversed(steps(self.directory)):
            what = damage(self.directory / str(step))
            if what is None:
                saved = self._restored(self.directory / str(step), state, sums)
                self._set_aside(damaged, step)
                return saved
            damaged[step] = what
        if not damaged:
            return None
        first = max(damaged)
        raise RunError(
            f"no whole checkpoint is left in {self.directory}: that of step {first} is damaged ({damaged[first]})"
            + (f", as are {len(damaged) - 1} before it" if len(damaged) > 1 else "")
            + f"; nothing was overwritten: bring it back, or remove {self.directory.parent} to train that stage anew"
        )

    def _set_aside(self, damaged: dict[int, str], whole: int) -> None:
        aside = self.directory.parent / "damaged"
        for step, what in damaged.items():
            log.warning(
                "the checkpoint of step %d in %s is damaged (%s); it is now in %s, training goes on from the one of "
                "step %d", step, self.directory, what, aside, whole,
            )  # fmt: skip
            shutil.rmtree(aside / str(step), ignore_errors=True)
            aside.mkdir(exist_ok=True)
            os.rename(self.directory / str(step), aside / str(step))
            self._scores.pop(step, None)

    def restore(self, step: int, state: State, sums: Tree) -> Saved:
        """The checkpoint of a step, placed as `state` and `sums` are; RunError where it is damaged."""
        return self._restored(_whole(self.directory, step), state, sums)

    def _restored(self, folder: Path, state: State, sums: Tree) -> Saved:
        like = jax.tree.map(_abstract, (state, sums))
        model = {"params": merge(like[0].params, like[0].frozen), "extra": like[0].extra}
        key = jax.eval_shape(jax.random.key_data, like[0].key).update(sharding=like[0].key.sharding)
        training = {"opt_state": like[0].opt_state, "key": key, "step": like[0].step, "sums": like[1]}
        saved = _read(folder, {"model": model, "training": training})
        model, training = saved["model"], saved["training"]
        names = ["/".join(path) for path in flat(state.frozen)]
        params, frozen = partition(model["params"], names)
        key = jax.random.wrap_key_data(training["key"])
        restored = State(training["step"], params, frozen, model["extra"], training["opt_state"], key)
        return Saved(int(folder.name), restored, training["sums"], _record(folder)["seconds"])

    def close(self) -> None:
        """Waits for the last write and lets go of the folder."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def steps(directory: Path) -> list[int]:
    """The steps that have a checkpoint in a folder, rising; whether they are whole is not looked at."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    return sorted(int(name) for name in names if name.isdecimal())


def restore_model(directory: Path, model: Tree, step: int | None = None) -> Tree:
    """{"params", "extra"} of a step, by default the newest, in a checkpoint folder; `model` says shapes and types.

    Raises Damaged where there is none or it is not as it was written, RunError where it does not fit, OSError where it
    cannot be read just now.
    """
    return _read(_whole(directory, step), {"model": jax.tree.map(_abstract, model)})["model"]


def read_model(directory: Path, step: int | None = None) -> Tree:
    """{"params", "extra"} of a step, by default the newest, as it was saved, in numpy arrays.

    Raises Damaged where there is none or it is not as it was written.
    """
    folder = _whole(directory, step)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        kinds = checkpointer.metadata(folder / "model").item_metadata.tree
    # Placed here: the devices on which it was saved need not be there.
    like = jax.tree.map(lambda leaf: _abstract(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)), kinds)
    return jax.tree.map(np.asarray, _read(folder, {"model": like})["model"])


def _whole(directory: Path, step: int | None) -> Path:
    """The folder of a step, by default the newest, that is there and as it was written; Damaged where it is not."""
    present = steps(directory)
    if not present or step not in {None, *present}:
        raise Damaged(f"there is no checkpoint{'' if step is None else f' of step {step}'} in {directory}")
    folder = Path(directory, str(present[-1] if step is None else step)).absolute()
    if (what := damage(folder)) is not None:
        raise Damaged(f"the checkpoint of step {folder.name} in {directory} is damaged ({what})")
    return folder


def _read(folder: Path, like: dict[str, Tree]) -> dict[str, Tree]:
    """The named parts of a checkpoint that is whole; RunError where a tensor is of another type or shape."""
    record = _record(folder)
    for name, tree in like.items():
        if (what := _misfit(record[name], _kinds(tree))) is not None:
            where = f"the checkpoint of step {folder.name} in {folder.parent}"
            raise RunError(f"{where} is of another network or recipe: {what}")
    args = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in like.items()})
    with _composite() as checkpointer:
        return dict(checkpointer.restore(folder, args=args))


def _composite() -> ocp.Checkpointer:
    """Orbax on all parts of a checkpoint; of several processes the first has it, which waits for no other."""
    only = _alone()
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=only),
        model=ocp.StandardCheckpointHandler(multiprocessing_options=only),
        training=ocp.StandardCheckpointHandler(multiprocessing_options=only),
        record=ocp.JsonCheckpointHandler(multiprocessing_options=only),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=only)


def _alone() -> ocp.options.MultiprocessingOptions:
    if not processes.several():
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="first")


def _record(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; nothing where that is damaged, which is found before it is needed."""
    try:
        record = json.loads((folder / "record" / "metadata").read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _kinds(tree: Tree) -> dict[str, str]:
    """Type and shape of every tensor by its name: {"params/head/bias": "float32[10]", ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = jax.tree_util.keystr
    return {name(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _misfit(saved: dict[str, str], wanted: dict[str, str]) -> str | None:
    for name in sorted({*saved, *wanted}):
        if saved.get(name) != wanted.get(name):
            return f"{name} is {saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here"
    return None


def _reason(error: Exception) -> str:
    """The cause of a failed write in a few words, out of the long ones of tensorstore."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO, errno.ENOENT)
    known = (os.strerror(number) for number in numbers)
    return next((words for words in known if words in text), f"{type(error).__name__}: {text[:200]}")


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
