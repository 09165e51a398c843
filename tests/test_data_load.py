import io
import sys

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

from jaxsd.data import arrays, tfds
from jaxsd.errors import UserError


def pixels(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def saved(path, **content):
    np.savez(path, **content)
    return path


def test_arrays_come_back_as_they_are(tmp_path):
    content = {
        "train_images": pixels(8, 5, 6, 3),
        "train_labels": np.arange(8) % 4,
        "validation_images": pixels(2, 5, 6, 3, seed=1),
        "validation_labels": np.array([3, 0], np.uint8),
        "test_images": pixels(3, 5, 6, 3, seed=2),
        "test_labels": np.array([[1], [2], [1]]),
        "classes": np.array(["a", "b", "c", "d"]),
    }
    splits = arrays(saved(tmp_path / "set.npz", **content))
    assert splits.name == "set" and splits.train.classes == ("a", "b", "c", "d")
    for split, source in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        assert np.array_equal(source.images, content[f"{split}_images"])
        assert np.array_equal(source.labels, content[f"{split}_labels"].reshape(-1))


def test_arrays_may_be_gray_unlabelled_or_without_a_test_split(tmp_path):
    gray = arrays(saved(tmp_path / "a.npz", train_images=pixels(10, 4, 4)), validation=0.2)
    assert gray.train.shape == (4, 4, 1) and gray.train.labels is None and gray.test is None
    assert (len(gray.train), len(gray.validation)) == (8, 2)
    labels = {"train_labels": np.array([0, 1, 0]), "val_labels": np.array([[2]])}
    medical = arrays(saved(tmp_path / "b.npz", train_images=pixels(3, 4, 4), val_images=pixels(1, 4, 4), **labels))
    assert len(medical.validation) == 1 and medical.train.classes == ("0", "1", "2")  # classes of all splits


IMAGES, LABELS = pixels(4, 6, 6, 3), np.arange(4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"images": IMAGES}, "no train_images: it has images"),
        ({"train_images": IMAGES / np.float32(255)}, r"not float32: save them as \(images \* 255\)"),
        ({"train_images": IMAGES.astype(int)}, "not int64"),
        ({"train_images": IMAGES.transpose(0, 3, 1, 2)}, "transpose them"),
        ({"train_images": IMAGES[0, 0]}, r"got \[6, 3\]"),
        ({"train_images": np.array([None, 1])}, "plain arrays"),
        ({"train_images": IMAGES, "train_labels": LABELS[:3]}, r"whole numbers \[4\]"),
        ({"train_images": IMAGES, "train_labels": np.eye(4)}, r"\[N\] or \[N, 1\]: got float64 \[4, 4\]"),
        ({"train_images": IMAGES, "train_labels": LABELS, "test_images": IMAGES}, "add test_labels"),
        ({"train_images": IMAGES, "train_labels": LABELS, "classes": np.array(["a"])}, "label 3 has no name"),
        ({"train_images": IMAGES, "test_images": IMAGES[:, :5]}, r"differ in image size: \(5, 6, 3\), \(6, 6, 3\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, content, said):
    with pytest.raises(UserError, match=said) as error:
        arrays(saved(tmp_path / "a.npz", **content))
    assert "\n" not in str(error.value)


def test_files_that_are_no_archive_are_refused(tmp_path):
    whole = saved(tmp_path / "a.npz", train_images=IMAGES).read_bytes()
    for content in (b"", b"text", whole[:-100], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]):
        (tmp_path / "b.npz").write_bytes(content)
        with pytest.raises(UserError, match="no readable .npz"):
            arrays(tmp_path / "b.npz")
    with pytest.raises(UserError, match="does not exist"):
        arrays(tmp_path / "none.npz")


COLOURS = pixels(10, 9, 12, 3)


