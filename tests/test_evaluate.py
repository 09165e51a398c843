import math
import warnings

import numpy as np
import pytest
from sklearn import datasets, linear_model, metrics, neighbors, preprocessing

from jaxsd.errors import RunError, UserError
from jaxsd.evaluate.metrics import classification, per_class
from jaxsd.evaluate.probes import knn, ridge


def digits(n, m, seed=0):
    features, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    features = features.astype(np.float32)[order]
    return features[:n], labels[order][:n], features[n : n + m], labels[order][n : n + m]


def blobs(n, d, m, k=3, seed=0):
    rng = np.random.default_rng(seed)
    centres, labels = rng.normal(size=(k, d)), rng.integers(0, k, n + m)
    features = (centres[labels] + 4 * rng.normal(size=(n + m, d))) * rng.uniform(0.1, 9, d) + 5
    return features[:n], labels[:n], features[n:], labels[n:]


# Metrics


def test_classification_by_hand():
    scores = np.array([[3, 1, 0], [0, 2, 1], [5, 0, 1], [1, 1, 0]])
    # Class 0: images 0 and 3 (a tie, the first counts), both right; class 1: images 1 and 2, one right; class 2: none.
    assert classification(scores, np.array([0, 1, 1, 0]), ("a", "b", "c")) == {
        "accuracy": 0.75,
        "balanced_accuracy": 0.75,
    }
    assert per_class(scores.argmax(1), [0, 1, 1, 0], ("a", "b", "c")) == [
        {"class": "a", "n": 2, "accuracy": 1.0},
        {"class": "b", "n": 2, "accuracy": 0.5},
        {"class": "c", "n": 0, "accuracy": None},
    ]


@pytest.mark.parametrize("seed", range(3))
def test_classification_against_sklearn(seed):
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=(200, 7)), rng.choice(6, 200, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05])  # class 6 absent
    found, predictions = classification(scores, labels, 7), scores.argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of predicted classes without images
        balanced = metrics.balanced_accuracy_score(labels, predictions)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predictions))
    assert found["balanced_accuracy"] == pytest.approx(balanced)
    recalls = metrics.recall_score(labels, predictions, labels=range(6), average=None)
    rows = per_class(predictions, labels, 7)
    assert [row["accuracy"] for row in rows[:6]] == pytest.approx(list(recalls))
    assert [row["n"] for row in rows] == list(np.bincount(labels, minlength=7))


@pytest.mark.parametrize(
    ("scores", "labels", "classes", "what"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), 2, "empty"),
        (np.zeros((3, 2)), np.zeros(4, int), 2, r"\[4, 2\].*\[3, 2\]"),
        (np.zeros((3, 2)), np.zeros(3, int), 3, r"\[3, 3\]"),
        (np.zeros((3, 2)), np.array([0, 1, 2]), 2, r"0\.\.1"),
        (np.zeros((3, 2)), np.array([0, -1, 1]), 2, r"0\.\.1"),
        (np.zeros((3, 2)), np.zeros(3), 2, "whole numbers"),
        (np.zeros((3, 0)), np.zeros(3, int), (), "class names"),
    ],
)
def test_classification_says_what_is_wrong(scores, labels, classes, what):
    with pytest.raises(UserError, match=what):
        classification(scores, labels, classes)


def test_scores_that_are_not_finite_are_no_prediction():
    with pytest.raises(RunError, match="1 of 2"):
        classification(np.array([[np.nan, 1], [0, 1]]), np.array([0, 1]), 2)


# Ridge


@pytest.mark.parametrize(("n", "d"), [(60, 20), (20, 60), (1500, 30)])  # the last needs more than one block of rows
def test_ridge_penalty_and_scores_against_sklearn(n, d):
    train, labels, test, _ = blobs(n, d, 40)
    penalties = np.logspace(-2, 4, 13)
    found = ridge(train, labels, test, classes=3, penalties=penalties)
    scaler = preprocessing.StandardScaler().fit(train)
    targets = 2.0 * np.eye(3)[labels] - 1
    oracle = linear_model.RidgeCV(penalties, store_cv_results=True).fit(scaler.transform(train), targets)
    assert found.penalty == pytest.approx(oracle.alpha_)
    assert penalties[0] < found.penalty < penalties[-1]  # so that the choice means something
    np.testing.assert_allclose(found.scores, oracle.predict(scaler.transform(test)), atol=1e-9)


