"""Views against tables, Pillow, OpenCV, scikit-image, torch's numbers, and what must not change."""

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
import skimage.feature
from PIL import Image

from jaxsd.data.source import Source
from jaxsd.errors import UserError
from jaxsd.views import compose, gray, harris, hybrid, pixels, scale, stretch, view

ASTRONAUT, CAMERA = skimage.data.astronaut(), skimage.data.camera()[..., None]
RAMP4, RAMP8 = (np.arange(size * size, dtype=np.float32).reshape(size, size, 1) for size in (4, 8))
SQUARE = np.zeros((1, 16, 16), np.float32)
SQUARE[:, 4:12, 4:12] = 255


def photos(size=64, count=3) -> Source:
    """Pieces of photographs, labelled."""
    astronaut, cat = ASTRONAUT, skimage.data.chelsea()
    pieces = [image[y : y + size, x : x + size] for y in (60, 130) for x in (150, 240) for image in (astronaut, cat)]
    return Source(np.stack(pieces[:count]), np.arange(count) % 2, ("woman", "cat"), tuple(map(str, range(count))))


# Quarter turns


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_quarter_turns_of_a_hand_worked_image(kind):
    image = np.array([[1, 2], [3, 4]])
    expected = ([[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]])
    for k, turned in enumerate(expected):
        two_channels = np.stack([image, 10 * image], axis=-1)
        result = np.asarray(pixels.quarter_turns(kind(two_channels), k))
        np.testing.assert_array_equal(result, np.stack([turned, 10 * np.array(turned)], axis=-1))


def test_quarter_turns_equal_rot90_and_come_back():
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 3, 3), np.uint8)
    for k in range(-1, 6):
        turned = pixels.quarter_turns(images, k)
        np.testing.assert_array_equal(turned, np.rot90(images, k, (1, 2)))
        assert turned.shape[1:3] == ((3, 2) if k % 2 else (2, 3))
        np.testing.assert_array_equal(pixels.quarter_turns(turned, 4 - k), images)


def test_all_turns_are_image_major_with_and_without_jit():
    images = photos(8).images
    turned = pixels.turned(images)
    assert turned.dtype == np.uint8 and turned.shape == (12, 8, 8, 3)
    for i in range(3):
        for k in range(4):
            np.testing.assert_array_equal(turned[4 * i + k], np.rot90(images[i], k))
    np.testing.assert_array_equal(jax.jit(pixels.turned)(images), turned)
    with pytest.raises(UserError, match="square"):
        pixels.turned(images[:, :5])


# Resizing


@pytest.mark.parametrize(
    ("ramp", "rule", "size", "expected"),
    [
        (RAMP4, "legacy", 2, [[0, 2], [8, 10]]),
        (RAMP4, "half_pixel", 2, [[2.5, 4.5], [10.5, 12.5]]),
        (RAMP4, "antialias", 2, [[3.571429, 5.142857], [9.857143, 11.428571]]),
        (RAMP4, "legacy", 3, [[0, 1.33333, 2.66667], [10.66667, 12, 13.33333]]),
        (RAMP4, "half_pixel", 3, [[0.83333, 2.16667, 3.5], [11.5, 12.83333, 14.16667]]),
        (RAMP4, "antialias", 3, [[1.5, 2.7, 3.9], [11.1, 12.3, 13.5]]),
        (RAMP4, "legacy", 1, [[0], [0]]),
        (RAMP4, "half_pixel", 1, [[7.5], [7.5]]),
        (RAMP8, "legacy", 2, [[0, 4], [32, 36]]),
        (RAMP8, "half_pixel", 2, [[13.5, 17.5], [45.5, 49.5]]),
        (RAMP8, "antialias", 2, [[17.035713, 20.25], [42.75, 45.964287]]),
    ],
)
def test_resized_ramps(ramp, rule, size, expected):
    result = pixels.resize(ramp, size, size, rule=rule)
    assert result.shape == (size, size, 1) and result.dtype == np.float32
    np.testing.assert_allclose(result[[0, -1], :, 0], expected, atol=6e-6, rtol=0)  # first and last row


