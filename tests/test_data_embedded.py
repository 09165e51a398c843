import gzip
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from jaxsd.data import digits, embedded, mnist5k, photos
from jaxsd.errors import UserError


def test_mnist5k_is_mnist():
    splits = mnist5k()
    assert splits.validation is None and splits.test is not None
    assert splits.train.shape == (28, 28, 1) and splits.train.classes == tuple("0123456789")
    assert np.bincount(splits.train.labels).tolist() == [400] * 10
    assert np.bincount(splits.test.labels).tolist() == [100] * 10
    total = sum(int(source.images.sum(dtype=np.int64)) for source in (splits.train, splits.test))
    assert total == 131_267_102  # the sum of all pixels of the file, taken with another program (awk)
    assert splits.train.fingerprint() == mnist5k().train.fingerprint()


def test_digits_are_scikit_learns():
    splits = digits(test=360, validation=0.25)
    sources = (splits.train, splits.validation, splits.test)
    assert [len(source) for source in sources] == [1078, 359, 360]
    mine = sorted((row.tobytes(), label) for s in sources for row, label in zip(s.images, s.labels, strict=True))
    table = load_digits()
    theirs = np.rint(table.images * 255 / 16).astype(np.uint8)
    assert mine == sorted((row.tobytes(), label) for row, label in zip(theirs, table.target, strict=True))


def test_the_table_reader_against_numpy(tmp_path):
    table = np.random.default_rng(0).integers(0, 1000, (50, 7))
    for ending in ("\n", "\r\n"):
        text = ending.join(",".join(map(str, row)) for row in table) + ending
        (tmp_path / "t.gz").write_bytes(gzip.compress(text.encode()))
        assert np.array_equal(embedded._integers(tmp_path / "t.gz", 7), table)
    with pytest.raises(UserError, match="not the table"):
        embedded._integers(tmp_path / "t.gz", 6)


@pytest.mark.parametrize("load", [mnist5k, digits])
def test_a_held_out_part_that_cannot_be(load):
    for test in (0, 10_000):
        with pytest.raises(UserError, match="test must be 10 to"):
            load(test=test)


def test_photos_never_share_a_pixel_between_training_and_test(monkeypatch):
    level = np.where(np.arange(600) < 300, 100, 101)  # photographs that say which half a pixel comes from
    column = Image.fromarray(np.broadcast_to(level[None], (400, 600)).astype(np.uint8))
    row = Image.fromarray(np.broadcast_to(level[:, None], (600, 400)).astype(np.uint8))
    for photograph in (column, row):
        monkeypatch.setattr(embedded.Image, "open", lambda path, p=photograph: p.copy())
        splits = photos(size=48, train_per_class=60, test_per_class=60)
        assert splits.test is not None
        assert (splits.train.images == 100).all() and (splits.test.images == 101).all()


def test_photos_are_crops_of_ten_photographs():
    splits = photos(size=24, train_per_class=9, test_per_class=4)
    assert splits.test is not None and splits.train.images.shape == (90, 24, 24, 3) and len(splits.test) == 40
    assert len(splits.train.classes) == 10 and np.bincount(splits.train.labels).tolist() == [9] * 10
    assert len(set(splits.train.names)) == 90
    again = photos(size=24, train_per_class=9, test_per_class=2)
    assert again.train.fingerprint() == splits.train.fingerprint()
    # The first crop of the astronaut, cut by hand where its name says; the half is 256x512, so the window is 128.
    top, left = (int(part[1:]) for part in splits.train.names[0].split("/")[-1].split("_"))
    with Image.open(embedded._package_file("skimage", "data/astronaut.png")) as photograph:
        crop = photograph.crop((left, top, left + 128, top + 128)).resize((24, 24), Image.Resampling.BICUBIC)
    assert np.array_equal(crop, splits.train.images[0]) and left + 128 <= 256


@pytest.mark.parametrize("asked", [{"size": 226}, {"size": 0}, {"train_per_class": 0}, {"test_per_class": 10**7}])
def test_photos_that_cannot_be_cut(asked):
    with pytest.raises(UserError, match="photos cannot give"):
        photos(**asked)


def test_loading_imports_nothing_heavy():
    code = "import sys, jaxsd.data as d; d.digits(); print({'jax', 'sklearn', 'scipy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_a_missing_package_is_named():
    for package in ("jaxsd_no_such_package", "PIL"):
        with pytest.raises(UserError, match=f"package {package} is missing: install"):
            embedded._package_file(package, "data/none.gz")
