import jax
import numpy as np
import pytest

from jaxsd.data import Source, Splits, describe, standardisation
from jaxsd.data.batches import epoch_batches, ordered_batches
from jaxsd.errors import UserError


def noise(count=12, side=5, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), np.uint8)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"images": noise().astype(np.float32)}, "float32"),
        ({"images": noise()[0]}, r"\[5, 5, 3\]"),
        ({"images": noise()[:0]}, "empty"),
        ({"images": noise().tolist()}, "list"),
        ({"images": noise(), "labels": np.zeros(11, int)}, r"whole numbers \[12\]"),
        ({"images": noise(), "labels": np.zeros(12)}, "float64"),
        ({"images": noise(), "labels": np.full(12, -1)}, "negative"),
        ({"images": noise(), "labels": np.arange(12), "classes": ("a", "b")}, "label 11 has no name"),
        ({"images": noise(), "names": ("a",)}, "1 for 12"),
    ],
)
def test_a_source_that_does_not_fit_together_is_refused(fields, said):
    with pytest.raises(UserError, match=said):
        Source(**fields)


def test_a_source_keeps_its_parts_together():
    labels, names = np.arange(12) % 3, tuple(f"n{i}" for i in range(12))
    source = Source(noise(), labels, names=names)
    assert source.labels is not None and source.labels.dtype == np.int32
    assert source.classes == ("0", "1", "2") and len(source) == 12 and source.shape == (5, 5, 3)
    part = source.take(np.array([7, 2]))
    assert part.names == ("n7", "n2") and part.labels is not None and part.labels.tolist() == [1, 2]
    assert np.array_equal(part.images, source.images[[7, 2]]) and part.classes == source.classes
    smaller = source.with_images(source.images[:, :2, :3])
    assert smaller.shape == (2, 3, 3) and smaller.names == names
    with pytest.raises(UserError, match="got 3 for 12"):
        source.with_images(noise(3))
    with pytest.raises(UserError, match="whole-number"):
        source.take(np.ones(12, bool))


def test_the_fingerprint_sees_pixels_labels_classes_and_names_and_nothing_else():
    labels, names = np.arange(12) % 3, tuple("abcdefghijkl")
    same = Source(noise(), labels, names=names)
    other_pixel = noise()
    other_pixel[3, 2, 1, 0] ^= 1
    others = [
        Source(other_pixel, labels, names=names),
        Source(noise(), np.roll(labels, 1), names=names),
        Source(noise(), labels, classes=("x", "y", "z"), names=names),
        Source(noise(), labels, names=names[::-1]),
        Source(noise(), None, names=names),
        Source(noise().reshape(12, 25, 1, 3), labels, names=names),
    ]
    prints = [source.fingerprint() for source in others]
    assert len({same.fingerprint(), *prints}) == 1 + len(others)
    view = np.asfortranarray(noise())  # the same values, otherwise in memory
    assert Source(view, labels.astype(np.uint8), names=names).fingerprint() == same.fingerprint()


def test_standardisation_is_numpys_mean_and_deviation():
    images = noise(5000, 3)
    images[..., 1] = 7
    mean, std = standardisation(Source(images))
    assert mean.dtype == std.dtype == np.float32
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std[[0, 2]], (images / 255).std((0, 1, 2))[[0, 2]], rtol=1e-6)
    assert std[1] == 1  # a channel that never changes


def test_describe_says_sizes_and_counts():
    train = Source(noise(), np.arange(12) % 3, classes=("cat", "dog", "owl"))
    many = Source(noise(40), np.arange(40) % 20)
    text = describe(Splits("pets", train, None, train.take([0, 3, 4]), skipped=("x (empty file)",)))
    assert text.splitlines() == [
        "pets: images 5x5x3",
        "  train: 12 images, cat 4, dog 4, owl 4",
        "  test: 3 images, cat 2, dog 1, owl 0",
        "  left out: 1 unreadable images",
    ]
    assert "20 classes with 2 images each" in describe(Splits("many", many, None, None))
    assert "no labels" in describe(Splits("flat", Source(noise()), None, None))


@pytest.mark.parametrize(("n", "size", "repeat"), [(10, 4, 1), (10, 5, 1), (10, 4, 3), (3, 8, 1), (3, 8, 2), (1, 1, 1)])
def test_an_epoch_shows_every_image_equally_often(n, size, repeat):
    index, mask = epoch_batches(jax.random.key(3), n, size, repeat=repeat)
    assert index.dtype == np.int32 and mask.dtype == np.float32
    assert index.shape == mask.shape == (-(-n * repeat // min(size, n * repeat)), min(size, n * repeat))
    shown = index[mask == 1]
    assert np.array_equal(np.bincount(shown, minlength=n), np.full(n, repeat))
    for start in range(0, n * repeat, n):  # one whole order after the other
        assert sorted(shown[start : start + n]) == list(range(n))
    filling = (mask == 0).sum()
    assert np.array_equal(index[mask == 0], index.reshape(-1)[:filling]) and mask[:-1].all()


def test_an_epoch_is_a_function_of_its_key():
    first, again = (epoch_batches(jax.random.key(1), 100, 32)[0] for _ in range(2))
    other = epoch_batches(jax.random.key(2), 100, 32)[0]
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    orders = epoch_batches(jax.random.key(1), 100, 100, repeat=2)[0]
    assert not np.array_equal(orders[0], orders[1])
    dropped, mask = epoch_batches(jax.random.key(1), 100, 32, drop_last=True)
    assert np.array_equal(dropped, first[:3]) and mask.all()


def test_ordered_batches_show_each_image_once_in_order():
    index, mask = ordered_batches(5, 4)
    assert index.tolist() == [[0, 1, 2, 3], [4, 0, 1, 2]] and mask.tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    index, mask = ordered_batches(2, 5)
    assert index.shape == (1, 5) and index.max() < 2 and mask.tolist() == [[1, 1, 0, 0, 0]]
    for n, size in ((0, 4), (4, 0)):
        with pytest.raises(UserError, match="at least one image"):
            ordered_batches(n, size)
