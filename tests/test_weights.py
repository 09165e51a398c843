"""Published weights: every tensor accounted for, what is adapted, where files come from, and the way back."""

import importlib.util

import jax
import numpy as np
import pytest
import safetensors.numpy
from filled import filled
from small import same

from jaxsd import models, weights
from jaxsd.errors import UserError
from jaxsd.models import convnet, efficientnet, pvt, resnest, resnet, t2t, vgg, vit
from jaxsd.models.forward import STANDARDISE, forward
from jaxsd.weights.names import kept

RESNET = resnet.ResNet(outputs=5, depths=(1, 1), widths=(4, 6), stem_kind="imagenet")
VGG = vgg.VGG(outputs=5, depths=(1, 2), widths=(4, 6), hidden=(8, 7), pool=2)
DEIT = vit.VisionTransformer(outputs=5, width=12, depth=2, heads=3, patch=4, side=8)
FAMILIES = {
    "resnet": RESNET,
    "bottleneck": resnet.ResNet(outputs=5, depths=(1, 1), widths=(4, 6), bottleneck=True, stem_kind="imagenet"),
    "selective": resnet.ResNet(
        outputs=5, depths=(1, 1), widths=(64, 64), bottleneck=True, stem_kind="imagenet", groups=2, selective=True
    ),
    "resnest": resnest.ResNeSt(outputs=5, depths=(1, 1, 1, 1), stem_width=8),
    "efficientnet": efficientnet.EfficientNet(outputs=5, width=0.25, depth=0.25),
    "vgg": VGG,
    "vgg_bn": VGG.clone(norm=True),
    "deit": DEIT,
    "pvt": pvt.PVT(outputs=5, depths=(1, 1, 1, 1), widths=(8, 8, 16, 16), heads=(1, 1, 2, 2)),
    "t2t": t2t.T2TViT(outputs=5, width=16, depth=1, heads=2, side=32),
}


def network(model, resolution=32, channels=3):
    """(params, collections) as an objective would draw them; the numbers are those of `filled`."""
    params, collections = filled(model, resolution, channels)
    standard = {"mean": np.zeros(channels, np.float32), "std": np.ones(channels, np.float32)}
    return params, {**collections, STANDARDISE: standard}


def zeros(trees):
    return jax.tree.map(np.zeros_like, trees)


def written(path, model=RESNET, change=None, **options):
    """A file of a network's tensors, changed as asked; returns (path, trees)."""
    trees = network(model, **options)
    tensors = weights.to_timm(model, *trees)
    if change:
        change(tensors)
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
    return path, trees


def actions(lines):
    return {line["tensor"]: line["action"] for line in lines}


# every tensor is accounted for


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_is_loaded_bit_for_bit(name, tmp_path):
    model, path = FAMILIES[name], tmp_path / "x.safetensors"
    params, collections = network(model)
    weights.save(path, model, params, collections)
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(file.get_tensor(key).dtype == np.float32 for key in file.keys())  # noqa: SIM118
    own = zeros((params, kept(collections)))
    found = weights.load(path, model, own[0], {**own[1], STANDARDISE: collections[STANDARDISE]})
    standard = {key: value.tolist() for key, value in found[1].pop(STANDARDISE).items()}
    assert standard == {
        key: np.float32(weights.fit.STANDARDS["imagenet"][at]).tolist() for at, key in enumerate(("mean", "std"))
    }
    same(found[:2], (params, kept(collections)))
    assert len(found[2]) == len(jax.tree.leaves((params, kept(collections))))
    assert {line["action"] for line in found[2]} == {"copied"}


