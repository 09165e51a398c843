"""The networks for growing patches: counts to the unit, the 4x4 rule, growing by name, dropout, starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import same

from jaxsd import models
from jaxsd.errors import UserError
from jaxsd.models.catalogue import shapes, size
from jaxsd.models.forward import forward, initialise

pytestmark = pytest.mark.usefixtures("plain")

LIVE = {"patch": 32, "outputs": 1}
MIT = {"patch": 64, "widths": (256, 256), "outputs": 67}
# all parameters, trained and frozen ones with every block but the last frozen: computed by PyTorch
STEPS = [
    (LIVE, 1, (1_274_145, 1_274_145, 0)),
    (LIVE, 2, (1_569_569, 1_476_097, 93_472)),
    (LIVE, 3, (3_503_905, 3_115_009, 388_896)),
    (LIVE, 4, (4_684_577, 3_409_921, 1_274_656)),
    (LIVE, 5, (10_322_721, 7_867_393, 2_455_328)),
    (MIT, 1, (1_438_819, 1_438_819, 0)),
    (MIT, 2, (3_373_155, 3_131_971, 241_184)),
    (MIT, 3, (4_553_827, 3_426_883, 1_126_944)),
]
BLOCKS = [(LIVE, (93_472, 295_424, 885_760, 1_180_672, 3_540_992)), (MIT, (241_184, 885_760, 1_180_672))]
TINY = {"patch": 8, "first": (4,), "widths": (6, 5), "hidden": (7, 6), "outputs": 3}


def shown(model, side):
    """Shapes of (outputs, features), one image."""
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    outputs, features = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, False)[0], images)
    return outputs.shape, {name: value.shape for name, value in features.items()}


@pytest.mark.parametrize("ladder, step, expected", STEPS)
def test_parameters_of_every_step(ladder, step, expected):
    frozen = tuple(f"block{i}" for i in range(1, step))
    model = models.build("patchnet", grow=step, frozen=frozen, **ladder)
    params = shapes(model, ladder["patch"] * 2 ** (step - 1))["params"]
    kept = sum(size(params[name]) for name in frozen)
    assert (size(params), size(params) - kept, kept) == expected
    assert set(params) == set(model.parts) and model.prefix == frozen


@pytest.mark.parametrize("ladder, expected", BLOCKS)
def test_parameters_of_the_blocks(ladder, expected):
    model = models.build("patchnet", **ladder)
    params = shapes(model, ladder["patch"] * 2 ** (len(expected) - 1))["params"]
    assert tuple(size(params[name]) for name in model.blocks) == expected
    assert size([params[name] for name in ("fc1", "fc2", "head")]) == size(params) - sum(expected)


@pytest.mark.parametrize("patch, units, channels", [(8, 1, 32), (16, 2, 64), (32, 3, 128), (64, 4, 128), (128, 5, 128)])
def test_every_step_ends_in_4x4(patch, units, channels):
    for step in (1, 2, 3):
        model = models.build("patchnet", patch=patch, widths=(24, 40), grow=step, outputs=2)
        outputs, features = shown(model, patch * 2 ** (step - 1))
        assert outputs == (1, 2) and tuple(features) == (*model.blocks, "pooled")
        last = 2 ** (step + 1)
        maps = [(1, last, last, channels), (1, last // 2, last // 2, 24), (1, 4, 4, 40)][:step]
        assert [features[name] for name in model.blocks] == maps and features["pooled"] == (1, 256)
    first = shapes(models.build("patchnet", patch=patch, grow=1), patch)["params"]["block1"]
    widths = [first[f"unit{i + 1}"]["conv"]["kernel"].shape[-1] for i in range(units)]
    assert len(first) == units and widths == [32, 64, *[128] * 9][:units]


@pytest.mark.parametrize(
    "name, options, side",
    [("patchnet", {"patch": 16}, None), ("resnet18", {"stem": "cifar"}, 16), ("resnet50", {"stem": "imagenet"}, 32)]
    + [("resnet8", {}, 16), ("nin", {}, 16), ("nin", {"blocks": 5, "pool_block3": True}, 16)],
)
def test_a_grown_network_is_the_beginning_of_the_whole(name, options, side):
    """Names and shapes are the whole network's but behind the last block, so weights carry over by name."""
    whole = models.build(name, outputs=2, **options)
    assert models.build(name, outputs=2, grow=len(whole.blocks), **options) == whole
    reference = shapes(whole, side or 256)
    for grow in range(1, len(whole.blocks)):
        model = models.build(name, outputs=2, grow=grow, **options)
        pixels = side or 16 * 2 ** (grow - 1)
        begin = shapes(model, pixels)
        assert model.blocks == whole.blocks[:grow] and set(begin["params"]) == set(model.parts) <= set(whole.parts)
        for part in (*model.blocks, *(("stem",) if "stem" in model.parts else ())):
            assert all(begin[kind][part] == reference[kind][part] for kind in ("params", "batch_stats"))
        if side:
            features, full = shown(model, side)[1], shown(whole, side)[1]
            assert all(features[block] == full[block] for block in model.blocks)


