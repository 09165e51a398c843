"""Which images go where: training and test parts, limited training sets, scenes on both sides."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxsd.data.source import Source, Splits
from jaxsd.errors import UserError

TEST_SHARE = 0.2  # held out where nothing else is said
DRAWS = 100  # of whole scenes, of which the most even one is taken


def carve(
    labels_or_n: np.ndarray | int, share: float, *, seed: int | Sequence[int], groups: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Parts a set in two at random: sorted positions (kept, carved), int64, together each position once.

    labels_or_n: labels [N], and every class is parted in proportion, at least one image on each side where it has
    two or more (a single image is kept); or only the number of images N, parted without regard to classes.
    share: part that is carved off, in [0, 1). Nothing is carved at 0.
    groups: the scene of each image, [N] or empty: whole scenes are carved off, so that none is on both sides: with
    labels as near to the share of every class as the scenes allow, else round((1 - share) * G) of G scenes are kept.
    """
    if not 0 <= share < 1:
        raise UserError(f"the share to carve off must be in [0, 1): got {share}")
    if len(groups):
        return _carve_scenes(labels_or_n, share, seed, groups)
    random = np.random.default_rng(seed)
    if isinstance(labels_or_n, int | np.integer):
        sizes, members = np.array([labels_or_n]), [np.arange(labels_or_n)]
    else:
        members = _members(np.asarray(labels_or_n))
        sizes = np.array([len(positions) for positions in members])
    counts = _proportional(sizes, share)
    drawn = [random.permutation(positions)[:count] for positions, count in zip(members, counts, strict=True)]
    carved = np.sort(np.concatenate(drawn)).astype(np.int64)
    return np.setdiff1d(np.arange(sizes.sum(), dtype=np.int64), carved), carved


