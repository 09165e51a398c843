"""What stages are shown before training, and their rates: the pictures have what a run will have."""

import numpy as np
import pytest
from PIL import Image
from test_configs import config_of

from jaxsd import build, check_pictures
from jaxsd.data import Source, Splits
from jaxsd.errors import UserError
from jaxsd.figures_data import Picture, picture_pairs, picture_rows, rate_panels
from jaxsd.views import flip_horizontal

RED, BLUE = (np.full((8, 8, 3), colour, np.uint8) for colour in ((255, 0, 0), (0, 0, 255)))


def source(count, side=8):
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    return Source(images, np.arange(count) % 2)


def pixels_of(path, colour):
    """How many pixels of a picture have a colour, and the columns and rows where they are."""
    same = (np.abs(np.asarray(Image.open(path).convert("RGB")).astype(int) - colour) < 3).all(-1)
    return same.sum(), np.flatnonzero(same.any(0)), np.flatnonzero(same.any(1))


def test_pairs_stand_side_by_side_and_rows_below_each_other(tmp_path):
    pair = ("a heading", [Picture(RED, "one\ntrain"), Picture(BLUE, "a name that is far too long to be shown whole")])
    picture_pairs(tmp_path / "pairs.png", [pair] * 4)
    count, columns, rows = pixels_of(tmp_path / "pairs.png", (255, 0, 0))
    assert count == pytest.approx(4 * 160**2, rel=0.02)  # 1.6 inches at 100 dots
    assert len(columns) == pytest.approx(3 * 160, abs=6) and len(rows) == pytest.approx(2 * 160, abs=4)
    others = pixels_of(tmp_path / "pairs.png", (0, 0, 255))[1]
    assert columns[0] < others[0] == pytest.approx(columns[0] + 175, abs=2) and not set(columns) & set(others)
    picture_rows(tmp_path / "rows.png", [("both", [Picture(RED[:4], "")]), ("", [Picture(BLUE, ""), Picture(RED, "")])])
    assert pixels_of(tmp_path / "rows.png", (255, 0, 0))[0] == pytest.approx(1.5 * 160**2, rel=0.02)
    with pytest.raises(UserError, match="at least one"):
        picture_pairs(tmp_path / "no.png", [])
    with pytest.raises(UserError, match="at least one"):
        picture_rows(tmp_path / "no.png", [("a heading", [])])
    with pytest.raises(UserError, match="at least one"):
        rate_panels(tmp_path / "no.png", {})


def test_rates_are_drawn_as_they_will_be(tmp_path):
    config = config_of("scalenet", "tiny")
    splits = Splits("noise", source(200), None, source(20))
    recipe = build.recipe(config, (8, 8, 3), 2)
    courses = check_pictures.courses(recipe, splits, None)
    # 128 images in batches of 32; as many pixels as two epochs at 4 x 4 and one at 8 x 8 show are 1.5 epochs at 8 x 8
    rates, steps = courses["rotnet, half\n2 epochs of 4 steps"]
    assert "full\n1 epoch of 4 steps" in courses and len(courses) == 5
    stage = recipe.arms["scalenet"][0]
    assert steps == 4 and np.array_equal(rates, stage.schedule.rates(2, 4))
    rate_panels(tmp_path / "rates.png", {**courses, "rising\n": (np.linspace(0, 1, 50), 10)})
    assert pixels_of(tmp_path / "rates.png", (0, 114, 178))[0] > 500 * len(courses)


def test_rows_show_input_view_patches_and_draws():
    config = config_of("scalenet", "tiny")
    config["inputs"] = {"original": (), "gray": ({"name": "gray"},)}
    config["stages"]["half"]["augment"] = ({"name": "flip_horizontal"},)
    train = source(30)
    rows = check_pictures.shown(build.recipe(config, (8, 8, 3), 2), train, None)
    headings = [heading for heading, _ in rows if heading]
    assert headings == [
        "input original: finetune, finetune_long, rotnet, full, probe (8 x 8, no augmentation)",
        "input original: half (4 x 4, chain(flip_horizontal()))",
        "input gray: finetune, finetune_long, rotnet, full, probe (8 x 8, no augmentation)",
        "input gray: half (4 x 4, chain(flip_horizontal()))",
    ]
    assert [picture.words for picture in rows[0][1]] == ["image", "image"]  # both examples beside each other
    pictures = rows[1][1]
    assert [picture.words for picture in pictures] == ["image", "view", *(f"augmented {n}" for n in range(1, 6))]
    assert np.array_equal(pictures[0].image, train.images[0])
    assert np.array_equal(pictures[1].image, train.images[0, ::2, ::2])
    small = pictures[1].image / 255
    flips = [np.allclose(picture.image, small[:, ::-1]) for picture in pictures[2:]]
    assert all(flip or np.allclose(p.image, small) for flip, p in zip(flips, pictures[2:], strict=True))
    assert 0 < sum(flips) < 5
    own = source(10, 8)
    again = check_pictures.shown(build.recipe(config, (8, 8, 3), 2), train, own.with_images(255 - own.images))
    assert any(np.array_equal(p.image, 255 - own.images[0]) for _, line in again for p in line)


def test_patches_are_cut_as_the_network_sees_them():
    images = source(4, 32)
    config = config_of("patches", "tiny")
    recipe = build.recipe(config, (32, 32, 3), 0, scored=True)
    rows = check_pictures.shown(recipe, images, None)
    (heading,) = [heading for heading, _ in rows if heading.startswith("patch16")]
    assert heading == "patch16 (patches of 16 x 16, no augmentation)"
    pictures = rows[[heading for heading, _ in rows].index(heading)][1]
    assert [p.words for p in pictures] == ["image", *(f"patch {n} of 4" for n in (1, 2, 3, 4))]
    assert np.array_equal(pictures[2].image, images.images[0, :16, 16:])


def test_a_draw_is_the_augmentations_own():
    given = source(2, 6)
    (first, _) = check_pictures._examples(given, given, given, flip_horizontal())
    assert [picture.image.shape for picture in first] == [(6, 6, 3)] * 6
