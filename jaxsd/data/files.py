"""Which image files a folder holds, in which split and class: by names only, nothing is opened."""

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from jaxsd.errors import UserError

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
IMAGE_SUFFIXES = frozenset(".jpg .jpeg .jpe .jfif .png .apng .webp .bmp .gif .tif .tiff .ppm .pgm .pbm".split())
# Images too, but of formats that are not read: they are named as unreadable instead of passed over in silence.
FOREIGN_SUFFIXES = frozenset(".heic .heif .avif .jp2 .jxl .svg .psd .dng .cr2 .cr3 .nef .arw .raw".split())


class Entry(NamedTuple):
    """One image file of a folder."""

    split: str  # "train", "validation" or "test"
    category: str | None  # class name; None in a folder without class folders
    name: str  # path relative to the folder, with "/", in Unicode's composed form on every system, and `printable`
    path: str
    stamp: tuple[int, int, int]  # size and times of last change: another stamp means the file may have changed
    group: str = ""  # the scene that it shows, where that is known


def scan(root: Path, *, test: str | None = None, groups: str | None = None) -> list[Entry]:
    """The images of a folder: train, validation, test, each sorted by class and name.

    The folder holds one folder per class, or a level train / val / test above the class folders, or images only
    (then there are no classes). The level is taken as one where a folder `train` has nothing or a validation or
    test folder beside it, so that "train" may also be a class among others; other folders beside are passed over.
    test: the folder that is the test split. Class folders are searched to any depth; hidden files are passed over, and
    files without the name of an image, whose number is told in the log. groups: a regular expression for the scene in a
    name below the split's folder.
    Raises UserError where the layout is none of these, where a split has a class that train lacks, or where `groups`
    does not tell scenes apart.
    """
    pattern = _pattern(groups) if groups else None
    if not os.path.exists(root):  # unlike Path.exists, False for a path that the system refuses too
        raise UserError(f"the image folder {root} does not exist: check the path")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give the folder that holds the class folders")
    entries = []
    others: Counter[str] = Counter()
    for split, folder in _split_folders(root, test).items():
        found = _split_entries(root, split, folder, others)
        if not found:
            raise UserError(f"no images were found in {folder}: it needs class folders with JPEG, PNG, ... files")
        level = "" if folder == root else unicodedata.normalize("NFC", folder.name) + "/"
        entries += found if pattern is None else [_with_group(entry, pattern, level) for entry in found]
    _check_classes(root, entries)
    if groups:
        _check_groups(root, entries, groups)
    if others:
        kinds = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in others.most_common(10))
        logging.getLogger(__name__).info("passed over in %s, as they have no image's name: %s", root, kinds)
    return entries


def listed(root: Path, names: Sequence[str], of: str) -> list[Entry]:
    """The files of a folder that a list names, in its order; of: the list, as errors name it.

    Names are relative to the folder. One that is not found as it is written is looked for in another case and another
    Unicode form, since lists and files come from different systems; the entry keeps the list's name.
    Raises UserError where the list is empty, leaves the folder, or names a file that is missing or came before.
    """
    if not names:
        raise UserError(f"{of} names no files: there is nothing to read")
    for name in names:
        if _place(name).is_absolute() or ".." in _place(name).parts:
            raise UserError(f"{of} names {name}, which leads out of {root}: give names inside that folder")
    paths = located(root, names)
    missing = [name for name, path in zip(names, paths, strict=True) if path is None]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(
            f"{len(missing)} of {len(names)} files that {of} names are not in {root}: {', '.join(missing[:5])}{more}; "
            "add them, or give the folder that has them"
        )
    first: dict[str, str] = {}
    entries = []
    for name, path in zip(names, filter(None, paths), strict=True):
        if path in first:
            raise UserError(f"{of} names the same file twice, {first[path]} and {name}: keep one of them")
        first[path] = name
        entries.append(Entry("train", None, printable(str(_place(name))), path, _stamp(os.stat(path))))
    return entries


def located(root: Path, names: Sequence[str]) -> list[str | None]:
    """The path of each file that is named as in `listed`; None for what is not in the folder."""
    contents: dict[str, dict[str, str]] = {}
    return [_find(str(root), _place(name).parts, contents) for name in names]


