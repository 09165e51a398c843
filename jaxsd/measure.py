"""What a cell of an experiment is measured by: networks meet test images here and nowhere else."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxsd.data.source import Source
from jaxsd.evaluate.answers import averaged
from jaxsd.evaluate.cam import grad_cam
from jaxsd.evaluate.collapse import collapsed
from jaxsd.evaluate.features import block_features, predict
from jaxsd.evaluate.metrics import classification, per_class
from jaxsd.evaluate.probes import knn, ridge, ridge_regression
from jaxsd.evaluate.regression import per_kind, regression, undefined
from jaxsd.evaluate.statistics import image_statistics
from jaxsd.recipe import Cell, Experiment
from jaxsd.stage import WEIGHTS_FORMAT, Run, Stage, data_of, done
from jaxsd.train.loop import evaluate
from jaxsd.workdir import Journal, fingerprint, log, read_json, write_json

Rows = list[dict[str, Any]]
SHOWN = 4  # images in the attention figure
FEATURES_FORMAT = 2  # raised when rows of classifiers on features would no longer be the same: 2 marks collapsed ones


class Unmeasured(Exception):
    """Something is not in the workdir yet, where only what is there is asked for."""


def measure(experiment: Experiment, cell: Cell) -> Rows:
    """The rows of one cell: one per evaluation, block and metric. What is on disk already is not computed again."""
    rows: Rows = []
    for name in experiment.recipe.evaluations:
        found = EVALUATIONS[name](experiment, cell)
        rows += [{**_place(cell), "evaluation": name, **row} for row in found]
    return rows


def measured(experiment: Experiment, cell: Cell) -> Rows:
    """The rows of a cell that has been trained and measured, by whatever process; none where something is missing.

    A run that is under way, or was removed to be trained again, is missing too: of the old one only numbers are left.
    """
    with contextlib.suppress(Unmeasured), experiment.reading():
        if all(done(run, experiment.workdir) is not None for run in experiment.all_runs([cell])):
            return measure(experiment, cell)
    return []


def _place(cell: Cell) -> dict[str, Any]:
    """The cell's place in the grid, as the beginning of a row."""
    place = {"arm": cell.arm, "input": cell.input, "labels": cell.labels, "seed": cell.seed}
    return place if cell.split is None else {**place, "split": cell.split}


def _budget(experiment: Experiment, runs: Sequence[Run]) -> dict[str, Any]:
    records = [done(run, experiment.workdir) or {} for run in runs]
    return {name: sum(record.get(name, 0) for record in records) for name in ("images", "pixels", "seconds")}


def _cached(experiment: Experiment, what: list[Any], compute: Callable[[], Rows]) -> Rows:
    """Rows from the workdir, or computed and kept there under a fingerprint of what they depend on."""
    path = experiment.workdir / "evaluations" / f"{fingerprint(what)}.json"
    if (rows := read_json(path)) is None:
        if experiment.reads:
            raise Unmeasured
        rows = compute()
        write_json(path, rows)
    return rows


def _row(metric: str, value: float | None, n: int, block: str | None = None) -> dict[str, Any]:
    return {"block": block, "metric": metric, "value": value, "n": n}


def _pretext_runs(experiment: Experiment, cell: Cell) -> list[Run]:
    return [run for run in experiment.runs(cell) if not run.stage.downstream]


def _test(experiment: Experiment, cell: Cell) -> Source | None:
    return experiment.viewed(cell).splits.test


def pretext(experiment: Experiment, cell: Cell) -> Rows:
    """Accuracy of the pretext task itself on the test images, under the last pretext stage's view."""
    runs, test = _pretext_runs(experiment, cell), _test(experiment, cell)
    if not runs or test is None:
        return []
    stage = runs[-1].stage

    def compute() -> Rows:
        trained = experiment.trained(cell, runs)
        viewed = stage.view(test)
        found = evaluate(stage.objective, trained.params, trained.extra, data_of(viewed), grid=viewed.grid)
        return [_row(k, v, len(test)) for k, v in found.items() if k.startswith("accuracy")]

    what = ["pretext", runs[-1].fingerprint(), test.fingerprint()]
    return [{**row, **_budget(experiment, runs)} for row in _cached(experiment, what, compute)]


