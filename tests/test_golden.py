"""Networks against what timm and torchvision compute from the same tensors (tests/golden/make.py)."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden.cases import CASES, entries

from jaxsd.models.forward import forward

pytestmark = pytest.mark.usefixtures("plain")

FOLDER = Path(__file__).parent / "golden"
# By default one network of a family in inference mode, and the training steps of the quick ones.
NAMES = [pytest.param(name, marks=pytest.mark.slow if case.slow else ()) for name, case in CASES.items()]
TRAINED = [
    pytest.param(name, marks=pytest.mark.slow if case.slow else ()) for name, case in CASES.items() if case.train
]


def golden(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def near(found, wanted, size, tolerance=1e-4):
    """Whether numbers agree to 1e-4 of the size of what they are taken from."""
    np.testing.assert_allclose(np.asarray(found, np.float64) / size, np.asarray(wanted) / size, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_features_in_inference_mode(name):
    case = CASES[name]
    for resolution, wanted in golden(name)["inference"].items():
        side = int(resolution)
        model, params, collections = case.filled(side)
        # Weights are arguments: as constants they would be compiled into the program, which takes far longer.
        run = jax.jit(functools.partial(forward, model, train=False))
        found = run(params, collections, case.pictures(side, 2))
        near(found.outputs[:, :8], wanted["logits"], np.abs(wanted["logits"]).max())
        assert set(wanted["features"]) == set(model.blocks)
        for block, told in wanted["features"].items():
            here = entries(found.features[block])
            assert here["shape"] == told["shape"], block
            near([here["mean"], here["magnitude"]], [told["mean"], told["magnitude"]], told["magnitude"])
            near(here["some"], told["some"], max(told["magnitude"], np.abs(told["some"]).max()))


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step(name):
    """Loss, the gradient of every leaf and the statistics after it."""
    case, wanted = CASES[name], golden(name)["train"]
    side = case.resolutions[0]
    model, params, collections = case.filled(side)

    def loss(params):
        key = jax.random.key(0)
        result = forward(model, params, collections, case.pictures(side, 3), train=True, key=key)
        return -jax.nn.log_softmax(result.outputs)[jnp.arange(3), jnp.arange(3)].mean(), result.collections

    (value, after), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert value == pytest.approx(wanted["loss"], rel=1e-4)
    norms = {"/".join(path): float(np.linalg.norm(leaf)) for path, leaf in flatten_dict(gradient).items()}
    assert set(norms) == set(wanted["gradients"])
    largest = max(wanted["gradients"].values())
    for path, norm in wanted["gradients"].items():
        assert norms[path] == pytest.approx(norm, rel=1e-3, abs=1e-5 * largest), path
    sums = {"/".join(path): float(np.sum(leaf)) for path, leaf in flatten_dict(after.get("batch_stats", {})).items()}
    assert sums == pytest.approx(wanted["running"], rel=1e-3, abs=1e-3)