def _place(name: str) -> PurePosixPath:
    """A listed name, in Unicode's composed form."""
    return PurePosixPath(unicodedata.normalize("NFC", name.replace("\\", "/")))


def _find(root: str, parts: tuple[str, ...], contents: dict[str, dict[str, str]]) -> str | None:
    """The path of a file below a folder; contents: what the folders seen so far hold."""
    path = root
    for part in parts:
        if path not in contents:
            contents[path] = _contents(path)
        name = contents[path].get(part) or contents[path].get(part.casefold())
        if name is None:
            return None
        path = os.path.join(path, name)
    return path if os.path.isfile(path) else None


def _contents(folder: str) -> dict[str, str]:
    """What a folder holds: its names by their composed form, and by that in lower case where there is none so."""
    if not os.path.isdir(folder):
        return {}
    names = {unicodedata.normalize("NFC", item.name): item.name for item in _visible(Path(folder))}
    return {name.casefold(): names[name] for name in reversed(names)} | names


def _split_folders(root: Path, test: str | None) -> dict[str, Path]:
    """The folder of every split; the root itself is the training split where there is no level of splits."""
    folders = {item.name.lower(): Path(item.path) for item in _visible(root) if _is_folder(item)}
    found: dict[str, Path] = {}
    for split, names in SPLIT_NAMES.items():
        present = [name for name in names if name in folders]
        if len(present) > 1:
            raise UserError(f"{root} has the folders {' and '.join(present)}, which mean the same: keep one of them")
        if present:
            found[split] = folders[present[0]]
    if test is not None:
        if test.lower() not in folders:
            raise UserError(f"test='{test}' names no folder in {root}: it has {', '.join(sorted(folders)) or 'none'}")
        chosen = folders[test.lower()]
        found = {split: folder for split, folder in found.items() if folder != chosen} | {"test": chosen}
    others = [name for name in folders if folders[name] not in found.values()]
    if "train" not in found and found and not others:
        raise UserError(f"{root} has {', '.join(sorted(folders))} but no folder train: add it")
    if "train" in found and (len(found) > 1 or not others):
        return {split: found[split] for split in SPLIT_NAMES if split in found}
    if test is not None:
        raise UserError(f"test='{test}' needs a folder train beside it in {root}")
    if len(folders) == 1 and (inner := next(iter(folders.values())) / "train").is_dir():
        raise UserError(f"{root} holds a whole image set: give {inner.parent} as the path")
    return {"train": root}


def _split_entries(root: Path, split: str, folder: Path, others: Counter[str]) -> list[Entry]:
    """The images of one split, sorted by class and name; others: counts the suffixes of files that are none."""
    loose, entries = [], []
    for item in _visible(folder):
        if _is_folder(item):
            category = printable(unicodedata.normalize("NFC", item.name))
            entries += [_entry(root, split, category, image) for image in _images(_files_below(item), others)]
        else:
            loose += _images([item], others)
    if loose and entries:
        shown = ", ".join(printable(item.name) for item in loose[:3])
        raise UserError(
            f"{len(loose)} images in {folder} lie beside the class folders ({shown}): move them into one, or away"
        )
    entries = entries or [_entry(root, split, None, path) for path in loose]
    return sorted(entries, key=lambda entry: (entry.category or "", entry.name))


def _pattern(groups: str) -> re.Pattern[str]:
    """The compiled expression for scenes; UserError where it is none, or marks no part as the scene."""
    try:
        pattern = re.compile(groups)
    except re.error as error:
        raise UserError(f"groups='{groups}' is no regular expression ({error}): mend it") from error
    if not pattern.groups:
        raise UserError(f"groups='{groups}' does not say which part is the scene: put it in brackets, (?P<group>...)")
    return pattern


def _with_group(entry: Entry, pattern: re.Pattern[str], level: str) -> Entry:
    """An entry with the scene that the pattern finds in its name below the folder `level`; "" where it finds none."""
    found = pattern.search(entry.name.removeprefix(level))
    group = found["group" if "group" in pattern.groupindex else 1] if found else None
    return entry._replace(group=group or "")


