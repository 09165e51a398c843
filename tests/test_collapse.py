"""Collapsed features: by hand, and from the measurement to the note under the table."""

import dataclasses
import logging

import numpy as np
import pytest
from scipy.stats import ortho_group
from test_chain import SPLITS, recipe_of
from test_report import summary

from jaxsd import measure, report
from jaxsd.aggregate import collapses
from jaxsd.evaluate.collapse import DEVIATION, RANK, collapsed, spread
from jaxsd.recipe import Experiment


def with_values(values, n, seed=0):
    """Centred features [n, len(values)] of given singular values."""
    random = np.random.default_rng(seed)
    left, _ = np.linalg.qr(np.hstack([np.ones((n, 1)), random.normal(size=(n, len(values)))]))
    return left[:, 1:] * values @ ortho_group.rvs(len(values), random_state=seed)


def test_the_effective_rank_by_hand():
    """Equal singular values count, others by the entropy of their shares; a mean and a scale change nothing."""
    assert spread(with_values([3.0] * 16, 100)).rank == pytest.approx(16)
    assert spread(5 + 1e-3 * with_values([3.0] * 16, 100)).rank == pytest.approx(16)
    shares = np.array([0.5, 0.25, 0.25])  # entropy 1.5 ln 2
    assert spread(with_values(4 * shares, 50)).rank == pytest.approx(2**1.5)
    assert spread(np.outer(np.arange(20.0), np.arange(1, 9))).rank == pytest.approx(1)
    assert spread(np.full((20, 8), 3.7, np.float32)).rank == 0


def test_the_deviation_by_hand():
    """Directions that are axes, each as often, have deviation sqrt(1 - 1/D) of the even spread; one direction has 0."""
    axes = np.tile(np.eye(10), (5, 1)) * np.arange(1, 51)[:, None]
    assert spread(axes).deviation == pytest.approx((1 - 1 / 10) ** 0.5)
    isotropic = np.random.default_rng(0).normal(size=(500, 64))
    assert spread(isotropic).deviation == pytest.approx(1, abs=0.02) and 55 < spread(isotropic).rank < 64
    assert spread(np.outer(np.arange(1.0, 21), np.ones(8))).deviation == pytest.approx(0, abs=1e-9)


def test_more_images_than_are_looked_at():
    """They stand in order of classes: all are represented."""
    features = np.repeat(np.eye(10), 300, axis=0)
    assert spread(features).rank == pytest.approx(9, rel=1e-3)


def test_what_is_called_collapsed():
    random = np.random.default_rng(0)
    assert collapsed(random.normal(size=(200, 32))) is None
    line = np.outer(random.normal(size=200), random.normal(size=32))
    assert "effective rank 1.00 of 32 dimensions" in str(collapsed(line))
    assert "effective rank 0.00" in str(collapsed(np.ones((200, 32), np.float32)))
    narrow = 100 + 0.1 * random.normal(size=(200, 32))  # every direction is there, but hardly any of it
    assert spread(narrow).rank > RANK and spread(narrow).deviation < DEVIATION
    assert "all of one direction" in str(collapsed(narrow))
    assert collapsed(100 + 10 * random.normal(size=(200, 32))) is None
    assert collapsed(line[:7]) is None and collapsed(line[:, :7]) is None  # too few to say
    for value in (np.nan, np.inf):
        assert collapsed(np.full((200, 32), value, np.float32)) is None  # no numbers, of which classifiers tell
    two = np.repeat(random.normal(size=(2, 32)), 100, axis=0) + 0.05 * random.normal(size=(200, 32))
    assert collapsed(two) is None  # two classes told apart, with what is left of the images


def test_a_collapse_is_logged_marked_and_noted(tmp_path, monkeypatch, caplog):
    """Constant features of one block: the row, the mark, the note; a block that is well has none."""
    block_features = measure.block_features

    def flat(*args, **options):
        found = block_features(*args, **options)
        return {**found, "block2": np.full_like(found["block2"], 0.3)}

    monkeypatch.setattr(measure, "block_features", flat)
    recipe = dataclasses.replace(recipe_of(), evaluations=("ridge", "knn"), seeds=(0,))
    experiment = Experiment(recipe, SPLITS, tmp_path)
    cell = next(cell for cell in experiment.cells() if cell.arm == "half")
    logging.getLogger("jaxsd").propagate = True
    with caplog.at_level(logging.WARNING, "jaxsd"):
        rows = [row for _ in range(2) for row in measure.measure(experiment, cell)][-6:]
    told = [line for line in caplog.messages if "collapsed" in line]
    assert len(told) == 1 and "half seed 0: the features of block2 collapsed: effective rank 0.00 of" in told[0]
    assert {row["block"] for row in rows if "collapsed" in row} == {"block2"}
    shown = summary(rows, seeds=(0,))
    notes = collapses(shown["rows"])
    assert len(notes) == 1 and "‡ half, original, block2: the features collapsed" in notes[0]
    assert "in seed 0" in notes[0] and report.table(shown).count("‡") == 2
