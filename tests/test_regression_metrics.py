import math

import numpy as np
import pytest
from scipy import optimize, stats
from scipy.special import expit

from jaxsd.errors import RunError, UserError
from jaxsd.evaluate.regression import logistic5, per_kind, regression, undefined

FIT = ("pearson_logistic5", "mae_logistic5", "rmse_logistic5")


def noisy(n=200, seed=0):
    """Predictions and scores that somewhat go together, with ties in both."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 100, n).astype(np.float32)
    return np.round(scores + rng.normal(0, 15, n)), scores


@pytest.mark.parametrize(
    ("x", "y", "wanted"),
    [
        ((1, 2, 3, 4), (1, 3, 2, 4), {"pearson": 0.8, "spearman": 0.8, "kendall": 2 / 3, "mae": 0.5, "rmse": 0.5**0.5}),
        (
            (10, 20, 30, 40, 50),
            (12, 18, 33, 41, 47),
            {"pearson": 0.987575043, "spearman": 1, "kendall": 1, "mae": 2.2, "rmse": 2.323790008},
        ),
        (range(1, 6), np.exp(range(1, 6)), {"pearson": 0.886275058, "spearman": 1, "kendall": 1}),
        ((1, 2, 2, 3), (1, 2, 3, 4), {"pearson": 0.948683298, "spearman": 0.948683298, "kendall": 0.912870929}),
    ],
)
def test_by_hand(x, y, wanted):
    found = regression(np.array(x), np.array(y))
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-9)
    assert [found[name] for name in FIT] == [None] * 3  # five images give five parameters nothing to fit


def test_kendall_counts_pairs_with_ties():
    x, y = noisy(40)
    signs = [np.sign(v[:, None] - v)[np.triu_indices(40, 1)] for v in (x, y)]
    wanted = (signs[0] * signs[1]).sum() / math.sqrt(np.abs(signs[0]).sum() * np.abs(signs[1]).sum())
    assert regression(x, y)["kendall"] == pytest.approx(wanted, abs=1e-12)


def test_spearman_is_pearson_of_mean_ranks():
    x, y = noisy()
    ranks = [stats.rankdata(v, method="average") for v in (x, y)]
    assert len(set(x)) < len(x) and regression(x, y)["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-12)


def test_what_does_not_change():
    x, y = noisy()
    first = regression(x, y)
    for changed in (x**3 / 1e4, np.exp(x / 20)):  # monotone: only the order counts
        found = regression(changed, y)
        assert [found[n] for n in ("spearman", "kendall")] == pytest.approx([first[n] for n in ("spearman", "kendall")])
        assert abs(found["pearson"] - first["pearson"]) > 0.01
    moved = regression(7 - 0.01 * x, y)  # linear: the fit takes it back, sign and all
    for name in ("pearson", "spearman", "kendall"):
        assert moved[name] == pytest.approx(-first[name])
    assert [moved[name] for name in FIT] == pytest.approx([first[name] for name in FIT], rel=1e-3)
    order = np.random.default_rng(1).permutation(len(x))
    assert regression(x[order], y[order]) == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("b", [(80, 0.1, 40, 0.1, 50), (-60, 0.5, 70, 0, 30), (100, 1e-2, 500, 0.02, 50)])
@pytest.mark.parametrize("unit", [1, 1e-3])
def test_the_fit_finds_a_logistic_curve(b, unit):
    x = np.linspace(0, 1000 if b[2] > 100 else 100, 150)
    y = b[0] * (0.5 - 1 / (1 + np.exp(b[1] * (x - b[2])))) + b[3] * x + b[4]
    np.testing.assert_allclose(logistic5(unit * x, y), y, atol=1e-3)
    found = regression(unit * x, y)
    assert found["pearson_logistic5"] == pytest.approx(1, abs=1e-6) and found["rmse_logistic5"] < 1e-3
    assert found["pearson"] < 0.9999


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_is_never_worse_than_a_line(seed):
    x, y = noisy(seed=seed)
    for predictions in (x, -x, x**2, np.random.default_rng(seed).normal(size=len(x))):
        line = np.polyval(np.polyfit(predictions, y, 1), predictions)
        found = regression(predictions, y)
        assert found["rmse_logistic5"] <= math.sqrt(np.square(line - y).mean()) + 1e-9
        assert found["pearson_logistic5"] >= abs(found["pearson"]) - 1e-6


def test_the_fit_is_that_of_scipys_curve_fit():
    x = np.linspace(-3, 3, 80)
    y = 4 * expit(2 * x) + np.random.default_rng(0).normal(0, 0.3, 80)

    def curve(x, b1, b2, b3, b4, b5):
        return b1 * (0.5 - 1 / (1 + np.exp(b2 * (x - b3)))) + b4 * x + b5

    wanted = curve(x, *optimize.curve_fit(curve, x, y, (4, 2, 0, 0, 2))[0])
    np.testing.assert_allclose(logistic5(x, y), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        ([5.0] * 9, range(9), "constant predictions"),
        ([50.0, 50.000004] * 4, range(8), "constant predictions"),  # float32 rounding
        (range(9), [3.0] * 9, "constant scores"),
        ([0.0] * 9, [0.0] * 9, "constant predictions"),
        ([1, 2], [1, 2], "fewer than 3 images"),
        ([7], [9], "fewer than 3 images"),
    ],
)
def test_what_is_not_defined_is_none_with_a_reason(x, y, reason):
    x, y = np.array(x, np.float64), np.array(y, np.float64)
    assert undefined(x, y) == reason
    found = regression(x, y)
    assert {name for name, value in found.items() if value is None} == set(found) - {"mae", "rmse"}
    assert found["mae"] == pytest.approx(np.abs(x - y).mean())
    (row,) = per_kind(x, y, ["jpeg"] * len(x))
    assert row == {"kind": "jpeg", "n": len(x), "pearson": None, "spearman": None, "mae": pytest.approx(found["mae"])}


def test_a_correlation_has_no_reason_against_it():
    assert undefined(*noisy()) is None and undefined(np.array([1, 2, 4]), np.array([1, 2, 3])) is None


def test_per_kind_is_regression_of_its_images():
    x, y = noisy()
    kinds = tuple(np.array(["wn", "jpeg", "gblur"])[np.random.default_rng(2).integers(0, 3, len(x))])
    rows = per_kind(x, y, kinds)
    assert [row["kind"] for row in rows] == ["gblur", "jpeg", "wn"] and sum(row["n"] for row in rows) == len(x)
    for row in rows:
        mine = np.array(kinds) == row["kind"]
        wanted = regression(x[mine], y[mine])
        assert [row[name] for name in ("pearson", "spearman", "mae")] == [
            wanted[name] for name in ("pearson", "spearman", "mae")
        ]


@pytest.mark.parametrize("measure", [regression, lambda x, y: per_kind(x, y, ["a"] * len(y))])
def test_what_does_not_fit_is_said(measure):
    good = np.arange(4.0)
    with pytest.raises(UserError, match=r"\[4\] to match scores, got \[4, 1\]"):
        measure(good[:, None], good)
    with pytest.raises(UserError, match="at least one"):
        measure(good[:0], good[:0])
    with pytest.raises(UserError, match="image 1 is not finite"):
        measure(good, np.array([0, np.nan, 1, 2]))
    with pytest.raises(RunError, match="1 of 4 images are not finite"):
        measure(np.array([0, np.inf, 1, 2]), good)


def test_kinds_must_be_one_per_image():
    with pytest.raises(UserError, match="3 for 4"):
        per_kind(np.arange(4), np.arange(4), ["a"] * 3)
