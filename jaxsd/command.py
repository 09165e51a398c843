"""What the command line does once its flags are read: process settings, data, experiment, summary, table."""

import os
import platform
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from jaxsd import __version__, build, figures, report, tuning
from jaxsd.data.source import Source, Splits, describe
from jaxsd.data.split import duplicates
from jaxsd.errors import UserError
from jaxsd.measure import attention, attention_images, measure
from jaxsd.recipe import Cell, Experiment
from jaxsd.train.loop import Stop
from jaxsd.workdir import fingerprint, log, start_log, write_json

Config = dict[str, Any]


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


def run(
    config: Config, workdir: Path, *, only: tuple[str, ...] = (), reuse: bool = False, stop: Stop
) -> dict[str, Any]:
    """Trains what is missing in the workdir, measures, writes summary.json and prints the table."""
    for name in only:
        if name not in config["arms"]:
            raise UserError(f"--only: {name!r} is no arm: choose from {', '.join(config['arms'])}")
    start_log(workdir / "log.txt")
    tuning.tune_allocator()
    tuning.cache_compilation()
    splits = build.load(config)
    log.info("%s", describe(splits))
    pretext = build.load_pretext(config, splits)
    copies = leaks(splits, pretext)
    if copies:
        log.warning("%d test images are pixel-equal to training images: accuracies will be too good", copies)
    classes = len(splits.train.classes)
    recipe = build.recipe(config, splits.train.shape, classes)
    experiment = Experiment(recipe, splits, workdir, pretext=pretext, stop=stop, save_seconds=config["save_seconds"])
    cells = list(experiment.cells(only))
    missing = experiment.check(cells, reuse=reuse)
    write_json(workdir / "config.json", config)
    rows = []
    for cell in cells:
        experiment.train(cell)
        rows += measure(experiment, cell)
        experiment.look()
    summary = heading(config, recipe.baseline, splits, pretext, copies)
    summary["rows"] = report.aggregate(rows, baseline=recipe.baseline)
    report.write(workdir, summary)
    picture = workdir / "attention.png"
    if config["attention"] and splits.test is not None and (missing or not picture.exists()):
        draw_attention(experiment, cells, picture)
    print(report.table(summary))
    return summary


def leaks(splits: Splits, pretext: Source | None) -> int | None:
    """How many test images are pixel-equal to one that something is trained on; None without test images."""
    if splits.test is None:
        return None
    return duplicates(splits.train, splits.test) + (duplicates(pretext, splits.test) if pretext is not None else 0)


def heading(
    config: Config, baseline: str, splits: Splits, pretext: Source | None, copies: int | None
) -> dict[str, Any]:
    """Everything in the summary but its rows."""
    train, test = splits.train, splits.test
    parts = [part.fingerprint() if part is not None else None for part in (train, splits.validation, test, pretext)]
    notes = ["seconds are those of training, compilation included"]
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
            "fingerprint": fingerprint(parts),
            "duplicates_train_test": copies,
        },
        "protocol": protocol(config, splits),
        "notes": notes + [f"left out, unreadable: {name}" for name in splits.skipped],
    }


def draw_attention(experiment: Experiment, cells: list[Cell], path: Path) -> None:
    """Grad-CAM of the first three blocks, pretext arms side by side on the same test images (ScaleNet, Figure 3)."""
    first = [cell for cell in cells if cell[1:] == cells[0][1:]]
    found = {cell.arm: maps for cell in first if (maps := attention(experiment, cell)) is not None}
    if found:
        images = attention_images(experiment, cells[0])
        figures.attention_figure(path, images, found)
        log.info("attention maps of the pretext networks: %s", path)


def protocol(config: Config, splits: Splits) -> str:
    """The line under the table: data, network, labelled images, what the intervals are, device."""
    sizes = [(len(part), name) for part, name in zip(splits[1:4], ("train", "validation", "test"), strict=True) if part]
    seeds = ", ".join(str(seed) for seed in config["seeds"])
    parts = [
        f"{splits.name}: {', '.join(f'{count:,} {name}' for count, name in sizes)} images, "
        f"{len(splits.train.classes)} classes",
        config["model"]["name"],
        *(f"labels {name}: {_amount(part)}" for name, part in config["labels"].items()),
        *(f"{name} images: {_amount(part)}" for name, part in config["subsets"].items()),
        f"last epoch; seeds {seeds}"
        + ("; 95 % Student-t intervals, paired by seed" if len(config["seeds"]) > 1 else ""),
        f"{jax.device_count()} x {jax.local_devices()[0].device_kind}",
    ]
    return "; ".join(parts)


def _amount(part: Config) -> str:
    """How many images, in words; 0 stands for not given, as in the recipe."""
    total, fraction, per_class = (part.get(name) for name in ("total", "fraction", "per_class"))
    if per_class:
        return f"{per_class:,} per class"
    if fraction:
        return f"{fraction:.0%} of the training images"
    return f"{total:,}" if total else "all"
