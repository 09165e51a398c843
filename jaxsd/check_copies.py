"""Copies within and between the parts of a data set: in words, and as pairs for a picture."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxsd.data.copies import Copies, equal, near, thumbnails
from jaxsd.data.source import Source
from jaxsd.figures_data import Picture

LISTED = 20  # copies listed and drawn
ACROSS = (("validation", "train"), ("test", "train"), ("test", "validation"), ("test", "pretext"))
TOO_GOOD = "results will be too good"


Pair = tuple[str, list[Picture]]  # heading, two pictures


class Copy(NamedTuple):
    """An image that is a copy, and what it copies: each the name of a part and a position in it."""

    image: tuple[str, int]
    of: tuple[str, int]
    kind: str  # "pixel-equal", "nearly equal" or "mirrored"
    another: bool  # whether their labels or scores differ


def find(parts: Mapping[str, Source]) -> list[Copy]:
    """All copies, those between parts first, then those with another label or score.

    parts: train, and validation, test and pretext where there are any. Of pretext images only those count that are in
    the test images too. Images of one named scene look alike: within a part only pixel-equal ones of them count.
    """
    small = {name: thumbnails(source.images) for name, source in parts.items()}
    found = []
    for name, other in ACROSS:
        if name in parts and other in parts:
            exact = equal(parts[name], of=parts[other])
            found += _copies(parts, name, other, exact, near(small[name], of=small[other]).without(exact))
    for name, source in parts.items():
        if name != "pretext":
            exact = equal(source)
            nearly = near(small[name], scenes=source.groups).without(exact)
            found += _copies(parts, name, name, exact, nearly)
    return sorted(found, key=lambda copy: (copy.image[0] == copy.of[0], not copy.another, copy.kind != "pixel-equal"))


def _copies(parts: Mapping[str, Source], name: str, other: str, exact: Copies, nearly: Copies) -> list[Copy]:
    """The copies that images of one part are of images of another, or the same."""
    first, second = parts[name], parts[other]
    found = []
    for copies, kind in ((exact, "pixel-equal"), (nearly, "nearly equal")):
        for row, of, mirrored in zip(*(part.tolist() for part in copies), strict=True):
            another = other != "pretext" and _told(first, row) != _told(second, of)
            found.append(Copy((name, row), (other, of), "mirrored" if mirrored else kind, another))
    return found


def warnings(parts: Mapping[str, Source], copies: Sequence[Copy]) -> list[str]:
    """A line for each pair of parts, or part, with equal images, and one for each with nearly equal ones."""
    lines = []
    for name, other in (*((name, name) for name in parts), *ACROSS):
        here = [copy for copy in copies if (copy.image[0], copy.of[0]) == (name, other)]
        for kind in ("pixel-equal", "nearly equal"):
            some = [copy for copy in here if (copy.kind == "pixel-equal") == (kind == "pixel-equal")]
            if not some:
                continue
            which = _which(parts[name], [copy.image[1] for copy in some])
            if name != other:
                count = len(parts[name].images)
                harm = TOO_GOOD if kind == "pixel-equal" else "results may be too good"
                lines.append(f"{len(some)} of {count} {name} images{which} are {kind} to {other} images: {harm}")
            elif kind == "pixel-equal":
                lines.append(f"{len(some)} {name} images equal an earlier one of {name} pixel for pixel{which}")
            else:
                lines.append(f"{len(some)} {name} images are nearly equal to an earlier one of {name}{which}")
    if another := sum(copy.another for copy in copies):
        what = "label" if parts["train"].labels is not None else "score"
        lines.append(f"copies with another {what} than the image that they copy: {another}")
    return lines


def listing(parts: Mapping[str, Source], copies: Sequence[Copy]) -> list[str]:
    """The first copies by name, one a line, after an empty line and a heading that says how many there are."""
    if not copies:
        return ["", "copies: none"]
    some = f"the first {LISTED} of {len(copies):,}" if len(copies) > LISTED else str(len(copies))
    lines = []
    for copy in copies[:LISTED]:
        sign = "=" if copy.kind == "pixel-equal" else "~"
        mirrored = " (mirrored)" if copy.kind == "mirrored" else ""
        told = [f" ({_told(parts[part], at)})" if copy.another else "" for part, at in (copy.image, copy.of)]
        names = [_name(parts[part], part, at) for part, at in (copy.image, copy.of)]
        lines.append(f"  {names[0]}{told[0]} {sign} {names[1]}{told[1]}{mirrored}")
    return ["", f"copies ({some}; = pixel-equal, ~ nearly equal):", *lines]


def pairs(parts: Mapping[str, Source], copies: Sequence[Copy]) -> list[Pair]:
    """The first copies as two pictures each, under what they are."""
    what = "label" if parts["train"].labels is not None else "score"
    shown = []
    for copy in copies[:LISTED]:
        both = [(parts[part], part, at) for part, at in (copy.image, copy.of)]
        pictures = [
            Picture(source.images[at], f"{_file(source, at)}\n{part}\n{_told(source, at)}".rstrip())
            for source, part, at in both
        ]
        shown.append((copy.kind + (f", another {what}" if copy.another else ""), pictures))
    return shown


def _told(source: Source, position: int) -> str:
    """What is known of an image: its class or its score."""
    if source.scores is not None:
        return f"{source.scores[position]:.4g}"
    return "" if source.labels is None else source.classes[source.labels[position]]


def _name(source: Source, part: str, position: int) -> str:
    """The name of an image with its part's where that is not in it; its number where it has none."""
    name = source.names[position] if source.names else str(position)
    return name if name.startswith(part) else f"{part} {name}"


def _file(source: Source, position: int) -> str:
    """The last part of an image's name; its number where it has none."""
    return source.names[position].rsplit("/", 1)[-1] if source.names else str(position)


def _which(source: Source, positions: Sequence[int], most: int = 3) -> str:
    """The first few names in brackets, where there are names."""
    if not source.names:
        return ""
    names = [source.names[position] for position in sorted(positions)]
    return f" ({', '.join(names[:most])}{f' and {len(names) - most} more' if len(names) > most else ''})"