def _check_groups(root: Path, entries: list[Entry], groups: str) -> None:
    """Raises UserError where some file has no scene or all have one; warns where every file is a scene of its own."""
    lost = [entry.name for entry in entries if not entry.group]
    if lost:
        which = f"{len(lost)} of {len(entries)}" if len(lost) < len(entries) else f"any of {len(entries)}"
        shown = ", ".join(lost[:3]) + (" and more" if len(lost) > 3 else "")
        raise UserError(f"groups='{groups}' finds no scene in the names of {which} files in {root}: {shown}; widen it")
    scenes = {entry.group for entry in entries}
    if len(scenes) == 1:
        raise UserError(
            f"groups='{groups}' finds one scene only in {root}, '{entries[0].group}': take more of the name"
        )
    if len(scenes) == len(entries):
        text = "groups='%s' makes every file in %s a scene of its own, such as '%s': it keeps nothing together"
        logging.getLogger(__name__).warning(text, groups, root, entries[0].group)


def _check_classes(root: Path, entries: list[Entry]) -> None:
    """Raises UserError where another split has classes that the training split does not know."""
    known = {entry.category for entry in entries if entry.split == "train"}
    for split in ("validation", "test"):
        unknown = {entry.category for entry in entries if entry.split == split} - known
        if None in unknown or (unknown and None in known):
            raise UserError(f"only one of train and {split} in {root} has class folders: add them or move {split}")
        if unknown:
            names = ", ".join(sorted(str(name) for name in unknown)[:20])
            raise UserError(f"the {split} split of {root} has classes that train lacks: {names}; add or remove them")


def _visible(folder: Path) -> list[os.DirEntry]:
    """What a folder holds, sorted, without hidden things."""
    try:
        with os.scandir(folder) as items:
            visible = [item for item in items if not item.name.startswith(".") and item.name != "__MACOSX"]
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read: {error.strerror}; check its permissions") from error
    return sorted(visible, key=lambda item: item.name)


def printable(name: str) -> str:
    """A name with control characters, and bytes that are no UTF-8, as escapes: it prints in one line everywhere."""
    unprintable = ("Cc", "Cs", "Zl", "Zp")
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in unprintable else c for c in name)


def _is_folder(item: os.DirEntry) -> bool:
    """Whether this is a folder, or a link to one.

    Raises UserError for a link that leads nowhere and has no image's name: it may have led to a folder of images.
    """
    try:
        if item.is_dir():
            return True
    except OSError:  # a link in a circle, or into a folder that is closed to us
        pass
    if item.is_symlink() and not os.path.exists(item.path) and _suffix(item) not in IMAGE_SUFFIXES | FOREIGN_SUFFIXES:
        raise UserError(f"{printable(item.path)} is a link that leads nowhere: mend or remove it")
    return False


def _suffix(item: os.DirEntry) -> str:
    return os.path.splitext(item.name)[1].lower()


def _files_below(folder: os.DirEntry, above: tuple[Path, ...] = ()) -> Iterator[os.DirEntry]:
    """All files below a folder; links are followed, but not back to a folder that they are in."""
    place = Path(folder.path).resolve()
    if place in above:
        return
    for item in _visible(Path(folder.path)):
        if _is_folder(item):
            yield from _files_below(item, (*above, place))
        else:
            yield item


def _images(files: Iterable[os.DirEntry], others: Counter[str]) -> list[os.DirEntry]:
    """Those with the name of an image, whatever they are: a pipe, or a link that leads nowhere, will be told of."""
    images = []
    for item in files:
        suffix = _suffix(item)
        if suffix in IMAGE_SUFFIXES | FOREIGN_SUFFIXES:
            images.append(item)
        else:
            others[printable(suffix)] += 1
    return images


def _entry(root: Path, split: str, category: str | None, item: os.DirEntry) -> Entry:
    """An image with its name relative to the root."""
    name = os.path.relpath(item.path, root).replace(os.sep, "/")
    try:
        stamp = _stamp(item.stat())
    except OSError:  # what cannot be reached will be named as unreadable
        stamp = (0, 0, 0)
    return Entry(split, category, printable(unicodedata.normalize("NFC", name)), item.path, stamp)


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    """Size and times of last change."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns
