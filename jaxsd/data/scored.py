"""Images beside a table that gives each a score to predict, or a label. Published sets are in `published`."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxsd.data.cache import read_images
from jaxsd.data.decode import Layout, layout
from jaxsd.data.files import listed, located
from jaxsd.data.load import by_split
from jaxsd.data.source import Splits
from jaxsd.errors import UserError

LARGEST = float(np.finfo(np.float32).max)  # of the numbers that scores are kept as


class Columns(NamedTuple):
    """Columns of a text file."""

    path: Path
    lines: list[int]  # where each row stands in the file, from 1
    cells: dict[str, list[str]]  # by the column's name
    header: tuple[str, ...] = ()  # the names of all columns of the file

    def texts(self, name: str) -> tuple[str, ...]:
        """A column's cells [N]. Raises UserError where one is empty."""
        for line, text in zip(self.lines, self.cells[name], strict=True):
            if not text:
                raise UserError(f"{self.path} has no {name} in line {line}: add it or remove the line")
        return tuple(self.cells[name])

    def numbers(self, name: str) -> np.ndarray:
        """A column as float32 [N]. Raises UserError where a cell is no finite number."""
        numbers = []
        for line, text in zip(self.lines, self.texts(name), strict=True):
            try:
                numbers.append(float(text))
            except ValueError:
                numbers.append(np.nan)
            if not abs(numbers[-1]) < LARGEST:
                raise UserError(f"{self.path} has a {name} in line {line} that is no number, '{text}': mend it")
        return np.array(numbers, np.float32)


class Listing(NamedTuple):
    """Files of one folder, and what is known of each; empty tuples for what is not known."""

    of: Path  # the list itself
    names: tuple[str, ...]  # relative to the folder, [N]
    scores: np.ndarray | None = None  # float32 [N]
    labels: tuple[str, ...] = ()  # class names, [N]
    groups: tuple[str, ...] = ()  # [N]
    kinds: tuple[str, ...] = ()  # [N]


class Reading(NamedTuple):
    """How images are read."""

    target: Layout
    on_bad_image: str
    cache: str | Path | None


def table(
    path: str | Path,
    *,
    images: str | Path | None = None,
    size: int | tuple[int, int] | None,
    canvas: str = "crop",
    channels: int = 3,
    score: str = "score",
    on_bad_image: str = "error",
    cache: str | Path | None = "auto",
) -> Splits:
    """Images that a CSV file lists with a score or a label; all of them are training images, in the table's order.

    path: UTF-8 text, commas between columns, their names in the first line: `file` and either `score` (a number) or
    `label` (a class name; classes are sorted). Where there are columns `group` (the scene: images of one belong on one
    side of a split) and `kind` (what was done to the image), they are taken along; others, such as `std`, are passed
    over. `file` is relative to `images`: that folder, or None for the table's own folder or `images` in it, whichever
    has the files. score: what the scores are, with range and direction, for the report.
    size, canvas, channels, on_bad_image, cache: as in `folder`; "reflect" and "zeros" do not resize, which would
    change an image's quality.
    Raises UserError for a wrong path, column, row, option, a missing file or an unreadable image.
    """
    if not path:
        raise UserError("no table is given: give the path of a CSV file")
    path = Path(path).expanduser()
    columns = read_csv(path, ("file",), ("score", "label", "group", "kind"))
    if ("score" in columns.cells) == ("label" in columns.cells):
        both = "both a score and a label" if "score" in columns.cells else "neither a column score nor label"
        raise UserError(f"{path} has {both}: give one of them; its columns are {', '.join(columns.header)}")
    names = columns.texts("file")
    optional = {name + "s": columns.texts(name) for name in ("label", "group", "kind") if name in columns.cells}
    scores = columns.numbers("score") if "score" in columns.cells else None
    root = _image_folder(path.parent, names) if images is None else Path(images).expanduser()
    reading = Reading(layout(size, canvas, channels), on_bad_image, cache)
    return read_listed(path.stem, root, Listing(path, names, scores, **optional), reading, score=score)


def read_listed(name: str, root: Path, listing: Listing, reading: Reading, *, score: str) -> Splits:
    """Splits of all listed images, as training images and in the list's order. score: what the scores are."""
    if not root.is_dir():
        raise UserError(f"the image folder {root} does not exist: check the path")
    entries = listed(root, listing.names, str(listing.of))
    if listing.labels:
        entries = [entry._replace(category=label) for entry, label in zip(entries, listing.labels, strict=True)]
    decoded, skipped = read_images(
        root,
        entries,
        reading.target,
        on_bad_image=reading.on_bad_image,
        cache=reading.cache,
        of=str(listing.of.resolve()),
    )
    read = [position for position in range(len(entries)) if position not in decoded.bad]
    source = replace(
        by_split(root, entries, decoded)["train"],
        scores=None if listing.scores is None else listing.scores[read],
        groups=tuple(listing.groups[position] for position in read) if listing.groups else (),
        kinds=tuple(listing.kinds[position] for position in read) if listing.kinds else (),
    )
    return Splits(name, source, None, None, skipped, "" if listing.scores is None else score)


def read_csv(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> Columns:
    """Columns of a CSV file with a header, as text without space around it; blank lines are passed over.

    Raises UserError where the file, a needed column or any row is missing, or a row is longer or shorter than the
    header.
    """
    if not path.is_file():
        raise UserError(f"the table {path} {'is a folder' if path.is_dir() else 'does not exist'}: give a CSV file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no readable CSV file ({error}): save it as UTF-8 text") from error
    rows = [(line, row) for line, row in rows if any(row)]
    header = rows[0][1] if rows else []
    for name in needed:
        if name not in header:
            found = ", ".join(header) or "nothing"
            raise UserError(
                f"{path} has no column {name}: its first line has {found}, and needs names in lower case between commas"
            )
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise UserError(f"{path} has {len(row)} columns in line {line}, but {len(header)} in its first: mend it")
    if len(rows) < 2:
        raise UserError(f"{path} has no rows below its first line: there is nothing to read")
    wanted = [name for name in (*needed, *optional) if name in header]
    cells = {name: [row[header.index(name)] for _, row in rows[1:]] for name in wanted}
    return Columns(path, [line for line, _ in rows[1:]], cells, tuple(header))


def _image_folder(folder: Path, names: Sequence[str]) -> Path:
    """The table's own folder, or `images` in it where more of the files are there."""
    return max((folder, folder / "images"), key=lambda root: sum(path is not None for path in located(root, names)))
