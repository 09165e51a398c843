"""Sets of TFDS, prepared here: read without TensorFlow, whichever way they were stored."""

import io
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from jaxsd.data import digits, tfds
from jaxsd.data.embedded import photograph
from jaxsd.errors import UserError

core, features = tensorflow_datasets.core, tensorflow_datasets.features
DIGITS = digits().train.take(np.arange(40))
PHOTOS = [photograph("cat").resize(size) for size in ((12, 9), (10, 10), (9, 14), (20, 8), (12, 9), (11, 7))]


def file_of(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    file.seek(0)
    return file


class JaxsdBase(core.GeneratorBasedBuilder):
    VERSION = core.Version("1.0.0")
    FEATURES, KEYS, SPLITS = {}, None, ()

    def _info(self):
        return core.DatasetInfo(builder=self, features=features.FeaturesDict(self.FEATURES), supervised_keys=self.KEYS)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.SPLITS}


class JaxsdDigits(JaxsdBase):
    """Pixels of the embedded digits as PNG; a second class label beside the usual one."""

    FEATURES = {
        "id": features.Text(),
        "picture": features.Image(shape=(8, 8, 1)),
        "digit": features.ClassLabel(names=[f"digit {n}" for n in range(10)]),
        "odd": features.ClassLabel(names=["even", "odd"]),
    }
    KEYS = ("picture", "digit")
    SPLITS = {"train": range(20), "validation": range(20, 28), "test": range(28, 40)}

    def _generate_examples(self, split):
        for number in self.SPLITS[split]:
            image, digit = Image.fromarray(DIGITS.images[number, ..., 0]), int(DIGITS.labels[number])
            yield number, {"id": f"é{number}", "picture": file_of(image), "digit": digit, "odd": digit % 2}


class JaxsdPhotos(JaxsdBase):
    """Photographs of different sizes, without a test split; no supervised keys; part of it has no labels."""

    FEATURES = {
        "image": features.Image(shape=(None, None, 3)),
        "label": features.ClassLabel(names=["a", "b"]),
        "score": np.float32,
    }
    SPLITS = {"train": range(6), "unlabelled": range(3)}

    def _generate_examples(self, split):
        for number in self.SPLITS[split]:
            label = -1 if split == "unlabelled" else number % 2
            yield number, {"image": file_of(PHOTOS[number], "JPEG"), "label": label, "score": 0.5}


class JaxsdPlain(JaxsdBase):
    """Pixels without a codec; no names of classes; two labels and no supervised keys."""

    FEATURES = {
        "image": features.Tensor(shape=(4, 4, 4), dtype=np.uint8),
        "fine": features.ClassLabel(num_classes=3),
        "coarse": features.ClassLabel(num_classes=2),
    }
    SPLITS = {"train": range(9)}

    def _generate_examples(self, split):
        for number in self.SPLITS[split]:
            yield number, {"image": np.full((4, 4, 4), number, np.uint8), "fine": number % 3, "coarse": number % 2}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    place = tmp_path_factory.mktemp("tfds")
    three = tensorflow_datasets.download.DownloadConfig(num_shards=3)
    JaxsdDigits(data_dir=place, file_format="array_record").download_and_prepare(download_config=three)
    JaxsdPhotos(data_dir=place, file_format="array_record").download_and_prepare()
    JaxsdPlain(data_dir=place, file_format="parquet").download_and_prepare()
    return place


def as_tfrecord(place, to, name):
    """A prepared set with the same records in tfrecord files, which TFDS itself writes with TensorFlow only."""
    from tensorboardX.record_writer import RecordWriter  # here: it loads PyTorch, where that is installed

    shutil.copytree(place / name, to / name)
    folder = to / name / "1.0.0"
    for path in folder.glob("*.array_record*"):
        reader = ArrayRecordReader(str(path))
        writer = RecordWriter(str(path).replace("array_record", "tfrecord"))
        for record in reader.read_all():
            writer.write(record)
        writer.close()
        path.unlink()
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    return folder


def same(found, wanted):
    assert (found is None) == (wanted is None)
    if found is not None:
        assert np.array_equal(found.images, wanted.images) and np.array_equal(found.labels, wanted.labels)
        assert found.classes == wanted.classes


def by_bytes(source):
    return sorted((image.tobytes(), int(label)) for image, label in zip(source.images, source.labels, strict=True))


def test_a_prepared_set_is_what_it_was_made_of(prepared):
    splits = tfds("jaxsd_digits", data_dir=prepared)
    assert splits.name == "jaxsd_digits" and splits.train.classes == tuple(f"digit {n}" for n in range(10))
    for split, found in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        assert by_bytes(found) == by_bytes(DIGITS.take(list(JaxsdDigits.SPLITS[split])))
    odd = tfds("jaxsd_digits", data_dir=prepared, label="odd").train
    assert odd.classes == ("even", "odd") and np.array_equal(odd.labels, splits.train.labels % 2)
    assert "tensorflow" not in sys.modules


