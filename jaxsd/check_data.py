"""What `python -m jaxsd.check data` says: files, counts, copies, scenes on both sides, and what would stop a run."""

import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsd import build, check_copies
from jaxsd.check_copies import TOO_GOOD
from jaxsd.check_pictures import courses, shown, used
from jaxsd.data.decode import headers
from jaxsd.data.files import SPLIT_NAMES, located, scan
from jaxsd.data.source import Source, Splits
from jaxsd.data.split import part, scenes_on_both_sides, subset, unmeasurable
from jaxsd.errors import UserError
from jaxsd.figures import image_rows
from jaxsd.figures_data import picture_pairs, picture_rows, rate_panels
from jaxsd.recipe import Recipe

Config = Mapping[str, Any]

PICTURES = {
    "images.png": "some images of each part",
    "duplicates.png": "copies side by side",
    "views.png": "what stages are shown",
    "rates.png": "learning rates",
}
SHOWN = 30  # classes and kinds listed one by one, at most
EACH = 8  # images of each part drawn
FEW = 5  # images of a class, below which it is named
BINS, BAR = 10, 40  # of the histogram of scores: how many, and the longest in characters


# What Pillow's modes are, in words.
MODES = {
    "RGB": "colour",
    "L": "gray",
    "1": "black and white",
    "P": "palette",
    "RGBA": "colour with transparency",
    "LA": "gray with transparency",
    "I;16": "gray of 16 bits",
}


LEVELS = ("line", "warning", "error")
Said = tuple[str, str]  # level, text


class Findings(NamedTuple):
    """What is said of a data set: lines to print, things to look at, things that stop a run, pairs of copies."""

    lines: list[str]
    warnings: list[str]
    errors: list[str]
    copies: list[check_copies.Pair]


def check_data(config: Config, out: Path) -> int:
    """Reads the data of a config, prints what is in them and draws some; 0, or 2 where a run would stop with an error.

    out: folder for the pictures. Raises UserError where the config or the data cannot be read at all.
    """
    build.recipe(config)  # wrong configs are found before any data are read
    splits = build.load(config)
    pretext = build.load_pretext(config, splits)
    found = inspect(config, splits, pretext)
    print("\n".join(found.lines))
    try:
        drawn = _draw(config, splits, pretext, found, out)
    except OSError as error:
        raise UserError(f"the folder {out} cannot be written ({error.strerror}): take another --out") from error
    print("\n" + "\n".join(f"{what}: {out / name}" for name, what in drawn.items()))
    for warning in found.warnings:
        print(f"warning: {warning}")
    for error in found.errors:
        print(f"error: {error}", file=sys.stderr)
    return 2 if found.errors else 0


def _draw(config: Config, splits: Splits, pretext: Source | None, found: Findings, out: Path) -> dict[str, str]:
    """Draws what there is to draw; {file: what it shows}. What an earlier check has drawn is taken away."""
    out.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        (out / name).unlink(missing_ok=True)
    drawn = ["images.png"]
    try:
        ways = _ways(config, splits)
    except UserError:  # one of the findings
        ways = {"": splits}
    image_rows(out / "images.png", _some_images(ways, pretext))
    if found.copies:
        drawn.append("duplicates.png")
        picture_pairs(out / "duplicates.png", found.copies)
    if not found.errors:
        recipe = _recipe(config, splits)
        rows, panels = shown(recipe, splits.train, pretext), courses(recipe, splits, pretext)
        if rows:
            drawn += ["views.png", "rates.png"]
            picture_rows(out / "views.png", rows)
            rate_panels(out / "rates.png", panels)
    return {name: PICTURES[name] for name in drawn}


