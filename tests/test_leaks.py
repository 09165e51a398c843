"""What a run says of test images that are copies of training images."""

import numpy as np
import pytest
from skimage.data import astronaut
from test_data_copies import encoded

from jaxsd import command
from jaxsd.data import Source, Splits
from jaxsd.data.split import part
from jaxsd.recipe import Experiment, Recipe

CUT = astronaut().reshape(8, 64, 8, 64, 3).swapaxes(1, 2).reshape(-1, 64, 64, 3)
RECIPE = Recipe("none", {}, (), baseline="")


def test_leaks_are_counted_once_and_apart():
    train = Source(CUT[8:40])
    copies = [CUT[9], CUT[9], encoded(CUT[10]), encoded(CUT[11])[:, ::-1], encoded(CUT[50])]
    test = Source(np.concatenate([CUT[40:50], copies]))
    own = Splits("parts", train, None, test)
    assert command.leaks(RECIPE, own, {None: own}, None) == (2, 2)
    pretext = Source(np.concatenate([CUT[9:10], CUT[50:52]]))  # one that is in the training images too, and one more
    assert command.leaks(RECIPE, own, {None: own}, pretext) == (2, 3)
    alone = own._replace(test=None)
    assert command.leaks(RECIPE, alone, {None: alone}, None) == (None, None)


def test_the_worst_of_several_splits_counts():
    """Every image is there twice: each of two splits holds some on both sides, and so many are counted."""
    source = Source(np.concatenate([CUT[8:40], [encoded(image) for image in CUT[8:40]]]))
    way = {"by": "image", "test": 0.25}
    recipe = Recipe("none", {}, (), baseline="", splits={"random": way})
    splits = Splits("parts", source, None, None)
    parted: command.Parted = {("random", seed): part(splits, **way, seed=seed) for seed in (0, 1)}
    apart = []
    for seed in (0, 1):
        known = {image.tobytes() for image in parted["random", seed].train.images}
        pairs = {a.tobytes(): b.tobytes() for a, b in zip(source.images, np.roll(source.images, 32, 0), strict=True)}
        held = parted["random", seed].test
        assert held is not None
        apart.append(sum(pairs[image.tobytes()] in known for image in held.images))
    assert command.leaks(recipe, splits, parted, None) == (0, max(apart)) and max(apart) > 5


def test_what_is_said_is_of_all_seeds_of_the_table(tmp_path):
    """This process has seed 1, the table another one's seeds too; copies and guesses are those of all."""
    random = np.random.default_rng(0)
    source = Source(np.concatenate([CUT[8:40], CUT[8:40]]), random.integers(0, 3, 64).astype(np.int32), tuple("abc"))
    way, splits = {"by": "image", "test": 0.25}, Splits("parts", source, None, None)

    def prepared(*seeds):
        recipe = Recipe("none", {"none": ()}, (), baseline="none", seeds=seeds, splits={"random": way})
        parted = command.parts(recipe, splits)
        copies, shared = command.leaks(recipe, splits, parted, None), command.shared_scenes(parted)
        return command.Prepared(Experiment(recipe, splits, tmp_path), parted, copies, shared)

    own, all_of = prepared(1), prepared(0, 1, 2, 3)
    found = command.covering(own, all_of.experiment.recipe)
    assert (found.copies, list(found.parted)) == (all_of.copies, list(all_of.parted))
    assert command.guesses(found.parted) == command.guesses(all_of.parted)
    assert found.copies > own.copies and found.experiment is own.experiment
    assert command.covering(own, own.experiment.recipe) is own


def test_too_many_pairs_are_not_compared(monkeypatch):
    own = Splits("parts", Source(CUT[:40]), None, Source(CUT[40:]))
    monkeypatch.setattr(command, "PAIRS", 40 * 24 - 1)
    assert command.leaks(RECIPE, own, {None: own}, None) == (0, None)


@pytest.mark.parametrize(
    ("count", "end"),
    [(0, ": none"), (3, ": 3 (python -m jaxsd.check data shows them)"), (None, ": not looked for among so many, as")],
)
def test_the_note_under_the_table(count, end):
    own = Splits("parts", Source(CUT[:40]), None, Source(CUT[40:]))
    (line,) = command.near_note(own, count)
    assert line.startswith("test images that are nearly equal to a training image") and end in line
    assert command.near_note(own._replace(test=None), count) == []
