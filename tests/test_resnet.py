"""The residual family beyond what golden values show: blur, selective kernels, two branches, pools, starts, errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import filled, pictures

from jaxsd import models
from jaxsd.errors import UserError
from jaxsd.models.catalogue import shapes, size
from jaxsd.models.forward import forward, trunk
from jaxsd.models.pool import blur_pool
from jaxsd.models.residual import Branch, SelectiveKernel, Unit

pytestmark = pytest.mark.usefixtures("plain")

DSK = {"selective": True, "branches": 2, "blur": True}
COUNTS = [
    ("skresnext50_32x4d", {"dilated": False}, 29_994_728),
    ("dsk_resnext50_32x4d", {"depthwise": True}, 44_737_704),
    ("dsk_resnext50_32x4d", {"depthwise": True, "dilated": False}, 44_979_368),
]


def small(**options):
    """A first stage of two bottlenecks and a second of one: every kind of unit there is."""
    form = {"depths": (2, 1), "widths": (8, 16), "bottleneck": True, "inner": 2, "groups": 4}
    return models.ResNet(**{"outputs": 5, **form, **options})


def drawn(module, side, channels=8, batch=8):
    """(variables of a submodule, an input) that depend on nothing but the shapes."""
    params, collections = filled(module, side, channels)
    return {"params": params, **collections}, pictures(side, batch, channels)


@functools.partial(jax.jit, static_argnums=(0, 3))
def parts(module, variables, x, train, key=None):
    """(output, what each submodule returned) of a call."""
    rngs = None if key is None else {"dropout": key}
    kept = ["batch_stats"] if train else []
    y, state = module.apply(
        variables, x, train, rngs=rngs, capture_intermediates=True, mutable=["intermediates", *kept]
    )
    inner = {name: value["__call__"][0] for name, value in state["intermediates"].items() if name != "__call__"}
    return y, inner, state.get("batch_stats")


@pytest.mark.parametrize("name, options, expected", COUNTS)
def test_exact_number_of_parameters_with_options(name, options, expected):
    assert size(shapes(models.build(name, stem="imagenet", **options), 64)["params"]) == expected


def test_the_papers_networks_are_nothing_but_options():
    build = functools.partial(models.build, resolution=224)
    assert build("dsk_resnext101_32x4d") == build("resnext101_32x4d", **DSK)
    assert build("dsk_resnext50_32x4d", blur=False) == build("skresnext50_32x4d", branches=2)
    assert build("d_resnext50_32x4d", branches=1) == build("resnext50_32x4d", blur=False)
    assert build("resnet18", resolution=32, grow=1) == build("resnet34", stem="cifar", grow=1).clone(depths=(2,))


def test_blur_by_hand():
    blur = jax.jit(blur_pool, static_argnums=1)
    ramp = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(np.asarray(blur(ramp))[0, :, :, 0], [[2.5, 4], [8.5, 10]])
    delta = np.zeros((1, 5, 5, 1), np.float32)
    delta[0, 2, 2, 0] = 1
    wanted = np.pad(np.outer([1, 2, 1], [1, 2, 1]) / 16, 1)
    np.testing.assert_array_equal(np.asarray(blur(delta, 1))[0, :, :, 0], wanted)
    assert (np.asarray(blur(np.full((2, 1, 3, 3), 0.75, np.float32))) == 0.75).all()
    for side, half in ((1, 1), (2, 1), (7, 4), (8, 4), (15, 8), (113, 57)):
        assert jax.eval_shape(blur_pool, np.zeros((2, side, 9, 3), np.float32)).shape == (2, half, 5, 3)


def test_blur_is_a_convolution_of_the_reflected_input():
    x = pictures(9)[:, :, :6]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::2, ::2]
    expected = np.einsum("bhwcij,ij->bhwc", windows, np.outer([1, 2, 1], [1, 2, 1]) / 16)
    np.testing.assert_allclose(jax.jit(blur_pool)(x), expected, atol=1e-6)


@pytest.mark.parametrize("selective", [False, True])
def test_blur_takes_the_stride_of_every_layer_and_adds_no_parameter(selective):
    plain = small(stem_kind="imagenet", selective=selective)
    # the stem's convolution, the strided layer and the shortcut of the second stage, each before its pool
    for options, expected in (
        ({}, (16, 4, 4)),
        ({"blur": True}, (16, 8, 4)),
        ({"blur": True, "blur_stem": True}, (32, 8, 4)),
    ):
        model, sides = plain.clone(**options), {}
        assert shapes(model, 32) == shapes(plain, 32)

        def note(layer, args, kwargs, context, sides=sides):
            y = layer(*args, **kwargs)
            if context.method_name == "__call__":
                sides["/".join(context.module.path)] = y.shape[1] if hasattr(y, "shape") else None
            return y

        with nn.intercept_methods(note):
            jax.eval_shape(lambda x, m=model: m.init(jax.random.key(0), x, False), pictures(32, 1))
        layer = "block2/unit1/layer2" + ("/path2" if selective else "")
        assert tuple(sides[name] for name in ("stem", layer, "block2/unit1/shortcut")) == expected
        assert (sides["block1"], sides["block2"]) == (8, 4)


@pytest.mark.parametrize("dilated", [True, False])
def test_selective_kernel_mixes_its_paths_channel_by_channel(dilated):
    module = SelectiveKernel(16, groups=4, dilated=dilated)
    variables, x = drawn(module, 6)
    y, inner, _ = parts(module, variables, x, False)
    first, second = inner["path1"], inner["path2"]
    assert (y >= jnp.minimum(first, second) - 1e-6).all() and (y <= jnp.maximum(first, second) + 1e-6).all()
    apart = jnp.abs(first - second) > 0.1
    share = np.ma.array((y - second) / (first - second), mask=~apart)
    assert share.max() - share.min() > 0.05  # it depends on the channel and the image
    assert (share.max((1, 2)) - share.min((1, 2))).max() < 1e-4  # and not on the place
    attention = inner["select"].reshape(8, 2, 16)
    np.testing.assert_allclose(share.mean((1, 2)), jax.nn.softmax(attention, 1)[:, 0], atol=1e-4)

    variables["params"]["select"]["kernel"] = jnp.zeros_like(variables["params"]["select"]["kernel"])
    np.testing.assert_allclose(parts(module, variables, x, False)[0], (first + second) / 2, rtol=1e-5, atol=1e-6)


def test_selective_kernel_of_equal_paths_is_the_path():
    module = SelectiveKernel(16, groups=4)
    variables, x = drawn(module, 6)
    for kind in variables.values():
        kind["path2"] = kind["path1"]
    kernel = np.zeros_like(variables["params"]["path1"]["conv"]["kernel"])
    kernel[1, 1] = variables["params"]["path1"]["conv"]["kernel"][1, 1]  # the tap that both dilations share
    variables["params"]["path1"]["conv"]["kernel"] = kernel
    y, inner, _ = parts(module, variables, x, False)
    np.testing.assert_allclose(inner["path2"], inner["path1"], rtol=1e-6)
    np.testing.assert_allclose(y, inner["path1"], rtol=1e-5, atol=1e-6)


def test_selective_kernel_squeezes_to_a_sixteenth_but_not_below_32():
    for features, squeezed in ((128, 32), (512, 32), (1024, 64)):
        params = shapes(SelectiveKernel(features), 2)["params"]
        assert params["select"]["kernel"].shape == (1, 1, squeezed, 2 * features)


TWO = Unit(4, branch=functools.partial(Branch, bottleneck=True), branches=2)


def telling(unit):
    """The parameters of a unit of two branches, changed so that its output is lam: F1 is 1, F2 and the shortcut 0."""

    def constant(norm, value):
        return {"scale": jnp.zeros_like(norm["scale"]), "bias": jnp.full_like(norm["bias"], value)}

    first, second, shortcut = unit["branch1"], unit["branch2"], unit["shortcut"]
    return {
        "branch1": {**first, "layer3": {**first["layer3"], "norm": constant(first["layer3"]["norm"], 1)}},
        "branch2": {**second, "layer3": {**second["layer3"], "norm": constant(second["layer3"]["norm"], 0)}},
        "shortcut": {**shortcut, "norm": constant(shortcut["norm"], 0)},
    }


def lams(unit, batch, draws):
    """lam of every image: [draws, batch]."""
    variables, x = drawn(unit, 1, batch=batch)
    variables["params"] = telling(variables["params"])
    keys = jax.random.split(jax.random.key(0), draws)
    call = jax.vmap(lambda key: unit.apply(variables, x, True, rngs={"dropout": key}, mutable=["batch_stats"])[0])
    values = np.asarray(jax.jit(call)(keys))
    assert np.ptp(values, axis=(2, 3, 4)).max() == 0
    return values[:, :, 0, 0, 0]


def test_inference_takes_both_branches_evenly_and_needs_no_key():
    variables, x = drawn(TWO, 4)
    y, inner, _ = parts(TWO, variables, x, False)
    np.testing.assert_allclose(y, nn.relu(inner["shortcut"] + (inner["branch1"] + inner["branch2"]) / 2), rtol=1e-5)
    assert np.abs(inner["branch1"] - inner["branch2"]).max() > 1
    swapped = {k: {**tree, "branch1": tree["branch2"], "branch2": tree["branch1"]} for k, tree in variables.items()}
    np.testing.assert_allclose(parts(TWO, swapped, x, False)[0], y, rtol=1e-5, atol=1e-6)


def test_training_takes_one_branch_for_every_image():
    seen = lams(TWO, 40, 25)
    assert set(seen.ravel()) == {0, 1} and 0.45 < seen.mean() < 0.55  # 1,000 fair coins: 0.5 +- 0.016
    assert len({row.tobytes() for row in seen}) == 25
    for group, ends in ((16, [16, 32]), (None, [])):
        for run in np.split(lams(TWO.clone(lam_group=group), 40, 20), ends, axis=1):
            assert (run == run[:, :1]).all() and 0 < run.mean() < 1
    variables, x = drawn(TWO, 4)
    with pytest.raises(Exception, match="dropout"):
        parts(TWO, variables, x, True)
    y, inner, _ = parts(TWO, variables, x, True, jax.random.key(0))
    either = [nn.relu(inner["shortcut"] + inner[branch]) for branch in ("branch1", "branch2")]
    assert {int(np.argmin([np.abs(y[i] - other[i]).max() for other in either])) for i in range(8)} == {0, 1}
    assert max(min(float(np.abs(y[i] - other[i]).max()) for other in either) for i in range(8)) < 1e-5


def test_a_branch_that_is_not_taken_gets_no_gradient_but_fresh_statistics():
    unit = TWO.clone(lam_group=None)
    variables, x = drawn(unit, 4)

    @jax.jit
    def step(key):
        def total(params):
            y, _, after = parts(unit, {**variables, "params": params}, x, True, key)
            return y.sum(), after

        return jax.grad(total, has_aux=True)(variables["params"])

    untouched = set()
    for seed in range(8):
        found, after = step(jax.random.key(seed))
        zero = [b for b in ("branch1", "branch2") if all((leaf == 0).all() for leaf in jax.tree.leaves(found[b]))]
        assert len(zero) == 1
        untouched.update(zero)
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), variables["batch_stats"], after)
        assert all(jax.tree.leaves(moved))
    assert untouched == {"branch1", "branch2"}


def test_shake_mixes_by_any_share_and_its_gradients_by_another():
    unit = TWO.clone(lam="shake")
    variables, x = drawn(unit, 1, batch=200)
    params = telling(variables["params"])

    def output(bias):
        first = params["branch1"]
        layer = {**first["layer3"], "norm": {**first["layer3"]["norm"], "bias": bias}}
        rngs = {"dropout": jax.random.key(0)}
        tree = {**variables, "params": {**params, "branch1": {**first, "layer3": layer}}}
        return unit.apply(tree, x, True, rngs=rngs, mutable=["batch_stats"])[0][:, 0, 0, 0]

    forward_lam = jax.jit(output)(jnp.ones(16))
    backward_lam = jax.jit(jax.jacrev(output))(jnp.ones(16))[:, 0]
    for lam in (forward_lam, backward_lam):
        assert 0 <= lam.min() < 0.05 and 0.95 < lam.max() <= 1
        assert lam.mean() == pytest.approx(0.5, abs=0.08) and lam.std() == pytest.approx(12**-0.5, abs=0.04)
    assert abs(np.corrcoef(forward_lam, backward_lam)[0, 1]) < 0.25


def test_blocks_draw_independently_and_frozen_ones_not_at_all():
    model = small(depths=(1, 1), branches=2)
    params, collections = filled(model, 8)
    for block in model.blocks:
        params[block]["unit1"] = telling(params[block]["unit1"])

    def maps(model):
        run = functools.partial(forward, model, params, collections, train=True, key=jax.random.key(0))
        result = jax.jit(run)(pictures(8, 64))
        return [np.asarray(result.features[block][:, 0, 0, 0]) for block in model.blocks]

    first, second = maps(model)
    assert set(first) == set(second) == {0, 1} and 0.3 < (first == second).mean() < 0.7
    frozen, free = maps(model.clone(frozen=("stem", "block1")))
    assert (frozen == 0.5).all() and set(free) == {0, 1}


def test_pools_see_the_mean_and_the_maximum():
    images = pictures(8, 2)
    build = functools.partial(models.ResNet, outputs=0, depths=(1, 1), widths=(4, 6))
    average, dual, concat = (build(pool=pool) for pool in ("average", "dual", "concat"))
    params, collections = filled(average, 8)
    infer = jax.jit(lambda m: forward(m, params, collections, images, train=False), static_argnums=0)
    found = {m.pool: infer(m) for m in (average, dual, concat)}
    maps = np.asarray(found["dual"].features["block2"])
    mean, most = maps.mean((1, 2)), maps.max((1, 2))
    np.testing.assert_allclose(found["average"].outputs, mean, rtol=1e-5)
    np.testing.assert_allclose(found["dual"].outputs, (mean + most) / 2, rtol=1e-5)
    np.testing.assert_allclose(found["concat"].outputs, np.concatenate([mean, most], 1), rtol=1e-5)
    assert shapes(concat.clone(outputs=5), 8)["params"]["head"]["kernel"].shape == (2 * 6, 5)
    grown = np.asarray(infer(dual.clone(depths=(1,), widths=(4,))).outputs)
    maps = np.asarray(found["dual"].features["block1"])
    np.testing.assert_allclose(grown, (maps.mean((1, 2)) + maps.max((1, 2))) / 2, rtol=1e-5)


ALL = {**DSK, "stem_kind": "imagenet", "blur_stem": True, "pool": "dual"}


def test_everything_at_once_on_odd_sides():
    """DSK on 37 pixels of 2 channels: in bfloat16, and in two goes."""
    model = small(**ALL, depths=(1, 1), head_dropout=0.2)
    params, collections = filled(model, 37, 2)
    images = pictures(37, 4, 2)
    infer = jax.jit(lambda m: forward(m, params, collections, images, train=False), static_argnums=0)
    whole, half = infer(model), infer(model.clone(dtype=jnp.dtype("bfloat16")))
    assert whole.features["block1"].shape == (4, 10, 10, 32) and whole.features["block2"].shape == (4, 5, 5, 64)
    assert half.features["block2"].dtype == jnp.bfloat16 and half.outputs.dtype == jnp.float32
    assert 0 < np.abs(whole.outputs - half.outputs).max() < 0.05 * np.abs(whole.outputs).max()

    frozen = model.clone(frozen=("stem", "block1", "block2"))
    kept = jax.jit(lambda images: trunk(frozen, params, collections, images))(images)
    assert kept.shape == (4, 64)
    rest = forward(frozen, params, collections, images, train=False, trunk=kept)
    np.testing.assert_allclose(rest.outputs, whole.outputs, rtol=1e-5, atol=1e-6)


def test_gradients_with_remat():
    """The same ones: the units that are run again draw the same lam."""
    model = small(branches=2, groups=1, depths=(1,), widths=(4,))
    params, collections = filled(model, 8)

    def gradient(model):
        def loss(params):
            result = forward(model, params, collections, pictures(8), train=True, key=jax.random.key(1))
            return jnp.square(result.outputs).mean()

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    for a, b in zip(gradient(model), gradient(model.clone(remat=True)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max() + 1e-6)


def test_start():
    model = small(widths=(64, 128), groups=32, **DSK, zero_init_residual=True)
    started = jax.jit(lambda key: model.init(key, jnp.zeros((1, 8, 8, 3)), False)["params"]["block2"])
    unit = started(jax.random.key(0))["unit1"]
    first, second = unit["branch1"], unit["branch2"]
    for kernel, deviation in (
        (first["layer1"]["conv"]["kernel"], (2 / 256) ** 0.5),
        (first["layer2"]["path1"]["conv"]["kernel"], (2 / (9 * 256)) ** 0.5),  # the fan out of all groups together
        (first["layer2"]["reduce"]["conv"]["kernel"], (2 / 32) ** 0.5),
        (first["layer2"]["select"]["kernel"], (2 / 512) ** 0.5),
        (first["layer3"]["conv"]["kernel"], (2 / 512) ** 0.5),
        (unit["shortcut"]["conv"]["kernel"], (2 / 512) ** 0.5),
    ):
        assert kernel.std() == pytest.approx(deviation, rel=0.03) and abs(kernel.mean()) < 0.05 * deviation
        assert np.abs(kernel).max() > 3.3 * deviation  # not truncated
    assert not np.allclose(first["layer1"]["conv"]["kernel"], second["layer1"]["conv"]["kernel"])
    for branch in (first, second):
        assert (branch["layer3"]["norm"]["scale"] == 0).all() and (
            branch["layer2"]["path1"]["norm"]["scale"] == 1
        ).all()
    assert (unit["shortcut"]["norm"]["scale"] == 1).all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: models.build("resnet50", stem="cifar", pool="max"), ["pool", "'max'", "'dual'", "'concat'"]),
        (lambda: models.build("resnet50", stem="cifar", branches=3), ["branches", "3", "1, 2"]),
        (lambda: models.build("resnet50", stem="cifar", branches=2, lam="any"), ["lam", "'either'", "'shake'"]),
        (lambda: models.build("resnet50", stem="cifar", lam_group=64), ["lam_group", "branches=2"]),
        (lambda: models.build("d_resnext50_32x4d", stem="cifar", lam_group=0), ["lam_group=0", "None"]),
        (lambda: models.build("resnext50_32x4d", stem="cifar", dilated=False), ["dilated", "selective=True"]),
        (lambda: models.build("resnet18", stem="cifar", depthwise=True), ["depthwise", "resnet50"]),
        (lambda: models.build("dsk_resnext50_32x4d"), ["dsk_resnext50_32x4d", "resolution=", "stem="]),
        (lambda: models.build("dsk_resnext50_32x4d", stem="cifar", grow=5), ["dsk_resnext50_32x4d", "1 .. 4"]),
    ],
)
def test_wrong_use_is_one_line(call, words):
    with pytest.raises(UserError) as failure:
        call()
    text = str(failure.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_two_branches_have_no_published_names():
    with pytest.raises(NotImplementedError):
        small(branches=2).published("block1/unit1/branch1/layer1/conv")