# torch 2.13: interpolate(x, size, mode="bilinear", align_corners=False, antialias=...), x = arange(35)**2 % 97 as 5 x 7
TORCH = {
    ("half_pixel", (3, 4)): [
        [18.45833, 26.83333, 17.20833, 42.12500],
        [12.87500, 66.12500, 40.75000, 33.75000],
        [42.62500, 39.70834, 55.16667, 64.75000],
    ],
    ("antialias", (3, 4)): [
        [24.76190, 26.64000, 18.78857, 42.61905],
        [38.03704, 63.53778, 51.94667, 49.37037],
        [49.47619, 58.48572, 61.20000, 62.86394],
    ],
    ("half_pixel", (2, 10)): [
        [36.75000, 43.07500, 51.62500, 61.07500, 24.53751, 10.62500, 22.97499, 36.62500, 51.17500, 63.00000],
        [41.75000, 67.32500, 76.12500, 42.17500, 72.57499, 74.67500, 47.26249, 68.43750, 68.68750, 59.75000],
    ],
    ("antialias", (2, 10)): [
        [22.90909, 31.15909, 41.05682, 49.87045, 37.05682, 27.90909, 25.51363, 41.61364, 46.70909, 45.90909],
        [26.90909, 50.55909, 63.52272, 45.64090, 72.04772, 71.69772, 44.37045, 58.46591, 59.57273, 54.77272],
    ],
}


@pytest.mark.parametrize(("rule", "size"), TORCH)
def test_resize_equals_torch(rule, size):
    image = (np.arange(35.0) ** 2 % 97).reshape(5, 7, 1)
    result = pixels.resize(image, *size, rule=rule)
    np.testing.assert_allclose(result[..., 0], TORCH[rule, size], atol=2e-5)
    assert result.dtype == np.float32


