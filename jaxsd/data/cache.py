"""Decoded images kept on disk, so that a folder is decoded once."""

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path

import numpy as np
import PIL

from jaxsd.data.decode import Decoded, Layout, decode_all
from jaxsd.data.files import Entry

FORMAT = 1  # raise when the meaning of cached pixels changes


def decode_cached(root: Path, entries: list[Entry], target: Layout, folder: Path | None) -> Decoded:
    """Decodes a folder's files, or reads what an earlier call left in the cache folder (None: no cache).

    There is one cache file per image folder and layout. It is valid while names, sizes and times of change of all
    files are the same; a stale or damaged one is made again, without a word. A cache that cannot be written is only
    a warning in the log. What the system failed to read (no memory, no permission) is tried again next time.
    """
    paths, names = [entry.path for entry in entries], [entry.name for entry in entries]
    if folder is None:
        return decode_all(paths, names, target)
    place = _digest(str(root.resolve()), *target)
    key = _digest(FORMAT, PIL.__version__, *target, *((entry.name, *entry.stamp) for entry in entries))
    path = folder / f"{root.resolve().name or 'images'}-{place[:16]}.npz"
    decoded = _read(path, key)
    if decoded is None:
        decoded = decode_all(paths, names, target)
        if decoded.lasting:
            _write(path, key, decoded)
    return decoded


def default_folder() -> Path:
    """`jaxsd/images` in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxsd" / "images"


def _read(path: Path, key: str) -> Decoded | None:
    """The cached images, or None where there are none, other ones, or damaged ones (the file has checksums)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) != key:
                return None
            bad = {int(position): reason for position, reason in json.loads(str(file["bad"])).items()}
            return Decoded(file["images"], bad)
    except Exception:  # damaged bytes can raise nearly anything
        return None


def _write(path: Path, key: str, decoded: Decoded) -> None:
    """Writes beside the target and renames, so that a reader never sees half a file."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".npz", delete=False) as file:
            temporary = Path(file.name)
            np.savez(file, key=np.array(key), bad=np.array(json.dumps(decoded.bad)), images=decoded.images)
        temporary.replace(path)
    except OSError as error:
        logging.getLogger(__name__).warning("decoded images are not cached: %s", error)
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()