@pytest.mark.parametrize(("n", "d"), [(40, 10), (15, 30)])
def test_ridge_penalty_is_that_of_least_error_when_each_image_is_left_out(n, d):
    train, labels, test, _ = blobs(n, d, 5, seed=3)
    penalties = (0.5, 5.0, 50.0, 500.0)
    x, y = preprocessing.scale(train), 2.0 * np.eye(3)[labels] - 1
    errors = []
    for penalty in penalties:
        model = linear_model.Ridge(penalty)
        left_out = [model.fit(np.delete(x, i, 0), np.delete(y, i, 0)).predict(x[i : i + 1])[0] - y[i] for i in range(n)]
        errors.append(np.square(left_out).sum())
    assert ridge(train, labels, test, classes=3, penalties=penalties).penalty == penalties[int(np.argmin(errors))]


def test_ridge_knows_digits_with_its_own_penalties_and_ignores_units_and_constants():
    train, labels, test, truth = digits(1000, 700)
    found = ridge(train, labels, test, classes=10)
    assert classification(found.scores, truth, 10)["accuracy"] > 0.92
    scaler = preprocessing.StandardScaler().fit(train)
    oracle = linear_model.RidgeClassifier(found.penalty).fit(scaler.transform(train), labels)
    np.testing.assert_array_equal(found.scores.argmax(1), oracle.predict(scaler.transform(test)))
    rng = np.random.default_rng(0)
    units = rng.uniform(1e-3, 1e3, 64)
    dead = np.full((1000, 2), [0.0, 7.3], np.float32)
    again = ridge(
        np.hstack([train * units + 3, dead]), labels, np.hstack([test * units + 3, dead[:700] + 1]), classes=10
    )
    np.testing.assert_allclose(again.scores, found.scores, atol=1e-6)


def test_ridge_on_collapsed_features_gives_the_class_shares():
    found = ridge(np.ones((4, 3), np.float32), np.array([1, 1, 1, 0]), np.zeros((2, 3), np.float32), classes=3)
    np.testing.assert_allclose(found.scores, [[-0.5, 0.5, -1]] * 2)
    assert math.isfinite(found.penalty)


def test_ridge_survives_fewer_images_than_classes_and_doubled_features():
    train, labels, test, _ = digits(4, 6)
    assert np.isfinite(ridge(np.hstack([train, train]), labels, np.hstack([test, test]), classes=10).scores).all()


# Nearest neighbours


def test_knn_by_hand():
    train = np.array([[1, 0], [0, 2], [3, 4], [-1, 0]])
    scores = knn(train, np.array([0, 1, 1, 2]), np.array([[5, 0]]), classes=3, neighbours=3, temperature=0.5)
    weights = np.exp(np.array([1, 0 + 0.0, 0.6]) / 0.5)  # cosines to (1, 0), (0, 2), (3, 4)
    np.testing.assert_allclose(scores, [[weights[0], weights[1] + weights[2], 0] / weights.sum()], rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.07, math.inf])
def test_knn_against_sklearn(temperature):
    train, labels, test, _ = digits(600, 1100)  # more than one block of rows
    oracle = neighbors.KNeighborsClassifier(
        20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(train, labels)
    found = knn(train, labels, test, classes=10, temperature=temperature)
    np.testing.assert_allclose(found, oracle.predict_proba(test), atol=1e-5)


def test_knn_clips_neighbours_and_does_not_overflow():
    train, labels, test, _ = digits(5, 30)
    np.testing.assert_allclose(
        knn(train, labels, test, classes=10, neighbours=200, temperature=math.inf),
        np.tile(np.bincount(labels, minlength=10) / 5, (30, 1)),
    )
    cold = knn(train, labels, test * 1e-30, classes=10, temperature=1e-4)
    np.testing.assert_allclose(cold, knn(train, labels, test, classes=10, neighbours=1), atol=1e-2)
    assert np.isfinite(knn(train, labels, np.zeros((1, 64)), classes=10)).all()


@pytest.mark.parametrize("probe", [ridge, knn])
def test_probes_say_what_is_wrong(probe):
    x, y = np.ones((4, 3)), np.zeros(4, int)
    with pytest.raises(UserError, match="3 and 2"):
        probe(x, y, np.ones((1, 2)), classes=2)
    with pytest.raises(UserError, match="5 and 4"):
        probe(x, np.zeros(5, int), x, classes=2)
    with pytest.raises(UserError, match="not empty"):
        probe(x, y, np.ones((0, 3)), classes=2)
    with pytest.raises(UserError, match="not empty"):
        probe(np.ones((4, 3, 3, 2)), y, x, classes=2)
    with pytest.raises(RunError, match="test features are not finite"):
        probe(x, y, x * np.nan, classes=2)


def test_probe_options_are_checked():
    x, y = np.ones((4, 3)), np.zeros(4, int)
    with pytest.raises(UserError, match="above 0"):
        ridge(x, y, x, classes=2, penalties=[0.0, 1.0])
    with pytest.raises(UserError, match="neighbours"):
        knn(x, y, x, classes=2, neighbours=0)
