"""Two pretext stages, a frozen trunk, Orbax, probes and the report on digits: arms that share beginnings."""

import dataclasses

import jax
import numpy as np
import pytest
from small import Small, same

from jaxsd import models, objectives, recipe
from jaxsd.aggregate import aggregate
from jaxsd.data.embedded import digits
from jaxsd.errors import UserError
from jaxsd.measure import measure, measured
from jaxsd.recipe import Experiment, Recipe
from jaxsd.stage import Stage
from jaxsd.train import optimiser, schedule
from jaxsd.views.view import scale

FROZEN = ("block1",)
OPTIMISER = optimiser.with_rate(optimiser.sgd(momentum=0.9))
PRETEXT_MODEL = Small(outputs=4)
PRETEXT = objectives.rotation(PRETEXT_MODEL)
MODEL = Small(outputs=10, frozen=FROZEN)
TASK = objectives.supervised(MODEL)
PROBES = models.LinearProbe(PRETEXT_MODEL, outputs=10)
PROBE_TASK = objectives.supervised(PROBES)
SPLITS = digits()


def stage_of(name, model, objective, *, epochs=1, rate=0.05, **options):
    rates = schedule.constant(rate)
    return Stage(name, model, objective, OPTIMISER, rates, epochs, 32, spec={"is": name}, **options)


def recipe_of(rate=0.05):
    """Two arms that begin with the same stage and end with a task on a frozen trunk, and that task alone."""
    half = stage_of("half", PRETEXT_MODEL, PRETEXT, view=scale(0.5))
    full = stage_of("full", PRETEXT_MODEL, PRETEXT)
    task = stage_of("task", MODEL, TASK, rate=rate, on="labelled", epochs=2, fresh=("head",), freeze=FROZEN)
    probe = stage_of("probe", PROBES, PROBE_TASK, on="labelled", under="trunk", freeze=("trunk",))
    return Recipe(
        name="chain",
        arms={"scratch": (task,), "half": (half, task), "scalenet": (half, full, task)},
        evaluations=("pretext", "probe", "finetune"),
        baseline="scratch",
        seeds=(0, 1),
        subsets={"unlabelled": {"total": 64}},
        labels={"few": {"per_class": 4}},
        probes={"scalenet": probe},
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("chain")


@pytest.fixture
def calls(monkeypatch):
    """The paths and seeds of the runs that are trained."""
    made, run_stage = [], recipe.run_stage

    def counting(run, *args, **options):
        made.append(("/".join(run.path), run.seed))
        return run_stage(run, *args, **options)

    monkeypatch.setattr(recipe, "run_stage", counting)
    return made


def rows_of(folder, what=None):
    experiment = Experiment(what or recipe_of(), SPLITS, folder)
    cells = list(experiment.cells())
    experiment.check(cells)
    return experiment, [row for cell in cells for row in measure(experiment, cell)]


PRETEXTS = ("original/half", "original/half/full")
TASKS = ("original/few/task", "original/half/few/task", "original/half/full/few/task")
PATHS = (*PRETEXTS, "original/half/full/few/probe", *TASKS)


def test_first_run(workdir, calls):
    """Shared beginnings are trained once; every row has its budget; the table holds every arm."""
    _, rows = rows_of(workdir)
    assert sorted(calls) == sorted((path, seed) for path in PATHS for seed in (0, 1))
    found = {(row["arm"], row["evaluation"], row["block"], row["seed"]) for row in rows}
    assert found >= {(arm, "finetune", None, seed) for arm in ("scratch", "half", "scalenet") for seed in (0, 1)}
    assert found >= {("scalenet", "probe", block, seed) for block in MODEL.blocks for seed in (0, 1)}
    assert {arm for arm, evaluation, _, _ in found if evaluation == "pretext"} == {"half", "scalenet"}
    assert all(0 <= row["value"] <= 1 and row["n"] == 360 for row in rows)
    task, half, full = 2 * 40, 64, 64
    images = {row["arm"]: row["images"] for row in rows if row["evaluation"] == "finetune"}
    assert images == {"scratch": task, "half": half + task, "scalenet": half + full + task}
    pixels = {row["arm"]: row["pixels"] for row in rows if row["evaluation"] == "finetune"}
    assert pixels["scalenet"] == 64 * 4 * 4 * 4 + 64 * 4 * 8 * 8 + task * 8 * 8
    summary = aggregate(rows, baseline="scratch")
    tuned = next(row for row in summary if row["arm"] == "scalenet" and row["evaluation"] == "finetune")
    values = [row["value"] for row in rows if (row["arm"], row["evaluation"]) == ("scalenet", "finetune")][::2]
    assert tuned["mean"] == pytest.approx(np.mean(values)) and tuned["difference"]["to"] == "scratch"


def test_again_nothing_is_trained(workdir, calls):
    experiment, rows = rows_of(workdir)
    assert calls == []
    for cell in experiment.cells():
        runs = experiment.runs(cell)
        end = experiment.trained(cell, runs)  # from disk
        if len(runs) > 1:
            begin = experiment.trained(cell, runs[:-1])
            for part in FROZEN:
                same(end.params[part], begin.params[part])
                same(end.extra["model"]["batch_stats"][part], begin.extra["model"]["batch_stats"][part])
            assert np.any(end.params["block2"]["dense"]["kernel"] != begin.params["block2"]["dense"]["kernel"])
        if cell.arm == "scalenet":
            probed = experiment.trained(cell, experiment.runs(cell, probe=True))
            same(probed.params["trunk"], begin.params)
    assert calls == []
    same(jax.tree.map(np.asarray, rows_of(workdir)[1]), jax.tree.map(np.asarray, rows))


@pytest.mark.parametrize("lost", ["half", "half/full", "half/full/few/task", "half/full/few/probe"])
def test_a_cell_with_a_run_that_is_not_done_is_not_reported(workdir, lost):
    """Its numbers are on disk, but nothing tells the seconds and images of what is not there."""
    experiment = Experiment(recipe_of(), SPLITS, workdir)
    cell = next(cell for cell in experiment.cells() if cell.arm == "scalenet")
    rows, record = measured(experiment, cell), workdir / "stages/original" / lost / "seed0/done.json"
    assert rows and rows == measure(experiment, cell)
    record.rename(workdir / "aside.json")
    assert measured(experiment, cell) == []
    (workdir / "aside.json").rename(record)
    assert measured(experiment, cell) == rows


def test_another_config_is_named_and_reuse_trains_what_differs(workdir, calls):
    changed = recipe_of(rate=0.02)
    with pytest.raises(UserError) as error:
        rows_of(workdir, changed)
    for path in TASKS:
        assert f"{path}/seed0: stage.schedule.rate: 0.05 -> 0.02" in str(error.value)
    assert "original/half/full/seed0" not in str(error.value) and "--reuse" in str(error.value)
    experiment = Experiment(changed, SPLITS, workdir)
    cells = list(experiment.cells())
    experiment.check(cells, reuse=True)
    for cell in cells:
        measure(experiment, cell)
    assert sorted(calls) == sorted((path, seed) for path in TASKS for seed in (0, 1))


def test_other_images_are_another_stage(workdir):
    """More unlabelled images change the stages on them and all that come after, not the task alone."""
    more = dataclasses.replace(recipe_of(rate=0.02), subsets={"unlabelled": {"total": 65}})
    with pytest.raises(UserError) as error:
        rows_of(workdir, more)
    assert "original/half/seed0: data:" in str(error.value) and "original/half/few/task/seed0: parent:" in str(
        error.value
    )
    assert "original/few/task/seed0" not in str(error.value)
