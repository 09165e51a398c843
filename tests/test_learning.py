"""Networks learn what they are to learn: rotation, features, a task from few labels; losses fall as they always did.

What is measured was measured over six seeds first; the margins are far below what any of them showed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled
from small import SGD, Small

from jaxsd import build, objectives, train
from jaxsd.data.embedded import digits, mnist5k
from jaxsd.data.source import standardisation
from jaxsd.data.split import subset
from jaxsd.evaluate.features import block_features, predict
from jaxsd.evaluate.metrics import classification
from jaxsd.evaluate.probes import ridge
from jaxsd.models.blocks import Backbone, ConvNorm
from jaxsd.objectives.regression import LOSSES
from jaxsd.objectives.supervised import CONVENTIONS
from jaxsd.stage import Run, Stage, data_of, drawn, train_run
from jaxsd.train import loop, optimiser, schedule
from jaxsd.train.optimiser import set_rate
from jaxsd.train.state import create
from jaxsd.views.view import scale

ROOT = Path(__file__).parents[1]


class Plain(Backbone):
    """Three convolutions that halve the map, average, head: for images of any size."""

    widths: tuple[int, ...] = (32, 64, 64)

    @property
    def blocks(self):
        return tuple(f"block{i + 1}" for i in range(len(self.widths)))

    @nn.compact
    def __call__(self, images, train):
        features, x = {}, images
        for name, width in zip(self.blocks, self.widths, strict=True):
            x = self.shown(features, name, ConvNorm(width, 3, 2, 1, name=name)(x, self.trains(name, train)))
        return self.ending(features, x, train)


# learning: 400 handwritten digits of 14 pixels

PRETEXT, MODEL = Plain(outputs=4), Plain(outputs=10)
ROTATION, TASK = objectives.rotation(PRETEXT), objectives.supervised(MODEL)


def stage_of(name, model, objective, rate, epochs, **options):
    tx = optimiser.with_rate(optimiser.sgd(momentum=0.9, nesterov=True, weight_decay=5e-4))
    return Stage(name, model, objective, tx, schedule.cosine(rate), epochs, 32, **options)


BLOCKS = (*PRETEXT.blocks, "pooled")
HALF = stage_of("half", PRETEXT, ROTATION, 0.1, 8, view=scale(0.5))
FULL = stage_of("full", PRETEXT, ROTATION, 0.05, 6)
TUNE = stage_of("finetune", MODEL, TASK, 0.05, 25, on="labelled", fresh=("head",))


class Trial:
    """ScaleNet's two scales on unlabelled digits, as a seed draws them."""

    def __init__(self, seed):
        splits = mnist5k(test=1000, validation=0.0)
        self.seed, self.train, self.test = seed, scale(0.5)(splits.train), scale(0.5)(splits.test)
        self.standard = standardisation(self.train)
        self.images = self.train.take(subset(self.train, total=400, seed=seed))
        self.scalenet = self.trained(FULL, self.images, self.trained(HALF, self.images))

    def run(self, stage):
        return Run(stage, (stage.name,), self.seed, "", None, self.standard)

    def trained(self, stage, images, parent=None):
        return train_run(self.run(stage), images, parent, loop.Watch())

    def rotation(self):
        """Accuracy of the rotation task on unseen digits; chance is 1/4."""
        return loop.evaluate(ROTATION, self.scalenet.params, self.scalenet.extra, data_of(self.test))["accuracy"]

    def features(self):
        """Ridge accuracy, mean over blocks, of ScaleNet's features and of those before any training."""
        return [self._ridge(trained) for trained in (self.scalenet, drawn(self.run(FULL), self.images))]

    def _ridge(self, trained):
        weights, labels = (trained.params, trained.extra["model"]), self.images.labels
        here, there = (block_features(PRETEXT, *weights, source.images) for source in (self.images, self.test))
        scores = [ridge(here[block], labels, there[block], classes=10).scores for block in BLOCKS]
        return np.mean([classification(score, self.test.labels, 10)["accuracy"] for score in scores])

    def finetuned(self):
        """Accuracy after fine-tuning on 10 labels per class, from ScaleNet and from scratch."""
        few, found = self.train.take(subset(self.train, per_class=10, seed=self.seed)), []
        for parent in (self.scalenet, None):
            end = self.trained(TUNE, few, parent)
            scores = predict(MODEL, end.params, end.extra["model"], self.test.images)
            found.append(classification(scores, self.test.labels, 10)["accuracy"])
        return found


@pytest.fixture(scope="module")
def trial():
    return Trial(0)


def test_rotation_is_learned(trial):
    """Six seeds: 0.954 to 0.969."""
    assert trial.rotation() > 0.9


