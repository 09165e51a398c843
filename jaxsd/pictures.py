"""The pictures of a finished run: what its networks look at, and how good its scores are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsd import figures, figures_scores
from jaxsd.evaluate.answers import patch_scores
from jaxsd.evaluate.regression import logistic5
from jaxsd.measure import attention, attention_images
from jaxsd.recipe import Cell, Experiment
from jaxsd.stage import Stage
from jaxsd.views.view import patches
from jaxsd.workdir import log

Rows = Sequence[dict[str, Any]]
METRIC = "spearman"  # of the picture over patch sizes


def draw(experiment: Experiment, cells: list[Cell], rows: Rows, summary: dict[str, Any], *, maps: bool) -> list[str]:
    """Draws what the run has to show into its workdir; returns the files' names, first things first.

    rows: of all cells, as measured. maps: whether attention maps are asked for.
    """
    first = [cell for cell in cells if cell[1:] == cells[0][1:]]
    test = experiment.viewed(first[0]).splits.test
    drawn = []
    if test is not None and maps and _attention(experiment, first):
        drawn.append("attention.png")
    if test is not None and test.scores is not None:
        drawn += _scores(experiment, first, rows, summary)
    for name in drawn:
        log.info("picture: %s", experiment.workdir / name)
    return drawn


def _attention(experiment: Experiment, cells: list[Cell]) -> bool:
    """Grad-CAM of the first three blocks, pretext arms side by side on the same test images (ScaleNet, Figure 3)."""
    found = {cell.arm: maps for cell in cells if (maps := attention(experiment, cell)) is not None}
    if found:
        images = attention_images(experiment, cells[0])
        figures.attention_figure(experiment.workdir / "attention.png", images, found)
    return bool(found)


def _scores(experiment: Experiment, cells: list[Cell], rows: Rows, summary: dict[str, Any]) -> list[str]:
    """Predicted against true scores, the metric over the ladder's steps, and the map of one image's patches."""
    unit, workdir = (summary["data"]["score"] or "").partition(",")[0], experiment.workdir
    place = dict(zip(("arm", "input", "labels", "seed", "split"), cells[0], strict=True))
    del place["arm"]
    here = [row for row in rows if all(row.get(name) == value for name, value in place.items())]
    found = {row["arm"]: row for row in here if "predictions" in row}
    if not found:
        return []
    _predicted(workdir / "predicted.png", found, here, experiment.viewed(cells[0]).splits.test.kinds, unit)  # type: ignore[union-attr]
    chain = [arm for arm in _ladder(experiment) if arm in found]
    if len(chain) < 2:
        return ["predicted.png"]
    group = {name: value for name, value in place.items() if name != "seed"}
    told = [row for row in summary["rows"] if all(row.get(name) == value for name, value in group.items())]
    means = {row["arm"]: row for row in told if row["metric"] == METRIC}
    drawn = ["quality_map.png", "predicted.png"]
    if all(arm in means for arm in chain):
        drawn.insert(0, "stages.png")
        base = means.get(summary["baseline"])
        figures_scores.metric_by_stage(
            workdir / "stages.png",
            chain,
            [means[arm]["mean"] for arm in chain],
            [means[arm]["ci95"] for arm in chain],
            baseline=(base["mean"], base["ci95"]) if base is not None and base["mean"] is not None else None,
            against=summary["baseline"],
            metric=METRIC,
            limits=(-1, 1),
        )
    _map(experiment, {cell.arm: cell for cell in cells if cell.arm in chain}, unit)
    return drawn


def _predicted(path: Path, found: dict[str, Any], rows: Rows, kinds: Sequence[str], unit: str) -> None:
    curves, titles = {}, {}
    for arm, row in found.items():
        values = np.asarray(row["predictions"])
        if (fitted := logistic5(values, np.asarray(row["scores"]))) is not None:
            curves[arm] = (values, fitted)
        told = {r["metric"]: r["value"] for r in rows if r["arm"] == arm and r["metric"] in ("pearson", "spearman")}
        told = [f"{name} {value:.3f}" for name, value in told.items() if value is not None]
        titles[arm] = ", ".join([f"seed {row['seed']}", *told])
    predictions = {arm: np.asarray(row["predictions"]) for arm, row in found.items()}
    scores = np.asarray(next(iter(found.values()))["scores"])
    figures_scores.predicted_scores(path, predictions, scores, unit=unit, kinds=kinds, curves=curves, titles=titles)


def _ladder(experiment: Experiment) -> list[str]:
    """The arms of the longest ladder: each one stage longer than the one before, all on labelled patches."""

    def climbs(stage: Stage) -> bool:
        return stage.downstream and any(isinstance(view, patches) for view in getattr(stage.view, "views", ()))

    arms = {name: path for name, path in experiment.recipe.arms.items() if path and all(map(climbs, path))}
    longest = max(arms.values(), key=len, default=())
    return sorted(
        (name for name, path in arms.items() if path == longest[: len(path)]), key=lambda name: len(arms[name])
    )


def _map(experiment: Experiment, cells: dict[str, Cell], unit: str) -> None:
    """Scores of every patch of the test image whose score is nearest to the middle of all, at every patch size."""
    any_cell = next(iter(cells.values()))
    test = experiment.viewed(any_cell).splits.test
    assert test is not None and test.scores is not None
    chosen = test.take([int(np.abs(test.scores - (test.scores.min() + test.scores.max()) / 2).argmin())])
    maps = {}
    for arm, cell in sorted(cells.items(), key=lambda item: len(experiment.recipe.arms[item[0]])):
        runs = experiment.runs(cell)
        trained, stage = experiment.trained(cell, runs), runs[-1].stage
        scale, collections = stage.objective.scale, trained.extra["model"]
        maps[arm] = patch_scores(stage.model, trained.params, collections, stage.view(chosen), scale)[0]
    path = experiment.workdir / "quality_map.png"
    name = Path(chosen.names[0]).name if chosen.names else ""
    figures_scores.quality_map(path, chosen.images[0], maps, score=float(chosen.scores[0]), unit=unit, name=name)  # type: ignore[index]