def finetune(experiment: Experiment, cell: Cell) -> Rows:
    """What the arm's last stage is worth on the test images: accuracy (overall, balanced, per class), or its scores."""
    runs = experiment.runs(cell)
    if not runs:
        return _without_network(experiment, cell)
    return _predicted("finetune", experiment, cell, runs) if runs[-1].stage.downstream else []


def probe(experiment: Experiment, cell: Cell) -> Rows:
    """Accuracy of trained linear probes on every block of the frozen pretext network."""
    if cell.arm not in experiment.recipe.probes:
        return []
    return _predicted("probe", experiment, cell, experiment.runs(cell, probe=True))


def _predicted(name: str, experiment: Experiment, cell: Cell, runs: list[Run]) -> Rows:
    """What the outputs of the last run are worth on the test images; for a dict of outputs, the accuracy of each."""
    stage, test = runs[-1].stage, _test(experiment, cell)
    if test is None or (test.labels is None and test.scores is None):
        return []

    def compute() -> Rows:
        trained, viewed = experiment.trained(cell, runs), stage.view(test)
        collections = trained.extra["model"]
        outputs = predict(stage.model, trained.params, collections, viewed.images, grid=viewed.grid)
        labels = np.asarray(test.labels)
        if isinstance(outputs, dict):
            answers = {k: averaged(scores, viewed.patches, stage.average) for k, scores in outputs.items()}
            found = {block: classification(scores, labels, test.classes) for block, scores in answers.items()}
            return [_row("accuracy", metrics["accuracy"], len(test), block) for block, metrics in found.items()]
        answers = averaged(outputs, viewed.patches, stage.average)
        rows = _judged(answers * stage.objective.scale, test)
        if viewed.patches > 1 and test.scores is None:
            alone = classification(outputs, np.repeat(labels, viewed.patches), test.classes)["accuracy"]
            rows.append(_row("patch_accuracy", alone, len(viewed)))
        if stage.best_test:
            rows.append(_best(experiment, runs[-1], test))
        return rows

    what = [name, runs[-1].fingerprint(), test.fingerprint(), stage.average, stage.best_test]
    return [{**row, **_budget(experiment, runs)} for row in _cached(experiment, what, compute)]


def _judged(answers: np.ndarray, test: Source) -> Rows:
    """Answers [N, K] for test images against their labels, or [N, 1] against their scores."""
    if test.scores is None:
        labels = np.asarray(test.labels)
        rows = [_row(k, v, len(test)) for k, v in classification(answers, labels, test.classes).items()]
        rows[0]["per_class"] = per_class(answers.argmax(-1), labels, test.classes)
        return rows
    predictions = answers[:, 0]
    rows = [_row(k, v, len(test)) for k, v in regression(predictions, test.scores).items()]
    reason = undefined(predictions, test.scores)
    reason = reason or ("fewer than 6 images" if len(test) < 6 else "a constant fit")
    rows = [row if row["value"] is not None else {**row, "undefined": reason} for row in rows]
    if test.kinds:
        rows[0]["per_kind"] = per_kind(predictions, test.scores, test.kinds)
    rows[0]["predictions"], rows[0]["scores"] = predictions.tolist(), test.scores.tolist()
    rows[0]["names"] = list(test.names)
    return rows


def _best(experiment: Experiment, run: Run, test: Source) -> dict[str, Any]:
    """The best epoch by the test images, as some papers choose it."""
    metric = "accuracy" if test.scores is None else "mae"
    entries = Journal(run.folder(experiment.workdir) / "metrics.jsonl").of("test")
    pick = max if metric == "accuracy" else min
    return {**_row(f"best_{metric}", pick(entry[metric] for entry in entries), len(test)), "chosen_on_test": True}


def _without_network(experiment: Experiment, cell: Cell) -> Rows:
    """Ridge on hand-made statistics of the images: what is reached without a network."""
    train, train_print = experiment.given(cell, "labelled")
    test = _test(experiment, cell)
    if test is None:
        return []

    def compute() -> Rows:
        here, there = image_statistics(train.images), image_statistics(test.images)
        if test.scores is not None:
            return _judged(ridge_regression(here, np.asarray(train.scores), there)[:, None], test)
        return _judged(ridge(here, np.asarray(train.labels), there, classes=test.classes).scores, test)

    rows = _cached(experiment, ["statistics", train_print, test.fingerprint()], compute)
    return [{**row, "images": len(train), "pixels": 0, "seconds": 0.0} for row in rows]


