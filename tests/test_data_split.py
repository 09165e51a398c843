import numpy as np
import pytest

from jaxsd.data import Source, Splits, carve, subset
from jaxsd.data.split import part, shared_groups, split
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


def scenes(counts, **fields):
    """One image for each count and scene, scenes shuffled."""
    names = np.random.default_rng(0).permutation(np.repeat([f"scene {n}" for n in range(len(counts))], counts))
    images = np.arange(4 * len(names), dtype=np.uint32).view(np.uint8).reshape(-1, 2, 2, 4)
    return Source(images, groups=tuple(names.tolist()), **fields)


# 29 scenes, 779 images: 26 images of nine scenes, 27 of 16, 28 of three, 29 of one (LIVE, release 2)
LIVE = scenes((26,) * 9 + (27,) * 16 + (28,) * 3 + (29,))


def sides(source, **how):
    train, test = split(source, **how)
    assert train.dtype == test.dtype == np.int64
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(len(source.images)))
    assert (np.diff(train) > 0).all() and (np.diff(test) > 0).all()
    return train, test


@pytest.mark.parametrize("seed", range(5))
def test_a_split_by_group_keeps_scenes_on_one_side(seed):
    train, test = sides(LIVE, seed=seed)
    seen, held = ({LIVE.groups[i] for i in part} for part in (train, test))
    assert (len(seen), len(held)) == (23, 6) and not seen & held
    assert shared_groups(LIVE.take(train), LIVE.take(test)) == 0


def test_parts_of_a_set_are_those_of_its_split():
    parts = part(Splits("live", LIVE, LIVE.take([0]), LIVE.take([1]), ("a.bmp",), "DMOS"), test=0.5, seed=2)
    train, test = split(LIVE, test=0.5, seed=2)
    assert (len(set(parts.train.groups)), parts.validation, parts.skipped, parts.score) == (
        14,
        None,
        ("a.bmp",),
        "DMOS",
    )
    assert parts.train.fingerprint() == LIVE.take(train).fingerprint()
    assert parts.test.fingerprint() == LIVE.take(test).fingerprint()


LONELY = Source(np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 0, 1, 1]), groups=("a", "a", "b", "b"))


def test_a_split_by_image_shows_test_scenes_in_training():
    train, test = sides(LIVE, by="image", seed=0)
    assert (len(train), len(test)) == (623, 156)
    assert shared_groups(LIVE.take(train), LIVE.take(test)) == 156  # each scene has about 21 images in training
    few = LIVE.take([i for i in train if LIVE.groups[i] == "scene 3"])
    assert shared_groups(few, LIVE) == 26  # all images of that scene, one of the first nine
    labels = labelled((30, 20, 10))
    assert counted(labels, sides(labels, by="image", test=0.3, seed=2)[1]) == [9, 6, 3]


def test_a_split_depends_on_seed_and_names_only():
    first, again, other = (split(LIVE, seed=seed)[1] for seed in (3, 3, 4))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    order = np.random.default_rng(1).permutation(len(LIVE))
    shuffled = LIVE.take(order)  # another order of files holds out the same scenes
    held = {shuffled.groups[i] for i in split(shuffled, seed=3)[1]}
    assert held == {LIVE.groups[i] for i in first}
    drawn = {name for seed in range(60) for name in (LIVE.groups[i] for i in split(LIVE, seed=seed)[1])}
    assert len(drawn) == 29  # each scene has its turn


@pytest.mark.parametrize(
    ("source", "how", "said"),
    [
        (scenes((3,)), {}, "two scenes or more: got 1"),
        (labelled((3, 3)), {}, "needs the images' groups"),
        (scenes((3, 3)), {"test": 0.2}, "0.2 of 2 scenes leaves no test images"),
        (scenes((3, 3)), {"test": 0.8}, "0.8 of 2 scenes leaves no training images"),
        (scenes((1,)), {"by": "image"}, "0.2 of 1 images leaves no test"),
        (LONELY, {}, "leaves no test images: .*; a class keeps its only scene for training"),
        (scenes((3, 3)), {"test": 0.0}, "above 0 and below 1"),
        (scenes((3, 3)), {"by": "scene"}, "'group' or by 'image': got 'scene'"),
    ],
)
def test_impossible_splits_are_refused(source, how, said):
    with pytest.raises(UserError, match=said) as error:
        split(source, seed=0, **how)
    assert "\n" not in str(error.value)


# k-fold cross-validation


