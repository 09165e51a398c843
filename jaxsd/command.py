"""What the command line does once its flags are read: process settings, data, experiment, summary, table."""

import dataclasses
import logging
import os
import platform
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxsd import __version__, build, pictures, processes, report, tuning
from jaxsd.aggregate import aggregate, collapses
from jaxsd.data.copies import equal, near, thumbnails
from jaxsd.data.source import Source, Splits, describe
from jaxsd.data.split import TEST_SHARE, part, scenes_on_both_sides, split, unmeasurable
from jaxsd.errors import UserError
from jaxsd.measure import measure, measured
from jaxsd.recipe import Cell, Experiment, Recipe
from jaxsd.train.loop import Stop
from jaxsd.workdir import fingerprint, locked, log, start_log, write_json

Config = dict[str, Any]
WAYS = {"group": "scene", "image": "image"}
PAIRS = 100_000_000  # of images that are compared at the start of a run: a second or two
Found = Mapping[Cell, list[dict[str, Any]]]
Parted = Mapping[tuple[str, int] | None, Splits]  # by split and seed


def stop_on_signals(signals: Iterable[int]) -> Stop:
    """A flag that the given signals set; a second one ends the process at once."""
    stop = Stop()

    def ask(number: int, frame: Any) -> None:
        if stop.signal is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.signal = number
        # A handler may come amid a log line, so it writes past the log.
        os.write(2, f"{signal.Signals(number).name}: saving, then stopping (once more: stop at once)\n".encode())

    for number in signals:
        signal.signal(number, ask)
    return stop


class Prepared(NamedTuple):
    """What there is before anything is trained."""

    experiment: Experiment
    parted: Parted
    copies: tuple[int | None, int | None]  # test images equal, and nearly equal, to ones that are trained on
    shared: list[str]  # a line for each split that has scenes on both sides


def prepare(config: Config, workdir: Path, stop: Stop) -> Prepared:
    """Reads the data and builds the experiment; UserError where these do not go together."""
    tuning.cache_compilation()
    splits = build.load(config)
    log.info("%s", describe(splits))
    pretext = build.load_pretext(config, splits)
    scored = splits.train.scores is not None
    recipe = build.recipe(config, splits.train.shape, len(splits.train.classes), scored=scored)
    parted = parts(recipe, splits)
    for key, parts_of in parted.items():
        if reason := unmeasurable(parts_of):
            raise UserError(f"split {key[0]}, seed {key[1]}: {reason}" if key else reason)
    experiment = Experiment(recipe, splits, workdir, pretext=pretext, stop=stop, save_seconds=config["save_seconds"])
    return Prepared(experiment, parted, leaks(recipe, splits, parted, pretext), shared_scenes(parted, pretext))


def run(config: Config, workdir: Path, *, only: tuple[str, ...] = (), reuse: bool = False, stop: Stop) -> int:
    """Trains what is missing in the workdir, measures, writes summary.json and prints the table.

    The table also has what other runs have finished in the same workdir: other arms, other seeds. Of several processes
    that train together the first does all this, the others only train. Returns the exit status.
    """
    for name in only:
        if name not in config["arms"]:
            raise UserError(f"--only: {name!r} is no arm: choose from {', '.join(config['arms'])}")
    if not processes.leads():
        start_log(None)
        log.setLevel(logging.ERROR)
        experiment = prepare(config, workdir, stop).experiment
        return experiment.follow(list(experiment.cells(only)))
    start_log(workdir / "log.txt")
    prepared = prepare(config, workdir, stop)
    experiment = prepared.experiment
    if prepared.copies[0]:
        log.warning("%d test images are pixel-equal to training images: results will be too good", prepared.copies[0])
    if prepared.copies[1]:
        log.warning("%d test images are nearly equal to training images: results may be too good", prepared.copies[1])
    for line in prepared.shared:
        log.warning("%s", line)
    own = list(experiment.cells(only))
    missing = experiment.check(own, reuse=reuse)
    write_json(workdir / "config.json", config)
    found: dict[Cell, list[dict[str, Any]]] = {}
    for cell in own:
        experiment.train(cell)
        found[cell] = measure(experiment, cell)
        experiment.look()
    # Who comes last sees what all others have measured.
    with locked(workdir / ".summary.lock", lambda _: experiment.look()):
        for cell in experiment.cells(seeds=experiment.seeds()):
            if cell not in found and (rows := measured(experiment, cell)):
                found[cell] = rows
        conclude(config, prepared, found, drawn=not missing)
    return 0