def test_a_grown_network_computes_what_the_whole_does():
    whole, part = (models.build("patchnet", **TINY, adaptive_pool=True, grow=grow) for grow in (None, 2))
    images = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    params, collections = initialise(whole, jax.random.key(0), images)
    drawn, _ = initialise(part, jax.random.key(0), images)
    for block in part.blocks:
        same(drawn[block], params[block])
    given = {**drawn, **{name: params[name] for name in part.blocks}}
    all_features = jax.jit(lambda: forward(whole, params, collections, images, train=False).features)()
    features = jax.jit(lambda: forward(part, given, collections, images, train=False).features)()
    for block in part.blocks:
        np.testing.assert_allclose(features[block], all_features[block], rtol=1e-5, atol=1e-6)


def test_by_hand():
    """One convolution that copies a channel: the maximum of every 2x2, whose mean over 4x4 the dense layers pass on."""
    model = models.build("patchnet", patch=8, first=(1,), widths=(), hidden=(1,), outputs=1, dropout=0.9)
    image = np.arange(64, dtype=np.float32).reshape(1, 8, 8, 1) / 64
    params, collections = initialise(model, jax.random.key(0), image)
    assert set(params) == {"block1", "fc1", "head"}
    params["block1"]["unit1"]["conv"]["kernel"] = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(2)
    params["fc1"]["dense"] = {"kernel": jnp.full((16, 1), 1 / 16), "bias": jnp.array([0.5])}
    params["head"] = {"kernel": jnp.array([[3.0]]), "bias": jnp.array([-1.0])}
    result = forward(model, params, collections, image, train=False)
    expected = 2 * image[:, 1::2, 1::2] / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(result.features["block1"], expected, rtol=1e-6)
    np.testing.assert_allclose(result.features["pooled"], [[expected.mean() + 0.5]], rtol=1e-6)
    np.testing.assert_allclose(result.outputs, [[3 * (expected.mean() + 0.5) - 1]], rtol=1e-6)
    params["fc1"]["dense"]["bias"] = jnp.array([-9.0])  # a ReLU follows
    assert forward(model, params, collections, image, train=False).features["pooled"] == 0