def inspect(config: Config, splits: Splits, pretext: Source | None = None) -> Findings:
    """Everything but the pictures. pretext: images of the pretext stages' own."""
    said = list(_of_all(config, splits, pretext))
    pairs: list[check_copies.Pair] = []
    ways: dict[str, Splits] = {}
    recipe = None
    try:
        ways = _ways(config, splits)
        recipe = _recipe(config, splits)
    except UserError as error:
        said.append(("error", str(error)))
    for name, parts in ways.items():
        named = _named(parts) | ({"pretext": pretext} if pretext is not None else {})
        copies = check_copies.find(named)
        pairs += check_copies.pairs(named, copies)
        said += [("line", line) for line in ("", *_parts(name, parts))]
        said += [("line", line) for line in check_copies.listing(named, copies)]
        found = [("warning", text) for text in check_copies.warnings(named, copies)]
        found += [("warning", text) for text in _doubts(parts)]
        if recipe is not None:
            found += _of_stages(recipe, parts.train, pretext)
            found += _of_split(parts, pretext, by_image=bool(name) and recipe.splits[name].get("by") == "image")
        said += [(level, f"split {name}: {text}" if name else text) for level, text in found]
    lines, warnings, errors = ([text for kind, text in said if kind == level] for level in LEVELS)
    return Findings(lines, warnings, errors, pairs[: check_copies.LISTED])


def _of_all(config: Config, splits: Splits, pretext: Source | None) -> Iterator[Said]:
    """What is to be said of the data, however they are parted."""
    train = splits.train
    height, width, channels = train.shape
    yield "line", f"{splits.name}: {height}x{width} pixels, {channels} channel{'s' if channels > 1 else ''}"
    yield from (("line", line) for line in files(config["data"], splits))
    if splits.skipped:
        yield "warning", f"{len(splits.skipped)} images cannot be read and are left out: {_some(splits.skipped)}"
    if empty := empty_folders(config["data"]):
        yield "warning", f"class folders without images are passed over: {_some(empty)}"
    if train.scores is not None:
        yield from (("line", line) for line in _scores(train, splits.score))
    elif train.labels is None:
        yield "warning", "there are neither labels nor scores: only pretext stages can be trained"
    if build.splits(config) and splits.test:
        text = f"{splits.name} has test images of its own, which the config's splits would leave out"
        yield "error", f"{text}: hold none out (--config.data.test=0) or take the splits out of the config"
    elif build.splits(config) and splits.validation:
        yield "warning", "the config names splits: validation images that the data bring along are not used"
    if pretext is not None:
        yield "line", f"pretext images of their own: {len(pretext)}"


def _recipe(config: Config, splits: Splits) -> Recipe:
    """The recipe of a config for these data."""
    train = splits.train
    return build.recipe(config, train.shape, len(train.classes), scored=train.scores is not None)


def _ways(config: Config, splits: Splits) -> dict[str, Splits]:
    """The splits of a config by name, as its first seed draws them; the data's own, named "", where there are none."""
    ways = {}
    for name, way in build.splits(config).items():
        try:
            ways[name] = part(splits, **way, seed=config["seeds"][0])
        except UserError as error:
            raise UserError(f"split {name!r}: {error}; see --config.splits.{name}") from error
    return ways or {"": splits}


def files(spec: Config, splits: Splits) -> list[str]:
    """A line on the image files as they are on disk: formats, modes, sizes; none where the images are no files."""
    names = [name for source in _named(splits).values() for name in source.names]
    root = _root(spec, names)
    paths = [path for path in located(root, names) if path is not None] if root is not None else []
    found = headers(paths)
    if not found:
        return []
    formats = Counter(header.format for header in found)
    modes = Counter(MODES.get(header.mode, header.mode) for header in found)
    sides = np.array([sorted((header.width, header.height)) for header in found])
    counted = [", ".join(f"{what} {n:,}" for what, n in counts.most_common()) for counts in (formats, modes)]
    line = f"files: {'; '.join(counted)}; shorter side {_range(sides[:, 0])}, longer side {_range(sides[:, 1])} pixels"
    wanted = min(splits.train.shape[:2])
    small = int((sides[:, 0] < wanted).sum())
    return [line + (f"; {small:,} are smaller than the {wanted} pixels that are shown" if small else "")]


def _root(spec: Config, names: list[str]) -> Path | None:
    """The folder below which the named files are: what the config names, or a folder in it."""
    given = spec.get("images") or spec.get("path")
    if not names or not given:
        return None
    place = Path(given).expanduser()
    place = place if place.is_dir() else place.parent
    folders = [place, *(sorted(item for item in place.iterdir() if item.is_dir()) if place.is_dir() else ())]
    return next((folder for folder in folders if located(folder, names[:1])[0] is not None), None)