@pytest.mark.parametrize("image", [ASTRONAUT, CAMERA], ids=["astronaut", "camera"])
@pytest.mark.parametrize("size", [(256, 256), (100, 333), (600, 520)])
def test_resized_photographs_equal_pillow_and_opencv(image, size):
    height, width = size
    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
        for c in range(image.shape[-1])
    ]
    np.testing.assert_allclose(pixels.resize(image, *size, rule="antialias"), np.stack(channels, axis=-1), atol=2e-4)
    opencv = cv2.resize(image.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    half_pixel = pixels.resize(image, *size, rule="half_pixel")
    np.testing.assert_allclose(half_pixel, opencv.reshape(half_pixel.shape), atol=2e-4)


def test_legacy_keeps_single_pixels():
    images = photos(48).images
    np.testing.assert_array_equal(pixels.resize(images, 24, 24, rule="legacy"), images[:, ::2, ::2])
    np.testing.assert_array_equal(pixels.resize(images, 12, 12, rule="legacy"), images[:, ::4, ::4])
    three_quarters = pixels.resize(images, 36, 36, rule="legacy")
    np.testing.assert_array_equal(three_quarters[:, ::3, ::3], images[:, ::4, ::4])


def test_only_symmetric_rules_commute_with_turning():
    images = photos(32).images
    for rule, size, commutes in (("half_pixel", 24, True), ("antialias", 20, True), ("legacy", 16, False)):
        before = pixels.resize(pixels.quarter_turns(images, 1), size, size, rule=rule)
        after = pixels.quarter_turns(pixels.resize(images, size, size, rule=rule), 1)
        assert np.allclose(before, after, atol=1e-3) == commutes, rule


def test_scale_rounds_to_even_and_keeps_everything_else():
    ramp = Source(RAMP4[None].astype(np.uint8))
    halves = scale(0.5, rule="half_pixel")(ramp).images  # of 2.5, 4.5, 10.5, 12.5
    np.testing.assert_array_equal(halves[0, ..., 0], [[2, 4], [10, 12]])
    source = photos(48)
    scaled = scale(0.75, rule="half_pixel")(source)
    exact = pixels.resize(source.images, 36, 36, rule="half_pixel")
    assert np.abs(scaled.images - exact).max() <= 0.5
    assert scaled.images.dtype == np.uint8 and scaled.shape == (36, 36, 3)
    assert (scaled.classes, scaled.names) == (source.classes, source.names)
    np.testing.assert_array_equal(scaled.labels, source.labels)
    assert scale(0.5)(source.with_images(source.images[:, :45, :47])).shape == (22, 24, 3)  # 22.5 and 23.5


@pytest.mark.parametrize("alpha", [0.5, 0.25, 1 / 3])
def test_the_strided_path_equals_the_arithmetic(alpha):
    source = photos(48)
    side = round(48 * alpha)
    scaled = scale(alpha)(source).images
    assert scaled.flags.c_contiguous
    np.testing.assert_array_equal(scaled, pixels.resize(source.images, side, side, rule="legacy"))


def test_stretch_takes_height_first():
    source = photos(48)
    assert stretch(0.5, 1.25)(source).shape == (24, 60, 3)
    np.testing.assert_array_equal(stretch(0.5, 0.25)(source).images, source.images[:, ::2, ::4])
    np.testing.assert_array_equal(stretch(0.75, 0.75)(source).images, scale(0.75)(source).images)


# Gray and corners


def test_gray_weights_and_channels():
    colours = np.array([(10, 20, 30), (255, 0, 0), (255, 255, 255)], np.uint8).reshape(1, 1, 3, 3)
    np.testing.assert_allclose(pixels.gray(colours)[0, 0], [18.15, 76.245, 255], rtol=1e-6)
    viewed = gray()(Source(colours)).images
    np.testing.assert_array_equal(viewed[0, 0], np.repeat([[18], [76], [255]], 3, axis=1))
    opencv = cv2.cvtColor(ASTRONAUT, cv2.COLOR_RGB2GRAY).astype(int)
    assert np.abs(np.rint(pixels.gray(ASTRONAUT)) - opencv).max() <= 1  # OpenCV rounds its weights to 15 bits
    camera = Source(CAMERA[None])
    assert gray()(camera) is camera


def test_harris_response_of_a_square():
    response = pixels.harris_response(SQUARE)[0]
    np.testing.assert_allclose(
        response[3:6, 3:6],
        [[-1.6517e5, -1.8168e6, -1.1396e7], [-1.8168e6, 8.2583e7, 2.1885e8], [-1.1396e7, 2.1885e8, 4.5834e8]],
        rtol=5e-5,
    )
    assert response.max() == pytest.approx(4.5833578e8, rel=1e-7)
    assert set(zip(*np.nonzero(response == response.max()), strict=True)) == {(5, 5), (5, 11), (11, 5), (11, 11)}
    marked = response > 0.01 * response.max()
    expected = np.zeros((16, 16), bool)
    expected[np.ix_([4, 5, 11, 12], [4, 5, 11, 12])] = True
    np.testing.assert_array_equal(marked, expected)
    assert cv2.dilate(marked.astype(np.uint8), np.ones((3, 3))).sum() == 64  # what dilation, left out here, would mark
    bytes_response = cv2.cornerHarris(SQUARE[0].astype(np.uint8), 2, 3, 0.04)  # scaled by 1 / 255 before squaring
    np.testing.assert_allclose(bytes_response.astype(np.float64) * 255**4, response, atol=1e-6 * response.max())


def test_harris_with_an_odd_block_is_centred():
    response = pixels.harris_response(SQUARE, block=3)[0]
    peaks = {(4, 4), (4, 11), (11, 4), (11, 11)}
    assert set(zip(*np.nonzero(response > 0.999999 * response.max()), strict=True)) == peaks
    assert (response > 0.01 * response.max()).sum() == 36
    other = skimage.feature.corner_harris(SQUARE[0], k=0.05, sigma=1)
    assert set(zip(*np.nonzero(other > 0.999999 * other.max()), strict=True)) == peaks
    assert (other > 0.01 * other.max()).sum() == 64


@pytest.mark.parametrize(("block", "sobel", "k"), [(2, 3, 0.04), (3, 3, 0.06), (4, 5, 0.04), (5, 7, 0.15)])
@pytest.mark.parametrize("image", [ASTRONAUT[:300, :257], CAMERA], ids=["astronaut", "camera"])
def test_harris_equals_opencv_on_photographs(image, block, sobel, k):
    shade = np.rint(pixels.gray(image))
    opencv = cv2.cornerHarris(shade, block, sobel, k)
    response = pixels.harris_response(shade[None], block=block, sobel=sobel, k=k)[0]
    np.testing.assert_allclose(response, opencv, atol=2e-6 * np.abs(opencv).max())
    marked = pixels.mark_corners(image[None], block=block, sobel=sobel, k=k, value=7)[0]
    np.testing.assert_array_equal(marked, np.where((opencv > 0.01 * opencv.max())[..., None], 7, image))


def test_an_even_block_does_not_turn_with_the_image():
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32)).astype(np.float32)

    def difference(block):
        response = pixels.harris_response(noise, block=block)
        turned = pixels.harris_response(np.rot90(noise, 1, (1, 2)), block=block)
        return np.abs(np.rot90(turned, -1, (1, 2)) - response).max() / response.max()

    assert difference(2) > 0.5
    assert difference(3) < 1e-6


def test_harris_marks_nothing_without_contrast_and_the_square_in_bytes():
    flat = np.stack([np.full((16, 16, 3), shade, np.uint8) for shade in (0, 77, 255)])
    assert harris(value=9)(Source(flat)).images.tobytes() == flat.tobytes()
    square = np.repeat(SQUARE[..., None], 3, axis=-1).astype(np.uint8)
    marked = harris(value=9)(Source(square)).images
    assert (marked == 9).all(axis=-1).sum() == 16 and (marked == 9).sum() == 48


