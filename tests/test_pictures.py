"""The pictures of a finished ladder, and what is measured of patches: per image, per patch, by the best test epoch."""

import dataclasses

import numpy as np
import pytest
from small import Small

from jaxsd import figures_scores, models, objectives, pictures
from jaxsd.aggregate import aggregate
from jaxsd.command import shared_scenes
from jaxsd.data.source import Source, Splits
from jaxsd.evaluate.features import predict
from jaxsd.measure import measure
from jaxsd.recipe import Experiment, Recipe
from jaxsd.stage import Stage
from jaxsd.train import optimiser, schedule
from jaxsd.views.view import compose, patches
from jaxsd.workdir import Journal

TX = optimiser.with_rate(optimiser.adam())


def splits_of(count=16, side=16):
    random = np.random.default_rng(0)
    noise = np.arange(count) % 4
    images = np.clip(128 + random.normal(size=(count, side, side, 1)) * 20 * noise[:, None, None, None], 0, 255)
    images, groups = images.astype(np.uint8), tuple(f"scene{i // 4}" for i in range(count))
    scored = Source(images, scores=10.0 + 20 * noise, groups=groups, kinds=("blur", "noise") * (count // 2))
    labelled = Source(images, (noise > 1).astype(np.int32), ("calm", "noisy"))
    return [
        Splits("noise", source.take(range(8)), None, source.take(range(8, count)), score="DMOS, by hand")
        for source in (scored, labelled)
    ]


def network(grow, frozen=()):
    return models.build(
        "patchnet", patch=8, first=(4,), widths=(4,), hidden=(8, 8), grow=grow, outputs=1, dropout=0.0, frozen=frozen
    )


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """A trained ladder of two steps with a reference without a network: experiment, cells, rows, summary."""
    small, large = network(1), network(2, ("block1",))
    one = Stage(
        "patch8", small, objectives.regression(small), TX, schedule.constant(0.01), 1, 8, on="labelled",
        view=compose(patches(8)), spec={"is": "patch8"},
    )  # fmt: skip
    two = dataclasses.replace(
        one, name="patch16", model=large, objective=objectives.regression(large), view=compose(patches(16)),
        freeze=("block1",), fresh=("block2", "fc1", "fc2", "head"), epochs=4, best_test=True, spec={"is": "patch16"},
    )  # fmt: skip
    arms = {"statistics": (), "patch8": (one,), "patch16": (one, two)}
    recipe = Recipe("ladder", arms, ("finetune",), baseline="patch8", seeds=(0,))
    experiment = Experiment(recipe, splits_of()[0], tmp_path_factory.mktemp("ladder"))
    cells = list(experiment.cells())
    experiment.check(cells)
    rows = [row for cell in cells for row in measure(experiment, cell)]
    summary = {
        "rows": aggregate(rows, baseline="patch8"),
        "baseline": "patch8",
        "data": {"score": "DMOS, by hand"},
    }
    return experiment, cells, rows, summary


def number(rows, arm, metric):
    return next(row["value"] for row in rows if (row["arm"], row["metric"]) == (arm, metric))


def test_a_ladder_has_three_pictures(ladder):
    experiment, cells, rows, summary = ladder
    names = pictures.draw(experiment, cells, rows, summary, maps=True)
    assert names == ["stages.png", "quality_map.png", "predicted.png"]  # patches have no attention maps
    assert all((experiment.workdir / name).stat().st_size > 10_000 for name in names)


def test_the_map_is_of_the_predictions_in_the_table(ladder, monkeypatch):
    """The mean over an image's patches is its prediction, so the map's mean stands among the rows."""
    experiment, cells, rows, summary = ladder
    shown = {}

    def keep(path, image, maps, **words):
        shown.update(maps=maps, image=image, **words)

    monkeypatch.setattr(figures_scores, "quality_map", keep)
    pictures.draw(experiment, cells, rows, summary, maps=False)
    test = experiment.splits.test
    place = test.scores.tolist().index(shown["score"])
    assert shown["score"] == 30 and shown["unit"] == "DMOS"  # of 10 to 70, nearest to 40; two are, the first is taken
    assert np.array_equal(shown["image"], test.images[place])
    assert {name: found.shape for name, found in shown["maps"].items()} == {"patch8": (2, 2), "patch16": (1, 1)}
    for arm, found in shown["maps"].items():
        told = next(row["predictions"] for row in rows if row["arm"] == arm and "predictions" in row)
        assert found.mean() == pytest.approx(told[place], rel=1e-4)


def test_the_best_test_epoch_is_the_journals(ladder):
    experiment, cells, rows, _ = ladder
    (run,) = [run for run in experiment.runs(cells[-1]) if run.stage.name == "patch16"]
    entries = [entry["mae"] for entry in Journal(run.folder(experiment.workdir) / "metrics.jsonl").of("test")]
    assert len(entries) == 4
    assert number(rows, "patch16", "best_mae") == min(entries)
    assert number(rows, "patch16", "mae") == pytest.approx(entries[-1], rel=1e-5)  # the last epoch gives the row
    marked = {(row["arm"], row["metric"]) for row in rows if row.get("chosen_on_test")}
    assert marked == {("patch16", "best_mae")}


@pytest.mark.parametrize("average", ["probability", "logits", "vote"])
def test_classes_of_patches(tmp_path, average):
    """Accuracy of images and of patches, against the outputs put together by hand."""
    model = Small(outputs=2)
    objective = objectives.supervised(model)
    stage = Stage(
        "patch8", model, objective, TX, schedule.constant(0.01), 2, 8, on="labelled", view=patches(8), average=average,
        spec={"is": average},
    )  # fmt: skip
    recipe = Recipe("classes", {"patch8": (stage,)}, ("finetune",), baseline="patch8", seeds=(0,))
    experiment = Experiment(recipe, splits_of()[1], tmp_path)
    (cell,) = experiment.cells()
    experiment.check([cell])
    rows = measure(experiment, cell)
    trained, test = experiment.trained(cell, experiment.runs(cell)), experiment.splits.test
    viewed = stage.view(test)
    outputs = predict(model, trained.params, trained.extra["model"], viewed.images, grid=viewed.grid).reshape(8, 4, 2)
    odds = np.exp(outputs) / np.exp(outputs).sum(-1, keepdims=True)
    votes = np.eye(2)[outputs.argmax(-1)]
    answers = {"probability": odds, "logits": outputs, "vote": votes}[average].mean(1)
    assert number(rows, "patch8", "accuracy") == np.mean(answers.argmax(-1) == test.labels)
    assert number(rows, "patch8", "patch_accuracy") == np.mean(outputs.argmax(-1) == test.labels[:, None])


def test_scenes_of_pretext_and_validation_images_are_told():
    splits, _ = splits_of()
    train, other, both = (splits.train.take(rows) for rows in ([0, 1], [4, 5], [2, 4]))
    (line,) = shared_scenes({None: splits._replace(train=train, test=other)}, both)
    assert "1 of 2" in shared_scenes({None: splits._replace(train=train, test=both)})[0]
    assert "2 of 2 test images show a scene that is also among the pretext images, so its results" in line
    (line,) = shared_scenes({None: splits._replace(train=train, validation=both, test=other)})
    assert "1 of 2 validation images show a scene that is also trained on, so its validation results" in line


def test_scenes_on_both_sides_are_told_once_for_each_split():
    splits, _ = splits_of()
    apart = splits._replace(train=splits.train.take([0, 1]), test=splits.train.take([4, 5]))
    across = splits._replace(train=splits.train.take([0, 1]), test=splits.train.take([2, 3, 4]))
    assert shared_scenes({None: apart}) == [] and shared_scenes({None: apart._replace(test=None)}) == []
    (line,) = shared_scenes({None: across})
    assert line == "the data's own split: 2 of 3 test images show a scene that is also trained on, " + (
        "so its results are too good"
    )
    found = shared_scenes({("by_scene", 0): apart, ("by_image", 0): across, ("by_image", 1): across})
    assert len(found) == 1 and found[0].startswith("split by_image: 2 of 3")
