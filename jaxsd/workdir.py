"""Files of a run: atomic JSON, the journal of epochs, fingerprints, locks, the log."""

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from jaxsd.errors import RunError, UserError

try:
    import fcntl
except ImportError:  # Windows: two processes in one workdir are not kept apart there
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("jaxsd")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    _put(Path(path), json.dumps(value, indent=1))


def _put(path: Path, text: str) -> None:
    """Puts a file in the place of an old one, with its text on disk by then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # processes of several machines may write at once
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # such as a full disk
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any | None:
    """The value in a JSON file; None where there is no file; RunError where it holds no JSON."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}): remove it, what it said is found out again") from error


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of keys; 16 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(old: Any, new: Any, at: str = "") -> list[str]:
    """What differs between two JSON values, as 'place: old -> new' lines."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted({*old, *new}):
            lines += differences(old.get(name), new.get(name), f"{at}.{name}" if at else name)
        return lines
    return [] if old == new else [f"{at}: {json.dumps(old)} -> {json.dumps(new)}"]


@contextlib.contextmanager
def locked(path: Path, on_wait: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock on a file; on_wait is called, with who has it, while another process does.

    The lock ends with its process, however that ends. The name that a killed process leaves in the file locks nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        _take(path, file, on_wait)
        if left := _owner(file):
            log.info("%s: %s, which was working on it, is gone: its lock is taken over", path.parent, left)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def _take(path: Path, file: IO[str], on_wait: Callable[[str], None]) -> None:
    """Waits until an open file is locked."""
    told = False
    while fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            owner = _owner(file) or "another process"
            if not told:
                log.info("%s: %s works on it: waiting", path.parent, owner)
                told = True
            on_wait(owner)
            time.sleep(0.2)
        except OSError as error:
            log.warning("%s cannot be locked (%s): start only one process for it", path.parent, error.strerror)
            return


def _owner(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def empty(folder: Path, *, last: str) -> None:
    """Removes all but the lock; `last` the file by which others know what the rest is, should this be cut short."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


class Journal:
    """metrics.jsonl of a stage: one JSON object per epoch and split, in order of steps."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def rewind(self, step: int) -> None:
        """Drops what came after `step`: a resumed run writes it again."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the last line of a run that was killed while writing
                break
            if entry["step"] > step:
                break
            kept.append(line + "\n")
        _put(self.path, "".join(kept))

    def of(self, split: str) -> list[dict[str, Any]]:
        """All objects of a split."""
        entries = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        return [entry for entry in entries if entry["split"] == split]

    def last(self, split: str = "train") -> dict[str, Any] | None:
        """The newest object of a split."""
        return next(iter(self.of(split)[-1:]), None)

    def write(self, entry: dict[str, Any]) -> None:
        """Appends one object; returns when it is on disk, for a later checkpoint is never without it."""
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def start_log(path: Path | None) -> None:
    """Sends what the run says to stderr (short) and to log.txt (everything, with times)."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    logging.raiseExceptions = False  # a log that cannot be written, on a full disk, is not worth a traceback
    screen = logging.StreamHandler(sys.stderr)
    screen.setLevel(logging.INFO)
    screen.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(screen)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(path)
        except OSError as error:
            raise UserError(
                f"the workdir {path.parent} cannot be written ({error.strerror}): take another --workdir"
            ) from error
        file.setLevel(logging.DEBUG)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(file)


def tensorboard(folder: Path) -> Callable[[dict[str, Any]], None]:
    """A function that writes an epoch's numbers as TensorBoard events, where tensorboardX is installed.

    In this process tensorboardX is then without PyTorch, unless that was loaded before.
    """
    if "torch" not in sys.modules:  # tensorboardX would load it, for seconds, though only numbers are written
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return lambda entry: None
    finally:
        if sys.modules.get("torch", "") is None:
            del sys.modules["torch"]
    writer = SummaryWriter(str(folder), write_to_disk=True)

    def write(entry: dict[str, Any]) -> None:
        for name, value in entry.items():
            if name not in ("step", "epoch", "split"):
                writer.add_scalar(f"{entry['split']}/{name}", value, entry["step"])
        writer.flush()

    return write
