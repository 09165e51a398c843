"""What `python -m jaxsd.check data` says: counts, copies, scenes on both sides, and what would stop a run."""

import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsd import build
from jaxsd.data.files import SPLIT_NAMES, scan
from jaxsd.data.source import Source, Splits
from jaxsd.data.split import copies, part, shared_groups, subset, unmeasurable
from jaxsd.errors import UserError
from jaxsd.figures import image_rows
from jaxsd.recipe import Recipe

Config = Mapping[str, Any]

SHOWN = 30  # classes and kinds listed one by one, at most
PICTURES = 8  # of each part
BINS, BAR = 10, 40  # of the histogram of scores: how many, and the longest in characters


class Findings(NamedTuple):
    """What is said of a data set: lines to print, things to look at, and things that stop a run."""

    lines: list[str]
    warnings: list[str]
    errors: list[str]


def check_data(config: Config, out: Path) -> int:
    """Reads the data of a config, prints what is in them and draws some; 0, or 2 where a run would stop with an error.

    out: folder for images.png. Raises UserError where the config or the data cannot be read at all.
    """
    build.recipe(config)  # wrong configs are found before any data are read
    splits = build.load(config)
    pretext = build.load_pretext(config, splits)
    found = inspect(config, splits, pretext)
    print("\n".join(found.lines))
    path = out / "images.png"
    try:
        out.mkdir(parents=True, exist_ok=True)
        image_rows(path, _pictures(parted(config, splits), pretext))
    except OSError as error:
        raise UserError(f"the folder {out} cannot be written ({error.strerror}): take another --out") from error
    print(f"some images of each part: {path}")
    for warning in found.warnings:
        print(f"warning: {warning}")
    for error in found.errors:
        print(f"error: {error}", file=sys.stderr)
    return 2 if found.errors else 0


def inspect(config: Config, splits: Splits, pretext: Source | None = None) -> Findings:
    """Everything but the pictures. pretext: images of the pretext stages' own."""
    train = splits.train
    height, width, channels = train.shape
    lines = [f"{splits.name}: {height}x{width} pixels, {channels} channel{'s' if channels > 1 else ''}"]
    warnings: list[str] = []
    errors: list[str] = []
    if splits.skipped:
        warnings.append(f"{len(splits.skipped)} images cannot be read and are left out: {_some(splits.skipped)}")
    if empty := empty_folders(config["data"]):
        warnings.append(f"class folders without images are passed over: {_some(empty)}")
    if train.scores is not None:
        lines += _scores(train, splits.score)
    elif train.labels is None:
        warnings.append("there are neither labels nor scores: only pretext stages can be trained")
    if build.splits(config) and (splits.test or splits.validation):
        warnings.append("the config names splits: validation and test images that the data bring along are not used")
    if pretext is not None:
        lines.append(f"pretext images of their own: {len(pretext)}")
    try:
        ways = parted(config, splits)
        scored = train.scores is not None
        recipe = build.recipe(config, train.shape, len(train.classes), scored=scored)
    except UserError as error:
        return Findings(lines, warnings, [str(error)])
    for name, parts in ways.items():
        lines += ["", *_parts(name, parts)]
        where = f"split {name}: " if name else ""
        errors += [where + reason] if (reason := unmeasurable(parts)) else []
        warnings += [where + text for text in _doubts(parts, pretext)]
        for level, text in _stages(recipe, parts.train, pretext):
            (errors if level == "error" else warnings).append(where + text)
        if name and recipe.splits[name].get("by") == "image" and (leak := _leak(parts)):
            warnings.append(f"{where}by image: {leak}; split by group")
        elif leak := _leak(parts):
            warnings.append(f"{where}{leak}")
    return Findings(lines, warnings, errors)


def parted(config: Config, splits: Splits) -> dict[str, Splits]:
    """The splits of a config by name, as its first seed draws them; the data's own, named "", where there are none."""
    ways = {}
    for name, way in build.splits(config).items():
        try:
            ways[name] = part(splits, **way, seed=config["seeds"][0])
        except UserError as error:
            raise UserError(f"split {name!r}: {error}; see --config.splits.{name}") from error
    return ways or {"": splits}


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


def _doubts(parts: Splits, pretext: Source | None) -> Iterator[str]:
    """What is odd about the parts of one split: copies, classes without images, no test images."""
    named = _named(parts)
    for name, source in named.items():
        if len(found := copies(source)):
            yield f"{len(found)} {name} images equal an earlier one of {name} pixel for pixel{_which(source, found)}"
    pairs = [(parts.validation, "validation", parts.train, "train"), (parts.test, "test", parts.train, "train")]
    pairs += [(parts.test, "test", parts.validation, "validation"), (parts.test, "test", pretext, "pretext")]
    for source, name, other, its in pairs:
        if source is not None and other is not None and len(found := copies(source, of=other)):
            some = f"{len(found)} of {len(source.images)} {name} images{_which(source, found)}"
            yield f"{some} are pixel-equal to {its} images: {_GOOD}"
    for name, source in named.items():
        if source.labels is not None:
            missing = [source.classes[label] for label in np.flatnonzero(_class_counts(source) == 0)]
            if missing:
                yield f"{name} has no image of {len(missing)} classes: {_some(missing)}"
    if parts.test is None:
        yield "there are no test images: nothing will be measured"


def _which(source: Source, positions: np.ndarray) -> str:
    """The first few names in brackets, where there are names."""
    return f" ({_some([source.names[position] for position in positions], 3)})" if source.names else ""


_GOOD = "results will be too good"


def _leak(parts: Splits) -> str:
    """Words on test images whose scene is also trained on; empty where there are none."""
    count = shared_groups(parts.train, parts.test) if parts.test is not None else 0
    total = len(parts.test.images) if parts.test is not None else 0
    return f"{count} of {total} test images show a scene that is also trained on: {_GOOD}" if count else ""


def _stages(recipe: Recipe, train: Source, pretext: Source | None) -> Iterator[tuple[str, str]]:
    """("error" or "warning", text) for every set of images that stages of a recipe ask for and cannot well have."""
    used = {
        stage.name: stage for arm in (*recipe.arms.values(), *((p,) for p in recipe.probes.values())) for stage in arm
    }
    asked = [("labels", name, "labelled") for name in recipe.labels] + [("subsets", n, n) for n in recipe.subsets]
    for kind, name, on in asked:
        stages = [stage for stage in used.values() if stage.on == on]
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
        for stage in stages:
            shown = samples[stage.name] * stage.repeat(samples[stage.name])
            if shown < stage.batch_size:
                yield "warning", f"stage {stage.name!r}: {shown} images are fewer than a batch of {stage.batch_size}"


def _pictures(ways: Mapping[str, Splits], pretext: Source | None) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Rows for the picture: some images of every part, evenly spread over it."""
    parts = {f"{way} {name}".strip(): source for way, these in ways.items() for name, source in _named(these).items()}
    if pretext is not None:
        parts["pretext"] = pretext
    rows = {}
    for name, source in parts.items():
        count = len(source.images)
        chosen = np.linspace(0, count - 1, min(PICTURES, count)).round().astype(int)
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