def empty_folders(spec: Config) -> list[str]:
    """Class folders of an image folder in which there is no image, by their names below the folder."""
    if spec["name"] != "folder":
        return []
    root, test = Path(spec["path"]).expanduser(), spec.get("test")
    entries = scan(root, test=test if isinstance(test, str) else None)
    if all(entry.category is None for entry in entries):
        return []
    first = {entry.name.split("/")[0] for entry in entries}
    level = len({entry.split for entry in entries}) > 1 or {name.lower() for name in first} <= set(SPLIT_NAMES["train"])
    used = {"/".join(entry.name.split("/")[: 1 + level]) for entry in entries}
    parents = [folder for folder in root.iterdir() if _composed(folder.name) in first] if level else [root]
    folders = [item for parent in parents for item in parent.iterdir() if item.is_dir() and item.name[0] not in "._"]
    return sorted({_composed(item.relative_to(root).as_posix()) for item in folders} - used)


def _composed(name: str) -> str:
    """A name in Unicode's composed form, as entries have it."""
    return unicodedata.normalize("NFC", name)


def _some(names: list[str] | tuple[str, ...], most: int = 5) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _scores(source: Source, what: str) -> list[str]:
    """A histogram of the scores; scenes and kinds where they are named."""
    scores = np.asarray(source.scores)
    lines = [f"{len(scores)} scores{f' ({what})' if what else ''}: mean {scores.mean():.4g}, {_range(scores)}"]
    counts, edges = np.histogram(scores, BINS)
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "█" * max(round(BAR * count / counts.max()), int(count > 0))
        lines.append(f"  {low:8.4g} to {high:8.4g}  {bar.ljust(BAR)} {count}")
    if source.groups:
        sizes = np.array(list(Counter(source.groups).values()))
        lines.append(f"{len(sizes)} scenes, images of each: {_range(sizes)}")
    if source.kinds:
        lines.append("kinds: " + _some([f"{kind} {n}" for kind, n in sorted(Counter(source.kinds).items())], SHOWN))
    return lines


def _range(values: np.ndarray) -> str:
    """Least, median and most; one number where all are equal."""
    if values.min() == values.max():
        return f"{values[0]:.4g}"
    return f"{values.min():.4g} to {values.max():.4g} (median {np.median(values):.4g})"


def _named(parts: Splits) -> dict[str, Source]:
    """The parts that there are."""
    found = {"train": parts.train, "validation": parts.validation, "test": parts.test}
    return {name: source for name, source in found.items() if source is not None}


def _parts(name: str, parts: Splits) -> list[str]:
    """A table of one split: images of each part, scenes, and images of each class."""
    named = _named(parts)
    rows = [("images", [len(source.images) for source in named.values()])]
    if parts.train.groups:
        rows.append(("scenes", [len(set(source.groups)) for source in named.values()]))
    if parts.train.labels is not None:
        counts = [_class_counts(source) for source in named.values()]
        if len(parts.train.classes) <= SHOWN:
            each = zip(parts.train.classes, np.transpose(counts).tolist(), strict=True)
            rows += [(f"  {label}", numbers) for label, numbers in each]
        else:
            rows.append(("classes", [int((part > 0).sum()) for part in counts]))
            rows += [(f"  {what} images", [int(of(part)) for part in counts]) for what, of in _LEAST_AND_MOST]
    first = max(len(label) for label, _ in (*rows, (name or "split", ())))
    heads = [(name or "split").ljust(first), *(f"{part:>10}" for part in named)]
    return ["  ".join(heads)] + [
        "  ".join([label.ljust(first), *(f"{number:>10,}" for number in numbers)]) for label, numbers in rows
    ]


_LEAST_AND_MOST = (("fewest", np.min), ("median", np.median), ("most", np.max))  # of a class


def _class_counts(source: Source) -> np.ndarray:
    """Images of each class."""
    return np.bincount(np.asarray(source.labels), minlength=len(source.classes))


