"""Bursts of frames in a folder: scenes from a pattern in the file names, which stay on one side of everything."""

import json

import numpy as np
import pytest
from test_configs import config_of

from jaxsd import build, command
from jaxsd.data import describe, folder
from jaxsd.data.embedded import PHOTOS, photograph
from jaxsd.data.split import shared_groups, split
from jaxsd.errors import UserError
from jaxsd.report import load, table
from jaxsd.train.loop import Stop

PATTERN = r"(?P<group>[^_]+)_\d+"
SCENES, FRAMES, SIDE = 6, 5, 16


@pytest.fixture(scope="module")
def bursts(tmp_path_factory):
    """Two photographs as classes: six scenes of each, of five frames, each shifted by two pixels against the last."""
    root = tmp_path_factory.mktemp("bursts") / "set"
    for name in list(PHOTOS)[:2]:
        (root / name).mkdir(parents=True)
        image = photograph(name)
        for scene in range(SCENES):
            for frame in range(FRAMES):
                left, top = 40 * scene + 2 * frame, 100 + frame
                image.crop((left, top, left + SIDE, top + SIDE)).save(root / name / f"scene{scene}_{frame}.png")
    return root


def read(root, **options):
    return folder(root, **{"groups": PATTERN, "cache": None, **options})


def scenes_of(source):
    return set(source.groups)


def test_frames_of_one_scene_stand_on_one_side(bursts):
    plain = read(bursts, groups=None, test=0.3, validation=0.3)
    assert plain.train.groups == ()
    splits = read(bursts, test=0.3, validation=0.3)
    parts = splits[1:4]
    assert sum(len(scenes_of(part)) for part in parts) == len(set.union(*map(scenes_of, parts))) == 2 * SCENES
    assert sum(map(len, parts)) == 2 * SCENES * FRAMES and all(len(part) % FRAMES == 0 for part in parts)
    assert all(np.ptp(np.bincount(part.labels)) == 0 for part in parts)  # classes stay even
    assert "2 classes" not in describe(splits) and "scenes such as 'astronaut/scene" in describe(splits)
    everything = read(bursts, test=0.0).train
    by_image = split(everything, by="image", test=0.3, seed=0)
    by_group = split(everything, by="group", test=0.3, seed=0)
    leak, none = (shared_groups(everything.take(train), everything.take(test)) for train, test in (by_image, by_group))
    assert leak == len(by_image[1]) == 18 and none == 0  # by image, every test frame has its like in training
    for seed in range(3):
        train, test = (everything.take(part) for part in split(everything, folds=3, seed=seed))
        assert shared_groups(train, test) == 0 and np.bincount(test.labels).tolist() == [10, 10]


def test_the_level_of_splits_is_no_part_of_the_scene(bursts, tmp_path):
    for name in list(PHOTOS)[:2]:
        for path in (bursts / name).iterdir():
            level = "test" if path.stem in ("scene0_0", "scene5_0") else "train"
            target = tmp_path / level / name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    splits = read(tmp_path)
    assert scenes_of(splits.test) == {f"{name}/scene{n}" for name in list(PHOTOS)[:2] for n in (0, 5)}
    assert shared_groups(splits.train, splits.test) == 4
    (said,) = command.shared_scenes({None: splits})
    assert "4 of 4 test images show a scene that is also trained on" in said
    named = read(tmp_path, groups=r"(scene|film)(?P<group>\d)_").train  # `group` before the first, over all classes
    assert scenes_of(named) == set("012345")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"film(\d+)", r"finds no scene in the names of any of 60 files in .*: astronaut/scene0_0.png, .* and more"),
        (r"(astronaut)", "names of 30 of 60 files in .*: cat/scene0_0.png, "),
        (r"scene(\d)?_0|_", "finds no scene in the names of 48 of 60 files"),
        (r"(scene)", "finds one scene only in .*, 'scene': take more of the name"),
        (r"scene\d", "which part is the scene: put it in brackets"),
        (r"([^_]+_", "is no regular expression"),
    ],
)
def test_patterns_that_tell_nothing_apart(bursts, pattern, said):
    with pytest.raises(UserError, match=said) as error:
        read(bursts, groups=pattern)
    assert "\n" not in str(error.value)


def test_a_pattern_that_keeps_nothing_together_is_warned_of(bursts, caplog):
    assert len(scenes_of(read(bursts, groups=r"(.+)\.png", test=0.0).train)) == 60
    assert "makes every file in" in caplog.text and "keeps nothing together" in caplog.text


def test_folds_from_the_command_line_to_the_table(bursts, tmp_path, capsys):
    config = config_of("patches", "folder")
    assert build.recipe(config).splits == {}  # no folds are given
    assert build.splits(config_of("patches", "scores")) == {"random": {"by": "image", "test": 0.2}}
    config["data"].update(path=str(bursts), size=16, groups=PATTERN, cache=None)
    config["splits"]["crossvalidation"].update(folds=3, by="group")
    config["arms"], config["baseline"] = {"statistics": ()}, "statistics"
    config["stages"] = {}
    with pytest.raises(UserError, match="hold none out"):
        command.run(config, tmp_path, stop=Stop())
    config["data"]["test"] = 0.0
    command.run(config, tmp_path, stop=Stop())
    summary = load(tmp_path)
    text = capsys.readouterr().out
    (row,) = [row for row in summary["rows"] if row["metric"] == "accuracy"]
    assert row["seeds"] == [0, 1, 2] and row["split"] == "crossvalidation"
    assert "crossvalidation: 3-fold cross-validation by scene, seed s tests on fold s mod 3" in summary["protocol"]
    assert "folds are not independent" in text and "equally often" not in text
    held = [json.loads(path.read_text())["test"] for path in sorted((tmp_path / "subsets").glob("splits-*.json"))]
    assert sorted(sum(held, [])) == list(range(60))
    config["seeds"] = (0, 1)
    notes = command.fold_notes(build.recipe(config, (16, 16, 3), 2, scored=False))
    assert "not all of its 3 folds were tested on equally often" in notes[1] and "'(0,1,2)'" in notes[1]
    assert table(summary) == text.rstrip("\n") + "\n"