class JaxsdColours(tensorflow_datasets.core.GeneratorBasedBuilder):
    VERSION = tensorflow_datasets.core.Version("1.0.0")

    def _info(self):
        features = tensorflow_datasets.features
        return tensorflow_datasets.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict(
                {
                    "picture": features.Image(shape=(None, None, 3)),
                    "kind": features.ClassLabel(names=["even", "odd"]),
                }
            ),
            supervised_keys=("picture", "kind"),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(6)), "test": self._generate_examples(range(6, 10))}

    def _generate_examples(self, numbers):
        for number in numbers:
            file = io.BytesIO()
            Image.fromarray(COLOURS[number]).save(file, "PNG")
            file.seek(0)
            yield number, {"picture": file, "kind": number % 2}


class JaxsdPlain(tensorflow_datasets.core.GeneratorBasedBuilder):
    VERSION = tensorflow_datasets.core.Version("1.0.0")

    def _info(self):
        features = tensorflow_datasets.features
        names = {
            "image": features.Tensor(shape=(4, 4, 1), dtype=np.uint8),
            "label": features.ClassLabel(num_classes=3),
            "score": features.Scalar(dtype=np.float32),
        }
        return tensorflow_datasets.core.DatasetInfo(builder=self, features=features.FeaturesDict(names))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(5):
            image = np.full((4, 4, 1), number, np.uint8)
            yield number, {"image": image, "label": number % 3, "score": 0.5}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    place = tmp_path_factory.mktemp("tfds")
    JaxsdColours(data_dir=place, file_format="array_record").download_and_prepare()
    JaxsdPlain(data_dir=place, file_format="parquet").download_and_prepare()
    return place


def by_bytes(images, labels):
    return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))


def test_tfds_reads_what_was_prepared(prepared):
    splits = tfds("jaxsd_colours", data_dir=prepared)
    assert splits.train.classes == ("even", "odd") and splits.validation is None
    assert by_bytes(splits.train.images, splits.train.labels) == by_bytes(COLOURS[:6], np.arange(6) % 2)
    assert by_bytes(splits.test.images, splits.test.labels) == by_bytes(COLOURS[6:], np.arange(4) % 2)
    parts = tfds("jaxsd_colours", data_dir=prepared, size=8, train="train[:4]", validation="train[4:]", test=None)
    assert (len(parts.train), len(parts.validation), parts.test) == (4, 2, None)
    assert parts.train.shape == (8, 8, 3)
    plain = tfds("jaxsd_plain", data_dir=prepared, test=None, size=(2, 3), canvas="squash", validation=0.2)
    assert plain.train.shape == (2, 3, 1) and plain.train.classes == ("0", "1", "2")
    assert len(plain.train) == 3 and len(plain.validation) == 2  # one of each class that has two
    assert np.array_equal(plain.train.images.max((1, 2, 3)) % 3, plain.train.labels)
    assert "tensorflow" not in sys.modules


def test_tfds_says_what_is_missing(prepared, tmp_path, monkeypatch):
    for name, options, said in (
        ("jaxsd_none_such", {"data_dir": prepared}, "jaxsd_none_such cannot be opened"),
        ("jaxsd_colours:9.0.0", {"data_dir": prepared}, "check the name"),
        ("jaxsd_colours", {"data_dir": tmp_path}, "not prepared in .*file_format='array_record'"),
        ("jaxsd_plain", {"data_dir": prepared}, "has no split test: it has train"),
    ):
        with pytest.raises(UserError, match=said) as error:
            tfds(name, **options)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install 'jaxsd\[tfds\]'"):
        tfds("jaxsd_plain", data_dir=prepared)


def test_tfds_sets_prepared_as_tfrecord_are_refused(tmp_path):
    JaxsdPlain(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    info = tmp_path / "jaxsd_plain/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for path in info.parent.glob("*.array_record*"):
        path.rename(str(path).replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="prepared as tfrecord, which needs TensorFlow"):
        tfds("jaxsd_plain", data_dir=tmp_path, test=None)
