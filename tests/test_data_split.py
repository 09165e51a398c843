import numpy as np
import pytest

from jaxsd.data import Source, carve, duplicates, subset
from jaxsd.errors import UserError


def labelled(counts, seed=0):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), 4, 4, 1), np.uint8)
    return Source(images, labels, tuple(f"class {label}" for label in range(len(counts))))


def counted(source, positions):
    return np.bincount(source.labels[positions], minlength=len(source.classes)).tolist()


@pytest.mark.parametrize("counts", [(100, 60, 40), (7, 5, 3, 2), (1, 2, 50), (1,), (2, 2, 2)])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.5, 0.97])
def test_carve_parts_every_class(counts, share):
    source = labelled(counts)
    kept, carved = carve(source.labels, share, seed=4)
    assert kept.dtype == carved.dtype == np.int64
    assert sorted([*kept, *carved]) == list(range(len(source)))
    assert np.array_equal(kept, np.sort(kept)) and np.array_equal(carved, np.sort(carved))
    for count, taken in zip(counts, counted(source, carved), strict=True):
        if share == 0 or count == 1:
            assert taken == 0
        else:
            assert 1 <= taken < count and abs(taken - share * count) < 1 + 1e-9


def test_carve_gives_the_exact_total_and_depends_on_the_seed():
    labels = labelled((103, 99, 51)).labels
    assert len(carve(labels, 0.2, seed=0)[1]) == round(0.2 * 253)
    assert len(carve(1000, 0.125, seed=0)[1]) == 125
    first, again, other = (carve(labels, 0.3, seed=seed)[1] for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    for share in (1.0, -0.1):
        with pytest.raises(UserError, match=r"in \[0, 1\)"):
            carve(labels, share, seed=0)


def test_a_plain_subset_is_a_random_draw():
    source = labelled((300, 300))
    drawn = subset(source, total=100, seed=1)
    assert drawn.dtype == np.int64 and len(set(drawn.tolist())) == 100 and np.array_equal(drawn, np.sort(drawn))
    assert np.array_equal(drawn, subset(source, total=100, seed=1))
    assert not np.array_equal(drawn, subset(source, total=100, seed=2))
    assert set(drawn) < set(subset(source, total=200, seed=1))  # a smaller draw is part of a larger one
    assert len(subset(source, fraction=0.25)) == 150
    assert np.array_equal(subset(source), np.arange(600))
    spread = [counted(source, subset(source, total=100, seed=seed))[0] for seed in range(200)]
    assert 4 < np.std(spread) < 5 and abs(np.mean(spread) - 50) < 1.5  # hypergeometric: 4.57


def test_subsets_per_class():
    source = labelled((30, 20, 10))
    assert counted(source, subset(source, per_class=7)) == [7, 7, 7]
    assert counted(source, subset(source, total=20, balanced=True)) == [7, 7, 6]
    assert counted(source, subset(source, fraction=0.5, balanced=True)) == [10, 10, 10]
    assert set(subset(source, per_class=3, seed=5)) < set(subset(source, per_class=4, seed=5))
    assert not np.array_equal(subset(source, per_class=3, seed=5), subset(source, per_class=3, seed=6))
    first = subset(source, per_class=4, first=True)
    expected = np.sort(np.concatenate([np.flatnonzero(source.labels == label)[:4] for label in range(3)]))
    assert np.array_equal(first, expected)
    assert np.array_equal(subset(source, total=12, balanced=True, first=True, seed=9), expected)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"total": 61}, "61 images was asked, but there are 60"),
        ({"total": 0}, "1 to 60"),
        ({"fraction": 1.5}, r"\(0, 1\]"),
        ({"per_class": 11}, "class 2' has 10: ask for at most 10 per class, 30 in total"),
        ({"per_class": 0}, "at least 1"),
        ({"total": 60, "balanced": True}, "at most 10 per class"),
        ({"total": 5, "fraction": 0.1}, "only one of"),
        ({"total": 5, "first": True}, "give per_class"),
    ],
)
def test_impossible_subsets_are_refused_with_numbers(asked, said):
    with pytest.raises(UserError, match=said) as error:
        subset(labelled((30, 20, 10)), **asked)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("asked", [{"per_class": 2}, {"total": 2, "balanced": True}])
def test_a_subset_per_class_needs_labels(asked):
    with pytest.raises(UserError, match="no labels"):
        subset(Source(np.zeros((3, 2, 2, 1), np.uint8)), **asked)


def test_duplicates_are_counted_pixel_for_pixel():
    source = labelled((30, 20))
    near = source.images[:5].copy()
    near[:, 0, 0, 0] ^= 1
    other = Source(np.concatenate([source.images[[3, 3, 40]], near]))
    assert duplicates(source, other) == 3
    assert duplicates(source, other.with_images(other.images[:, :2])) == 0
