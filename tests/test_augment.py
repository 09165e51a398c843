"""Augmentations: every draw is one of the allowed ones, about equally often, on its own for each image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2_contingency, chisquare
from skimage.data import astronaut

from jaxsd.errors import UserError
from jaxsd.views import chain, flip_horizontal, flip_vertical, pad_crop

KEY = jax.random.key(7)
PHOTO = (astronaut()[100:116, 200:216] / 255).astype(np.float32)


def copies(count: int, image: np.ndarray = PHOTO) -> jax.Array:
    """A batch [count, H, W, C] of one photograph."""
    return jnp.broadcast_to(jnp.asarray(image), (count, *image.shape))


def shifts_of(crops: jax.Array, padding: int, image: np.ndarray = PHOTO) -> np.ndarray:
    """Which of the exact shifts of the padded photograph each crop is: (down, right) [B, 2]; fails if it is none."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    places = range(2 * padding + 1)
    found = {padded[y : y + height, x : x + width].tobytes(): (y, x) for y in places for x in places}
    assert len(found) == (2 * padding + 1) ** 2
    return np.array([found[crop.tobytes()] for crop in np.asarray(crops)])


def test_every_crop_is_an_exact_shift_and_all_are_equally_likely():
    shifts = shifts_of(pad_crop(4)(KEY, copies(4050)), 4)
    counts = np.bincount(shifts[:, 0] * 9 + shifts[:, 1], minlength=81)
    assert chisquare(counts).pvalue > 0.01  # 50 expected of each
    assert chi2_contingency(np.histogram2d(*shifts.T, bins=9)[0]).pvalue > 0.01  # rows and columns are unrelated
    following = np.histogram2d(shifts[:-1, 0], shifts[1:, 0], bins=9)[0]
    assert chi2_contingency(following).pvalue > 0.01  # neighbours in a batch are unrelated


def test_crops_of_images_that_are_not_square():
    image = PHOTO[:12]
    crops = pad_crop(2)(KEY, copies(64, image))
    assert crops.shape == (64, 12, 16, 3)
    assert len(np.unique(shifts_of(crops, 2, image), axis=0)) > 15


def test_padding_comes_in_black():
    ones = pad_crop(3)(KEY, jnp.ones((200, 8, 8, 1)))
    image = PHOTO[:8, :8]
    down, right = shifts_of(pad_crop(3)(KEY, copies(200, image)), 3, image).T
    kept = (8 - np.abs(down - 3)) * (8 - np.abs(right - 3))
    np.testing.assert_array_equal(np.asarray(ones).sum((1, 2, 3)), kept)


@pytest.mark.parametrize(("flip", "axis"), [(flip_horizontal(), 2), (flip_vertical(), 1)])
def test_flips_mirror_about_half(flip, axis):
    images = copies(2000)
    flipped = np.asarray(flip(KEY, images))
    mirrored = (flipped == np.flip(images, axis)).all((1, 2, 3))
    same = (flipped == images).all((1, 2, 3))
    assert (mirrored ^ same).all()
    assert abs(mirrored.mean() - 0.5) < 0.034  # three standard deviations


ALL = [pad_crop(4), flip_horizontal(), flip_vertical(), chain(pad_crop(2), flip_horizontal())]


@pytest.mark.parametrize("augment", ALL, ids=repr)
def test_jit_equals_eager_and_draws_depend_on_key_and_position_only(augment):
    images = jnp.asarray(np.random.default_rng(0).random((24, 8, 8, 3), np.float32))
    result = augment(KEY, images)
    assert result.shape == images.shape and result.dtype == images.dtype
    np.testing.assert_array_equal(jax.jit(augment)(KEY, images), result)
    np.testing.assert_array_equal(augment(KEY, images[:10]), result[:10])  # images after the tenth do not matter
    others = augment(KEY, images.at[3].set(0))
    np.testing.assert_array_equal(np.delete(others, 3, 0), np.delete(result, 3, 0))
    assert (augment(jax.random.key(8), images) != result).any()


def test_identities():
    images = copies(5)
    np.testing.assert_array_equal(pad_crop(0)(KEY, images), images)
    assert chain()(KEY, images) is images


def test_chain_goes_from_first_to_last_with_a_key_each():
    images = copies(6)
    first = pad_crop(4)(jax.random.fold_in(KEY, 0), images)
    np.testing.assert_array_equal(
        chain(pad_crop(4), flip_horizontal())(KEY, images), flip_horizontal()(jax.random.fold_in(KEY, 1), first)
    )
    twice = np.asarray(chain(flip_horizontal(), flip_horizontal())(KEY, copies(400)))
    same = (twice == PHOTO).all((1, 2, 3))
    assert 0.4 < same.mean() < 0.6  # one key for both would undo every flip


@pytest.mark.parametrize("augment", ALL, ids=repr)
def test_augmentations_are_values(augment):
    again = eval(repr(augment))
    assert again == augment and hash(again) == hash(augment)
    assert len(set(ALL)) == len(ALL) and chain(*ALL) == chain(*ALL) and chain(*ALL) != chain(*ALL[1:])


def test_negative_padding_is_refused():
    with pytest.raises(UserError, match="0 or more"):
        pad_crop(-1)
