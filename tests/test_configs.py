"""Every preset builds as written; its stages hand their weights on and their steps are traced; tiny ones are run."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from small import Small

from jaxsd import build
from jaxsd.data import Source, Splits
from jaxsd.errors import UserError
from jaxsd.main import plain
from jaxsd.models import catalogue
from jaxsd.recipe import Cell, Experiment
from jaxsd.train import loop
from jaxsd.train.checkpoint import Checkpoints

CONFIGS = Path(__file__).parents[1] / "configs"
PRESETS = {
    "scalenet": (None, "tiny", "folder", "tfds", "photos", "cifar10", "cifar10_limited", "imagenet_subset"),
    "rotnet": (None, "tiny", "folder", "tfds", "cifar10"),
    "patches": (None, "tiny", "live", "live_itw", "koniq", "indoor67", "folder", "tfds", "scores")
    + ("rotation_then_patches",),
}
MADE = {}
EACH = [(name, preset) for name, presets in PRESETS.items() for preset in presets]
HEAVY = (("scalenet", "imagenet_subset"),)  # 57 million parameters


def config_of(name, preset):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = plain(module.get_config(preset))
    if "path" in config["data"]:
        config["data"]["path"] = "/a/folder"
    if preset == "tfds":
        config["data"]["dataset"] = "cifar10"
    return config


def shrunk(config):
    """One step per stage, of eight images, and the smallest network in place of most."""
    if config["model"]["name"].startswith("resnet"):
        config["model"] = {"name": "small"}
    for stage in (*config["stages"].values(), *([config["probe"]] if config["probe"] else [])):
        stage.update(epochs=1, batch_size=8, match=(), epoch_images=None)
    if config["preset"] is None:  # the same sizes as the other presets, so that nothing is compiled for this alone
        config["inputs"] = {"original": ()}
        for name in set(config["stages"]) & {"rotation", "conv", "supervised"}:
            config["stages"][name]["view"] = ()
    if config["name"] == "patches":
        first = min(view["size"] for stage in config["stages"].values() for view in stage.get("view", ()))
        for stage in config["stages"].values():
            stage.update(
                {"view": tuple({**v, "size": 8 * v["size"] // first} for v in stage["view"])} if "view" in stage else {}
            )
    config["subsets"] = {name: {"total": 8} for name in config["subsets"]}
    config["labels"] = {name: {"total": 8} for name in config["labels"]}
    return config


@pytest.fixture
def shared(monkeypatch):
    """Equal parts of all presets become the same objects, so that they are compiled once."""
    start = build._Builder.__init__

    def init(self, *arguments):
        start(self, *arguments)
        self._made = MADE

    monkeypatch.setattr(build._Builder, "__init__", init)

    def ladder(*, grow=None, widths=(), patch=0, first=(), hidden=(), dropout=0.0, adaptive_pool=False, **common):
        return Small(widths=(4,) * (grow or 1 + len(widths)), **common)

    monkeypatch.setitem(catalogue.BACKBONES, "small", lambda **common: Small(**common))
    monkeypatch.setitem(catalogue.BACKBONES, "patchnet", ladder)
    monkeypatch.setitem(catalogue.BACKBONES, "nin", lambda *, blocks=4, **common: Small(widths=(4,) * blocks, **common))


@pytest.mark.parametrize(("name", "preset"), EACH)
def test_a_preset_builds_as_written(name, preset):
    config = config_of(name, preset)
    recipe = build.recipe(config)
    assert list(recipe.arms) == list(config["arms"])
    assert recipe.baseline in recipe.arms and recipe.seeds == tuple(config["seeds"])
    assert set(config["stages"]) == {stage.name for arm in recipe.arms.values() for stage in arm}, "a stage nobody uses"


@pytest.mark.parametrize("taken", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "preset"), [pytest.param(*one, marks=pytest.mark.slow if one in HEAVY else ()) for one in EACH]
)
def test_every_stage_of_a_preset_takes_a_step(name, preset, taken, shared, monkeypatch, tmp_path):
    """By default steps are traced: there shapes and arguments can be wrong; to compile them takes far longer."""
    if preset != "tiny" and not taken:  # nor is anything saved: the next stage takes the weights from memory
        monkeypatch.setattr(loop._Loop, "epoch", lambda self, epoch, state, sums, *rest: (state, sums))
        monkeypatch.setattr(Checkpoints, "save", lambda *arguments, **options: None)
        monkeypatch.setattr("jaxsd.recipe.KEPT", 100)
    config = shrunk(config_of(name, preset))
    side = 127 if preset == "imagenet_subset" else 8  # 63 pixels at alpha 0.5 are the least that AlexNet can take
    if preset == "imagenet_subset":  # 57 million parameters: the path from scale to scale, which is its own
        config["arms"] = {"scalenet_65": config["arms"]["scalenet_65"]}
        config["baseline"], config["probe"] = "scalenet_65", None
    if name == "patches":
        side = 8 << len(config["model"]["widths"])
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (20, side, side, 3), np.uint8), np.arange(20) % 10
    scored = any(stage.get("objective", {}).get("name") == "regression" for stage in config["stages"].values())
    source = Source(images, None if scored else labels, scores=labels * 10.0 if scored else None)
    source = dataclasses.replace(source, groups=tuple("abcdefghij"[label] for label in labels) if scored else ())
    splits = Splits("noise", source, None, None if build.splits(config) else source.take(np.arange(10)))
    recipe = build.recipe(config, splits.train.shape, 0 if scored else 10, scored=scored)
    experiment = Experiment(recipe, splits, tmp_path)
    for arm in recipe.arms:
        cell = Cell(arm, list(recipe.inputs)[-1], list(recipe.labels)[0], 0, next(iter(recipe.splits), None))
        experiment.train(cell)
        if not recipe.arms[arm]:
            continue
        trained = experiment.trained(cell, experiment.runs(cell))
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(trained.params))
    done = {path.parent.parent.name for path in tmp_path.rglob("done.json")}
    assert done >= {stage for arm in config["arms"].values() for stage in arm}


def test_images_must_have_what_a_stage_asks_for():
    with pytest.raises(UserError, match="learns scores, but the images have none"):
        build.recipe(config_of("patches", "scores"), (256, 256, 3), 10, scored=False)
    with pytest.raises(UserError, match="learns classes, but the images have none"):
        build.recipe(config_of("patches", "folder"), (64, 64, 3), 0, scored=True)
    with pytest.raises(UserError, match="nothing is labelled or scored"):
        build.recipe(config_of("patches", "folder"), (64, 64, 3), 0, scored=False)


def test_without_labels_the_pretext_part_is_left():
    recipe = build.recipe(config_of("scalenet", "folder"), (32, 32, 3), classes=0)
    assert {name: [stage.name for stage in arm] for name, arm in recipe.arms.items()} == {
        "rotnet": ["rotnet"],
        "scalenet": ["half", "full"],
    }
    assert recipe.baseline == "rotnet" and not recipe.probes


def test_the_papers_numbers_stand_in_the_presets():
    config = config_of("scalenet", "cifar10")
    stage = config["stages"]["a50_r10"]
    assert (stage["epochs"], stage["batch_size"], stage["optimiser"]["weight_decay"]) == (100, 128, 5e-4)
    rates = build.recipe(config).arms["a50_100_r10_5"][1].schedule.rates(100, 1)
    assert np.allclose(rates[[0, 29, 30, 59, 60, 79, 80, 99]], [0.05, 0.05, 0.01, 0.01, 0.002, 0.002, 0.0004, 0.0004])
    rates = build.recipe(config).arms["rotnet"][-1].schedule.rates(240, 1)
    assert np.allclose(rates[[0, 79, 80, 159, 160, 199, 200]], [1e-3, 1e-3, 2e-4, 2e-4, 4e-5, 4e-5, 8e-6])
    table = config_of("scalenet", "imagenet_subset")
    assert (table["stages"]["rotnet"]["batch_size"], table["stages"]["rotnet"]["epochs"]) == (192, 30)
    assert list(config_of("scalenet", "cifar10_limited")["inputs"]) == [
        "original",
        "harris",
        "hybrid",
        "gray",
        "gray_harris",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(name="resnet9"), "unknown model 'resnet9'"),
        (lambda c: c["model"].update(depth=3), "no option 'depth'"),
        (lambda c: c["stages"]["half"].update(epoch=3), "key: 'epoch' is unknown: choose from epochs"),
        (lambda c: c["stages"]["half"]["schedule"].update(factr=3), "argument: 'factr' is unknown: choose from factor"),
        (lambda c: c["stages"]["half"]["optimiser"].update(name="sdg"), "'sdg' is unknown: choose from sgd"),
        (lambda c: c["stages"]["half"].update(epochs=0), "epochs must be a whole number of 1 or more"),
        (lambda c: c["stages"]["half"].update(on="labeled"), "choose from labelled"),
        (lambda c: c["arms"].update(new=("half", "fine")), "'fine' is unknown: choose from finetune"),
        (lambda c: c["arms"].update(new=("finetune", "half")), "its pretext stages must come before"),
        (lambda c: c.update(baseline="scrach"), "choose from scratch"),
        (lambda c: c.update(evaluations=("fintune",)), "choose from finetune"),
        (lambda c: c.update(seeds=("a",)), "seeds must be whole numbers"),
        (lambda c: c["data"].update(name="mnist"), "choose from mnist5k"),
        (lambda c: c.update(stages=3), "does not fit"),
        (lambda c: c["stages"]["finetune"].update(trunk="gpu"), "choose from auto"),
        (lambda c: c["stages"]["finetune"].update(average="mean"), "'mean' is unknown: choose from"),
        (lambda c: c["stages"]["half"].update(best_test=True), "best_test is for stages on 'labelled'"),
        (lambda c: c["inputs"].update(cut=({"name": "patches", "size": 4},)), "patches are a stage's view"),
    ],
)
def test_a_wrong_config_is_named_in_one_line(change, message):
    config = config_of("scalenet", "tiny")
    change(config)
    with pytest.raises(UserError) as error:
        build.recipe(config)
    assert message in str(error.value) and "\n" not in str(error.value)
