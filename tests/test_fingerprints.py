"""By what a workdir's stages are known again: what must make them others, and what must not."""

import shutil

import numpy as np
import pytest
from PIL import Image
from test_check import config_for, folder_of
from test_configs import CONFIGS

from jaxsd import build, stage
from jaxsd.errors import UserError
from jaxsd.main import parse
from jaxsd.recipe import Experiment
from jaxsd.workdir import write_json


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    names = [f"{n}" for n in range(6)]
    layout = {f"{split}/{kind}": names for split in ("train", "test") for kind in ("cat", "dog")}
    return folder_of(tmp_path_factory.mktemp("data") / "set", layout)


def experiment_of(config, workdir):
    """The experiment of a config for a folder of images, as the command makes it."""
    splits = build.load(config)
    recipe = build.recipe(config, splits.train.shape, len(splits.train.classes), scored=False)
    experiment = Experiment(recipe, splits, workdir)
    return experiment, list(experiment.cells())


def begun(config, workdir):
    """A workdir in which every stage has begun; returns {stage: its file}."""
    experiment, cells = experiment_of(config, workdir)
    runs = experiment.all_runs(cells)
    for run in runs:
        write_json(run.folder(workdir) / "stage.json", run.identity())
    assert experiment.check(cells) == len(runs)
    return {"/".join(run.path): run.folder(workdir) / "stage.json" for run in runs}


@pytest.fixture(scope="module")
def workdir(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun") / "run"
    begun(config_for(root), folder)
    return folder


def said(config, workdir):
    """What the check says of a workdir, empty where it fits."""
    experiment, cells = experiment_of(config, workdir)
    try:
        experiment.check(cells)
        return ""
    except UserError as error:
        return str(error)


def recolour(root):
    path = root / "train/cat/3.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def touch(root):
    for path in root.rglob("*.png"):
        Image.open(path).save(path, compress_level=1)


CHANGES = {  # what is done to the folder: what then differs
    "one pixel": (recolour, 'data: "'),
    "another class": (lambda root: (root / "train/cat/3.png").rename(root / "train/dog/9.png"), 'data: "'),
    "another name": (lambda root: (root / "train/cat/3.png").rename(root / "train/cat/33.png"), 'data: "'),
    "a class renamed": (lambda root: [(part / "cat").rename(part / "cow") for part in root.iterdir()], 'data: "'),
    "one image less": (lambda root: (root / "train/cat/3.png").unlink(), 'data: "'),
    "a test image": (lambda root: (root / "test/cat/3.png").unlink(), ""),
    "the same pixels": (touch, ""),
    "moved": (lambda root: None, ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_change_of_the_data_changes(root, workdir, tmp_path, change):
    """Each image counts with its name, which the predictions give and the order comes from; where it lies does not."""
    shutil.copytree(workdir, tmp_path / "run")
    harm, words = CHANGES[change]
    copy = tmp_path / "elsewhere"
    shutil.copytree(root, copy)
    harm(copy)
    text = said(config_for(copy), tmp_path / "run")
    assert (words in text and f"{tmp_path}/run holds stages that were made otherwise: " in text) if words else not text


def test_another_value_names_itself_and_reuse_keeps_the_rest(root, tmp_path):
    files = begun(config_for(root), tmp_path)
    config = config_for(root)
    config["stages"]["finetune"]["epochs"] += 1
    text = said(config, tmp_path)
    assert "finetune/seed0: epochs: " in text and "half/seed0:" not in text and "--reuse" in text
    experiment, cells = experiment_of(config, tmp_path)
    experiment.check(cells, reuse=True)
    kept = {name.split("/")[-1]: file.exists() for name, file in files.items()}
    assert kept["half"] and kept["full"] and not kept["finetune"]


def test_another_format_of_the_weights_is_named(root, tmp_path, monkeypatch):
    begun(config_for(root), tmp_path)
    new = stage.WEIGHTS_FORMAT + 1
    monkeypatch.setattr(stage, "WEIGHTS_FORMAT", new)
    assert f"format: {new - 1} -> {new}" in said(config_for(root), tmp_path)


def test_a_comment_in_the_config_changes_nothing(tmp_path):
    text = (CONFIGS / "scalenet.py").read_text()
    (tmp_path / "scalenet.py").write_text("# another first line\n" + text.replace("\n\n", "\n# a note\n\n", 3) + "\n")
    found = [parse(["main", f"--config={folder}/scalenet.py:tiny"]) for folder in (CONFIGS, tmp_path)]
    assert found[0] == found[1]
    begun(found[0], tmp_path / "run")
    assert said(found[1], tmp_path / "run") == ""