def test_dropout_is_a_matter_of_training():
    model = models.build("patchnet", patch=8, first=(2,), widths=(), hidden=(400,), outputs=1)
    images = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    params, collections = initialise(model, jax.random.key(0), images)

    @jax.jit
    def pooled(key):
        result = forward(model, params, collections, images, train=True, key=key)
        return result.features["pooled"]

    first, again, other = (np.asarray(pooled(jax.random.key(k))) for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    still = model.clone(dropout=0.0)
    without = np.asarray(forward(still, params, collections, images, train=True).features["pooled"])
    assert np.any((first == 0) != (other == 0))
    kept = first != 0
    np.testing.assert_allclose(first[kept], 2 * without[kept], rtol=1e-5, atol=1e-6)  # scaled, so that the mean stays
    assert 0.4 < kept[without > 0].mean() < 0.6
    frozen = model.clone(frozen=("fc1",))
    off = forward(frozen, params, collections, images, train=True).features["pooled"]  # needs no key
    np.testing.assert_allclose(off, without, rtol=1e-5, atol=1e-6)
    results = [forward(model, params, collections, images, train=False, key=key) for key in (None, jax.random.key(3))]
    same(*[result.outputs for result in results])


def test_start():
    model = models.build("patchnet", patch=8, first=(64,), widths=(64,), hidden=(300,), outputs=100)
    params = jax.jit(lambda key: model.init(key, jnp.zeros((1, 16, 16, 3)), False)["params"])(jax.random.key(3))
    kernel = np.asarray(params["block2"]["unit1"]["conv"]["kernel"])
    assert kernel.std() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02) and np.abs(kernel).max() > 3.5 * kernel.std()
    for layer, total in ((params["fc1"]["dense"], 16 * 64 + 300), (params["head"], 300 + 100)):
        limit = (6 / total) ** 0.5
        assert 0.99 * limit < np.abs(layer["kernel"]).max() <= limit and not np.any(layer["bias"])
        assert np.std(layer["kernel"]) == pytest.approx(limit / 3**0.5, rel=0.02)


def test_adaptive_pool_takes_any_size_and_changes_nothing_at_the_right_one():
    plain, adaptive = (models.build("patchnet", **TINY, adaptive_pool=flag) for flag in (False, True))
    assert shapes(plain, 32) == shapes(adaptive, 32) == shapes(adaptive, 8) == shapes(adaptive, 77)
    images = np.random.default_rng(0).random((1, 32, 32, 3), np.float32)
    params, collections = initialise(plain, jax.random.key(0), images)
    same(*[forward(m, params, collections, images, train=False).outputs for m in (plain, adaptive)])


def build(**options):
    return models.build("patchnet", **options)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: shown(build(), 256), ["5 blocks", "512 x 512", "256 x 256", "adaptive_pool"]),
        (lambda: shown(build(grow=2), 48), ["2 blocks", "cut patches of 64", "48 x 48"]),
        (lambda: shown(build(grow=1), 33), ["1 block ", "cut patches of 32"]),
        (lambda: shown(build(adaptive_pool=True), 100), ["128 pixels or more", "100 x 100"]),
        (lambda: build(patch=48), ["8, 16, 32, 64", "48"]),
        (lambda: build(patch=4), ["4", "patch="]),
        (lambda: build(first=(8, 8)), ["3 numbers", "first="]),
        (lambda: build(dropout=1.0), ["dropout", "[0, 1)"]),
        (lambda: build(grow=6), ["patchnet has 5 blocks", "1 .. 5"]),
        (lambda: models.build("resnet8", grow=0), ["resnet8 has 3 blocks", "1 .. 3"]),
        (lambda: models.build("nin", blocks=3, grow=4), ["nin has 3 blocks"]),
        (lambda: models.build("alexnet_rotnet", grow=2), ["'grow'", "adaptive_pool"]),
        (lambda: build(grow=2, frozen=("block3",)), ["block3", "'block2'"]),
    ],
)
def test_wrong_use_is_one_line(call, words):
    with pytest.raises(UserError) as failure:
        call()
    text = str(failure.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_perturbations_reach_the_maps():
    """Gradients with respect to a feature, as attention maps need them: behind the last block, through the dense."""
    model = models.build("patchnet", patch=8, first=(2,), widths=(), hidden=(), outputs=2)
    images = np.ones((1, 8, 8, 3), np.float32)
    variables = jax.jit(lambda key: model.init(key, images, False))(jax.random.key(0))
    assert set(variables["perturbations"]) == {"block1_map", "pooled_map"}

    def score(added):
        rest = {name: variables[name] for name in ("params", "batch_stats")}
        zeros = jax.tree.map(jnp.zeros_like, variables["perturbations"])
        return model.apply({**rest, "perturbations": {**zeros, "block1_map": added}}, images, False)[0][0, 1]

    gradient = np.asarray(jax.jit(jax.grad(score))(np.zeros((1, 4, 4, 2), np.float32)))
    wanted = np.asarray(variables["params"]["head"]["kernel"])[:, 1]
    np.testing.assert_allclose(gradient.reshape(-1), wanted, rtol=1e-6)
