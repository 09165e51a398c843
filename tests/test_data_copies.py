"""Copies: those that are planted are found with what they copy, and nothing else is."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from skimage import data as photographs

from jaxsd.data import Source, duplicates, mnist5k
from jaxsd.data.copies import equal, near, thumbnails

SIDE = 64


def crops():
    """Parts of three photographs that do not overlap: 64 + 24 + 20 different images of three classes."""
    parts = []
    for photograph in (photographs.astronaut(), photographs.coffee(), photographs.chelsea()):
        rows, columns = (size // SIDE for size in photograph.shape[:2])
        cut = photograph[: rows * SIDE, : columns * SIDE, :3].reshape(rows, SIDE, columns, SIDE, 3)
        parts.append(cut.swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3))
    return np.concatenate(parts)


def encoded(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=75)
    return np.asarray(Image.open(file))


def resized(image):
    small = Image.fromarray(image).resize((SIDE // 2, SIDE // 2), Image.Resampling.BICUBIC)
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def brightened(image, factor):
    return np.asarray(ImageEnhance.Brightness(Image.fromarray(image)).enhance(factor))


def mirrored(image):
    return np.ascontiguousarray(image[:, ::-1])


CHANGES = {
    "equal": np.copy,
    "encoded anew": encoded,
    "resized": resized,
    "mirrored": mirrored,
    "brighter": lambda image: brightened(image, 1.05),
    "darker": lambda image: brightened(image, 0.95),
    "mirrored, brighter, encoded anew": lambda image: encoded(brightened(mirrored(image), 1.05)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_planted_copies_are_found_among_images_of_the_same_photographs(name):
    images = crops()
    known, others = images[::2], images[1::2]
    chosen = np.flatnonzero(known.std(axis=(1, 2, 3)) > 12)[::4]  # a plain background is hardly an image
    planted = np.stack([CHANGES[name](image) for image in known[chosen]])
    found = near(thumbnails(np.concatenate([others, planted])), of=thumbnails(known))
    assert len(chosen) > 15
    assert found.rows.tolist() == list(range(len(others), len(others) + len(chosen)))
    assert found.of.tolist() == chosen.tolist()
    assert found.mirrored.tolist() == ["mirrored" in name] * len(chosen)
    within = near(thumbnails(np.concatenate([images, planted])))
    assert within.rows.tolist() == list(range(len(images), len(images) + len(chosen)))
    assert within.of.tolist() == (2 * chosen).tolist()


def test_a_copy_in_another_scene_is_not_hidden_by_a_nearer_one_of_the_same_scene():
    images = crops()[8:40]
    again = encoded(resized(images[5]))
    small = thumbnails(np.concatenate([images, [brightened(images[5], 1.02), again, brightened(again, 1.02)]]))
    first = [f"scene {n}" for n in range(len(images))]
    assert near(small).rows.tolist() == [32, 34] and near(small).of.tolist() == [5, 33]
    found = near(small, scenes=[*first, "scene 5", "another", "another"])
    assert found.rows.tolist() == [33, 34] and set(found.of.tolist()) <= {5, 32}
    assert near(small, scenes=[*first, "scene 5", "scene 5", "scene 5"]).rows.tolist() == []


def test_different_parts_of_one_photograph_are_no_copies():
    small = thumbnails(crops())
    assert near(small).rows.tolist() == [] and near(small[::2], of=small[1::2]).rows.tolist() == []


def test_images_that_are_all_alike_have_to_be_more_alike():
    """Of 1,000 digits hardly any is called a copy, though hundreds have one beside them that looks alike."""
    digits = mnist5k().test.images
    small = thumbnails(digits)
    again = thumbnails(digits[:100] // 8 * 8)  # the levels of another encoder
    assert len(near(small).rows) <= 2
    assert near(np.concatenate([small, again])).rows.tolist()[-100:] == list(range(1000, 1100))


def test_images_without_contrast_are_no_copies_and_small_ones_are_compared_as_they_are():
    plain = np.repeat(np.arange(0, 250, 5, dtype=np.uint8), 13 * 17 * 3).reshape(-1, 13, 17, 3)
    assert near(thumbnails(plain)).rows.tolist() == []
    small = np.random.default_rng(0).integers(0, 256, (20, 3, 5, 1), np.uint8)
    assert np.array_equal(thumbnails(small), small)
    assert near(thumbnails(np.concatenate([small, 255 - small[4:5] // 2]))).rows.tolist() == []
    assert near(thumbnails(np.concatenate([small, small[4:5] // 2]))).of.tolist() == [4]
    one = np.random.default_rng(0).integers(0, 256, (1, 1, 1, 3), np.uint8)
    assert near(thumbnails(one)).rows.tolist() == [] == near(thumbnails(one), of=thumbnails(one)).rows.tolist()


def test_thumbnails_are_means_of_equal_areas():
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 30, 2), np.uint8)
    twofold = images.repeat(2, axis=2).reshape(3, 12, 2, 12, 5, 2).mean((2, 4))
    assert np.allclose(thumbnails(images), twofold, atol=1e-3)
    assert np.allclose(thumbnails(images[:, :, ::-1]), thumbnails(images)[:, :, ::-1], atol=1e-3)


def test_equal_images_are_found_pixel_for_pixel():
    images = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1), np.uint8)
    source, changed = Source(images), images[:5].copy()
    changed[:, 0, 0, 0] ^= 1
    other = Source(np.concatenate([images[[3, 3, 40]], changed]))
    assert duplicates(source, other) == 3
    assert duplicates(source, other.with_images(other.images[:, :2])) == 0
    found = equal(other, of=source)
    assert found.rows.tolist() == [0, 1, 2] and found.of.tolist() == [3, 3, 40]
    assert equal(other).rows.tolist() == [1] and equal(other).of.tolist() == [0]
    assert not len(equal(source).rows)
    assert found.without(equal(other)).of.tolist() == [3, 40]
