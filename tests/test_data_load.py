import numpy as np
import pytest

from jaxsd.data import arrays
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
