"""Decoded or computed images kept on disk, so that the work is done once."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import PIL

from jaxsd.data.decode import Decoded, Layout, decode_all
from jaxsd.data.files import Entry
from jaxsd.errors import UserError

FORMAT = 2  # raise when the meaning of cached pixels changes
SHOWN = 20  # files named in an error or a warning


def read_images(
    root: Path, entries: list[Entry], target: Layout, *, on_bad_image: str, cache: str | Path | None, of: str = ""
) -> tuple[Decoded, tuple[str, ...]]:
    """A folder's decoded files, and the names of those that could not be read, each with the reason.

    on_bad_image: "skip", or "error" to raise UserError with these names. cache: folder for decoded images, "auto" for
    the user's cache folder, None or "" for none. of: as in `decode_cached`.
    Files that were read but may not show what is meant are named in a warning.
    """
    if on_bad_image not in ("error", "skip"):
        raise UserError(f"on_bad_image must be 'error' or 'skip': got '{on_bad_image}'")
    decoded = decode_cached(root, entries, target, chosen_folder(cache), of=of)
    skipped = _named(entries, decoded.bad)
    if skipped and on_bad_image == "error":
        raise UserError(
            f"{len(skipped)} image{'s' if len(skipped) > 1 else ''} in {root} cannot be read: {_some(skipped)}; "
            "repair or remove what is named, or leave it out with on_bad_image='skip' (--config.data.on_bad_image=skip)"
        )
    if doubts := _named(entries, decoded.doubts):
        logging.getLogger(__name__).warning(
            "%d images in %s are read, but look at them: %s", len(doubts), root, _some(doubts)
        )
    return decoded, skipped


def _named(entries: list[Entry], reasons: Mapping[int, str]) -> tuple[str, ...]:
    return tuple(f"{entries[position].name} ({reason})" for position, reason in reasons.items())


def _some(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def decode_cached(root: Path, entries: list[Entry], target: Layout, folder: Path | None, *, of: str = "") -> Decoded:
    """Decodes a folder's files, or reads what an earlier call left in the cache folder (None: no cache).

    There is one cache file per image folder, list of its files (`of`: the list's path) and layout. It is valid while
    names, sizes and times of change of all files are the same; a stale or damaged one is made again, without a word. A
    cache that cannot be written is only a warning in the log. What the system failed to read (no memory, no
    permission) is tried again next time.
    """
    paths, names = [entry.path for entry in entries], [entry.name for entry in entries]
    if folder is None:
        return decode_all(paths, names, target)
    place = _digest(str(root.resolve()), *target, *((of,) if of else ()))
    key = _digest(FORMAT, PIL.__version__, *target, *((entry.name, *entry.stamp) for entry in entries))
    path = folder / f"{root.resolve().name or 'images'}-{place[:16]}.npz"
    kept = _read(path, key)
    if kept is not None:
        bad, doubts = (
            {int(position): reason for position, reason in reasons.items()}
            for reasons in json.loads(str(kept["reasons"]))
        )
        return Decoded(kept["images"], bad, doubts)
    decoded = decode_all(paths, names, target)
    if decoded.lasting:
        reasons = np.array(json.dumps([decoded.bad, decoded.doubts]))
        _write(path, key, {"reasons": reasons, "images": decoded.images})
    return decoded


def arrays_cached(
    name: str, key: object, folder: Path | None, make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """What `make` gives, or what it gave for an equal `key` earlier; the newest key is kept in the folder (None: none).

    name: the file's name in the folder. key: all that the arrays depend on, told apart by its `repr`.
    """
    if folder is None:
        return make()
    path, digest = folder / f"{name}.npz", _digest(FORMAT, key)
    kept = _read(path, digest)
    if kept is None:
        kept = make()
        _write(path, digest, kept)
    return kept


def chosen_folder(cache: str | Path | None) -> Path | None:
    """The folder that a loader's `cache` stands for: a path, "auto" for the default, None or "" for no cache."""
    return default_folder() if cache == "auto" else Path(cache).expanduser() if cache else None


def default_folder() -> Path:
    """`jaxsd/images` in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxsd" / "images"


def _read(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """The cached arrays, or None where there are none, other ones, or damaged ones (the file has checksums)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files} if str(file["key"]) == key else None
    except Exception:  # damaged bytes can raise nearly anything
        return None


def _write(path: Path, key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes beside the target and renames, so that a reader never sees half a file."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".npz", delete=False) as file:
            temporary = Path(file.name)
            np.savez(file, **{"key": np.array(key), **arrays})  # type: ignore[arg-type]
        temporary.replace(path)
    except OSError as error:
        logging.getLogger(__name__).warning("images are not cached: %s", error)
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()
