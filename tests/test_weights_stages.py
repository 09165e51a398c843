"""Stages that begin with published weights, and the export of what they end with."""

from pathlib import Path

import jax
import numpy as np
import pytest
from small import Small, same
from test_configs import config_of
from test_weights import RESNET, actions, network, written, zeros

from jaxsd import build, command, weights
from jaxsd.data import Source, Splits
from jaxsd.errors import UserError
from jaxsd.models import catalogue
from jaxsd.models.forward import STANDARDISE
from jaxsd.recipe import Cell, Experiment
from jaxsd.stage import start
from jaxsd.weights import __main__ as export
from jaxsd.workdir import write_json


class Named(Small):
    """Small, with a name for everything."""

    def published(self, name):
        return name.replace("/", ".")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A config of two arms on four gray digits' worth of noise, begun with a file; and the file's tensors."""
    monkeypatch.setitem(catalogue.BACKBONES, "named", lambda **common: Named(**common))
    model = Named(outputs=7)
    params, collections = network(model, resolution=8, channels=1)
    weights.save(tmp_path / "net.safetensors", model, params, collections)
    config = config_of("scalenet", "tiny")
    config["model"] = {"name": "named"}
    for stage in (*config["stages"].values(), config["probe"]):
        stage.update(epochs=1, batch_size=8, match=(), epoch_images=None)
    config["subsets"], config["labels"] = {"unlabelled": {"total": 8}}, {"few": {"total": 8}}
    config["arms"] = {name: config["arms"][name] for name in ("scratch", "scalenet")}
    config["seeds"] = (0,)
    config["init"] = {"weights": str(tmp_path / "net.safetensors"), "standardise": "auto"}
    return config, params


def experiment_of(config, folder):
    random = np.random.default_rng(0)
    source = Source(random.integers(0, 256, (20, 8, 8, 1), np.uint8), np.arange(20) % 4)
    splits = Splits("noise", source, None, source.take(np.arange(8)))
    return Experiment(build.recipe(config, source.shape, 4), splits, folder)


def test_the_first_stage_of_every_arm_begins_with_them(tiny, tmp_path):
    """All but the head, once; every stage of the arm standardises as the published network did."""
    config, params = tiny
    experiment = experiment_of(config, tmp_path / "run")
    for cell in experiment.cells():
        runs = experiment.runs(cell) + (experiment.runs(cell, probe=True) if cell.arm == "scalenet" else [])
        for run in runs:
            np.testing.assert_allclose(run.identity()["standard"], [[0.449], [0.226]], rtol=1e-6)
            assert ("init" in run.identity()) == (run.parent is None)
        source, _ = experiment.given(cell, runs[0].stage.on)
        state, lines = start(runs[0].stage, runs[0].key(), runs[0].stage.view(source), runs[0].standard, None)
        told = actions(lines)
        assert {k for k, v in told.items() if v == "fresh"} == {"params/head/kernel", "params/head/bias"}
        assert {k for k, v in told.items() if v == "dropped"} == {"head.weight", "head.bias"}
        same(jax.tree.map(np.asarray, state.params["block2"]), params["block2"])
        np.testing.assert_allclose(state.extra["model"][STANDARDISE]["mean"], 0.449, rtol=1e-6)
        begun = experiment.untrained(cell, runs[0].stage)  # what a network's features are compared with
        same(begun.params["block2"], state.params["block2"])
    assert "named begun with" in command.protocol(config, experiment.splits)


def test_other_weights_are_another_stage(tiny, tmp_path):
    config, params = tiny
    experiment = experiment_of(config, tmp_path / "run")
    cells = list(experiment.cells(("scratch",)))
    (run,) = experiment.runs(cells[0])
    write_json(run.folder(tmp_path / "run") / "stage.json", run.identity())
    moved = tmp_path / "moved.safetensors"
    Path(config["init"]["weights"]).rename(moved)
    config["init"]["weights"] = str(moved)
    assert experiment_of(config, tmp_path / "run").check(cells) == 1  # the bytes count, not the name
    model = Named(outputs=7)
    weights.save(moved, model, jax.tree.map(lambda x: x + 1, params), network(model, resolution=8, channels=1)[1])
    for change in ({}, {"standardise": "half"}, {"weights": None, "standardise": "auto"}):
        config["init"] = {**config["init"], **change}
        with pytest.raises(UserError, match=r"original/few/finetune/seed0: init"):
            experiment_of(config, tmp_path / "run").check(cells)


def test_a_stage_can_keep_its_random_start(tiny, tmp_path):
    config, _ = tiny
    config["stages"]["finetune"]["start"] = "random"
    recipe = experiment_of(config, tmp_path / "run").recipe
    assert recipe.arms["scratch"][0].init is None and recipe.arms["scalenet"][0].init is not None
    experiment = experiment_of(config, tmp_path / "run")
    runs = {arm: experiment.runs(Cell(arm, "original", "few", 0)) for arm in recipe.arms}
    assert "init" not in runs["scratch"][0].identity() and "init" in runs["scalenet"][0].identity()
    same(runs["scratch"][0].standard, experiment.viewed(Cell("scratch", "original", "few", 0)).standard)
    config["stages"]["finetune"]["start"] = "zero"
    with pytest.raises(UserError, match="start: 'zero' is unknown: choose from weights, random|choose from random"):
        build.recipe(config)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"weights": "none.safetensors"}, "--config.init.weights: the file of weights none.safetensors is not there"),
        ({"weights": "hf:"}, "--config.init.weights: 'hf:' names no repository"),
        ({"weights": "x", "std": 3}, "init: argument: 'std' is unknown: choose from standardise"),
    ],
)
def test_wrong_weights_are_found_before_any_data_are_read(tiny, init, message):
    config, _ = tiny
    with pytest.raises(UserError, match=message):
        build.recipe({**config, "init": init})
    with pytest.raises(UserError, match="--config.init.weights: stage 'finetune': PatchNet has no published"):
        build.recipe({**config, "model": config_of("scalenet", "tiny")["model"]})


def test_weights_of_another_network_name_the_option(tiny, tmp_path):
    config, _ = tiny
    written(tmp_path / "net.safetensors", RESNET)
    experiment = experiment_of(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"net.safetensors \(--config.init.weights\) do not fit this Named: .* missing"):
        experiment.train(next(experiment.cells()))
    assert not list((tmp_path / "run").rglob("done.json"))


def test_a_finished_stage_is_exported(tiny, tmp_path, capsys):
    config, _ = tiny
    experiment = experiment_of(config, tmp_path / "run")
    cell = next(experiment.cells(("scratch",)))
    runs = experiment.runs(cell)
    trained = experiment.trained(cell, runs)
    folder, out = runs[-1].folder(tmp_path / "run"), tmp_path / "out.safetensors"
    assert export.main([str(folder), str(out)]) == 0
    assert "named, 4 outputs; of images in [0, 1] it takes (0.449) over (0.226)" in capsys.readouterr().out
    model = runs[-1].stage.model
    found = weights.load(out, model, *zeros((trained.params, trained.extra["model"])))
    same(found[0], jax.tree.map(np.asarray, trained.params))
    for arguments, message in (
        ([folder.parent, out], "holds no finished stage"),
        ([folder, tmp_path / "out.pth"], "must end in .safetensors"),
    ):
        assert export.main([str(part) for part in arguments]) == 2
        assert message in capsys.readouterr().err