def _on_features(name: str, classify: Callable[..., np.ndarray]) -> Callable[[Experiment, Cell], Rows]:
    """An evaluation by a closed-form classifier on every block of the network that the pretext part ends with."""

    def evaluation(experiment: Experiment, cell: Cell) -> Rows:
        runs, test = _pretext_runs(experiment, cell), _test(experiment, cell)
        if test is None or test.labels is None or not experiment.recipe.arms[cell.arm]:
            return []
        if not runs and cell.arm != experiment.recipe.baseline:
            return []
        begun = experiment.recipe.arms[cell.arm][0].init
        stage = runs[-1].stage if runs else dataclasses.replace(experiment.runs(cell)[-1].stage, init=begun)
        train, train_print = experiment.given(cell, "labelled")
        train_labels, labels, classes = train.labels, test.labels, test.classes
        test_print = test.fingerprint()
        standard = [part.tolist() for part in experiment.standard(cell)]
        init = [stage.init.identity()] if stage.init is not None else []
        start = (
            runs[-1].fingerprint()
            if runs
            else fingerprint(["untrained", WEIGHTS_FORMAT, stage.spec, cell.seed, standard, *init])
        )

        def features() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, str]]:
            trained = experiment.trained(cell, runs) if runs else experiment.untrained(cell, stage)
            here, there = (
                block_features(stage.model, trained.params, trained.extra["model"], viewed.images, grid=viewed.grid)
                for viewed in (stage.view(source) for source in (train, test))
            )
            flat = {block: reason for block, values in there.items() if (reason := collapsed(values))}
            for block, reason in flat.items():
                log.warning("%s seed %d: the features of %s collapsed: %s", cell.arm, cell.seed, block, reason)
            return here, there, flat

        def compute() -> Rows:
            here, there, flat = experiment.remembered(("features", start, train_print, test_print), features)
            scores = {k: classify(here[k], train_labels, there[k], classes=classes) for k in here}
            return [
                _row("accuracy", classification(score, labels, classes)["accuracy"], len(test), block)
                | ({"collapsed": flat[block]} if block in flat else {})
                for block, score in scores.items()
            ]

        rows = _cached(experiment, [name, FEATURES_FORMAT, start, train_print, test_print], compute)
        return [{**row, **_budget(experiment, runs)} for row in rows]

    return evaluation


EVALUATIONS: dict[str, Callable[[Experiment, Cell], Rows]] = {
    "pretext": pretext,
    "ridge": _on_features("ridge", lambda *args, **kw: ridge(*args, **kw)[0]),
    "knn": _on_features("knn", knn),
    "probe": probe,
    "finetune": finetune,
}


def attention_images(experiment: Experiment, cell: Cell) -> np.ndarray:
    """Four test images for the attention figure, of different classes where there are labels."""
    test = _test(experiment, cell)
    assert test is not None
    rows = np.arange(len(test)) if test.labels is None else np.unique(test.labels, return_index=True)[1]
    return test.images[np.sort(rows)[:: max(1, len(rows) // SHOWN)][:SHOWN]]


def _shown_patches(experiment: Experiment, cell: Cell, stage: Stage) -> bool:
    return stage.view(experiment.viewed(cell).splits.train.take([0])).grid is not None


def attention(experiment: Experiment, cell: Cell) -> dict[str, np.ndarray] | None:
    """Grad-CAM maps of the pretext network's first three blocks for the answer that it gives.

    None without such a network, or where it is shown patches and not whole images.
    """
    runs = _pretext_runs(experiment, cell)
    if not runs or _shown_patches(experiment, cell, runs[-1].stage):
        return None
    trained, model = experiment.trained(cell, runs), runs[-1].stage.model
    images, params, collections = attention_images(experiment, cell), trained.params, trained.extra["model"]
    target = predict(model, params, collections, images).argmax(-1)
    return grad_cam(model, params, collections, images, blocks=model.blocks[:3], target=target)
