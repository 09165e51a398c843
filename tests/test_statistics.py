import numpy as np
import pytest
from scipy import special, stats
from sklearn import linear_model, preprocessing

from jaxsd.errors import RunError, UserError
from jaxsd.evaluate.probes import ridge_regression
from jaxsd.evaluate.statistics import NAMES, asymmetric_gaussian, generalised_gaussian, image_statistics, normalised


def named(images):
    """Statistics by name, each [N]."""
    return dict(zip(NAMES, image_statistics(images).T, strict=True))


def smooth(n=4, side=64, channels=3, seed=0):
    """Random images of waves."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(2 * np.pi * (f[0] * x + f[1] * y + f[2])) for f in rng.uniform(-4, 4, (n * channels, 3))]
    images = 128 + 60 * np.stack(waves).reshape(n, channels, side, side).transpose(0, 2, 3, 1)
    return np.rint(images + rng.normal(0, 2, images.shape)).clip(0, 255).astype(np.uint8)


def test_fits_against_known_distributions():
    for alpha in (0.8, 1.0, 2.0, 4.0):
        draws = stats.gennorm.rvs(alpha, scale=3, size=(2, 200_000), random_state=1)
        found, variance = generalised_gaussian(draws)
        assert found == pytest.approx(alpha, rel=0.05)
        assert variance == pytest.approx(stats.gennorm.var(alpha, scale=3), rel=0.05)
        # Of two halves with scales 1 and 2, one twice as often as the other, so that the density has no step.
        halves = np.abs(draws) / 3 * np.where(np.arange(200_000) % 3 == 0, -1, 2)
        shape, mean, left, right = asymmetric_gaussian(halves)
        assert shape == pytest.approx(alpha, rel=0.05) and mean == pytest.approx(halves.mean(axis=1), rel=0.05)
        unit = special.gamma(3 / alpha) / special.gamma(1 / alpha)
        assert left == pytest.approx(unit, rel=0.05) and right == pytest.approx(4 * unit, rel=0.05)


def test_local_normalisation_by_hand():
    gray = np.random.default_rng(0).uniform(0, 255, (1, 9, 11))
    offsets = np.arange(-3, 4)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * (7 / 6) ** 2))
    window /= window.sum()
    for row, column in ((4, 5), (3, 3)):
        part = gray[0, row - 3 : row + 4, column - 3 : column + 4]
        mean = (window * part).sum()
        deviation = np.sqrt((window * part**2).sum() - mean**2)
        wanted = (gray[0, row, column] - mean) / (deviation + 1)
        assert normalised(gray)[0, row, column] == pytest.approx(wanted)


def test_a_constant_image_has_finite_statistics():
    for side, channels in ((8, 1), (9, 3), (33, 3)):
        found = image_statistics(np.full((2, side, side, channels), 77, np.uint8))
        assert found.shape == (2, len(NAMES)) and np.isfinite(found).all()
        flat = dict(zip(NAMES, found[0], strict=True))
        assert flat["luminance"] == pytest.approx(77) and abs(flat["colourfulness"]) < 1e-9
        assert flat["alpha_1"] == flat["below_left_alpha_2"] == pytest.approx(10)  # the last of the table
        assert max(abs(flat[name]) for name in ("contrast_1", "gradient_mean_2", "blockiness")) < 1e-6
    assert np.isfinite(image_statistics(np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8))).all()


def test_noise_is_more_gaussian_than_edges():
    rng = np.random.default_rng(0)
    noise = rng.normal(128, 20, (4, 64, 64, 1)).clip(0, 255).astype(np.uint8)
    edges = np.kron(rng.integers(0, 256, (4, 4, 4, 1)), np.ones((1, 16, 16, 1))).astype(np.uint8)
    # Dividing by a deviation that each pixel is part of makes the tails of noise lighter: above 2.
    assert ((named(noise)["alpha_1"] > 2) & (named(noise)["alpha_1"] < 3.5)).all()
    assert (named(edges)["alpha_1"] < 1).all()
    deviation, slope = np.exp(named(noise)["contrast_1"]) - 1, np.exp(named(noise)["gradient_mean_1"]) - 1
    assert deviation == pytest.approx(20, rel=0.05)
    assert slope == pytest.approx(20 * np.sqrt(np.pi / 2), rel=0.05)  # Rayleigh's distribution


def test_a_flip_changes_nothing_but_the_diagonals():
    images = smooth()
    first, mirrored = named(images), named(images[:, :, ::-1])
    swapped = {"below_right": "below_left", "below_left": "below_right"}
    for name in NAMES:
        kind = next((kind for kind in swapped if name.startswith(f"{kind}_")), "")
        other = name.replace(kind, swapped[kind], 1) if kind else name
        np.testing.assert_allclose(mirrored[other], first[name], rtol=1e-9, atol=1e-9, err_msg=name)
    turned = named(images.transpose(0, 2, 1, 3))
    np.testing.assert_allclose(turned["right_alpha_2"], first["below_alpha_2"])


def test_gray_is_colour_with_equal_channels():
    gray = smooth(channels=1)
    np.testing.assert_allclose(image_statistics(np.repeat(gray, 3, axis=3)), image_statistics(gray), atol=1e-6)
    assert (named(gray)["colourfulness"] == 0).all()


def test_colourfulness_by_hand():
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[:, :4] = (200, 100, 50)  # R - G = 100, (R + G) / 2 - B = 100; the other half is black
    wanted = np.hypot(50, 50) + 0.3 * np.hypot(50, 50)
    assert named(image)["colourfulness"][0] == pytest.approx(wanted)


@pytest.mark.parametrize("shift", [0, 3])
def test_blockiness_is_that_of_eight_pixels(shift):
    rng = np.random.default_rng(0)
    eights, fours = (np.kron(rng.integers(0, 256, (1, 96 // n, 96 // n, 1)), np.ones((1, n, n, 1))) for n in (8, 4))
    part = slice(shift, shift + 64)
    found = [named(images[:, part, part].astype(np.uint8))["blockiness"][0] for images in (eights, fours)]
    assert found[0] > 3 and found[1] < found[0] - 1
    assert named(np.full((1, 64, 64, 1), 9, np.uint8) + np.arange(64, dtype=np.uint8)[:, None])["blockiness"][0] < 0.01


def test_the_gradient_of_a_ramp():
    ramp = (3 * np.arange(16)[:, None] + 4 * np.arange(16)).astype(np.uint8)[None, ..., None]
    found = named(ramp)
    assert np.exp(found["gradient_mean_1"]) - 1 == pytest.approx(5) and found["gradient_std_1"] == pytest.approx(
        0, abs=1e-6
    )
    assert np.exp(found["gradient_mean_2"]) - 1 == pytest.approx(10)


def test_chunks_change_nothing(monkeypatch):
    images = smooth(7, side=16)
    whole = image_statistics(images)
    monkeypatch.setattr("jaxsd.evaluate.statistics.CHUNK", 2 * 16 * 16)
    np.testing.assert_array_equal(image_statistics(images), whole)


@pytest.mark.parametrize(
    ("images", "what"),
    [
        (np.zeros((2, 7, 9, 3), np.uint8), "at least 8x8.*7x9"),
        (np.zeros((2, 8, 8, 2), np.uint8), "1 or 3"),
        (np.zeros((2, 8, 8, 3)), "uint8"),
        (np.zeros((0, 8, 8, 3), np.uint8), "uint8"),
    ],
)
def test_images_without_statistics(images, what):
    with pytest.raises(UserError, match=what):
        image_statistics(images)


# Ridge regression


@pytest.mark.parametrize(("n", "d"), [(60, 20), (20, 60)])
def test_ridge_regression_against_sklearn(n, d):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(n + 9, d)) * rng.uniform(0.1, 9, d) + 5
    scores = features @ rng.normal(size=d) + rng.normal(0, 9, n + 9) + 40
    penalties = np.logspace(-2, 4, 13)
    scaler = preprocessing.StandardScaler().fit(features[:n])
    oracle = linear_model.RidgeCV(penalties).fit(scaler.transform(features[:n]), scores[:n])
    assert penalties[0] < oracle.alpha_ < penalties[-1]
    found = ridge_regression(features[:n], scores[:n], features[n:], penalties=penalties)
    np.testing.assert_allclose(found, oracle.predict(scaler.transform(features[n:])), atol=1e-8)
    dead = np.full((n + 9, 1), 7.3)
    more = np.hstack([features * 100 - 3, dead])
    np.testing.assert_allclose(ridge_regression(more[:n], scores[:n], more[n:], penalties=penalties), found, atol=1e-6)


def test_ridge_regression_finds_the_noise_and_survives_collapse():
    rng = np.random.default_rng(0)
    amount = rng.uniform(1, 50, 120)
    noise = rng.normal(size=(120, 16, 16, 1)) * amount[:, None, None, None]
    features = image_statistics((128 + noise).clip(0, 255).astype(np.uint8))
    found = ridge_regression(features[:80], amount[:80], features[80:])
    assert found.shape == (40,) and stats.spearmanr(found, amount[80:])[0] > 0.9
    np.testing.assert_allclose(ridge_regression(np.ones((4, 3)), [1, 2, 3, 6], np.ones((2, 3))), [3, 3])


def test_ridge_regression_says_what_is_wrong():
    x, y = np.ones((4, 3)), np.zeros(4)
    with pytest.raises(UserError, match=r"\[5\] for 4"):
        ridge_regression(x, np.zeros(5), x)
    with pytest.raises(UserError, match="3 and 2"):
        ridge_regression(x, y, np.ones((1, 2)))
    with pytest.raises(UserError, match="image 3 is not finite"):
        ridge_regression(x, [0, 1, 2, np.inf], x)
    with pytest.raises(RunError, match="test features are not finite"):
        ridge_regression(x, y, x * np.nan)
    with pytest.raises(UserError, match="above 0"):
        ridge_regression(x, y, x, penalties=[0.0])
