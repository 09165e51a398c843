"""What a cell of an experiment is measured by: networks meet test images here and nowhere else."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxsd.data.source import Source
from jaxsd.evaluate.cam import grad_cam
from jaxsd.evaluate.features import block_features, predict
from jaxsd.evaluate.metrics import classification, per_class
from jaxsd.evaluate.probes import knn, ridge
from jaxsd.recipe import Cell, Experiment
from jaxsd.stage import Run, data_of, done
from jaxsd.train.loop import evaluate
from jaxsd.workdir import fingerprint, read_json, write_json

Rows = list[dict[str, Any]]
SHOWN = 4  # images in the attention figure


def measure(experiment: Experiment, cell: Cell) -> Rows:
    """The rows of one cell: one per evaluation, block and metric. What is on disk already is not computed again."""
    rows: Rows = []
    for name in experiment.recipe.evaluations:
        found = EVALUATIONS[name](experiment, cell)
        rows += [{**_place(cell), "evaluation": name, **row} for row in found]
    return rows


def _place(cell: Cell) -> dict[str, Any]:
    """The cell's place in the grid, as the beginning of a row."""
    return {"arm": cell.arm, "input": cell.input, "labels": cell.labels, "seed": cell.seed}


def _budget(experiment: Experiment, runs: Sequence[Run]) -> dict[str, Any]:
    records = [done(run, experiment.workdir) or {} for run in runs]
    return {name: sum(record.get(name, 0) for record in records) for name in ("images", "pixels", "seconds")}


def _cached(experiment: Experiment, what: list[Any], compute: Callable[[], Rows]) -> Rows:
    """Rows from the workdir, or computed and kept there under a fingerprint of what they depend on."""
    path = experiment.workdir / "evaluations" / f"{fingerprint(what)}.json"
    if (rows := read_json(path)) is None:
        rows = compute()
        write_json(path, rows)
    return rows


def _row(metric: str, value: float, n: int, block: str | None = None) -> dict[str, Any]:
    return {"block": block, "metric": metric, "value": value, "n": n}


def _pretext_runs(experiment: Experiment, cell: Cell) -> list[Run]:
    return [run for run in experiment.runs(cell) if not run.stage.downstream]


def _test(experiment: Experiment, cell: Cell) -> Source | None:
    return experiment.viewed(cell.input).splits.test


def pretext(experiment: Experiment, cell: Cell) -> Rows:
    """Accuracy of the pretext task itself on the test images, under the last pretext stage's view."""
    runs, test = _pretext_runs(experiment, cell), _test(experiment, cell)
    if not runs or test is None:
        return []
    stage = runs[-1].stage

    def compute() -> Rows:
        trained = experiment.trained(cell, runs)
        found = evaluate(stage.objective, trained.params, trained.extra, data_of(stage.view(test)))
        return [_row(k, v, len(test)) for k, v in found.items() if k.startswith("accuracy")]

    what = ["pretext", runs[-1].fingerprint(), test.fingerprint()]
    return [{**row, **_budget(experiment, runs)} for row in _cached(experiment, what, compute)]


def finetune(experiment: Experiment, cell: Cell) -> Rows:
    """Accuracy of the arm's last stage on the test images: overall, balanced, and per class."""
    runs = experiment.runs(cell)
    return _predicted("finetune", experiment, cell, runs) if runs[-1].stage.downstream else []


def probe(experiment: Experiment, cell: Cell) -> Rows:
    """Accuracy of trained linear probes on every block of the frozen pretext network."""
    if cell.arm not in experiment.recipe.probes:
        return []
    return _predicted("probe", experiment, cell, experiment.runs(cell, probe=True))


def _predicted(name: str, experiment: Experiment, cell: Cell, runs: list[Run]) -> Rows:
    """What the outputs of the last run are worth on the test images; for a dict of outputs, the accuracy of each."""
    stage, test = runs[-1].stage, _test(experiment, cell)
    if test is None or test.labels is None:
        return []
    labels, classes = test.labels, test.classes

    def compute() -> Rows:
        trained = experiment.trained(cell, runs)
        outputs = predict(stage.model, trained.params, trained.extra["model"], stage.view(test).images)
        if isinstance(outputs, dict):
            found = {block: classification(scores, labels, classes) for block, scores in outputs.items()}
            return [_row("accuracy", metrics["accuracy"], len(test), block) for block, metrics in found.items()]
        rows = [_row(k, v, len(test)) for k, v in classification(outputs, labels, classes).items()]
        rows[0]["per_class"] = per_class(outputs.argmax(-1), labels, classes)
        return rows

    what = [name, runs[-1].fingerprint(), test.fingerprint()]
    return [{**row, **_budget(experiment, runs)} for row in _cached(experiment, what, compute)]


def _on_features(name: str, classify: Callable[..., np.ndarray]) -> Callable[[Experiment, Cell], Rows]:
    """An evaluation by a closed-form classifier on every block of the network that the pretext part ends with."""

    def evaluation(experiment: Experiment, cell: Cell) -> Rows:
        runs, test = _pretext_runs(experiment, cell), _test(experiment, cell)
        if test is None or test.labels is None or not (runs or cell.arm == experiment.recipe.baseline):
            return []
        stage = runs[-1].stage if runs else experiment.runs(cell)[-1].stage
        train, train_print = experiment.given(cell, "labelled")
        train_labels, labels, classes = train.labels, test.labels, test.classes
        standard = [part.tolist() for part in experiment.viewed(cell.input).standard]
        start = runs[-1].fingerprint() if runs else fingerprint(["untrained", stage.spec, cell.seed, standard])

        def features() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
            trained = experiment.trained(cell, runs) if runs else experiment.untrained(cell, stage)
            viewed = (stage.view(source).images for source in (train, test))
            here, there = (
                block_features(stage.model, trained.params, trained.extra["model"], images) for images in viewed
            )
            return here, there

        def compute() -> Rows:
            here, there = experiment.remembered(("features", start, train_print), features)
            scores = {k: classify(here[k], train_labels, there[k], classes=classes) for k in here}
            return [
                _row("accuracy", classification(score, labels, classes)["accuracy"], len(test), block)
                for block, score in scores.items()
            ]

        rows = _cached(experiment, [name, start, train_print, test.fingerprint()], compute)
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


def attention(experiment: Experiment, cell: Cell) -> dict[str, np.ndarray] | None:
    """Grad-CAM maps of the pretext network's first three blocks for the answer that it gives; None without one."""
    runs = _pretext_runs(experiment, cell)
    if not runs:
        return None
    trained, model = experiment.trained(cell, runs), runs[-1].stage.model
    images, params, collections = attention_images(experiment, cell), trained.params, trained.extra["model"]
    target = predict(model, params, collections, images).argmax(-1)
    return grad_cam(model, params, collections, images, blocks=model.blocks[:3], target=target)
