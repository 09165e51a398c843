"""What does not fit is found before anything is trained: names without data, shapes and weights with them."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from filled import filled
from small import OBJECTIVE, SGD, Small, same, source_of
from test_configs import config_of

from jaxsd import build, models, objectives, processes, weights
from jaxsd.data import Splits
from jaxsd.errors import UserError
from jaxsd.fits import check_fits
from jaxsd.models import LinearProbe
from jaxsd.recipe import Experiment, Recipe
from jaxsd.stage import Run, Stage, run_stage, start
from jaxsd.train import schedule

SOURCE = source_of(8)
STANDARD = np.zeros(1, np.float32), np.ones(1, np.float32)


def stage_of(name="first", model=OBJECTIVE, **options):
    objective = OBJECTIVE if model is OBJECTIVE else objectives.rotation(model)
    model = Small(outputs=4) if model is OBJECTIVE else model
    options = {"batch_size": 4, "spec": {"network": name}, **options}
    return Stage(name, model, objective, SGD, schedule.constant(0.1), 1, **options)


def recipe_of(*stages, **options):
    return Recipe("net", {"arm": stages}, ("pretext",), "arm", seeds=(0,), **options)


# names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["stages"]["finetune"].update(fresh=("haed",)), "'finetune': fresh: 'haed' is no part .* block1"),
        (lambda c: c["stages"]["full"].update(fresh=("fc1", "fc2")), "'full': fresh: 'fc2' is no part"),
        (lambda c: c["probe"].update(fresh=("probe_block9",)), "'probe': fresh: 'probe_block9' is no part"),
    ],
)
def test_parts_to_start_anew_are_known_before_any_data_are_read(change, message):
    config = config_of("scalenet", "tiny")
    change(config)
    with pytest.raises(UserError, match=message) as error:
        build.recipe(config)
    assert "\n" not in str(error.value)


def test_parts_are_those_of_the_network_and_of_the_one_before():
    longer = Small(outputs=4, widths=(4, 6, 8))
    first, second = stage_of("first", longer), stage_of("second", fresh=("block3", "head", "block1/dense"))
    recipe_of(first, second)
    with pytest.raises(UserError, match="under: 'trnk' is no part of its network: trunk, probe_block1"):
        recipe_of(first, stage_of("probe", LinearProbe(longer, outputs=2), under="trnk"))


def test_networks_for_images_of_any_size_are_built_before_the_size_is_known():
    config = config_of("scalenet", "folder")
    config["model"] = {"name": "deit_tiny", "patch": 384}
    build.recipe(config)
    build.recipe(config, (512, 512, 3))
    with pytest.raises(UserError, match="deit_tiny for images of 224 pixels cannot have patches of 384"):
        build.recipe(config, (224, 224, 3))


# shapes


def test_what_a_stage_hands_on_is_fitted_before_the_first_is_trained(tmp_path):
    wider = stage_of("wider", Small(outputs=4, widths=(4, 8)))
    splits = Splits("noise", SOURCE, None, None)
    for last, message in ((wider, "'wider': weights do not fit: .*params/block2/.* wanted"), (stage_of("same"), "")):
        experiment = Experiment(recipe_of(stage_of("first"), stage_of("middle"), last), splits, tmp_path)
        if not message:
            assert experiment.check(list(experiment.cells())) == 3
            continue
        with pytest.raises(UserError, match=message):
            experiment.check(list(experiment.cells()))
    assert not list(tmp_path.rglob("stage.json"))


def test_the_shapes_are_those_that_training_ends_with():
    first, frozen = stage_of("first"), stage_of("frozen", Small(outputs=4, frozen=("block1",)), freeze=("block1",))
    begun = check_fits(frozen, SOURCE, check_fits(first, SOURCE))
    ended = run_stage(Run(frozen, ("frozen",), 0, "", None, STANDARD), SOURCE)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), begun) == jax.tree.map(lambda x: (x.shape, x.dtype), ended)


def test_positions_of_a_trunk_are_fitted_to_larger_images():
    """Linear probes at twice the resolution of the network that they are put on."""
    form = {"width": 8, "depth": 1, "heads": 2, "patch": 4}
    small, large = (models.VisionTransformer(outputs=4, side=side, **form) for side in (8, 16))
    params, collections = filled(small, 8, 1)
    parent = check_fits(stage_of("small", small), source_of(2, side=8))
    parent = parent._replace(params=params, extra={**parent.extra, "model": collections})
    probe = stage_of("probe", LinearProbe(large, outputs=4), under="trunk", freeze=("trunk",))
    state, lines = start(probe, jax.random.key(0), source_of(2, side=16), STANDARD, parent)
    told = {line["tensor"]: line["action"] for line in lines}
    assert [tensor for tensor, action in told.items() if action == "adapted"] == ["params/trunk/embed/positions"]
    table = models.vit.resize_positions(params["embed"]["positions"], (4, 4))
    np.testing.assert_array_equal(state.frozen["trunk"]["embed"]["positions"], table)
    same(jax.tree.map(np.asarray, state.frozen["trunk"]["block1"]), params["block1"])


# several processes


def test_what_processes_cannot_train_together_is_found_first(tmp_path, monkeypatch):
    """Of the second stage: a batch that cannot be split, for so few images too, and features in one process's file."""
    cells_of = {}
    for name, options in {
        "odd": {"batch_size": 5},
        "few": {"batch_size": 64},
        "disk": {"batch_size": 4, "trunk": "disk"},
        "fine": {"batch_size": 4, "trunk": "host"},
    }.items():
        recipe = recipe_of(stage_of("first", batch_size=4), stage_of("second", **options))
        experiment = Experiment(recipe, Splits("noise", source_of(7), None, None), tmp_path / name)
        cells_of[name] = experiment, list(experiment.cells())
        assert experiment.check(cells_of[name][1]) == 2
    refuse = processes.mesh
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "mesh", lambda size: refuse(size) if size % 2 else None)  # here are one's devices
    for name, message in (
        ("odd", "stage 'second': batches of 5 cannot be split over 2 processes"),
        ("few", "stage 'second': batches of 7 cannot be split over 2 processes"),
        ("disk", "stage 'second': trunk='disk' is for a single process: choose 'host'"),
    ):
        experiment, cells = cells_of[name]
        with pytest.raises(UserError, match=message):
            experiment.check(cells)
    experiment, cells = cells_of["fine"]
    assert experiment.check(cells) == 2


