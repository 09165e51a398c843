"""What a frozen trunk makes of a fixed set of images: computed once, then read in every step.

The features of every image (or patch) stay on the device where there is room, else in the host's memory, else in a file
of the stage, from which a run that was stopped while they were computed goes on.
"""

import functools
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxsd import processes
from jaxsd.data.batches import fitting, ordered_batches
from jaxsd.data.source import Grid
from jaxsd.errors import RunError, UserError
from jaxsd.objectives.objective import Objective
from jaxsd.train.loop import Stop, data_mesh, gather, spread
from jaxsd.tuning import compiler_options
from jaxsd.workdir import log, read_json, write_json

Tree = Any
PLACES = ("auto", "device", "host", "disk", "never")
SHARE = 0.25  # of a memory that may be filled without asking
FLUSH_SECONDS = 5.0  # between two notes of how far the file is filled
BATCH = 64


class Trunk(NamedTuple):
    """Features of all rows: an array tree [rows, ...] for the device, or a function that gives those of a batch."""

    place: str
    features: Tree | None
    feed: Callable[[np.ndarray], Tree] | None
    seconds: float


def compute(
    objective: Objective,
    params: Tree,
    extra: Tree,
    data: dict[str, np.ndarray],
    *,
    grid: Grid | None = None,
    place: str = "auto",
    folder: Path | None = None,
    stamp: str = "",
    stop: Stop | None = None,
    where: str = "training",
) -> Trunk:
    """Runs the objective's trunk over all images of `data`, or all their patches, in order.

    place: one of PLACES but "never". folder: where a file may be kept. stamp: what the features depend on; a file of
    another one is thrown away. Raises UserError for an unknown place, RunError where a disk has no room.
    """
    start, stop = time.monotonic(), stop or Stop()
    count = len(data["image"]) * (grid.count(*data["image"].shape[1:3]) if grid is not None else 1)
    batch = min(fitting(BATCH, (grid.size, grid.size) if grid is not None else data["image"].shape[1:]), count)
    mesh = data_mesh(batch)
    function = _compiled(objective, mesh, grid)
    params, extra, placed = spread((params, extra, {"image": data["image"]}), mesh)
    one = jax.eval_shape(function, params, extra, placed, *(part[0] for part in ordered_batches(count, batch)))
    shapes = jax.tree.map(lambda x: ((count, *x.shape[1:]), x.dtype), one)
    size = sum(count * math.prod(x.shape[1:]) * x.dtype.itemsize for x in jax.tree.leaves(one))
    # Processes whose memories differ would choose differently, and then run different programs.
    chosen = PLACES[int(processes.share(np.array(PLACES.index(_chosen(place, size, folder)))))]
    log.info("%s: the frozen trunk's features, %.0f MB, are computed once, kept on the %s", where, size / 1e6, chosen)

    def rows_from(first: int):
        index, masks = ordered_batches(count, batch)
        for at in range(first // batch, len(index)):
            stop.look(where)
            found = function(params, extra, placed, index[at], masks[at])
            rows = slice(at * batch, min((at + 1) * batch, count))
            yield rows, jax.tree.map(lambda x, rows=rows: np.asarray(x)[: rows.stop - rows.start], found)

    if chosen == "disk":
        assert folder is not None
        features = _filled(folder, shapes, stamp, batch, rows_from)
    else:
        features = jax.tree.map(lambda part: np.empty(*part), shapes, is_leaf=_is_shape)
        for rows, found in rows_from(0):
            jax.tree.map(lambda kept, new, rows=rows: kept.__setitem__(rows, new), features, found)
    seconds = time.monotonic() - start
    if chosen == "device":
        return Trunk(chosen, features, None, seconds)
    return Trunk(chosen, None, lambda rows: jax.tree.map(lambda kept: kept[rows], features), seconds)


def clear(folder: Path) -> None:
    """Removes the file of a finished stage."""
    shutil.rmtree(folder, ignore_errors=True)


@functools.lru_cache(maxsize=64)
def _compiled(objective: Objective, mesh: Mesh | None, grid: Grid | None) -> Callable[..., Tree]:
    assert objective.trunk is not None

    def features(params: Tree, extra: Tree, data: Tree, rows: jax.Array, mask: jax.Array) -> Tree:
        return objective.trunk(params, extra, gather(data, rows, mask, mesh, grid)["image"])  # type: ignore[misc]

    return jax.jit(features, compiler_options=compiler_options())


def _is_shape(part: Any) -> bool:
    return isinstance(part, tuple) and len(part) == 2 and isinstance(part[0], tuple)


def _chosen(place: str, size: int, folder: Path | None) -> str:
    """Where features of so many bytes go."""
    if place not in PLACES or place == "never":
        raise UserError(f"trunk: {place!r} is no place for features: choose from {', '.join(PLACES)}")
    if place == "disk" and folder is None:
        raise UserError("trunk: 'disk' needs a workdir and a single process: choose 'host'")
    if place != "auto":
        return place
    memory = _memory()
    device = jax.local_devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    if size <= SHARE * (stats["bytes_limit"] if stats else memory):
        return "device"
    return "host" if (stats and size <= SHARE * memory) or folder is None else "disk"


def _memory() -> int:
    """Bytes of memory that this process may have: the machine's, or less in a container."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 4 << 30
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return whole
    return min(whole, int(limit)) if limit.isdigit() else whole


def _filled(folder: Path, shapes: Tree, stamp: str, batch: int, rows_from: Callable[[int], Any]) -> Tree:
    """Files with all rows, opened for reading; filled from where an earlier start was stopped."""
    note = folder / "rows.json"
    leaves, structure = jax.tree.flatten(shapes, is_leaf=_is_shape)
    wanted = {"stamp": stamp, "batch": batch, "shapes": json.loads(json.dumps([[s, str(d)] for s, d in leaves]))}
    paths = [folder / f"{number}.npy" for number in range(len(leaves))]
    first, sums = _left(note, paths, wanted)
    if not first:
        clear(folder)
        folder.mkdir(parents=True)
        need = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in leaves)
        if need > shutil.disk_usage(folder).free:
            raise RunError(
                f"the trunk's features need {need / 1e9:.1f} GB in {folder}: make room, or set trunk='never'"
            )
    kept = [
        np.lib.format.open_memmap(path, "r+" if first else "w+", **({} if first else {"dtype": dtype, "shape": shape}))
        for path, (shape, dtype) in zip(paths, leaves, strict=True)
    ]
    if not first:
        _reserve(paths)
    written = time.monotonic()
    for rows, new in rows_from(first):
        for array, values in zip(kept, jax.tree.leaves(new), strict=True):
            array[rows] = values
        sums = [_checksum(values, start) for values, start in zip(jax.tree.leaves(new), sums, strict=True)]
        if rows.stop == leaves[0][0][0] or time.monotonic() - written > FLUSH_SECONDS:
            for array in kept:
                array.flush()
            write_json(note, {**wanted, "rows": rows.stop, "sums": sums})
            written = time.monotonic()
    return jax.tree.unflatten(structure, [np.load(path, mmap_mode="r") for path in paths])


def _left(note: Path, paths: list[Path], wanted: dict[str, Any]) -> tuple[int, list[int]]:
    """How many rows an earlier start has left and a checksum of each file's; none where they differ now."""
    found, nothing = read_json(note) or {}, (0, [0] * len(paths))
    if {name: found.get(name) for name in wanted} != wanted:
        return nothing
    rows, sums = found["rows"], found["sums"]
    try:
        if [_checksum(np.load(path, mmap_mode="r")[:rows]) for path in paths] == sums:
            return rows, sums
    except (OSError, ValueError):  # missing, or cut
        pass
    log.warning("the features in %s are damaged: they are computed again", note.parent)
    return nothing


def _checksum(values: np.ndarray, start: int = 0) -> int:
    """CRC-32 of the bytes of rows that follow others with the checksum `start`."""
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, start)


def _reserve(paths: list[Path]) -> None:
    """Takes the room of files on the disk: a process is killed where there is none when it writes to their memory."""
    for path in paths if hasattr(os, "posix_fallocate") else ():
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