def test_tfrecord_files_give_the_same_as_array_record_files(prepared, tmp_path):
    folder = as_tfrecord(prepared, tmp_path, "jaxsd_digits")
    assert len(list(folder.glob("*tfrecord*"))) == 9  # three splits of three files
    for options in ({}, {"train": "train[3:17]+test[50%:]", "test": "validation[:5]"}):
        found, wanted = (tfds("jaxsd_digits", data_dir=place, **options) for place in (tmp_path, prepared))
        for one, other in zip(found[1:4], wanted[1:4], strict=True):
            same(one, other)
    assert "tensorflow" not in sys.modules
    (path,) = folder.glob("*-test.tfrecord-00001*")
    content = path.read_bytes()
    flipped = content[:14] + b"\xff" * 40 + content[54:]
    for damaged, why in (
        (content[:-5], "is cut off"),
        (content[:6], "is cut off"),
        (b"\xff" * 20 + content[20:], "is cut off or damaged"),
        (flipped, ""),
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"of test in .* cannot be read \(.*{why}.*\): prepare jaxsd_digits again"):
            tfds("jaxsd_digits", data_dir=tmp_path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be read \(the files hold \d+ images of 12\)"):
        tfds("jaxsd_digits", data_dir=tmp_path)


def test_which_images_are_held_out(prepared):
    def sizes(name="jaxsd_digits", **options):
        splits = tfds(name, data_dir=prepared, size=8, **options)
        return [0 if source is None else len(source) for source in splits[1:4]]

    assert sizes() == [20, 8, 12] and sizes(test=0.0, validation="0") == [20, 0, 0]
    assert sizes(test="validation") == [20, 0, 8]  # not twice
    train, validation, test = sizes(train="train+test")  # the split test is not read again
    assert train + test == 32 and validation == 8 and test > 0
    assert sizes(train="train + test") == [train, validation, test]
    train, validation, test = sizes(train="all")  # nor any other
    assert train + test == 40 and validation == 0 and test > 0
    assert sizes(train="train[:50%]", validation="train[50%:]", test="0.2") == [8, 10, 2]
    assert sizes("jaxsd_photos") == [4, 0, 2] and sizes("jaxsd_photos", test=0) == [6, 0, 0]
    assert sizes("jaxsd_photos", test=0, validation=0.5) == [3, 3, 0]
    unlabelled = tfds("jaxsd_photos", data_dir=prepared, size=8, train="unlabelled", test=0.0)
    assert unlabelled.train.labels is None and len(unlabelled.train) == 3


def test_images_come_to_one_size_and_colour(prepared):
    photos = tfds("jaxsd_photos", data_dir=prepared, size=(5, 6), canvas="squash", test=0.0).train
    read = [Image.open(file_of(image, "JPEG")) for image in PHOTOS]
    wanted = {np.asarray(image.resize((6, 5), Image.Resampling.BICUBIC)).tobytes() for image in read}
    assert {image.tobytes() for image in photos.images} == wanted
    assert tfds("jaxsd_photos", data_dir=prepared, size=6, channels=1).train.shape == (6, 6, 1)
    plain = tfds("jaxsd_plain", data_dir=prepared, label="fine", test=0.0).train
    assert plain.shape == (4, 4, 4) and plain.classes == ("0", "1", "2")  # parquet; no names were given
    assert np.array_equal(plain.images[:, 0, 0, 0] % 3, plain.labels)
    white = tfds("jaxsd_plain", data_dir=prepared, label="fine", channels=3, test=0.0).train
    assert white.shape == (4, 4, 3) and white.images.min() > 240  # nearly transparent on white


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("jaxsd_digit", {}, "no set jaxsd_digit, nor has data_dir: did you mean .*jaxsd_digits"),
        ("cifar1O", {}, "did you mean cifar10"),
        ("q§", {}, "list_builders"),
        ("jaxsd_digits:9.0.0", {}, "cannot be opened .*: check the name"),
        ("imdb_reviews", {}, r"no 8-bit image with a class label: it has text \(Text\), label \(ClassLabel\)"),
        ("kitti", {}, r"it has image \(Image\), image/file_name \(Text\), objects \(Sequence\)"),
        ("jaxsd_photos", {}, r"jaxsd_photos differ in size or channels \(.*\): give size"),
        ("jaxsd_plain", {}, "several class labels, fine, coarse: give label"),
        ("jaxsd_plain", {"label": "kind"}, "no class label kind: it has fine, coarse"),
        ("jaxsd_plain", {"label": "fine", "size": 2}, "has 4 channels: give channels=3"),
        ("jaxsd_photos", {"size": 8, "test": "test"}, "no split test: it has train, unlabelled"),
        ("jaxsd_photos", {"size": 8, "test": "train[:"}, r"no split train\[:"),
        ("jaxsd_photos", {"size": 8, "test": "train[:0]"}, r"split train\[:0\] .* is empty"),
        ("jaxsd_photos", {"size": 8, "test": "unlabelled"}, "unlabelled of .* has no labels: take another for test"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(prepared, name, options, said):
    with pytest.raises(UserError, match=said) as error:
        tfds(name, data_dir=prepared, **options)
    assert "\n" not in str(error.value)


def test_a_set_that_is_not_prepared_comes_with_the_command(prepared, tmp_path, monkeypatch):
    with pytest.raises(UserError) as error:
        tfds("cifar10", data_dir=tmp_path)
    assert f"not prepared in {tmp_path}/cifar10/3.0.2: prepare it once" in str(error.value)
    command = f"tfds.builder('cifar10', data_dir='{tmp_path}', file_format='array_record').download_and_prepare()"
    assert command in str(error.value)
    shutil.copytree(prepared / "jaxsd_digits/1.0.0", tmp_path / "jaxsd_digits/0.9.0")
    with pytest.raises(UserError, match=r"jaxsd_digits/1.0.0 \(but version 0.9.0 is: give it after a colon\)"):
        tfds("jaxsd_digits", data_dir=tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install 'jaxsd\[tfds\]'"):
        tfds("jaxsd_plain", data_dir=prepared)
