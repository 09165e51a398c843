"""The check of data: what it counts, what it warns of, and what it says would stop a run."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut
from test_configs import CONFIGS, config_of

from jaxsd import check, check_data
from jaxsd.data import Source, Splits
from jaxsd.data.split import split
from jaxsd.errors import UserError

RANDOM = np.random.default_rng(0)


def folder_of(root, layout, *, side=8):
    """Writes a random image for each name of {folder: names}; a folder without names stays empty."""
    for place, names in layout.items():
        (root / place).mkdir(parents=True)
        for name in names:
            pixels = RANDOM.integers(0, 256, (side, side, 3), np.uint8)
            Image.fromarray(pixels).save(root / place / f"{name}.png")
    return root


def config_for(root, **labels):
    """The config for a folder of images with sides of 8 pixels."""
    config = config_of("scalenet", "folder")
    config["data"].update(path=str(root), size=8, cache=None)
    config["pretext_data"]["path"] = None
    config["labels"] = {"few": labels or {"per_class": 2}}
    for stage in config["stages"].values():
        if "batch_size" in stage:
            stage["batch_size"] = 4
    config["probe"]["batch_size"] = 4
    return config


def noise(count, **fields):
    return Source(RANDOM.integers(0, 256, (count, 8, 8, 3), np.uint8), **fields)


def printed(text, label):
    """The numbers in the line of a table."""
    (line,) = [line for line in text.splitlines() if line.split()[:1] == [label]]
    return [int(word.replace(",", "")) for word in line.split()[1:]]


def test_a_clean_folder_is_fine(tmp_path, capsys):
    names = [str(n) for n in range(5)]
    root = folder_of(tmp_path / "set", {f"{s}/{c}": names for s in ("train", "test") for c in ("cat", "dog")})
    assert check_data.check_data(config_for(root), tmp_path / "out") == 0
    said, errors = capsys.readouterr()
    assert "set: 8x8 pixels, 3 channels" in said and "warning" not in said and not errors
    assert printed(said, "images") == [10, 10] and printed(said, "cat") == printed(said, "dog") == [5, 5]
    assert f"{tmp_path}/out/images.png" in said and "files: PNG 20; colour 20; shorter side 8, longer side 8" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"images.png", "views.png", "rates.png"}
    with Image.open(tmp_path / "out" / "images.png") as picture:
        assert picture.width == pytest.approx(100 * (0.2 + 8 * 1.6 + 7 * 0.15), abs=1)  # eight of each part


def test_what_is_odd_in_a_folder_is_named(tmp_path, capsys):
    layout = {"train/cat": "abcdef", "train/dog": "abcd", "train/owl": "ab", "train/emu": "", "test/cat": "xyz"}
    root = folder_of(tmp_path / "set", {**layout, "test/dog": "x", "test/yak": ""})
    (root / "train/cat/g.png").write_bytes((root / "train/cat/a.png").read_bytes())
    for name in "pq":
        (root / f"test/dog/{name}.png").write_bytes((root / "train/dog/a.png").read_bytes())
    (root / "train/dog/broken.png").write_bytes(b"no image")
    config = config_for(root, per_class=3)
    config["data"]["on_bad_image"] = "skip"
    config["stages"]["half"]["batch_size"] = 64
    assert check_data.check_data(config, tmp_path / "out") == 2
    said, errors = capsys.readouterr()
    assert printed(said, "images") == [13, 6] and printed(said, "owl") == [2, 0]
    warnings = [line.removeprefix("warning: ") for line in said.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 8
    for words in (
        "1 images cannot be read and are left out: train/dog/broken.png",
        "class folders without images are passed over: test/yak, train/emu",
        "1 train images equal an earlier one of train pixel for pixel (train/cat/g.png)",
        "1 test images equal an earlier one of test",
        "2 of 6 test images (test/dog/p.png, test/dog/q.png) are pixel-equal to train images: results will be too good",
        "test has no image of 1 classes: owl",
        "2 classes have fewer than 5 training images: dog 4, owl 2",
        "stage 'half': 13 images are fewer than a batch of 64",
    ):
        assert sum(words in warning for warning in warnings) == 1, words
    assert errors.count("error: ") == 1
    assert "labels 'few': 3 images of each class were asked, but class 'owl' has 2" in errors


def test_empty_class_folders_without_splits(tmp_path):
    root = folder_of(tmp_path / "set", {"train": "ab", "cat": "ab", "emu": "", ".git": "", "cat/young": "a"})
    assert check_data.empty_folders({"name": "folder", "path": root, "test": 0.2}) == ["emu"]
    flat = folder_of(tmp_path / "flat", {"in": "abc", "in/empty": ""})
    assert check_data.empty_folders({"name": "folder", "path": flat / "in"}) == []
    assert check_data.empty_folders({"name": "mnist5k"}) == []


def test_one_class_stops_a_run_and_no_labels_do_not(tmp_path, capsys):
    one = folder_of(tmp_path / "one", {"train/cat": "abc", "test/cat": "xy"})
    assert check_data.check_data(config_for(one), tmp_path / "out") == 2
    assert "error: the training images have one class only" in capsys.readouterr().err
    flat = folder_of(tmp_path / "flat", {"images": "abcdefgh"}) / "images"
    assert check_data.check_data(config_for(flat), tmp_path / "out") == 0
    assert "warning: there are neither labels nor scores" in capsys.readouterr().out
    with pytest.raises(UserError, match="classes that train lacks: yak"):
        check_data.check_data(
            config_for(folder_of(tmp_path / "set", {"train/cat": "ab", "train/dog": "ab", "test/yak": "a"})), tmp_path
        )


def photograph(at):
    """A part of a photograph of its own, 32 pixels."""
    row, column = divmod(at, 16)
    return astronaut()[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]


def test_copies_are_named_and_drawn(tmp_path, capsys):
    root, save = tmp_path / "set", lambda image, name, **how: Image.fromarray(image).save(root / name, **how)
    folder_of(root, {f"{split}/{name}": "" for split in ("train", "test") for name in ("cat", "dog")})
    for at in range(16):
        save(photograph(64 + at), f"train/{'cat' if at % 2 else 'dog'}/{at}.png")
        save(photograph(160 + at), f"test/{'cat' if at % 2 else 'dog'}/{at}.png")
    save(photograph(65), "train/cat/same.png")
    save(photograph(66)[:, ::-1], "train/cat/turned.png")
    save(photograph(67), "test/cat/leak.jpg", quality=80)
    config = config_for(root)
    config["data"]["size"] = 32
    assert check_data.check_data(config, tmp_path / "out") == 0
    said = capsys.readouterr().out.splitlines()
    at = said.index("copies (3; = pixel-equal, ~ nearly equal):")
    assert said[at + 1 : at + 4] == [
        "  test/cat/leak.jpg ~ train/cat/3.png",
        "  train/dog/2.png (dog) ~ train/cat/turned.png (cat) (mirrored)",
        "  train/cat/same.png = train/cat/1.png",
    ]
    assert [line for line in said if line.startswith("warning: ")] == [
        "warning: 1 train images equal an earlier one of train pixel for pixel (train/cat/same.png)",
        "warning: 1 train images are nearly equal to an earlier one of train (train/dog/2.png)",
        "warning: 1 of 17 test images (test/cat/leak.jpg) are nearly equal to train images: results may be too good",
        "warning: copies with another label than the image that they copy: 1",
    ]
    with Image.open(tmp_path / "out" / "duplicates.png") as drawn:
        pixels, cell = (
            np.asarray(drawn.convert("RGB")),
            np.asarray(Image.fromarray(photograph(67)).resize((160, 160), 0)),
        )
    found = pixels[40:200, 185:345]  # below the heading, beside the copy: what it is a copy of
    assert np.abs(found.astype(int) - cell).mean() < 3
    (root / "train/cat/same.png").unlink()
    (root / "train/cat/turned.png").unlink()
    (root / "test/cat/leak.jpg").unlink()
    assert check_data.check_data(config, tmp_path / "out") == 0
    assert not (tmp_path / "out" / "duplicates.png").exists()  # the earlier check's


def test_files_are_told_as_they_are_on_disk(tmp_path):
    root = folder_of(tmp_path, {"cat": "ab", "dog": ""}, side=8)
    picture = Image.fromarray(photograph(70)).resize((20, 10))
    for mode, name in (("L", "a.png"), ("P", "b.gif"), ("CMYK", "c.jpg"), ("RGBA", "d.png"), ("L", "e.jpg")):
        picture.convert(mode).save(root / "dog" / name)
    (root / "dog" / "f.png").write_bytes(b"no image")
    names = tuple(sorted(path.relative_to(root).as_posix() for path in root.glob("*/*")))
    source = Source(np.zeros((8, 9, 9, 3), np.uint8), names=names)
    (line,) = check_data.files({"name": "folder", "path": root}, Splits("set", source, None, None))
    assert line == (
        "files: PNG 4, JPEG 2, GIF 1; colour 2, gray 2, palette 1, CMYK 1, colour with transparency 1; "
        "shorter side 8 to 10 (median 10), longer side 8 to 20 (median 20) pixels; "
        "2 are smaller than the 9 pixels that are shown"
    )
    (root / "scores.csv").write_text("")
    below = Source(source.images, names=tuple(name.partition("/")[2] for name in names))  # named inside a folder of it
    assert check_data.files({"name": "table", "path": root / "scores.csv"}, Splits("", below.take([0]), None, None))
    assert check_data.files({"name": "mnist5k"}, Splits("", source, None, None)) == []


def labelled(*counts, test=(6, 6)):
    """Noise with so many training images of each class."""
    parts = [noise(sum(part), labels=np.repeat(np.arange(len(part)), part)) for part in (counts, test)]
    classes = tuple("abcdefgh"[: max(len(counts), len(test))])
    train, held = (Source(part.images, part.labels, classes) for part in parts)
    return Splits("noise", train, None, held)


@pytest.mark.parametrize(
    ("splits", "change", "level", "words"),
    [
        (labelled(9, 9), {}, None, ""),
        (labelled(9, 9), {"labels": {"per_class": 10}}, "error", "ask for at most 9 per class, 18 in total"),
        (labelled(9, 9), {"labels": {"total": 19}}, "error", "a subset of 19 images was asked, but there are 18"),
        (labelled(9, 9), {"subsets": {"total": 19}}, "error", "subsets 'unlabelled': a subset of 19 images was asked"),
        (labelled(9, 9), {"batch_size": 19}, "warning", "18 images are fewer than a batch of 19"),
        (labelled(9, 9), {"milestones": (5, 25)}, "warning", "the rate never drops at epoch 25: it has 20"),
        (labelled(9, 4), {}, "warning", "1 classes have fewer than 5 training images: b 4"),
        (labelled(9, 9, 0, test=(6, 6, 6)), {"labels": {"total": 9}}, "warning", "train has no image of 1 classes: c"),
        (labelled(9, 9, test=(12, 0)), {}, "warning", "test has no image of 1 classes: b"),
        (labelled(90, 90, 5, test=(6, 6, 6)), {"labels": {"total": 4}}, "warning", "no image of 1 classes is drawn: c"),
        (labelled(18, test=(6,)), {}, "error", "one class only"),
        (Splits("noise", noise(18), None, noise(9)), {}, "warning", "neither labels nor scores"),
        (labelled(9, 9)._replace(test=None), {}, "warning", "no test images: nothing will be measured"),
        (labelled(9, 9), {"splits": {"new": {"by": "image"}}}, "error", "noise has test images of its own"),
        (labelled(9, 4)._replace(test=None), {"splits": {"new": {"by": "image", "folds": 5}}}, "error", "fewer folds"),
    ],
)  # fmt: skip
def test_what_is_said_how_loud(splits, change, level, words):
    config = config_for("/a/folder", **change.get("labels", {"per_class": 4}))
    config["data"] = {"name": "mnist5k"}
    config["subsets"] = {"unlabelled": change.get("subsets", {})}
    config["splits"] = change.get("splits", {})
    config["stages"]["half"]["batch_size"] = change.get("batch_size", 4)
    if "milestones" in change:
        config["stages"]["half"]["schedule"] = {
            "name": "steps",
            "rate": 0.1,
            "factor": 0.5,
            "milestones": change["milestones"],
        }
    found = check_data.inspect(config, splits)
    said = [("warning", text) for text in found.warnings] + [("error", text) for text in found.errors]
    if level is None:
        assert said == []
    else:
        assert [heard for heard, text in said if words in text] == [level], said
        assert len(said) == 1, said


def scored(scenes=10, each=4):
    """Images of some scenes, each once for every kind, with scores 0, 1, 2, ..."""
    groups = tuple(f"scene {n}" for n in range(scenes) for _ in range(each))
    kinds = tuple("blur" if n % 2 else "noise" for n in range(len(groups)))
    source = noise(len(groups), scores=np.arange(float(len(groups))), groups=groups, kinds=kinds)
    return Splits("made", source, None, None, (), "DMOS")


BOTH = {"by_group": {"by": "group", "test": 0.2}, "by_image": {"by": "image", "test": 0.2}}


def scored_config(splits):
    config = config_of("patches", "tiny")
    config["splits"] = splits
    config["stages"] = {name: {**stage, "view": ()} for name, stage in config["stages"].items()}
    return config


def test_scores_scenes_and_leaks():
    found = check_data.inspect(scored_config(BOTH), scored())
    assert found.errors == []
    text = "\n".join(found.lines)
    assert "40 scores (DMOS): mean 19.5, 0 to 39 (median 19.5)" in text
    bars = [line for line in found.lines if "█" in line]
    assert len(bars) == 10 and all(line.count("█") == 40 and line.endswith(" 4") for line in bars)
    assert "10 scenes, images of each: 4" in text and "kinds: blur 20, noise 20" in text
    assert [line.split()[1:] for line in found.lines if line.startswith(("images ", "scenes "))] == [
        ["32", "8"],
        ["8", "2"],
        ["32", "8"],
        ["10", str(len({scored().train.groups[i] for i in split(scored().train, by="image", seed=0)[1]}))],
    ]
    leaks = [warning for warning in found.warnings if "scene" in warning]
    assert leaks == [
        "split by_image: by image: 8 of 8 test images show a scene that is also trained on: "
        "results will be too good; split by group"
    ]


def test_the_histogram_has_bars_in_proportion():
    scores = np.array([0.0] * 80 + [10] * 20 + [5])
    lines = check_data._scores(noise(101, scores=scores), "")
    assert [line.count("█") for line in lines[1:]] == [40, 0, 0, 0, 0, 1, 0, 0, 0, 10]  # one image is still seen


def test_splits_that_cannot_be_drawn_are_errors(tmp_path):
    config = scored_config({"by_group": {"by": "group", "test": 0.2}})
    found = check_data.inspect(config, scored(scenes=1))
    assert list(check_data._draw(config, scored(scenes=1), None, found, tmp_path)) == ["images.png"]
    assert found.errors and "split 'by_group': a split by group needs images of two scenes" in found.errors[0]
    equal = noise(12, scores=np.ones(12), groups=tuple("abcdef") * 2)
    own = Splits("made", equal, None, noise(2, scores=np.ones(2), groups=("a", "z")), (), "DMOS")
    told = check_data.inspect(scored_config({}), own)
    (error,), warnings = told.errors, told.warnings
    assert "all scores of the training images are 1" in error
    assert any(w.startswith("1 of 2 test images show a scene") for w in warnings)
    assert any("test images of its own" in e for e in check_data.inspect(scored_config(BOTH), own).errors)


def test_the_command(tmp_path, capsys):
    flags = ["--config=configs/scalenet.py:tiny", "--config.labels.few.per_class=1000", f"--out={tmp_path / 'out'}"]
    command = [sys.executable, "-m", "jaxsd.check", "data", *flags]
    done = subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True)
    assert done.returncode == 2
    assert printed(done.stdout, "images") == [1437, 360]
    assert done.stderr == (
        "error: labels 'few': 1000 images of each class were asked, but class '0' has 142: "
        "ask for at most 139 per class, 1390 in total; see --config.labels.few\n"
    )
    assert (tmp_path / "out" / "images.png").stat().st_size > 1000
    assert check.main(["data", "--config=configs/nothing.py"]) == 2
    assert "there is no file configs/nothing.py" in capsys.readouterr().err
