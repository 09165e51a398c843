"""Figures of scores: what is where, by the colours of the written file."""

import sys

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from PIL import Image

from jaxsd.errors import UserError
from jaxsd.figures import image_rows
from jaxsd.figures_scores import COLOURS, metric_by_stage, predicted_scores, quality_map

WHITE = np.full((40, 40, 3), 255, np.uint8)
HOT = np.zeros((4, 4))
HOT[1, 2] = 8


@pytest.fixture(autouse=True)
def without_pyplot(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail


def pixels_of(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def found(pixels, colour, near=2):
    """Where a colour is (a name, a hex value, or parts of one): a mask."""
    return (np.abs(pixels - np.array(to_rgb(colour)) * 255) <= near).all(axis=-1)


def box(mask, least=0):
    """(top, bottom, left, right) of rows and columns where more than `least` is set: letters have few."""
    rows, columns = np.flatnonzero(mask.sum(axis=1) > least), np.flatnonzero(mask.sum(axis=0) > least)
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def test_a_hot_patch_is_hot_at_its_place_and_all_panels_share_a_scale(tmp_path):
    maps = {"10": HOT, "20": np.array([[0, 2], [0, 0.0]]), "40": np.array([[0.5]])}
    quality_map(tmp_path / "map.png", WHITE - 55, maps, score=0.7, unit="DMOS")
    pixels = pixels_of(tmp_path / "map.png")
    picture = found(pixels, (200 / 255,) * 3)
    assert picture.sum() == pytest.approx(360**2, rel=0.02)  # 2.4 inches at 150 dots
    light = 0.65 + 0.35 * 200 / 255  # the picture is the brightness of the colours
    shown = {value: tuple(light * np.array(colormaps["viridis"](value / 8)[:3])) for value in (0, 0.5, 2, 8)}
    areas = {value: found(pixels, colour).sum() / 360**2 for value, colour in shown.items()}
    assert areas == pytest.approx({0: 15 / 16 + 3 / 4, 0.5: 1, 2: 1 / 4, 8: 1 / 16}, abs=0.03)
    top, bottom, left, right = box(picture, 50)
    hot = np.array(box(found(pixels, shown[8]))) - (top, top, left + 375, left + 375)  # the panel on the right
    assert hot == pytest.approx([90, 180, 180, 270], abs=3)  # second row, third column of four


def test_an_arm_that_is_far_off_does_not_hide_the_others(tmp_path):
    true = np.linspace(0, 1, 50)
    predicted_scores(tmp_path / "alone.png", {"near": true}, true)
    predicted_scores(tmp_path / "both.png", {"near": true, "far": 1000 * true}, true)
    widths = []
    for name, half in (("alone", 1), ("both", 2)):
        pixels = pixels_of(tmp_path / f"{name}.png")
        pixels = pixels[:, : pixels.shape[1] // half]
        points = (pixels[..., 2] - pixels[..., 0] > 60) & (pixels[..., 2] > 150)
        _, _, left, right = box(points)
        widths.append(right - left)
    assert widths[1] > 0.4 * widths[0]


def test_a_map_without_differences_lies_in_the_middle_of_its_scale(tmp_path):
    quality_map(tmp_path / "map.png", WHITE[..., :1], {"20": np.full((2, 2), 3.0)})
    assert found(pixels_of(tmp_path / "map.png"), colormaps["viridis"](0.5)[:3]).sum() > 0.95 * 360**2


def lines_right(pixels):
    """How many plots there are, by the columns of their left borders, darker than half of the longest."""
    dark = (pixels.sum(axis=-1) < 150).sum(axis=0)
    long = np.flatnonzero(dark > dark.max() / 2)
    return int((np.diff(long, prepend=-10) > 3).sum()) // 2


def whole(pixels):
    """Whether nothing touches the border of a file: no words are cut off there."""
    inner = pixels[2:-2, 2:-2]
    return pixels.sum() - inner.sum() == 765 * (pixels[..., 0].size - inner[..., 0].size)


LONG = "mean opinion score, 0 to 100, higher is better"


@pytest.mark.parametrize(("arms", "kinds"), [(1, 5), (2, 0), (5, 25)])
def test_no_words_are_cut_off(tmp_path, arms, kinds):
    true = np.linspace(-120, 110, 50)
    names = [f"distortion {n % kinds}" for n in range(50)] if kinds else []
    titles = {"an arm with a rather long name 0": "Pearson 0.9712, Spearman 0.9698, MAE 12.123"} if arms != 2 else None
    arms, unit = {f"an arm with a rather long name {n}": true for n in range(arms)}, LONG if kinds else ""
    predicted_scores(tmp_path / "scores.png", arms, true, unit=unit, kinds=names, titles=titles)
    assert whole(pixels_of(tmp_path / "scores.png"))


def test_no_words_of_the_other_figures_are_cut_off(tmp_path):
    maps = {"32": 100 * HOT, "64": HOT}
    for count, height in ((1, 40), (2, 15)):
        quality_map(tmp_path / "map.png", WHITE[:height], dict(list(maps.items())[:count]), score=-112.34, unit=LONG)
        assert whole(pixels_of(tmp_path / "map.png"))
    for stages in (["32", "64"], ["patches of 32", "patches of 64", "whole images"]):
        values = list(range(len(stages)))
        metric_by_stage(tmp_path / "stages.png", stages, values, [None] * len(stages), metric="MAE", unit=LONG)
        assert whole(pixels_of(tmp_path / "stages.png"))


@pytest.mark.parametrize("arms", [1, 3])
def test_each_arm_has_a_panel_and_each_kind_a_colour(tmp_path, arms):
    true = np.arange(40.0)
    kinds = ["blur"] * 30 + ["noise"] * 10
    arms = {f"arm {n}": true for n in range(arms)}
    titles = {"arm 0": "Pearson 1.000"}
    predicted_scores(tmp_path / "scores.png", arms, true, unit="DMOS", kinds=kinds, titles=titles)
    pixels = pixels_of(tmp_path / "scores.png")
    assert lines_right(pixels) == len(arms)
    blur, noise = ((found(pixels, tuple(1 - 0.7 * (1 - c) for c in to_rgb(colour)), 6)) for colour in COLOURS[:2])
    assert 1.5 < blur.sum() / noise.sum() < 3  # three times as many, as discs against squares


def test_predictions_lie_across_scores_up_and_the_fit_over_them(tmp_path):
    true = np.linspace(0, 1, 50)
    flat = (np.linspace(0, 1.5, 9), np.full(9, 0.5))
    predicted_scores(tmp_path / "scores.png", {"more": 1.5 * true}, true, curves={"more": flat})
    pixels = pixels_of(tmp_path / "scores.png")
    points = (pixels[..., 2] - pixels[..., 0] > 60) & (pixels[..., 2] > 150)
    top, bottom, left, right = box(points)
    assert (right - left) / (bottom - top) == pytest.approx(1.5, rel=0.05)  # one scale for both
    black = (pixels.sum(axis=-1) < 60)[top : bottom + 1, left:right]
    row = int(black.sum(axis=1).argmax())
    assert row == pytest.approx((bottom - top) / 2, abs=4) and black[row].mean() > 0.95
    middle = pixels[(top + bottom) // 2 - 60]  # over the points: there the prediction is larger than the score
    gray = np.flatnonzero(found(middle[None], "0.6", 12)[0])
    blue = np.flatnonzero(points[(top + bottom) // 2 - 60])
    assert len(blue) and gray[gray > left].min() < blue.min()


def test_stages_fall_below_the_baselines_band(tmp_path):
    path = tmp_path / "stages.png"
    intervals = [(4, 6), None, (2.5, 3.5)]
    metric_by_stage(path, ["32", "64", "128"], [5, 4, 3], intervals, baseline=(9, (8, 10)), metric="MAE", unit="DMOS")
    pixels = pixels_of(path)
    band = box(found(pixels, tuple(1 - 0.18 * (1 - c) for c in to_rgb(COLOURS[3]))))
    blue = found(pixels, COLOURS[0])
    blue[: band[0]] = False  # the legend
    top, bottom, left, right = box(blue)
    assert top > band[1] and band[2] < left and right < band[3]
    unit = (band[1] - band[0]) / 2  # pixels
    assert (bottom - top) / unit == pytest.approx(6 - 2.5, abs=0.15)  # from the top of the first bar to the last's end
    assert (left + right) / 2 == pytest.approx((band[2] + band[3]) / 2, abs=3)
    middle = np.flatnonzero(blue[:, (left + right) // 2])
    assert (middle[-1] - middle[0]) / unit < 0.5  # one seed: a point without a bar


def test_one_seed_and_an_undefined_mean_leave_gaps(tmp_path):
    metric_by_stage(tmp_path / "stages.png", ["a", "b", "c", "d"], [1, None, 2, 3], [None] * 4)
    blue = found(pixels_of(tmp_path / "stages.png"), COLOURS[0])
    touched = np.flatnonzero(np.diff(blue.any(axis=0).astype(int)))
    assert len(touched) == 4  # the first point alone, then a line


def test_rows_of_images(tmp_path):
    rows = {
        "train": (np.stack([WHITE // 2] * 3), ["cat", "dog", "a very long class name"]),
        "test": (WHITE[None] // 4, ["c"]),
    }
    image_rows(tmp_path / "rows.png", rows)
    pixels = pixels_of(tmp_path / "rows.png")
    train, test = found(pixels, (127 / 255,) * 3), found(pixels, (63 / 255,) * 3)
    assert train.sum() == pytest.approx(3 * 160**2, rel=0.03) and test.sum() == pytest.approx(160**2, rel=0.03)
    upper, lower = box(train, 50), box(test, 50)
    assert lower[0] > upper[1] and lower[2] == pytest.approx(upper[2], abs=1)


SCORES = np.arange(3.0)


@pytest.mark.parametrize(
    ("draw", "said"),
    [
        (lambda path: quality_map(path, WHITE[0], {"8": HOT}), r"uint8 \[H, W, 1 or 3\]: got uint8 \[40, 3\]"),
        (lambda path: quality_map(path, WHITE / 255, {"8": HOT}), "got float64"),
        (lambda path: quality_map(path, WHITE, {}), "at least one patch size"),
        (lambda path: quality_map(path, WHITE, {"8": HOT[0]}), r"map of patch size 8 must be numbers \[rows, cols\]"),
        (lambda path: quality_map(path, WHITE, {"8": HOT / HOT}), "must be finite: 15 are not"),
        (lambda path: predicted_scores(path, {}, SCORES), "at least one arm"),
        (lambda path: predicted_scores(path, {"a": SCORES[1:]}, SCORES), "got 2 for 3 scores"),
        (lambda path: predicted_scores(path, {"a": SCORES}, SCORES, kinds=["blur"]), "got 1 for 3"),
        (lambda path: predicted_scores(path, {"a": SCORES}, SCORES, curves={"b": (SCORES, SCORES)}), "curve of 'b'"),
        (lambda path: metric_by_stage(path, ["32"], [1, 2], [None]), "got 1 stages, 2 means, 1 intervals"),
        (lambda path: metric_by_stage(path, [], [], []), "got 0 stages"),
        (lambda path: image_rows(path, {"train": (WHITE[None], [])}), "0 captions"),
        (lambda path: image_rows(path, {}), "at least one image"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_does_not_fit_is_named(tmp_path, draw, said):
    with pytest.raises(UserError, match=said) as error:
        draw(tmp_path / "figure.png")
    assert "\n" not in str(error.value)