def split(
    source: Source,
    *,
    test: float | None = None,
    folds: int | None = None,
    by: Literal["group", "image"] = "group",
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Parts the images of a source at random: sorted positions (train, test), int64, together each image once.

    by: "group" holds out whole scenes (`Source.groups`), so that no scene is on both sides. "image" holds out images,
    whatever they show. Both keep the shares of the classes where there are labels.
    test: the share held out, in (0, 1), as in `carve`; 0.2 where folds are not given either.
    folds: k-fold cross-validation in place of a share. The images are cut into k parts, each of which has every class
    in proportion, as far as scenes allow; seed s tests on part s mod k and trains on the others. Seeds 0 to k-1 test
    on every image once; seeds k to 2k-1 do so again with parts drawn anew, and so on.
    Raises UserError where there are no two scenes, where nothing would be left on a side, or where a class has fewer
    images (scenes, by "group") than there are folds.
    """
    check_way(test=test, folds=folds, by=by)
    groups = _scenes(source) if by == "group" else ()
    what = f"{len(set(groups))} scenes" if groups else f"{len(source.images)} images"
    if folds is not None:
        held = _fold(source, folds, groups, seed)
        return np.setdiff1d(np.arange(len(source.images), dtype=np.int64), held), held
    share = TEST_SHARE if test is None else test
    of = len(source.images) if source.labels is None else source.labels
    train, held = carve(of, share, seed=seed, groups=groups)
    if not len(train) or not len(held):
        side = "test" if len(train) else "training"
        alone = "; a class keeps its only scene for training" if groups and source.labels is not None else ""
        raise UserError(f"a test share of {share:g} of {what} leaves no {side} images: take another share{alone}")
    return train, held


def check_way(*, test: float | None = None, folds: int | None = None, by: str = "group") -> None:
    """Raises UserError for arguments that `split` would not take, whatever the images."""
    if by not in ("group", "image"):
        raise UserError(f"a split is by 'group' or by 'image': got {by!r}")
    if test is not None and folds is not None:
        both = f"got test {test:g}, folds {folds}; in a config 0 takes one away"
        raise UserError(f"a split has a share of test images or folds, not both: {both}")
    if test is not None and not 0 < test < 1:
        raise UserError(f"the share of test images must be above 0 and below 1: got {test}")
    if folds is not None and (not isinstance(folds, int) or folds < 2):
        raise UserError(f"k-fold splits need a whole number of 2 folds or more: got {folds}")


def part(
    splits: Splits,
    *,
    test: float | None = None,
    folds: int | None = None,
    by: Literal["group", "image"] = "group",
    seed: int,
) -> Splits:
    """A data set with its training images parted anew by `split`; other images of its own are left out."""
    train, held = split(splits.train, test=test, folds=folds, by=by, seed=seed)
    return splits._replace(train=splits.train.take(train), validation=None, test=splits.train.take(held))


def unmeasurable(splits: Splits) -> str:
    """Why the answers for the test images will tell nothing, in words; empty where they tell something."""
    scores, test = splits.train.scores, splits.test
    if scores is None or test is None:
        return ""
    if scores.min() == scores.max():
        return f"all scores of the training images are {scores[0]:g}: there is nothing to learn"
    if len(test.images) < 3:
        return f"correlations need 3 test images or more, and there are {len(test.images)}: give more images"
    return ""


def shared_groups(a: Source, b: Source) -> int:
    """How many images of `b` show a scene (`Source.groups`) that some image of `a` shows; 0 where none are named."""
    known = set(a.groups)
    return sum(group in known for group in b.groups)


def scenes_on_both_sides(parts: Splits, pretext: Source | None = None) -> dict[str, str]:
    """What is to be said of scenes that two parts show: {"test", "pretext" or "validation": text}.

    pretext: images of the pretext stages' own.
    """
    pairs = {
        "test": (parts.test, "test", parts.train, "is also trained on"),
        "pretext": (parts.test, "test", pretext, "is also among the pretext images"),
        "validation": (parts.validation, "validation", parts.train, "is also trained on"),
    }
    return {
        name: f"{count} of {len(held)} {part} images show a scene that {where}"
        for name, (held, part, known, where) in pairs.items()
        if held is not None and known is not None and (count := shared_groups(known, held))
    }


def subset(
    source: Source,
    *,
    total: int | None = None,
    fraction: float | None = None,
    per_class: int | None = None,
    balanced: bool = False,
    first: bool = False,
    seed: int = 0,
) -> np.ndarray:
    """Sorted positions, int64, of a limited training set; all of them where no amount is given.

    total, fraction (of all images, in (0, 1]): a plain random draw, so classes come out only roughly equal; with
    `balanced` the same number of each class (one more in the first classes where it does not divide).
    per_class: that many of each class. first: the first of each class in the order of the source, not random ones
    (the few-label rule of RotNet, Gidaris et al., ICLR 2018); needs per_class or balanced.
    With one seed, a smaller draw is part of a larger one. Raises UserError where more is asked than there is.
    """
    check_amount(total=total, fraction=fraction, per_class=per_class, balanced=balanced, first=first)
    if total is None and fraction is None and per_class is None:
        return np.arange(len(source), dtype=np.int64)
    random = np.random.default_rng(seed)
    classes = len(source.classes)
    if per_class is not None:
        return _per_class(source, np.full(classes, per_class), None if first else random)
    total = _total(len(source), total, fraction)
    if balanced:
        shared = total // max(classes, 1) + (np.arange(classes) < total % max(classes, 1))
        return _per_class(source, shared, None if first else random)
    return np.sort(random.permutation(len(source))[:total]).astype(np.int64)


def check_amount(
    *,
    total: int | None = None,
    fraction: float | None = None,
    per_class: int | None = None,
    balanced: bool = False,
    first: bool = False,
) -> None:
    """Raises UserError for arguments that `subset` would not take, whatever the images."""
    given = {"total": total, "fraction": fraction, "per_class": per_class}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UserError(f"give only one of total, fraction and per_class for a subset: got {' and '.join(named)}")
    if total is not None and total < 0:
        raise UserError(f"total must not be negative: got {total}")
    if per_class is not None and per_class < 1:
        raise UserError(f"per_class must be at least 1: got {per_class}")
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"the fraction of a subset must be in (0, 1]: got {fraction}")
    if named and first and per_class is None and not balanced:
        raise UserError("first=True takes the first images of each class: give per_class, or balanced=True with it")


def _scenes(source: Source) -> tuple[str, ...]:
    """The scene of each image, of which there are two or more."""
    if not source.groups:
        raise UserError(
            "a split by group needs the images' groups (a table's column group, a folder's data.groups), and there are "
            "none"
        )
    if len(set(source.groups)) < 2:
        raise UserError("a split by group needs images of two scenes or more: got 1; split by image")
    return source.groups


def _carve_scenes(
    labels_or_n: np.ndarray | int, share: float, seed: int | Sequence[int], groups: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """`carve` with whole scenes.

    With labels, scenes are drawn by their commonest class, several times; the draw is taken whose shares of the
    classes' images are nearest to the one asked for, by the sum of squares: scenes may be of different sizes and show
    more than one class.
    """
    names, scene = np.unique(np.asarray(groups), return_inverse=True)
    if isinstance(labels_or_n, int | np.integer):
        order = np.random.default_rng(seed).permutation(len(names))
        drawn = [order[round((1 - share) * len(names)) :]]
        shares = np.ones((len(names), 1))
    else:
        counts = np.zeros((len(names), 1 + max(labels_or_n)))  # images of each scene and class
        np.add.at(counts, (scene, labels_or_n), 1)
        shares = counts / np.maximum(counts.sum(axis=0), 1)
        start = (seed,) if isinstance(seed, int | np.integer) else seed
        drawn = [carve(counts.argmax(axis=1), share, seed=(*start, draw))[1] for draw in range(DRAWS)]
    held = min(drawn, key=lambda chosen: float(((shares[chosen].sum(axis=0) - share) ** 2).sum()))
    carved = np.isin(scene, held)
    return np.flatnonzero(~carved).astype(np.int64), np.flatnonzero(carved).astype(np.int64)


def _fold(source: Source, folds: int, groups: Sequence[str], seed: int) -> np.ndarray:
    """Sorted positions, int64, of fold seed mod folds of the cut number seed // folds."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # takes a second to load

    labels = np.zeros(len(source.images), np.int64) if source.labels is None else source.labels
    names, unit = np.unique(np.asarray(groups), return_inverse=True) if groups else ((), np.arange(len(labels)))
    units = np.array([len(np.unique(unit[labels == label])) for label in np.unique(labels)])
    if units.min() < folds:
        label = np.unique(labels)[units.argmin()]
        which = "there are" if source.labels is None else f"class '{source.classes[label]}' has"
        what = "scenes" if groups else "images"
        raise UserError(
            f"{folds} folds need {folds} {what} of each class, and {which} {units.min()}: ask for fewer folds"
        )
    cut, number = divmod(seed, folds)
    if groups:  # in another order each time: which of equal scenes come together is by chance
        unit = np.random.default_rng(cut).permutation(len(names))[unit]
        parts = StratifiedGroupKFold(folds).split(labels, labels, unit)
    else:
        parts = StratifiedKFold(folds, shuffle=True, random_state=cut).split(labels, labels)
    return np.sort(list(parts)[number][1]).astype(np.int64)


def _members(labels: np.ndarray) -> list[np.ndarray]:
    """Positions of each label that occurs, in increasing order of label."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _proportional(sizes: np.ndarray, share: float) -> np.ndarray:
    """Whole numbers near share * sizes that sum to round(share * sum), then moved off 0 and off the whole class."""
    if share == 0:
        return np.zeros_like(sizes)
    exact = share * sizes
    counts = np.floor(exact).astype(int)
    missing = round(share * sizes.sum()) - counts.sum()
    largest = np.argsort(counts - exact, kind="stable")
    counts[largest[:missing]] += 1
    return np.where(sizes >= 2, np.clip(counts, 1, np.maximum(sizes - 1, 1)), 0)


def _total(available: int, total: int | None, fraction: float | None) -> int:
    """The number of images to draw, checked."""
    if fraction is not None:
        return max(1, round(fraction * available))
    if total is None or not 1 <= total <= available:
        raise UserError(f"a subset of {total} images was asked, but there are {available}: ask for 1 to {available}")
    return total


def _per_class(source: Source, wanted: np.ndarray, random: np.random.Generator | None) -> np.ndarray:
    """Sorted positions of wanted[label] images of each class: random ones, or the first where `random` is None."""
    if source.labels is None:
        raise UserError("a subset per class was asked, but the images have no labels: give total or fraction")
    fewest = int(np.bincount(source.labels, minlength=len(wanted)).min())
    chosen = []
    for label, count in enumerate(wanted):
        positions = np.flatnonzero(source.labels == label)
        if len(positions) < count:
            raise UserError(
                f"{count} images of each class were asked, but class '{source.classes[label]}' has {len(positions)}: "
                f"ask for at most {fewest} per class, {fewest * len(wanted)} in total"
            )
        chosen.append((positions if random is None else random.permutation(positions))[:count])
    return np.sort(np.concatenate(chosen)).astype(np.int64)