def every_fold(source, folds, **how):
    """The test part of each fold; that each is disjoint from its training part is asserted."""
    return [sides(source, folds=folds, seed=seed, **how)[1] for seed in range(folds)]


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_by_image_part_every_class(folds):
    source = labelled((31, 20, 7))
    parts = every_fold(source, folds, by="image")
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(58))  # disjoint, and together everything
    for part_of in parts:
        for count, held in zip((31, 20, 7), counted(source, part_of), strict=True):
            assert held in (count // folds, -(-count // folds))
    plain = every_fold(Source(source.images), folds, by="image")
    assert np.array_equal(np.sort(np.concatenate(plain)), np.arange(58))
    assert {len(part_of) for part_of in plain} <= {58 // folds, 58 // folds + 1}


def test_seeds_beyond_the_folds_draw_anew():
    for source, by in ((labelled((30, 20)), "image"), (LIVE, "group")):
        first, again = ([split(source, folds=5, by=by, seed=seed)[1].tolist() for seed in seeds] for seeds in
                        (range(5), range(5, 10)))  # fmt: skip
        assert sorted(sum(again, [])) == list(range(len(source.images)))
        assert all(one not in first for one in again)
        assert split(source, folds=5, by=by, seed=7)[1].tolist() == again[2]


def bursts(each, *, classes=4, scenes=6):
    """Labelled frames in scenes of `each` images or so, one class in a scene, in mixed order."""
    random = np.random.default_rng(3)
    rows = [(f"{c}-{s}", c) for c in range(classes) for s in range(scenes) for _ in range(random.integers(*each))]
    rows = [rows[i] for i in random.permutation(len(rows))]
    images = np.arange(4 * len(rows), dtype=np.uint32).view(np.uint8).reshape(-1, 2, 2, 4)
    return Source(images, np.array([c for _, c in rows]), groups=tuple(name for name, _ in rows))


def test_folds_by_group_keep_scenes_whole_and_classes_even():
    source = bursts((5, 6), scenes=6)
    parts = every_fold(source, 3)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(source)))
    assert [counted(source, part_of) for part_of in parts] == [[10] * 4] * 3  # two scenes of five each
    for part_of in parts:
        rest = np.setdiff1d(np.arange(len(source)), part_of)
        assert shared_groups(source.take(rest), source.take(part_of)) == 0
    scored = every_fold(LIVE, 5)
    assert np.array_equal(np.sort(np.concatenate(scored)), np.arange(779))
    assert max(map(len, scored)) - min(map(len, scored)) <= 29  # as even as one scene
    seen = [{LIVE.groups[i] for i in part_of} for part_of in scored]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 29


@pytest.mark.parametrize(
    ("source", "how", "said"),
    [
        (labelled((9, 3)), {"by": "image"}, "5 folds need 5 images of each class, and class 'class 1' has 3"),
        (bursts((5, 6), scenes=4), {}, "5 folds need 5 scenes of each class, and class '0' has 4: ask for fewer"),
        (scenes((3, 3, 3)), {}, "5 folds need 5 scenes of each class, and there are 3"),
        (scenes((3, 3)), {"folds": 1}, "2 folds or more: got 1"),
        (scenes((3, 3)), {"folds": 2, "test": 0.2}, "not both: got test 0.2, folds 2"),
        (labelled((9, 9)), {"by": "group"}, "needs the images' groups"),
    ],
)
def test_impossible_folds_are_refused(source, how, said):
    with pytest.raises(UserError, match=said) as error:
        split(source, **{"folds": 5, "seed": 0, **how})
    assert "\n" not in str(error.value)


# shares of whole scenes


def test_a_share_of_scenes_keeps_every_class():
    source = bursts((5, 6), scenes=5)
    for seed in range(5):
        train, test = sides(source, test=0.4, seed=seed)
        assert counted(source, test) == [10] * 4 and shared_groups(source.take(train), source.take(test)) == 0
    kept, carved = carve(source.labels, 0.2, seed=0, groups=source.groups)
    assert counted(source, carved) == [5] * 4 and len(kept) == 80
    assert not len(carve(source.labels, 0.0, seed=0, groups=source.groups)[1])
    assert len({tuple(split(source, seed=seed)[1]) for seed in range(9)}) == 9


def test_shares_of_mixed_scenes_are_as_even_as_scikit_learns():
    """Patients with images of several classes, in all numbers: against the folds of StratifiedGroupKFold."""
    from sklearn.model_selection import StratifiedGroupKFold

    ours, theirs = [], []
    for seed in range(10):
        random = np.random.default_rng(seed)
        sizes = random.integers(1, 12, 40)
        groups = np.repeat(np.arange(40), sizes)
        mixture = random.dirichlet((0.4,) * 3, 40)
        labels = np.array([random.choice(3, p=mixture[group]) for group in groups])

        def unevenness(held, labels=labels):
            return np.abs(np.bincount(labels[held], minlength=3) / np.bincount(labels) - 0.2).max()

        ours.append(unevenness(carve(labels, 0.2, seed=seed, groups=[f"{g:02}" for g in groups])[1]))
        folds = StratifiedGroupKFold(5).split(labels, labels, groups)
        theirs.append(np.mean([unevenness(held) for _, held in folds]))
    assert np.mean(ours) < 1.2 * np.mean(theirs)  # one draw alone: 3.8 times theirs
