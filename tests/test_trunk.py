"""A network run in two goes, frozen beginning and rest, is the network: outputs, gradients, statistics, bit for bit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import Small, batch_of, same

from jaxsd import models, objectives, processes
from jaxsd.models.forward import forward, has_trunk, initialise, trunk
from jaxsd.train.state import merge, partition
from jaxsd.train.trunk import PLACES, compute

KEY = jax.random.key(7)
# Equal bits are a matter of how the code is made: as in real runs, not as in the other tests (see conftest).
jit = partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True})
PATCHES = models.build("patchnet", patch=8, first=(4,), widths=(6,), hidden=(7, 6), outputs=3)
RESIDUAL = models.ResNet(outputs=3, depths=(1, 1), widths=(4, 6), stem_kind="imagenet", bottleneck=True)
# model, how many leading parts are frozen, side of the images
CUTS = [
    (PATCHES, 1, 16),
    (PATCHES, 3, 16),  # dropout on one side of the cut alone
    (PATCHES.clone(dtype=jnp.bfloat16), 4, 16),  # all but the head
    pytest.param(PATCHES.clone(outputs=0), 2, 16, marks=pytest.mark.slow),
    (RESIDUAL, 2, 20),
    pytest.param(models.build("nin", outputs=3, grow=2), 1, 8, marks=pytest.mark.slow),
    pytest.param(models.build("alexnet_rotnet", outputs=3), 6, 63, marks=pytest.mark.slow),
    (models.LinearProbe(PATCHES, outputs=3, pool={"block1": 3}), 1, 16),
]


def setting(model, side):
    """Parameters, collections whose running values have seen something, a batch of uint8 images."""
    images = np.random.default_rng(1).integers(0, 256, (3, side, side, 3), np.uint8)
    params, collections = initialise(model, KEY, images)
    random = np.random.default_rng(2)
    moved = jax.tree.map(lambda x: x + random.random(x.shape, np.float32), collections)
    return params, moved, images


def training(model):
    """Jitted (trained, frozen, collections, images, known) -> ((loss, forward's result), gradient of the trained)."""

    def loss(trained, frozen, collections, images, known):
        result = forward(model, merge(trained, frozen), collections, images, train=True, key=KEY, trunk=known)
        return sum(jnp.square(head - 1).mean() for head in jax.tree.leaves(result.outputs)), result

    return jit(jax.value_and_grad(loss, has_aux=True))


def features_of(model, result):
    """The features that the rest must show: those of its own parts, and what the head reads."""
    probed = isinstance(model, models.LinearProbe)
    return {k: v for k, v in result.features.items() if not probed and k not in model.prefix}


@pytest.mark.parametrize("model, cut, side", CUTS, ids=lambda value: str(getattr(value, "parts", value)))
def test_trunk_then_rest_is_all(model, cut, side):
    model = model.clone(frozen=model.parts[:cut])
    params, collections, images = setting(model, side)
    assert model.prefix == model.parts[:cut] and has_trunk(model)
    known = jit(trunk, static_argnums=0)(model, params, collections, images)

    infer = jit(partial(forward, model, train=False))
    whole, rest = (infer(params, collections, images, trunk=value) for value in (None, known))
    same((rest.outputs, rest.features), (whole.outputs, features_of(model, whole)))

    train, parts = training(model), partition(params, model.frozen)
    (loss, whole), gradient = train(*parts, collections, images, None)
    (rest_loss, rest), rest_gradient = train(*parts, collections, images, known)
    same((rest_loss, rest.outputs, rest_gradient), (loss, whole.outputs, gradient))
    same((rest.collections, rest.features), (whole.collections, features_of(model, whole)))
    for part, before in collections["batch_stats"].items():
        changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), rest.collections["batch_stats"][part], before)
        assert all(jax.tree.leaves(changed)) == any(jax.tree.leaves(changed)) == (part not in model.prefix)


def test_trunk_is_what_the_parts_show(plain):
    params, collections, images = setting(PATCHES, 16)

    def known(*frozen):
        return trunk(PATCHES.clone(frozen=frozen), params, collections, images)

    features = forward(PATCHES, params, collections, images, train=False).features
    np.testing.assert_allclose(known("block1"), features["block1"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(known("block1", "block2"), features["block2"].reshape(3, -1), rtol=1e-5, atol=1e-5)
    for head in ((), ("head",)):  # the head is never part of it
        everything = known("block1", "block2", "fc1", "fc2", *head)
        np.testing.assert_allclose(everything, features["pooled"], rtol=1e-5, atol=1e-5)
    probe = models.LinearProbe(PATCHES, outputs=2, pool={"block2": 2})
    params, collections = initialise(probe, KEY, images)
    maps = trunk(probe, params, collections, images)
    features = forward(probe, params, collections, images, train=False).features
    assert {name: value.shape for name, value in maps.items()} == {"block1": (3, 8, 8, 4), "block2": (3, 2, 2, 6)}
    np.testing.assert_allclose(maps["block1"], features["block1"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(maps["block2"][:, 1, 0], features["block2"][:, 2:, :2].max((1, 2)), rtol=1e-5, atol=1e-5)


def test_what_has_a_trunk():
    parts = ("block1", "block2", "fc1", "fc2", "head")
    assert PATCHES.parts == parts
    for frozen, prefix in (
        ((), ()),
        (("block2",), ()),
        (("fc1", "block1"), ("block1",)),
        (("block2", "block1"), ("block1", "block2")),
        (parts, parts[:-1]),
    ):
        model = PATCHES.clone(frozen=frozen)
        assert model.prefix == prefix and has_trunk(model) == bool(prefix)
    assert not has_trunk(Small(outputs=3, frozen=("block1",)))  # a family of its own, not known to run in parts
    probe = models.LinearProbe(PATCHES, outputs=3)
    assert probe.prefix == ("trunk",) and not has_trunk(probe.clone(frozen=()))


def test_all_processes_keep_the_features_where_the_first_does(monkeypatch):
    """Here there is room on the device; process 0 says that it has none."""
    objective = objectives.supervised(PATCHES.clone(frozen=("block1",)))
    images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    what = (objective, *objective.init(KEY, {"image": images}), {"image": images})
    own = compute(*what)
    monkeypatch.setattr(processes, "share", lambda chosen: np.array(PLACES.index("host"), chosen.dtype))
    found = compute(*what)
    assert (own.place, found.place, found.features) == ("device", "host", None)
    same(found.feed(np.arange(3)), own.features)


def test_an_objective_takes_the_trunk(plain):
    batch = batch_of(4, side=16, channels=3)
    batch["score"] = 100 * batch["image"].mean((1, 2, 3))
    frozen = PATCHES.clone(frozen=("block1", "block2"))
    for objective in (objectives.supervised(frozen), objectives.regression(frozen.clone(outputs=1))):
        params, extra = objective.init(KEY, batch)
        known = jax.jit(objective.trunk)(params, extra, batch["image"])
        assert known.shape == (4, 4 * 4 * 6)
        whole, quick = (
            jax.jit(objective.loss)(params, extra, given, KEY) for given in (batch, {**batch, "trunk": known})
        )
        same(quick, whole)
        elsewhere = {**batch, "image": jnp.zeros_like(batch["image"]), "trunk": known}
        same(jax.jit(objective.loss)(params, extra, elsewhere, KEY), whole)
    assert objectives.supervised(PATCHES).trunk is objectives.regression(PATCHES.clone(outputs=1)).trunk is None
    assert objectives.rotation(frozen.clone(outputs=4)).trunk is None  # it turns the images first