def test_gray_and_harris_commute():
    source = photos(64, 8)
    one, other = compose(gray(), harris())(source), compose(harris(), gray())(source)
    np.testing.assert_array_equal(one.images, other.images)
    assert (one.images != gray()(source).images).any()


# Composition


def test_hybrid_draws_once_per_image_by_position():
    source = Source(np.tile(photos(16, 8).images, (50, 1, 1, 1)))
    mixed, changed = hybrid(harris(), share=0.3, seed=1)(source).images, harris()(source).images
    drawn = (mixed != source.images).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(mixed[drawn], changed[drawn])
    assert 0.2 < drawn.mean() < 0.4  # sd 0.023
    np.testing.assert_array_equal(hybrid(harris(), share=0.3, seed=1)(source).images, mixed)
    np.testing.assert_array_equal(hybrid(harris(), share=0.3, seed=1)(source.take(range(100))).images, mixed[:100])
    assert (hybrid(harris(), share=0.3, seed=2)(source).images != mixed).any()
    np.testing.assert_array_equal(hybrid(harris(), share=1)(source).images, changed)
    assert hybrid(harris(), share=0)(source) is source
    with pytest.raises(UserError, match="keeps the image size"):
        hybrid(scale(0.5))(source)


def test_compose_goes_from_first_to_last():
    source = photos(32)
    marked_then_scaled = compose(harris(), scale(0.5))(source)
    np.testing.assert_array_equal(marked_then_scaled.images, harris()(source).images[:, ::2, ::2])


def test_identities_hand_back_the_same_source():
    source = photos(32)
    for identity in (scale(1), scale(0.99), stretch(1, 1), compose(), compose(scale(1.0), compose())):
        assert identity(source) is source


VIEWS = [
    lambda: scale(0.75),
    lambda: scale(0.5, rule="antialias"),
    lambda: stretch(0.7, 0.9, rule="half_pixel"),
    lambda: gray(),
    lambda: harris(block=3),
    lambda: hybrid(gray(), share=0.4, seed=3),
    lambda: compose(gray(), harris(), scale(0.25)),
]


@pytest.mark.parametrize("make", VIEWS, ids=lambda make: repr(make()))
def test_views_are_values_and_work_in_chunks(make, monkeypatch):
    assert make() == make() and hash(make()) == hash(make())
    assert eval(repr(make())) == make()
    assert len({made() for made in VIEWS}) == len(VIEWS)
    source = photos(32, 8)
    before = source.images.copy()
    whole = make()(source)
    monkeypatch.setattr(view, "CHUNK", 3 * 32 * 32 * 3)  # three images at a time, the last two together
    np.testing.assert_array_equal(make()(source).images, whole.images)
    np.testing.assert_array_equal(source.images, before)
    assert whole.images.dtype == np.uint8 and whole.names == source.names


def test_equal_numbers_make_equal_views():
    assert repr(scale(1)) == repr(scale(1.0)) and scale(np.float64(0.5)) == scale(0.5)
    assert scale(0.5) != scale(0.5, rule="half_pixel") and scale(0.5) != stretch(0.5, 0.5)


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda: scale(0), "alpha in"),
        (lambda: scale(-0.5), "alpha in"),
        (lambda: scale(1.5), "alpha in"),
        (lambda: scale(float("nan")), "alpha in"),
        (lambda: scale(0.5, rule="cubic"), "legacy, half_pixel, antialias"),
        (lambda: scale(0.01)(photos(32)), "32 x 32 pixels are too small for alpha 0.01"),
        (lambda: stretch(1, 0), "above 0"),
        (lambda: stretch(1, 1, rule="cubic"), "legacy, half_pixel, antialias"),
        (lambda: pixels.resize(RAMP4, 0, 2), "at least 1 x 1"),
        (lambda: pixels.gray(np.zeros((2, 2, 4))), "1 or 3 channels"),
        (lambda: harris(value=256), "0 to 255"),
        (lambda: harris(threshold=1), r"\[0, 1\)"),
        (lambda: harris(block=1), "at least 2"),
        (lambda: harris(sobel=4), "odd"),
        (lambda: harris(k=0.3), "0.25"),
        (lambda: hybrid(gray(), share=1.1), r"\[0, 1\]"),
    ],
)
def test_mistakes_are_named_in_one_line(mistake, words):
    with pytest.raises(UserError, match=words) as caught:
        mistake()
    assert "\n" not in str(caught.value)