def test_scalenet_features_beat_random_ones(trial):
    """By 0.033 to 0.049 over six seeds, mean 0.043, deviation 0.005."""
    learned, random = trial.features()
    assert learned > random + 0.02


def test_fine_tuning_is_not_worse_than_scratch(trial):
    """By -0.004 to 0.050 over six seeds, mean 0.025, deviation 0.019: one seed cannot show that it is better.

    Fine-tuned 0.741 to 0.805, from scratch 0.705 to 0.768. With 10 epochs in place of 25 it is worse by 0.03.
    """
    tuned, scratch = trial.finetuned()
    assert tuned > scratch - 0.03
    assert tuned > 0.68 and scratch > 0.64


@pytest.mark.slow
def test_fine_tuning_beats_scratch():
    """The mean over six seeds, whose deviation is 0.008."""
    pairs = np.array([Trial(seed).finetuned() for seed in range(6)])
    assert np.mean(pairs[:, 0] - pairs[:, 1]) > 0.005


# losses, step by step

STEPS = 10
CASES = {
    "rotation": ("rotation", {}),
    "rotation smoothed": ("rotation", {"label_smoothing": 0.1}),
    "supervised": ("supervised", {}),
    **{f"supervised {name}": ("supervised", {"label_smoothing": 0.1, "convention": name}) for name in CONVENTIONS},
    **{f"regression {name}": ("regression", {"loss": name, "scale": 10.0}) for name in LOSSES},
}
# By jax 0.10 on a CPU; as tests and as real runs compile they differ by 7e-7 of their values.
PINNED = {
    "rotation": [1.43965, 1.42919, 1.43097, 1.41824, 1.40783, 1.39877, 1.39176, 1.38725, 1.38021, 1.37988],
    "rotation smoothed": [1.43556, 1.42605, 1.42781, 1.41647, 1.40741, 1.39971, 1.39391, 1.38991, 1.38449, 1.38378],
    "supervised": [2.66688, 2.47436, 2.41328, 2.39586, 2.36085, 2.32984, 2.31226, 2.32344, 2.33808, 2.28421],
    "supervised uniform": [2.65151, 2.47584, 2.41752, 2.39845, 2.36328, 2.33176, 2.31443, 2.32397, 2.33355, 2.28598],
    "supervised others": [2.64981, 2.47601, 2.41799, 2.39874, 2.36354, 2.33198, 2.31466, 2.32402, 2.33307, 2.28619],
    "regression l1": [0.891807, 0.482479, 0.24669, 0.540271, 0.685593, 0.375281, 0.268679, 0.357057, 0.383, 0.34144],
    "regression l2": [
        0.877643,
        0.106327,
        0.272212,
        0.576511,
        0.40036,
        0.0834382,
        0.318546,
        0.351534,
        0.171193,
        0.0974644,
    ],
    "regression huber": [
        0.0841807,
        0.0754342,
        0.0734436,
        0.0706878,
        0.0498243,
        0.0397912,
        0.0303013,
        0.0218368,
        0.0207106,
        0.0205591,
    ],
}


def losses_of(case):
    """The losses of the first steps on digits, their label as score too, with weights that no generator draws."""
    name, arguments = CASES[case]
    model = Small(outputs={"rotation": 4, "supervised": 10, "regression": 1}[name], widths=(8, 12))
    objective = getattr(objectives, name)(model, **arguments)
    source = digits().train
    params, collections = filled(model, 8, channels=1)
    mean, std = standardisation(source)
    collections = {**collections, "standardise": {"mean": jnp.asarray(mean), "std": jnp.asarray(std)}}
    state = create(jax.random.key(0), params, {"model": collections}, SGD)
    state = state.replace(opt_state=set_rate(state.opt_state, 0.1))
    step, losses = jax.jit(train.make_train_step(objective, SGD)), []
    for number in range(STEPS):
        rows = slice(32 * number, 32 * (number + 1))
        batch = {"image": source.images[rows], "label": source.labels[rows]}
        batch |= {"score": batch["label"].astype(np.float32), "index": np.arange(32, dtype=np.int32)}
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


def test_every_objective_is_pinned():
    assert {name for name, _ in CASES.values()} == set(build.OBJECTIVES)
    assert set(PINNED) == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_losses_are_what_they_were(case):
    np.testing.assert_allclose(losses_of(case), PINNED[case], rtol=1e-4)


@pytest.mark.slow
def test_losses_as_real_runs_compile():
    """Without the flags of the tests."""
    code = "import json, test_learning as t; print(json.dumps({case: t.losses_of(case) for case in t.CASES}))"
    plain = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
    for case, losses in json.loads(done.stdout.splitlines()[-1]).items():
        np.testing.assert_allclose(losses, PINNED[case], rtol=1e-4, err_msg=case)
