import os
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from jaxsd.data import cache, describe, folder
from jaxsd.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def fill(root, *names, side=4):
    """Writes one image per name; every image is another one."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)).save(path)
    return root


def many(split, classes, count):
    return [f"{split}{name}/{number:02}.png" for name in classes for number in range(count)]


def names_of(source):
    return None if source is None else list(source.names)


def test_a_level_of_splits_is_taken_as_it_is(tmp_path):
    names = [*many("train/", "abc", 4), *many("val/", "abc", 2), *many("test/", "ac", 3)]
    splits = folder(fill(tmp_path / "set", *names))
    assert splits.name == "set" and splits.skipped == ()
    assert names_of(splits.train) + names_of(splits.validation) + names_of(splits.test) == names
    assert splits.train.classes == splits.test.classes == ("a", "b", "c")
    assert splits.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert splits.test.labels.tolist() == [0] * 3 + [2] * 3  # labels count as in train, though b is lacking
    for source in (splits.train, splits.validation, splits.test):
        for name, image in zip(source.names, source.images, strict=True):
            assert np.array_equal(image, Image.open(tmp_path / "set" / name))
    assert "train: 12 images, a 4, b 4, c 4" in describe(splits)


@pytest.mark.parametrize("level", [("train", "valid", "testing"), ("Training", "VALIDATION", "Test")])
def test_splits_have_other_names_too(tmp_path, level):
    splits = folder(fill(tmp_path, *(f"{split}/a/{i}.png" for i, split in enumerate(level))))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (1, 1, 1)


def test_shares_are_held_out_of_class_folders(tmp_path):
    fill(tmp_path, *many("", "ab", 10))
    splits = folder(tmp_path, test=0.3, validation=0.2)
    assert np.bincount(splits.test.labels).tolist() == [3, 3]
    assert splits.validation.labels.size == 3 and splits.train.labels.size == 11
    together = names_of(splits.train) + names_of(splits.validation) + names_of(splits.test)
    assert sorted(together) == sorted(many("", "ab", 10))
    assert names_of(folder(tmp_path, test=0.3, validation=0.2).test) == names_of(splits.test)
    assert len(folder(tmp_path).test) == 4 and folder(tmp_path, test=0.0).test is None
    fill(tmp_path / "two", *many("train/", "ab", 10), *many("val/", "ab", 2))
    splits = folder(tmp_path / "two", validation=0.5)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 4, 4)  # the folder goes first


def test_another_folder_can_be_the_test_split(tmp_path):
    fill(tmp_path, *many("train/", "ab", 3), *many("val/", "ab", 1), *many("test/", "a", 1), *many("hard/", "b", 2))
    assert names_of(folder(tmp_path).test) == ["test/a/00.png"]
    assert names_of(folder(tmp_path, test="hard").test) == ["hard/b/00.png", "hard/b/01.png"]
    splits = folder(tmp_path, test="val")
    assert len(splits.test) == 2 and splits.validation is None
    with pytest.raises(UserError, match="test='easy' names no folder .* hard, test, train, val"):
        folder(tmp_path, test="easy")


def test_train_may_be_a_class(tmp_path):
    splits = folder(fill(tmp_path, *many("", ("bus", "car", "train"), 2)), test=0.0)
    assert splits.train.classes == ("bus", "car", "train") and len(splits.train) == 6


def test_a_flat_folder_is_unlabelled(tmp_path):
    splits = folder(fill(tmp_path, "b.png", "a.png", "c.png", "d.png"), test=0.0)
    assert splits.train.labels is None and splits.test is None and splits.train.classes == ()
    held = folder(tmp_path)  # a fifth, for the pretext task's accuracy
    assert (len(held.train), len(held.test)) == (3, 1) and held.test.labels is None
    assert names_of(splits.train) == ["a.png", "b.png", "c.png", "d.png"]
    assert len(folder(tmp_path, validation=0.25).validation) == 1
    fill(tmp_path / "level", "train/a.png", "train/b.png", "val/c.png")
    assert names_of(folder(tmp_path / "level").validation) == ["val/c.png"]


def test_what_is_no_image_is_passed_over_and_classes_are_searched_to_any_depth(tmp_path):
    names = ["a/x/y/1.png", "a/x/2.PNG", "a/3.jpeg", "b/4.webp", "b/5.bmp", "b/6.tiff", "b/7.gif"]
    fill(tmp_path, *names, ".hidden/1.png", "a/.thumb.png", "__MACOSX/a/1.png", "a/._3.jpg.png")
    for text in ("labels.csv", "a/readme.txt", "a/x/notes.md", "b/index.json"):
        (tmp_path / text).write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a/x/loop").symlink_to(tmp_path / "a")
    splits = folder(tmp_path, test=0.0)
    assert sorted(splits.train.names) == sorted(names) and splits.train.classes == ("a", "b")


def test_names_are_the_same_in_every_unicode_form(tmp_path):
    name = "für/größe 🐈.png"
    one, other = (fill(tmp_path / form, unicodedata.normalize(form, name)) for form in ("NFC", "NFD"))
    first, second = (folder(root, test=0.0).train for root in (one, other))
    assert first.classes == ("für",) and first.names == (name,)
    assert first.fingerprint() == second.fingerprint()


LAYOUT_ERRORS = [
    ((), "no images were found"),
    (("a/1.txt.png", "1.png"), "1 images .* beside the class folders"),
    (("train/a/1.png", "test/a/1.png", "test/dog/1.png", "test/cat/1.png"), "classes that train lacks: cat, dog"),
    (("train/a/1.png", "test/1.png"), "only one of train and test"),
    (("train/1.png", "test/a/1.png"), "only one of train and test"),
    (("test/a/1.png", "val/a/1.png"), "no folder train"),
    (("train/a/1.png", "val/a/1.png", "valid/a/1.png"), "mean the same"),
    (("set/train/a/1.png", "set/test/a/1.png"), "holds a whole image set: give .*set as the path"),
]


@pytest.mark.parametrize(("names", "said"), LAYOUT_ERRORS)
def test_layouts_that_are_none(tmp_path, names, said):
    with pytest.raises(UserError, match=said) as error:
        folder(fill(tmp_path, *names))
    assert "\n" not in str(error.value)


def test_wrong_use_is_told(tmp_path):
    fill(tmp_path, *many("", "ab", 2))
    for options, said in (
        ({"path": ""}, "no image folder is given"),
        ({"path": tmp_path / "none"}, "does not exist"),
        ({"path": tmp_path / "a/00.png"}, "not a folder"),
        ({"on_bad_image": "ignore"}, "'error' or 'skip'"),
        ({"canvas": "fill"}, "crop, pad, squash"),
        ({"validation": 1.0}, r"\[0, 1\)"),
    ):
        with pytest.raises(UserError, match=said):
            folder(**{"path": tmp_path, **options})
    fill(tmp_path / "one", "a/1.png", "b/1.png")
    with pytest.raises(UserError, match="too small to hold out test=0.2"):
        folder(tmp_path / "one")
    (tmp_path / "level/test").mkdir(parents=True)
    with pytest.raises(UserError, match="no images were found in .*test"):
        folder(fill(tmp_path / "level", "train/a/1.png"))


def test_bad_images_are_named_in_one_line_or_left_out(tmp_path):
    fill(tmp_path, *many("train/", "ab", 15), *many("test/", "ab", 2))
    bad = [*many("train/", "ab", 11), "test/a/01.png"]
    for name in bad:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError) as error:
        folder(tmp_path)
    text = str(error.value)
    assert text.startswith(f"23 images in {tmp_path} cannot be read: train/a/00.png (empty file), ")
    assert "train/b/08.png (empty file) and 3 more; " in text and "train/b/09" not in text and "\n" not in text
    splits = folder(tmp_path, on_bad_image="skip")
    assert splits.skipped == tuple(f"{name} (empty file)" for name in bad)
    assert names_of(splits.train) == [f"train/{name}/{i}.png" for name in "ab" for i in range(11, 15)]
    assert np.array_equal(splits.train.images[5], Image.open(tmp_path / "train/b/12.png"))
    assert splits.train.labels.tolist() == [0] * 4 + [1] * 4 and len(splits.test) == 3
    again = folder(tmp_path, on_bad_image="skip")  # from the cache
    assert again.skipped == splits.skipped and again.train.fingerprint() == splits.train.fingerprint()
    with pytest.raises(UserError, match="23 images"):
        folder(tmp_path)


@pytest.mark.parametrize(
    ("lost", "said"), [("train/a", "of class 'a' in the train split"), ("test", "in the test split")]
)
def test_a_class_or_split_of_bad_images_only_is_told(tmp_path, lost, said):
    fill(tmp_path, *many("train/", "ab", 2), *many("test/", "ab", 2))
    for path in (tmp_path / lost).rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=said):
        folder(tmp_path, on_bad_image="skip")


@pytest.fixture
def decodings(monkeypatch):
    """How many files every decoding read."""
    counts = []
    decode_all = cache.decode_all
    monkeypatch.setattr(
        cache, "decode_all", lambda paths, *rest: (counts.append(len(paths)), decode_all(paths, *rest))[1]
    )
    return counts


def test_a_folder_is_decoded_once(tmp_path, decodings):
    root = fill(tmp_path / "set", *many("train/", "ab", 3), side=8)
    first, again = folder(root, test=0.0), folder(root, test=0.0)
    assert decodings == [6] and first.train.fingerprint() == again.train.fingerprint()
    assert folder(root, size=4, test=0.0).train.shape == (4, 4, 3) and decodings == [6, 6]  # another layout
    assert folder(root, test=0.5).train.shape == (8, 8, 3) and decodings == [6, 6]  # the first is still there
    changed = root / "train/a/01.png"
    before = changed.stat()
    pixels = np.asarray(Image.open(changed)).copy()
    pixels[0, 0] ^= 255
    Image.fromarray(pixels).save(changed, compress_level=9)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    third = folder(root, test=0.0)
    assert decodings == [6, 6, 6] and np.array_equal(third.train.images[1], pixels)
    fill(root, "train/a/99.png", side=8)
    assert len(folder(root, test=0.0).train) == 7 and decodings[-1] == 7
    (root / "train/a/99.png").unlink()
    assert len(folder(root, test=0.0).train) == 6 and decodings[-1] == 6
    files = list(cache.default_folder().iterdir())
    assert len(files) == 2 and all(file.name.startswith("set-") for file in files)  # one per layout, nothing half done


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text", "folder"])
def test_a_damaged_cache_is_made_again(tmp_path, decodings, damage):
    root = fill(tmp_path / "set", *many("train/", "ab", 3), side=16)
    first = folder(root, test=0.0, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4  # inside the pixels
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        file.write_bytes({"flip": content, "cut": content[:-300], "empty": b"", "text": b"what?"}[damage])
    again = folder(root, test=0.0, cache=tmp_path / "cache")
    assert decodings == [6, 6] and again.train.fingerprint() == first.train.fingerprint()
    folder(root, test=0.0, cache=tmp_path / "cache")
    assert len(decodings) == (3 if damage == "folder" else 2)  # mended, where it can be


def test_no_cache_and_a_cache_that_cannot_be(tmp_path, decodings, caplog):
    root = fill(tmp_path / "set", *many("train/", "ab", 3))
    (tmp_path / "file").write_text("in the way")
    for place in (None, "", tmp_path / "file/cache"):
        assert len(folder(root, test=0.0, cache=place).train) == 6
    assert decodings == [6, 6, 6] and "not cached" in caplog.text
    assert not cache.default_folder().exists()


def test_what_the_system_failed_to_read_is_tried_again(tmp_path, decodings):
    root = fill(tmp_path / "set", *many("train/", "ab", 3))
    (root / "train/a/00.png").rename(tmp_path / "away.png")
    (root / "train/a/00.png").symlink_to(tmp_path / "later.png")
    assert len(folder(root, test=0.0, on_bad_image="skip").skipped) == 1
    assert folder(root, test=0.0, on_bad_image="skip").skipped == ("train/a/00.png (No such file or directory)",)
    assert decodings == [6, 6]
    (tmp_path / "away.png").rename(tmp_path / "later.png")
    assert len(folder(root, test=0.0).train) == 6


def test_the_fingerprint_goes_with_the_files_not_their_place(tmp_path):
    fill(tmp_path / "here", *many("train/", "ab", 3))
    first = folder(tmp_path / "here", test=0.0).train.fingerprint()
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert folder(tmp_path / "there", test=0.0).train.fingerprint() == first
    shutil.move(tmp_path / "there", tmp_path / "deep/er")
    assert folder(tmp_path / "deep/er", test=0.0).train.fingerprint() == first
    os.utime(tmp_path / "here/train/a/01.png")
    assert folder(tmp_path / "here", test=0.0).train.fingerprint() == first
    (tmp_path / "here/train/a/02.png").rename(tmp_path / "here/train/a/03.png")
    assert folder(tmp_path / "here", test=0.0).train.fingerprint() != first
