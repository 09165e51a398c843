"""Figures: what is where, by the colours of the written file."""

import sys

import numpy as np
import pytest
from PIL import Image

from jaxsd.errors import UserError
from jaxsd.figures import attention_figure

GRAY = np.full((2, 16, 32, 3), 128, np.uint8)
LEFT = np.zeros((2, 16, 32))
LEFT[..., :16] = 1


def test_attention_maps_lie_over_the_images_red_where_high(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    rows = {"RotNet": {"block1": LEFT, "block2": 0 * LEFT}, "ScaleNet": {"block1": 0 * LEFT, "block2": LEFT}}
    path = tmp_path / "figure.png"
    attention_figure(path, GRAY, rows, titles={"block1": "Stage-1"})
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)

    def cells(colour):
        """Pixels of a colour: how many, and the columns where they begin and end."""
        found = (np.abs(pixels - colour) <= 2).all(axis=-1)
        edges = np.flatnonzero(np.diff((found.sum(axis=0) > 50).astype(int)))  # more than letters have
        return found.sum(), edges

    picture = 240 * 120  # 1.6 x 0.8 inches at 150 dots
    originals, edges = cells((128, 128, 128))
    assert originals == pytest.approx(2 * picture, rel=0.03)
    assert len(edges) == 4  # two images side by side, a gap between them
    red, red_edges = cells((128, 64, 64))  # half gray, half the darkest red
    blue, _ = cells((64, 64, 128))
    assert red == pytest.approx(4 * picture / 2, rel=0.1)
    assert blue == pytest.approx(4 * picture + 4 * picture / 2, rel=0.1)
    assert len(red_edges) == 8 and (np.diff(red_edges)[::2] < 125).all()  # four left halves


@pytest.mark.parametrize(
    ("images", "rows", "words"),
    [
        (GRAY[0], {"a": {"block1": LEFT}}, "needs images"),
        (GRAY, {}, "at least one model"),
        (GRAY, {"a": {}}, "at least one model"),
        (GRAY, {"a": {"block1": LEFT}, "b": {"block2": LEFT}}, "b has \\['block2'\\]"),
        (GRAY, {"a": {"block1": LEFT[:1]}}, "maps of a block1 must be \\[2, 16, 32\\]"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, images, rows, words):
    with pytest.raises(UserError, match=words):
        attention_figure(tmp_path / "figure.png", images, rows)