def test_alexnet_keeps_its_dense_layers_flat_channels_first():
    model = convnet.AlexNet(outputs=5)
    for leaf, wanted in (((6, 6, 256, 3), (3, 9216)), ((1, 1, 7, 3), (3, 7))):
        value = np.arange(np.prod(leaf), dtype=np.float32).reshape(leaf)
        found = weights.names.turned(model, ("params", "fc1", "kernel"), value)
        assert found.shape == wanted
        np.testing.assert_array_equal(found, value.transpose(3, 2, 0, 1).reshape(wanted))
        same(weights.names.turned_back(("params", "fc1", "kernel"), found, leaf), value)


def test_a_head_of_other_outputs_is_fresh_and_everything_is_told(tmp_path):
    def count(tensors):
        tensors["bn1.num_batches_tracked"] = np.int64(3)

    path, (params, collections) = written(tmp_path / "x.safetensors", change=count)
    model = RESNET.clone(outputs=3)
    own = network(model)
    found, stats, lines = weights.load(path, model, *zeros(own))
    told = actions(lines)
    assert {k for k, v in told.items() if v == "fresh"} == {"params/head/kernel", "params/head/bias"}
    assert {k for k, v in told.items() if v == "dropped"} == {"fc.weight", "fc.bias", "bn1.num_batches_tracked"}
    assert set(told.values()) == {"copied", "fresh", "dropped"}
    assert len(told) == len(jax.tree.leaves((params, kept(collections)))) + 3
    same(found["block1"], params["block1"])
    same(stats["batch_stats"], collections["batch_stats"])
    assert not found["head"]["kernel"].any()
    stem = next(line for line in lines if line["tensor"] == "params/stem/conv/kernel")
    assert stem == {
        "tensor": "params/stem/conv/kernel",
        "shape": [7, 7, 3, 4],
        "action": "copied",
        "from": "conv1.weight",
    }

    headless = weights.load(path, RESNET.clone(outputs=0), *zeros(network(RESNET.clone(outputs=0))))
    assert actions(headless[2])["fc.weight"] == "dropped" and "head" not in headless[0]
    same(headless[0]["stem"], params["stem"])