def conclude(config: Config, prepared: Prepared, found: Found, *, drawn: bool) -> None:
    """Summary, pictures and table of all cells that are measured; drawn: whether there may be pictures of them."""
    experiment, workdir = prepared.experiment, prepared.experiment.workdir
    cells = [cell for cell in experiment.cells(seeds=experiment.seeds()) if cell in found]
    rows = [row for cell in cells for row in found[cell]]
    config = {**config, "seeds": tuple(dict.fromkeys(cell.seed for cell in cells))}
    write_json(workdir / "config.json", config)
    recipe = dataclasses.replace(experiment.recipe, seeds=config["seeds"])
    prepared = covering(prepared, recipe)
    parted = prepared.parted
    summary = heading(config, recipe.baseline, next(iter(parted.values())), experiment.pretext, prepared.copies)
    summary["rows"] = aggregate(rows, baseline=recipe.baseline)
    summary["notes"] += prepared.shared + fold_notes(recipe) + guesses(parted) + report.gaps(summary["rows"])
    summary["notes"] += collapses(summary["rows"])
    known = report.load(workdir) if drawn and (workdir / "summary.json").exists() else {"rows": None}
    names = known.get("pictures", [])
    if known["rows"] != report.plain(summary["rows"]) or not names or not all((workdir / n).exists() for n in names):
        names = pictures.draw(experiment, cells, rows, summary, maps=config["attention"])
    summary["pictures"] = names
    report.write(workdir, summary)
    report.write_predictions(workdir, rows)
    print(report.table(summary))


def covering(prepared: Prepared, recipe: Recipe) -> Prepared:
    """The same with what is said of the splits said of those of all the recipe's seeds."""
    experiment = prepared.experiment
    if not recipe.splits or set(recipe.seeds) == set(experiment.recipe.seeds):
        return prepared
    parted = parts(recipe, experiment.splits)
    copies = leaks(recipe, experiment.splits, parted, experiment.pretext)
    return prepared._replace(parted=parted, copies=copies, shared=shared_scenes(parted, experiment.pretext))


def parts(recipe: Recipe, splits: Splits) -> dict[tuple[str, int] | None, Splits]:
    """The data as every split and seed of the recipe parts them, or as they are."""
    if recipe.splits and splits.test is not None:
        raise UserError(
            f"{splits.name} has test images of its own, which splits ({', '.join(recipe.splits)}) would leave out: "
            "hold none out (--config.data.test=0) or take the splits out of the config"
        )
    ways = recipe.splits.items()
    found = {(name, seed): part(splits, **way, seed=seed) for seed in recipe.seeds for name, way in ways}
    return {**found} or {None: splits}


def leaks(recipe: Recipe, splits: Splits, parted: Parted, pretext: Source | None) -> tuple[int | None, int | None]:
    """How many test images are pixel-equal, and how many only nearly equal, to one that something is trained on.

    None without test images; the second also where more than PAIRS pairs would have to be compared. Of several splits
    the most.
    """
    beside = [pretext] if pretext is not None else []
    small: list[np.ndarray] = []  # thumbnails of all that is parted, and of the pretext images
    exact, nearly, many = [], [], False
    for key, sides in parted.items():
        if sides.test is None:
            continue
        copies = np.concatenate([equal(sides.test, of=source).rows for source in (sides.train, *beside)])
        exact.append(len(np.unique(copies)))
        many = many or len(sides.test) * sum(map(len, (sides.train, *beside))) > PAIRS
        if many:
            continue
        small = small or [thumbnails(source.images) for source in (splits.train, *beside)]
        if key is None:
            train, test = small[0], thumbnails(sides.test.images)
        else:
            train, test = (small[0][rows] for rows in split(splits.train, **recipe.splits[key[0]], seed=key[1]))
        found = near(test, of=np.concatenate([train, *small[1:]])).rows
        nearly.append(len(np.setdiff1d(found, copies)))
    return max(exact, default=None), None if many else max(nearly, default=None)


def near_note(splits: Splits, count: int | None) -> list[str]:
    """A line on test images that are nearly equal to training images, where there are test images."""
    if splits.test is None:
        return []
    told = f"{count} (python -m jaxsd.check data shows them)" if count else "none"
    told = "not looked for among so many, as python -m jaxsd.check data does" if count is None else told
    return [f"test images that are nearly equal to a training image (encoded anew, resized, mirrored, ...): {told}"]


def shared_scenes(parted: Parted, pretext: Source | None = None) -> list[str]:
    """A line for each split, and two of its parts, with scenes on both sides."""
    lines = {}
    for key, splits in parted.items():
        name = f"split {key[0]}" if key is not None else "the data's own split"
        for parts, text in scenes_on_both_sides(splits, pretext).items():
            results = "validation results" if parts == "validation" else "results"
            lines.setdefault((name, parts), f"{name}: {text}, so its {results} are too good")
    return list(lines.values())