# published weights


def published(path, model, change=None, standardise="auto"):
    """A file of a network's tensors, changed as asked, as a stage takes it."""
    tensors = weights.to_timm(model, *filled(model, 32, 1))
    if change:
        change(tensors)
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    return weights.published(str(path), standardise)


def test_published_weights_are_fitted_before_the_first_stage(tmp_path):
    net = models.ResNet(outputs=4, depths=(1, 1), widths=(4, 6))
    source = source_of(8, side=8)
    splits = Splits("noise", source, None, None)
    for change, message in (
        (lambda tensors: tensors.pop("layer2.0.conv1.weight"), "'net': the weights .* do not fit .* is missing"),
        (lambda tensors: tensors.update(odd=np.ones(2, "f")), "'net': the weights .* do not fit .*odd has no place$"),
        (lambda tensors: tensors.update({"conv1.weight": np.ones((4, 3, 7, 7), "f")}), "with stem='imagenet'"),
        (None, None),
    ):
        init = published(tmp_path / "net.safetensors", net, change, "data" if change is None else "auto")
        experiment = Experiment(recipe_of(stage_of("net", net, init=init)), splits, tmp_path / "run")
        if message is None:
            assert experiment.check(list(experiment.cells())) == 1
            continue
        with pytest.raises(UserError, match=message):
            experiment.check(list(experiment.cells()))
    assert not list((tmp_path / "run").rglob("stage.json"))


def test_blocks_that_a_shorter_network_leaves_out_are_named(tmp_path):
    whole = models.ResNet(outputs=4, depths=(1, 1, 1), widths=(4, 6, 8))
    short = whole.clone(depths=(1,), widths=(4,))
    init, source = published(tmp_path / "net.safetensors", whole), source_of(2, side=8)
    hint = "layer2.0.* has no place.* fewer blocks than the file: to leave them out, name 'block2', 'block3' in `fresh`"
    with pytest.raises(UserError, match=hint):
        check_fits(stage_of("net", short, init=init), source)
    check_fits(stage_of("net", short, init=init, fresh=("block2", "block3")), source)