def test_what_is_asked_to_be_fresh_keeps_its_own_values(tmp_path):
    path, (params, _) = written(tmp_path / "x.safetensors")
    own = zeros(network(RESNET))
    found, _, lines = weights.load(path, RESNET, *own, fresh=("head", "block2/unit1/layer2"))
    fresh = {k for k, v in actions(lines).items() if v == "fresh"}
    parts = ("head/", "block2/unit1/layer2/")
    assert fresh == {name for name in actions(lines) if name.partition("/")[2].startswith(parts)} and len(fresh) == 7
    assert not found["head"]["kernel"].any() and not found["block2"]["unit1"]["layer2"]["conv"]["kernel"].any()
    same(found["block2"]["unit1"]["layer1"], params["block2"]["unit1"]["layer1"])
    shorter = RESNET.clone(depths=(1,), widths=(4,))
    with pytest.raises(UserError, match=r"layer2.0.* has no place"):
        weights.load(path, shorter, *network(shorter))
    lines = weights.load(path, shorter, *network(shorter), fresh=("head", "block2"))[2]
    assert actions(lines)["layer2.0.conv1.weight"] == "dropped"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layer1.0.conv1.weight"), "layer1.0.conv1.weight is missing"),
        (lambda t: t.update(extra=np.ones(2, np.float32)), "extra has no place"),
        (lambda t: t.update({"bn1.bias": np.ones(5, np.float32)}), r"bn1.bias is \[5\], wanted \[4\]"),
        (lambda t: t.update({"conv1.weight": np.ones((4, 3, 3, 3), "f")}), r"is \[4, 3, 3, 3\], wanted \[4, 3, 7, 7\]"),
        (lambda t: t.update({"conv1.weight": np.ones((4, 7, 7, 3), "f")}), r"is \[4, 7, 7, 3\], wanted"),
        (lambda t: [t.pop(name) for name in list(t)], "and .* more"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(change, message, tmp_path):
    path, _ = written(tmp_path / "x.safetensors", change=change)
    with pytest.raises(UserError, match=f"{path} do not fit this ResNet: .*{message}") as error:
        weights.load(path, RESNET, *network(RESNET))
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_networks_that_nobody_publishes(tmp_path):
    path, _ = written(tmp_path / "x.safetensors")
    nin = models.build("nin", outputs=5)
    for call in (lambda: weights.load(path, nin, {}, {}), lambda: weights.to_timm(nin, {}, {})):
        with pytest.raises(UserError, match="NIN has no published counterpart"):
            call()


# what is adapted


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_the_first_convolution_takes_other_numbers_of_channels(channels, tmp_path):
    path, (params, _) = written(tmp_path / "x.safetensors")
    found, _, lines = weights.load(path, RESNET, *network(RESNET, channels=channels))
    rgb, kernel = params["stem"]["conv"]["kernel"], found["stem"]["conv"]["kernel"]
    wanted = {
        1: rgb.sum(2, keepdims=True),
        2: rgb[:, :, [0, 1]] * 1.5,
        4: rgb[:, :, [0, 1, 2, 0]] * 0.75,
    }[channels]
    np.testing.assert_allclose(kernel, wanted, rtol=1e-6)
    adapted = [line for line in lines if line["action"] == "adapted"]
    assert [(line["tensor"], line["note"]) for line in adapted] == [
        ("params/stem/conv/kernel", f"3 channels to {channels}")
    ]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floats_become_float32_and_that_is_told(dtype, tmp_path):
    dtype = jax.numpy.dtype(dtype)
    path, _ = written(tmp_path / "x.safetensors", change=lambda t: t.update({k: v.astype(dtype) for k, v in t.items()}))
    found, _, lines = weights.load(path, RESNET, *network(RESNET))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float32")}
    assert {(line["action"], line["note"]) for line in lines} == {("copied", f"from {dtype}")}


def test_positions_of_another_grid_are_resized(tmp_path):
    path, (params, _) = written(tmp_path / "x.safetensors", DEIT, resolution=8)
    larger = DEIT.clone(side=16)
    found, _, lines = weights.load(path, larger, *network(larger, resolution=16))
    table = found["embed"]["positions"]
    np.testing.assert_array_equal(table[:, 0], params["embed"]["positions"][:, 0])
    np.testing.assert_allclose(table, vit.resize_positions(params["embed"]["positions"], (4, 4)), rtol=1e-6)
    (line,) = [line for line in lines if line["action"] == "adapted"]
    assert (line["from"], line["note"], line["shape"]) == ("pos_embed", "5 positions to 17", [1, 17, 12])


def test_torchvisions_names_and_flat_layers(tmp_path):
    def as_torchvision(tensors):
        for timm, other in (
            ("pre_logits.fc1", "classifier.0"),
            ("pre_logits.fc2", "classifier.3"),
            ("head.fc", "classifier.6"),
        ):
            for leaf in ("weight", "bias"):
                value = tensors.pop(f"{timm}.{leaf}")
                tensors[f"{other}.{leaf}"] = value.reshape(len(value), -1) if leaf == "weight" else value

    path, (params, _) = written(tmp_path / "x.safetensors", VGG, as_torchvision)
    found, _, lines = weights.load(path, VGG, *zeros(network(VGG)))
    same(found, params)
    assert {line["action"] for line in lines} == {"copied"}


def test_what_networks_expect_of_images(tmp_path):
    path, _ = written(tmp_path / "x.safetensors")
    data = (np.full(3, 0.3, np.float32), np.full(3, 0.2, np.float32))
    for name, (mean, std) in {
        "imagenet": (0.485, 0.229),
        "auto": (0.485, 0.229),
        "half": (0.5, 0.5),
        "unit": (0, 1),
        "data": (0.3, 0.2),
    }.items():
        found = weights.published(str(path), name).standard(data)
        assert (found[0][0], found[1][0]) == (pytest.approx(mean), pytest.approx(std)) and len(found[0]) == 3
    imagenet = weights.published(str(path))
    gray, four = (imagenet.standard((np.zeros(n, np.float32), np.ones(n, np.float32))) for n in (1, 4))
    np.testing.assert_allclose((gray[0][0], gray[1][0]), (0.449, 0.226), rtol=1e-6)
    np.testing.assert_allclose(four[0], [0.485, 0.456, 0.406, 0.485], rtol=1e-6)
    assert four[0].dtype == np.float32
    with pytest.raises(UserError, match="standardise='imagenett' is unknown: choose from auto, imagenet"):
        weights.published(str(path), "imagenett")


# the other library itself


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs torch and timm")
@pytest.mark.parametrize(("name", "peer"), [("resnet18", "resnet18"), ("deit_tiny", "deit_tiny_patch16_224")])
def test_timm_takes_it_and_gives_it(name, peer, tmp_path):
    """Its logits of standardised images are ours of images in [0, 1]; what we save it loads with strict=True."""
    import torch

    operators = torch.library.Library("torchvision", "FRAGMENT")  # a CPU torch lacks two that torchvision looks up
    for operator in ("nms", "qnms"):
        operators.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    torch.manual_seed(0)
    there = timm.create_model(peer, num_classes=5).eval()
    path, images = tmp_path / "x.safetensors", np.random.default_rng(0).random((2, 224, 224, 3), np.float32)
    safetensors.numpy.save_file({k: v.numpy() for k, v in there.state_dict().items()}, path)
    model = models.build(name, outputs=5, resolution=224)
    params, collections, _ = weights.load(path, model, *network(model, 224))
    found = jax.jit(lambda x: forward(model, params, collections, x, train=False).outputs)(images)
    shown = (images - np.float32((0.485, 0.456, 0.406))) / np.float32((0.229, 0.224, 0.225))
    turned = torch.from_numpy(shown.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        np.testing.assert_allclose(found, there(turned).numpy(), atol=1e-4, rtol=1e-4)
    weights.save(tmp_path / "back.safetensors", model, params, collections)
    again = timm.create_model(peer, num_classes=5, checkpoint_path=str(tmp_path / "back.safetensors")).eval()
    with torch.no_grad():
        np.testing.assert_array_equal(again(turned).numpy(), there(turned).numpy())


def test_a_file_goes_back_with_the_colours_it_came_with(tmp_path):
    """The numbers of "caffe" are no order of colours: only Keras' own files begin with blue."""
    params, collections = filled(VGG, 32)
    path = tmp_path / "net.safetensors"
    weights.save(path, VGG, params, collections)
    back, _, _ = weights.load(weights.published(str(path), "caffe"), VGG, *filled(VGG, 32))
    same(back, params)


def test_a_part_to_begin_anew_that_is_none_is_named(tmp_path):
    model = models.ResNet(outputs=3, depths=(1,), widths=(4,))
    params, collections = filled(model, 8)
    weights.save(tmp_path / "net.safetensors", model, params, collections)
    with pytest.raises(UserError, match="'blokc1' in `fresh` is no part of this ResNet"):
        weights.load(tmp_path / "net.safetensors", model, params, collections, fresh=("blokc1",))


def test_a_head_comes_whole_or_not_at_all(tmp_path):
    """Another pool makes the head's kernel twice as long: its bias would fit."""
    model = models.ResNet(outputs=3, depths=(1,), widths=(4,))
    params, collections = filled(model, 8)
    weights.save(tmp_path / "net.safetensors", model, params, collections)
    wide = model.clone(pool="concat")
    _, _, lines = weights.load(tmp_path / "net.safetensors", wide, *filled(wide, 8))
    told = {line["tensor"]: line["action"] for line in lines if line["tensor"].startswith("params/head")}
    assert told == {"params/head/kernel": "fresh", "params/head/bias": "fresh"}
