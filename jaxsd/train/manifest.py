"""What a checkpoint's folder must hold: the size and SHA-256 of every file, in its manifest.json."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def seal(folder: Path) -> None:
    """Writes the manifest of a folder that is complete; returns when all of its files are on disk."""
    for name in _files(folder):
        flush(folder / name)
    (folder / MANIFEST).write_text(_text(folder))
    for path in (folder / MANIFEST, folder):
        flush(path)


def damage(folder: Path) -> str | None:
    """The first thing in which a folder is not as it was sealed, in words; None where nothing is.

    Hidden files, which other programs leave behind, do not count. Raises OSError where a file cannot be read just now.
    """
    try:
        wanted, found = (folder / MANIFEST).read_bytes(), _text(folder).encode()
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    return None if wanted == found else _difference(wanted, json.loads(found))


def _difference(manifest: bytes, found: dict[str, Any]) -> str:
    try:
        wanted = dict(json.loads(manifest))
    except (ValueError, TypeError):
        return f"{MANIFEST} is no manifest"
    for name in sorted({*wanted, *found}):
        if name not in found:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} does not belong to it"
        if wanted[name] != found[name]:
            return f"{name} is not as it was written"
    return f"{MANIFEST} is not as it was written"


def _text(folder: Path) -> str:
    """The manifest of the files as they are now; equal folders give equal bytes."""
    return json.dumps({name: _described(folder / name) for name in _files(folder)}, indent=1) + "\n"


def _described(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _files(folder: Path) -> list[str]:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    return sorted(name for name in names if name != MANIFEST and not Path(name).name.startswith("."))


def flush(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on disk."""
    if path.is_dir() and os.name == "nt":  # Windows has no way to flush a folder
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
