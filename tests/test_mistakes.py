"""What a command line can have wrong is told in one line, with exit status 2, before any data are read."""

import shlex
from pathlib import Path

import pytest
from test_configs import EACH

from jaxsd import build, command, main

ROOT = Path(__file__).parents[1]
SCALE, ROTNET, PATCHES = "scalenet", "rotnet", "patches"
KONIQ = "patches:koniq"
# (config, overrides, what is said)
MISTAKES = [
    (SCALE, ["sed=3"], "--config has no key 'sed'. Did you mean \"seeds\"? Its keys are"),
    (SCALE, ["stages.fintune.epochs=3"], "has no key 'fintune'. Did you mean \"finetune\"?"),
    (SCALE, ["stages.finetune.optimiser.lr=1"], "optimiser 'sgd': argument: 'lr' is unknown: choose from"),
    (SCALE, ["seeds.first=1"], "--config.seeds has no entry 'first': its 3 entries are --config.seeds[0]"),
    (SCALE, ["stages.half.view.alpha=0.5"], "has no entry 'alpha': its 1 entries are --config.stages.half.view[0]"),
    (SCALE, ["stages.half.view[1].alpha=0.5"], "has no entry '1'"),
    (SCALE, ["save_seconds.x=1"], "--config.save_seconds has no keys, so no 'x'"),
    (SCALE, ["preset=tiny"], "--config.preset cannot be set by a flag"),
    (SCALE, ["seeds=()"], "seeds must be whole numbers"),
    (SCALE, ["seeds="], "seeds must be whole numbers"),
    (SCALE, ["seeds=(0,0)"], "seeds must be named once each: got (0, 0)"),
    (SCALE, ["seeds=(0,-1)"], "seeds must be whole numbers"),
    (SCALE, ["seeds=(0,1.5)"], "seeds must be whole numbers"),
    (SCALE, ["seeds=(True,)"], "seeds must be whole numbers"),
    (SCALE, ["seeds=(4294967296,)"], "seeds must be whole numbers"),
    (SCALE, ["stages.finetune.epochs=0"], "stage 'finetune': epochs must be a whole number of 1 or more, got 0"),
    (SCALE, ["stages.finetune.epochs=-3"], "epochs must be a whole number of 1 or more, got -3"),
    (SCALE, ["stages.finetune.epochs=1.5"], "--config.stages.finetune.epochs=1.5: invalid literal for int()"),
    (SCALE, ["stages.finetune.batch_size=0"], "stage 'finetune': batch_size must be a whole number of 1 or more"),
    (SCALE, ["probe.epochs=0"], "stage 'probe': epochs must be a whole number of 1 or more"),
    (SCALE, ["stages.finetune.schedule.rate=-1"], "rate -1.0 must be finite and not negative"),
    (SCALE, ["stages.finetune.schedule.rate=nan"], "rate nan must be finite"),
    (SCALE, ["stages.finetune.schedule.name=step"], "schedule: 'step' is unknown: choose from steps"),
    (SCALE, ["stages.finetune.schedule.shares=(0.6,0.3)"], "milestones (9.0, 4.5) must be"),
    (SCALE, ["stages.finetune.schedule.shares=(0.3,1.6)"], "stage 'finetune': schedule shares (0.3, 1.6) must be"),
    (SCALE, ["stages.finetune.optimiser.name=sdg"], "optimiser: 'sdg' is unknown: choose from sgd"),
    (SCALE, ["stages.finetune.optimiser.momentum=2"], "momentum 2.0 must be at least 0 and below 1"),
    (SCALE, ["stages.finetune.objective.name=superwised"], "'superwised' is unknown: choose from supervised"),
    (
        SCALE,
        ["stages.finetune.fresh=('haed',)"],
        "'haed' is no part of its network or of one before it: choose from stem",
    ),
    (SCALE, ["stages.finetune.on=unlabeled"], "on: 'unlabeled' is unknown: choose from unlabelled"),
    (SCALE, ["stages.half.view[0].alpha=0"], "scale needs alpha in (0, 1]"),
    (SCALE, ["stages.half.view=('scale',)"], "view: 'scale' is no dict(name=..., ...)"),
    (SCALE, ["model.name=resnet9"], "unknown model 'resnet9': choose from resnet8"),
    (SCALE, ["data.name=mnist"], "data: 'mnist' is unknown: choose from mnist5k"),
    (SCALE, ["labels.few.per_class=-1"], "labels 'few': per_class must be at least 1: got -1"),
    (SCALE, ["labels.few.total=5"], "labels 'few': give only one of total, fraction and per_class"),
    (SCALE, ["labels.few.per_class=0", "labels.few.fraction=2"], "labels 'few': the fraction of a subset"),
    (SCALE, ["subsets.unlabelled.total=-4"], "subsets 'unlabelled': total must not be negative: got -4"),
    (SCALE, ["arms.scalenet=('half','ful','finetune')"], "arm 'scalenet': stage: 'ful' is unknown: choose from full"),
    (SCALE, ["arms.scalenet=('finetune',)"], "stage 'finetune_long': match: 'half' is in no arm"),
    (SCALE, ["arms.rotnet=('finetune','rotnet')"], "arm 'rotnet': its pretext stages must come before"),
    (SCALE, ["arms.rotnet=('rotnet','rotnet')"], "arm 'rotnet': a stage stands twice"),
    (SCALE, ["baseline=scrach"], "baseline: arm: 'scrach' is unknown: choose from scratch"),
    (SCALE, ["evaluations=('fintune',)"], "evaluations: 'fintune' is unknown: choose from finetune"),
    (SCALE, ["evaluations=()"], "evaluations must be one or more of pretext"),
    (SCALE, ["evaluations=('knn','knn')"], "evaluations must be named once each: got ('knn', 'knn')"),
    (SCALE, ["attention=maybe"], "--config.attention=maybe"),
    (SCALE, ["save_seconds=-1"], "save_seconds must be a number of seconds from 0"),
    (SCALE, ["init.weights=nothing"], "--config.init.weights: the file of weights nothing is not there"),
    (SCALE, ["init.standardise=imagenet"], "init.standardise says how published weights saw images"),
    ("scalenet:tny", [], "configs/scalenet.py has no preset 'tny': choose from tiny"),
    ("scalenet:folder", [], "data 'folder' needs path: --config.data.path=..."),
    ("scalenet:folder", ["data.path=/nowhere"], "the image folder /nowhere does not exist"),
    ("scalenet:folder", ["data.path=FOLDER", "data.size=0"], "size must be a number of pixels"),
    ("scalenet:folder", ["data.path=FOLDER", "data.canvas=fit"], "canvas 'fit' is not known: use one of crop"),
    ("scalenet:folder", ["data.path=FOLDER", "data.channels=2"], "channels must be 1 (gray) or 3"),
    ("scalenet:folder", ["data.path=FOLDER", "data.test=2.0"], "test must be a share of the images in [0, 1): got 2.0"),
    ("scalenet:folder", ["data.path=FOLDER", "data.validation=-1"], "validation must be a share of the images"),
    ("scalenet:folder", ["data.path=FOLDER", "data.on_bad_image=ignore"], "on_bad_image must be 'error' or 'skip'"),
    (PATCHES, ["stages.patch8.freeze=('block9',)"], "frozen parts ['block9'] are not in PatchNet"),
    (PATCHES, ["stages.patch8.trunk=sometimes"], "trunk: 'sometimes' is unknown: choose from"),
    (PATCHES, ["stages.patch8.average=mean"], "average: 'mean' is unknown: choose from"),
    (PATCHES, ["stages.patch8.model.grow=9"], "patchnet has 3 blocks, so it cannot use the first 9"),
    (PATCHES, ["stages.patch8.view[0].size=0"], "patches need a size"),
    (PATCHES, ["splits.by_scene.test=1.5"], "splits 'by_scene': the share of test images must be above 0 and below 1"),
    (KONIQ, ["data.path=X", "splits.random.test=0", "splits.random.folds=1"], "splits 'random': k-fold splits need a"),
    (KONIQ, ["data.path=X", "splits.random.folds=5"], "splits 'random': a split has a share of test images or folds"),
    (PATCHES, ["splits.by_scene.by=sceen"], "splits 'by_scene': a split is by 'group' or by 'image': got 'sceen'"),
    (PATCHES, ["model.patch=7"], "patchnet begins with patches of"),
    (PATCHES, ["stages.patch8.objective.loss=l3"], "unknown loss 'l3'"),
    (PATCHES, ["stages.patch8.objective.scale=0"], "regression needs scale and delta above 0"),
    (ROTNET, ["model.blocks=2"], "nin has 3, 4 or 5 blocks, not 2"),
    (ROTNET, ["labels.per_class_20.per_class=0", "labels.per_class_20.frist=True"], 'Did you mean "first"?'),
    (ROTNET, ["stages.conv.augment=('pad_crop',)"], "augment: 'pad_crop' is no dict(name=..., ...)"),
]
FLAGS = [
    ([], "--config is missing"),
    (["--config"], "there is no file"),
    (["--config", "configs/nothing.py"], "there is no file configs/nothing.py"),
    (["--config=configs"], "there is no file configs"),
    (["--config=README.md"], "README.md cannot be loaded (SyntaxError"),
    (["--config=configs/rotnet.py:tiny", "--only=rotnt"], "--only: 'rotnt' is no arm: choose from supervised"),
    (["--config=configs/rotnet.py:tiny", "--reuse=maybe"], "--reuse=maybe"),
    (["--config=configs/rotnet.py:tiny", "--workdr=x"], "Unknown command line flag 'workdr'. Did you mean: workdir"),
    (["--config=configs/rotnet.py:tiny", "word"], "'word' is no flag"),
]