def fold_notes(recipe: Recipe) -> list[str]:
    """What is to be said of each k-fold split: how far its intervals can be trusted, and which folds were left out.

    Values of folds depend on each other, and no estimate of their variance is unbiased: Bengio and Grandvalet (2004).
    """
    lines = []
    for name, way in recipe.splits.items():
        if not (folds := way.get("folds")):
            continue
        lines.append(
            f"split {name}: its folds are not independent, since each one's test images train the other networks: "
            "intervals tend to be too narrow, and differences separated too soon"
        )
        times = np.bincount([seed % folds for seed in recipe.seeds], minlength=folds)
        if times.min() != times.max():
            wanted = f"({','.join(map(str, range(folds)))})"
            lines.append(
                f"split {name}: not all of its {folds} folds were tested on equally often, which "
                f"--config.seeds='{wanted}' would do"
            )
    return lines


def guesses(parted: Parted) -> list[str]:
    """What is reached without looking at an image, for each split: by the mean score, or by the commonest class."""
    found: dict[str, list[float]] = {}
    for key, splits in parted.items():
        train, test = splits.train, splits.test
        if test is None:
            continue
        where = f", split {key[0]}" if key is not None else ""
        if train.scores is not None and test.scores is not None:
            error = float(np.abs(test.scores - train.scores.mean()).mean())
            found.setdefault(f"always answering the training images' mean score{where}: MAE {{:.3f}}", []).append(error)
        elif train.labels is not None and test.labels is not None:
            share = float((test.labels == np.bincount(train.labels).argmax()).mean())
            found.setdefault(f"always answering the commonest class{where}: {{:.1f}} %", []).append(100 * share)
    return [text.format(np.mean(values)) for text, values in found.items()]


def heading(
    config: Config,
    baseline: str,
    splits: Splits,
    pretext: Source | None,
    copies: tuple[int | None, int | None],
) -> dict[str, Any]:
    """Everything in the summary but its rows."""
    train, test = splits.train, splits.test
    parts = [part.fingerprint() if part is not None else None for part in (train, splits.validation, test, pretext)]
    notes = [*near_note(splits, copies[1]), "seconds are those of training, compilation included"]
    if any(view["name"] == "patches" for stage in config["stages"].values() for view in stage.get("view", ())):
        notes.append("images: of an arm that is shown patches, every patch counts")
    if test is None:
        notes.append("there are no test images: nothing was measured, the trained networks are in the workdir")
    return {
        "config": config["name"],
        "preset": config["preset"],
        "version": __version__,
        "seeds": list(config["seeds"]),
        "baseline": baseline,
        "environment": {
            "jax": jax.__version__,
            "device": jax.local_devices()[0].device_kind,
            "devices": jax.device_count(),
            "python": platform.python_version(),
        },
        "data": {
            "name": splits.name,
            "train": len(train),
            "validation": len(splits.validation or ()),
            "test": len(test or ()),
            "classes": len(train.classes),
            "score": splits.score or None,
            "fingerprint": fingerprint(parts),
            "duplicates_train_test": copies[0],
            "near_duplicates_train_test": copies[1],
        },
        "protocol": protocol(config, splits),
        "notes": notes + [f"left out, unreadable: {name}" for name in splits.skipped],
    }


def protocol(config: Config, splits: Splits) -> str:
    """The line under the table: data, network, labelled images, what the intervals are, device."""
    sizes = [(len(part), name) for part, name in zip(splits[1:4], ("train", "validation", "test"), strict=True) if part]
    seeds = ", ".join(str(seed) for seed in config["seeds"])
    parts = [
        f"{splits.name}: {', '.join(f'{count:,} {name}' for count, name in sizes)} images, "
        + (splits.score or f"{len(splits.train.classes)} classes"),
        config["model"]["name"]
        + (f" begun with {init}" if (init := (config.get("init") or {}).get("weights")) else ""),
        *(f"{name}: {_way(way)}" for name, way in build.splits(config).items()),
        *(f"labels {name}: {_amount(part)}" for name, part in config["labels"].items()),
        *(f"{name} images: {_amount(part)}" for name, part in config["subsets"].items()),
        f"last epoch; seeds {seeds}"
        + ("; 95 % Student-t intervals, paired by seed" if len(config["seeds"]) > 1 else ""),
        f"{jax.device_count()} x {jax.local_devices()[0].device_kind}",
    ]
    return "; ".join(parts)


def _way(way: Config) -> str:
    """What one entry of config.splits holds out, in words."""
    by = WAYS[way.get("by", "group")]
    if folds := way.get("folds"):
        return f"{folds}-fold cross-validation by {by}, seed s tests on fold s mod {folds}"
    return f"{way.get('test', TEST_SHARE):.0%} held out by {by}, drawn anew for each seed"


def _amount(part: Config) -> str:
    """How many images, in words; 0 stands for not given, as in the recipe."""
    total, fraction, per_class = (part.get(name) for name in ("total", "fraction", "per_class"))
    if per_class:
        return f"{per_class:,} per class"
    if fraction:
        return f"{fraction:.0%} of the training images"
    return f"{total:,}" if total else "all"