def _doubts(parts: Splits) -> Iterator[str]:
    """What is odd about the classes of one split; no test images."""
    for name, source in _named(parts).items():
        if source.labels is None:
            continue
        counts = _class_counts(source)
        if missing := [source.classes[label] for label in np.flatnonzero(counts == 0)]:
            yield f"{name} has no image of {len(missing)} classes: {_some(missing)}"
        few = [f"{source.classes[label]} {counts[label]}" for label in np.flatnonzero((counts > 0) & (counts < FEW))]
        if few and name == "train":
            yield f"{len(few)} classes have fewer than {FEW} training images: {_some(few)}"
    if parts.test is None:
        yield "there are no test images: nothing will be measured"


def _of_split(parts: Splits, pretext: Source | None, *, by_image: bool) -> Iterator[Said]:
    """Scores that tell nothing; images whose scene is on the other side, too."""
    if reason := unmeasurable(parts):
        yield "error", reason
    for name, text in scenes_on_both_sides(parts, pretext).items():
        leak = f"{text}: {'validation ' if name == 'validation' else ''}{TOO_GOOD}"
        yield "warning", f"by image: {leak}; split by group" if by_image and name == "test" else leak


def _of_stages(recipe: Recipe, train: Source, pretext: Source | None) -> Iterator[Said]:
    """What stages ask for and cannot have, or cannot well have."""
    asked = [("labels", name, "labelled") for name in recipe.labels] + [("subsets", n, n) for n in recipe.subsets]
    for kind, name, on in asked:
        stages = [stage for stage in used(recipe).values() if stage.on == on]
        pool = train if kind == "labels" or pretext is None else pretext
        if not stages:
            continue
        try:
            rows = subset(pool, **getattr(recipe, kind)[name], seed=recipe.seeds[0])
            one = next(iter(recipe.inputs.values()))(pool.take(rows[:1]))
            samples = {stage.name: len(rows) * len(stage.view(one)) for stage in stages}
        except UserError as error:
            yield "error", f"{kind} {name!r}: {error}; see --config.{kind}.{name}"
            continue
        if kind == "labels" and pool.labels is not None:
            drawn = _class_counts(pool.take(rows))
            if missing := [pool.classes[label] for label in np.flatnonzero((drawn == 0) & (_class_counts(pool) > 0))]:
                yield "warning", f"labels {name!r}: no image of {len(missing)} classes is drawn: {_some(missing)}"
        for stage in stages:
            seen = samples[stage.name] * stage.repeat(samples[stage.name])
            if seen < stage.batch_size:
                yield "warning", f"stage {stage.name!r}: {seen} images are fewer than a batch of {stage.batch_size}"
    for stage in used(recipe).values():
        if not stage.match and (missed := stage.schedule.unreached(stage.epochs)):
            epochs = ", ".join(f"{epoch:g}" for epoch in missed)
            yield "warning", f"stage {stage.name!r}: the rate never drops at epoch {epochs}: it has {stage.epochs}"


def _some_images(ways: Mapping[str, Splits], pretext: Source | None) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Rows for the picture: some images of every part, evenly spread over it."""
    parts = {f"{way} {name}".strip(): source for way, these in ways.items() for name, source in _named(these).items()}
    if pretext is not None:
        parts["pretext"] = pretext
    rows = {}
    for name, source in parts.items():
        count = len(source.images)
        chosen = np.linspace(0, count - 1, min(EACH, count)).round().astype(int)
        some = source.take(chosen)
        channels = 3 if some.images.shape[-1] >= 3 else 1
        rows[f"{name}: {count} images"] = some.images[..., :channels], _captions(some)
    return rows


def _captions(source: Source) -> list[str]:
    """Score and kind, or class, of each image."""
    if source.scores is not None:
        kinds = source.kinds or [""] * len(source.images)
        return [f"{score:.4g} {kind}".strip() for score, kind in zip(source.scores, kinds, strict=True)]
    return [""] * len(source.images) if source.labels is None else [source.classes[label] for label in source.labels]