class DataRead(Exception):
    """Everything that can be told before was found in order."""


@pytest.fixture
def called(monkeypatch, capsys, tmp_path):
    """Runs the command line in this process up to the reading of image files: (status, stdout, stderr)."""

    def read(*arguments, **options):
        raise DataRead

    load = build.load
    monkeypatch.setattr(build, "load", lambda config: (load if config["data"]["name"] == "folder" else read)(config))
    monkeypatch.setattr("jaxsd.data.cache.decode_cached", read)
    for name in ("tune_allocator", "cache_compilation"):
        monkeypatch.setattr(command.tuning, name, lambda: None)
    monkeypatch.setattr(command, "start_log", lambda path: None)
    monkeypatch.setattr(command, "stop_on_signals", lambda signals: None)
    monkeypatch.chdir(ROOT)

    def call(*flags):
        status = main.main(["main", f"--workdir={tmp_path / 'run'}", *flags])
        return status, *capsys.readouterr()

    return call


def refused(result, said):
    status, out, err = result
    assert (status, out) == (2, ""), (status, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err, err


@pytest.mark.parametrize(("config", "overrides", "said"), MISTAKES)
def test_a_mistake_in_a_config(config, overrides, said, called, tmp_path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "1.png").write_bytes(b"never read")
    name, _, preset = config.partition(":")
    flags = [f"--config.{one.replace('FOLDER', str(tmp_path / 'set'))}" for one in overrides]
    result = called(f"--config=configs/{name}.py" + (f":{preset}" if preset else ""), *flags)
    refused(result, said)
    assert "Error:" not in result[-1], "the text of an exception"


@pytest.mark.parametrize(("flags", "said"), FLAGS)
def test_a_mistake_in_the_flags(flags, said, called):
    refused(called(*flags), said)


def test_without_a_mistake_data_are_read_next(called):
    status, _, err = called("--config=configs/rotnet.py:tiny")
    assert status == 1 and "DataRead" in err


def test_one_number_is_one_seed(called):
    assert main.parse(["main", f"--config={ROOT}/configs/rotnet.py", "--config.seeds=3"])["seeds"] == (3,)
    assert "--config.seeds=3 is one, the seed 3" in main.usage()


def test_another_name_drops_what_only_the_former_took():
    flags = ["--config.stages.finetune.optimiser.name=adamw", "--config.stages.finetune.optimiser.beta1=0.8"]
    config = main.parse(["main", f"--config={ROOT}/configs/scalenet.py", *flags])
    assert config["stages"]["finetune"]["optimiser"] == {"name": "adamw", "weight_decay": 5e-4, "beta1": 0.8}
    assert config["stages"]["half"]["optimiser"]["name"] == "sgd"
    config = main.parse(["main", f"--config={ROOT}/configs/scalenet.py:cifar10", "--config.model.name=pvt_v2_b0"])
    assert config["model"] == {"name": "pvt_v2_b0"}


def test_another_name_leaves_what_is_around_it(tmp_path):
    """Clipping and warming up belong to no optimiser and no schedule."""
    own = tmp_path / "own.py"
    own.write_text(
        "def get_config(preset=None):\n    config = plain_config(preset)\n    stage = config.stages.finetune\n"
        "    stage.optimiser.update(clip_norm=1.0, accumulate=2)\n    stage.schedule.warmup = dict(epochs=1)\n"
        "    return config\n"
    )
    plain = (ROOT / "configs/scalenet.py").read_text().replace("def get_config(", "def plain_config(")
    own.write_text(plain + own.read_text())
    flags = [f"--config.stages.finetune.{key}" for key in ("optimiser.name=adamw", "schedule.name=cosine")]
    stage = main.parse(["main", f"--config={own}", *flags])["stages"]["finetune"]
    assert stage["optimiser"] == {"name": "adamw", "weight_decay": 5e-4, "clip_norm": 1.0, "accumulate": 2}
    assert stage["schedule"]["warmup"] == {"epochs": 1} and "factor" not in stage["schedule"]


@pytest.mark.parametrize(("name", "preset"), EACH)
def test_what_is_printed_can_be_given(name, preset, called):
    flag = f"--config={ROOT}/configs/{name}.py" + (f":{preset}" if preset else "")
    status, out, err = called(flag, "--config.seeds=(7,)", "--print")
    assert status == 0 and not err and "--config.seeds='(7,)'" in out.splitlines()
    given = [shlex.split(line)[0] for line in out.splitlines() if not line.startswith("#")]
    assert len(given) > 20
    assert main.parse(["main", flag, *given]) == main.parse(["main", flag, "--config.seeds=(7,)"])
