"""The network families: exact counts and maps, what each costs, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled import pictures

from jaxsd import models
from jaxsd.errors import UserError
from jaxsd.models import __main__ as command
from jaxsd.models.blocks import growing
from jaxsd.models.catalogue import RESOLUTIONS, costs, shapes, size
from jaxsd.models.pool import adaptive_max_pool, max_pool

pytestmark = pytest.mark.usefixtures("plain")

# (name, options): {outputs: trainable parameters}, running values of the batch norms (T2T-ViT: constants)
COUNTS = [
    ("resnet8", {}, {10: 78_042, 0: 77_392}, 2 * (3 * 16 + 3 * 32 + 3 * 64)),
    ("resnet18", {"stem": "cifar"}, {4: 11_170_884, 10: 11_173_962, 1000: 11_681_832, 0: 11_168_832}, 9_600),
    ("resnet18", {"stem": "imagenet"}, {4: 11_178_564, 10: 11_181_642, 1000: 11_689_512, 0: 11_176_512}, 9_600),
    ("resnet50", {"stem": "cifar"}, {4: 23_508_548, 10: 23_520_842, 1000: 25_549_352, 0: 23_500_352}, 53_120),
    ("resnet50", {"stem": "imagenet"}, {4: 23_516_228, 10: 23_528_522, 1000: 25_557_032, 0: 23_508_032}, 53_120),
    ("resnet34", {"stem": "imagenet"}, {10: 21_289_802, 1000: 21_797_672, 0: 21_284_672}, 17_024),
    ("resnet101", {"stem": "imagenet"}, {1000: 44_549_160}, 105_344),
    ("resnext50_32x4d", {"stem": "imagenet"}, {10: 23_000_394, 1000: 25_028_904, 0: 22_979_904}, 68_224),
    ("resnext101_32x4d", {"stem": "imagenet"}, {1000: 44_177_704}, 137_856),
    ("skresnext50_32x4d", {"stem": "imagenet"}, {10: 25_451_274, 1000: 27_479_784, 0: 25_430_784}, 84_544),
    ("skresnext101_32x4d", {"stem": "imagenet"}, {1000: 48_736_040}, 172_672),
    ("d_resnext50_32x4d", {"stem": "imagenet"}, {10: 43_194_186, 1000: 45_222_696}, 128_640),
    ("d_resnext101_32x4d", {"stem": "imagenet"}, {1000: 83_520_296}, 267_904),
    ("dsk_resnext50_32x4d", {"stem": "imagenet"}, {10: 48_095_946, 1000: 50_124_456}, 161_280),
    ("dsk_resnext101_32x4d", {"stem": "imagenet"}, {1000: 92_636_968}, 337_536),
    ("nin", {"blocks": 3}, {4: 1_004_484, 10: 1_005_642, 0: 1_003_712}, 3_200),
    ("nin", {}, {4: 1_411_140, 10: 1_412_298, 0: 1_410_368}, 4_352),
    ("nin", {"blocks": 5}, {4: 1_817_796, 10: 1_818_954, 0: 1_817_024}, 5_504),
    ("alexnet_rotnet", {}, {4: 57_030_724, 1000: 61_111_336}, 18_688),
    ("resnest14d", {}, {1000: 10_611_688}, 22_336),
    ("resnest26d", {}, {1000: 17_069_448}, 36_736),
    ("resnest50d", {}, {10: 25_454_730, 1000: 27_483_240, 0: 25_434_240}, 64_576),
    ("resnest101e", {}, {1000: 48_275_016}, 130_112),
    ("resnest200e", {}, {1000: 70_201_544}, 218_432),
    ("resnest269e", {}, {1000: 110_929_480}, 314_432),
    ("vgg16", {}, {10: 134_301_514, 1000: 138_357_544, 0: 134_260_544}, 0),
    ("vgg16", {"hidden": (256,)}, {6: 21_139_014}, 0),
    ("vgg16", {"hidden": (256,), "pool": 1}, {6: 14_847_558}, 0),
    ("vgg16_bn", {}, {10: 134_309_962, 1000: 138_365_992, 0: 134_268_992}, 8_448),
    ("alexnet", {}, {1000: 61_100_840}, 0),
    ("deit_tiny", {}, {102: 5_544_102, 1000: 5_717_416, 0: 5_524_416}, 0),
    ("deit_tiny", {"patch": 4}, {1000: 6_143_656}, 0),  # 768 - 48 inputs less, 56 * 56 - 14 * 14 positions more
    ("deit_small", {}, {102: 21_704_934, 1000: 22_050_664, 0: 21_665_664}, 0),
    ("deit_base", {}, {102: 85_877_094, 1000: 86_567_656, 0: 85_798_656}, 0),
    ("t2t_vit_7", {}, {102: 4_024_908, 1000: 4_255_694}, 54_528),
    ("t2t_vit_10", {}, {102: 5_603_916, 1000: 5_834_702}, 54_528),
    ("t2t_vit_12", {}, {102: 6_656_588, 1000: 6_887_374}, 54_528),
    ("t2t_vit_14", {}, {102: 21_120_076, 1000: 21_465_806}, 79_744),
    ("t2t_vit_19", {}, {102: 38_681_868, 1000: 39_085_070}, 92_352),
    ("t2t_vit_24", {}, {102: 63_540_300, 1000: 64_000_974}, 104_960),
    ("t2t_vit_t_14", {}, {102: 21_119_692, 1000: 21_465_422}, 75_648),
    ("efficientnet_b0", {}, {10: 4_020_358, 1000: 5_288_548, 0: 4_007_548}, 42_016),
    ("efficientnet_b0", {"tf": True}, {1000: 5_288_548}, 42_016),
    ("efficientnet_b1", {}, {1000: 7_794_184}, 62_048),
    ("efficientnet_b2", {}, {1000: 9_109_994}, 67_568),
    ("efficientnet_b3", {}, {1000: 12_233_232}, 87_296),
    ("efficientnet_b4", {}, {1000: 19_341_616}, 125_200),
    ("efficientnet_b5", {}, {1000: 30_389_784}, 172_736),
    ("efficientnet_b6", {}, {1000: 43_040_704}, 224_432),
    ("efficientnet_b7", {}, {1000: 66_347_960}, 310_720),
    ("pvt_v2_b0_small1", {}, {102: 233_150, 1000: 291_520, 0: 226_520}, 0),
    ("pvt_v2_b0_small", {}, {102: 883_478, 1000: 999_320, 0: 870_320}, 0),
    ("pvt_v2_b0", {}, {102: 3_435_974, 1000: 3_666_760, 0: 3_409_760}, 0),
    ("pvt_v2_b0_large", {}, {1000: 6_537_928}, 0),
    ("pvt_v2_b1", {}, {1000: 14_009_000}, 0),
    ("pvt_v2_b2", {}, {1000: 25_362_856}, 0),
    ("pvt_v2_b2_li", {}, {1000: 22_553_512}, 0),
    ("pvt_v2_b3", {}, {1000: 45_238_696}, 0),
    ("pvt_v2_b4", {}, {1000: 62_556_072}, 0),
    ("pvt_v2_b5", {}, {1000: 81_956_008}, 0),
    ("patchnet", {}, {1: 10_322_721, 0: 10_322_464}, 2 * (32 + 64 + 128 + 2 * (128 + 256 + 256 + 512))),
]


PARTS = {
    "resnet50": {"stem": 1_856, "block1": 215_808, "block2": 1_219_584, "block3": 7_098_368, "block4": 14_964_736},
    "dsk_resnext50_32x4d": {"block1": 498_048, "block2": 2_610_688, "block3": 15_006_464, "block4": 29_950_720},
    "nin": {"block1": 61_376, "block2": 535_680, "block3": 406_656, "block4": 406_656, "head": 1_930},
    "alexnet_rotnet": {"block1": 23_424, "block2": 307_776, "block3": 664_704, "block4": 885_504, "block5": 590_592},
}


MAPS = [
    ("resnet50", {"stem": "cifar"}, {32: (32, 16, 8, 4), 24: (24, 12, 6, 3), 16: (16, 8, 4, 2), 8: (8, 4, 2, 1)}),
    ("resnet50", {"stem": "imagenet"}, {224: (56, 28, 14, 7), 112: (28, 14, 7, 4), 32: (8, 4, 2, 1), 16: (4, 2, 1, 1)}),
    ("nin", {}, {32: (16, 8, 8, 8), 16: (8, 4, 4, 4), 8: (4, 2, 2, 2), 24: (12, 6, 6, 6)}),
    ("nin", {"blocks": 5, "pool_block3": True}, {32: (16, 8, 4, 4, 4)}),
    ("alexnet_rotnet", {}, {224: (55, 27, 13, 13, 13), 112: (27, 13, 6, 6, 6), 168: (41, 20, 9, 9, 9)}),
    ("alexnet_rotnet", {}, {64: (15, 7, 3, 3, 3)}),
]


def feature_shapes(model, resolution):
    images = jax.ShapeDtypeStruct((2, resolution, resolution, 3), jnp.float32)
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, False)[0], images)


def test_rates_grow_over_the_units_of_all_blocks():
    assert growing(0.4, (2, 1, 2)) == [(0.0, 0.1), (0.2,), pytest.approx((0.3, 0.4))]
    assert growing(0.4, (2, 2), steps=4) == [(0.0, 0.1), pytest.approx((0.2, 0.3))]
    assert growing(0.4, (1,)) == [(0.0,)]


@pytest.mark.parametrize("name, options, outputs, running", COUNTS)
def test_exact_number_of_parameters(name, options, outputs, running):
    """Traced once, at the most outputs; each output has a weight for every input of the head, and a bias."""
    variables = shapes(models.build(name, outputs=max(outputs), **options), RESOLUTIONS[name])
    head = variables["params"]["head"]
    body, width = size(variables["params"]) - size(head), head["kernel"].shape[0]
    assert {n: body + n * (width + 1) for n in outputs} == outputs
    kind = "constants" if name.startswith("t2t") else "batch_stats"
    assert size(variables.get(kind, {})) == running
    assert set(variables) == {"params", *((kind,) if running else ())}


def test_every_model_is_counted_and_catalogued():
    assert {name for name, *_ in COUNTS} == set(models.BACKBONES) == set(RESOLUTIONS)


@pytest.mark.parametrize("name", PARTS)
def test_exact_number_of_parameters_of_the_parts(name):
    model = models.build(name, outputs=10, resolution=32)
    params = shapes(model, RESOLUTIONS[name])["params"]
    assert {part: size(params[part]) for part in PARTS[name]} == PARTS[name]
    assert set(params) == set(model.parts)
    if name == "alexnet_rotnet":
        assert size(params["fc1"]) + size(params["fc2"]) == 54_542_336


@pytest.mark.parametrize("name, options, sides", MAPS)
def test_maps_of_the_blocks(name, options, sides):
    model = models.build(name, outputs=4, **options)
    for resolution, expected in sides.items():
        outputs, features = feature_shapes(model, resolution)
        assert tuple(features) == (*model.blocks, "pooled")
        assert tuple(features[block].shape[1] for block in model.blocks) == expected
        assert outputs.shape == (2, 4) and features["pooled"].ndim == 2


def test_stem_is_chosen_by_the_full_size():
    kinds = [models.build("resnet18", resolution=r).stem_kind for r in (8, 64, 65, 224)]
    assert kinds == ["cifar", "cifar", "imagenet", "imagenet"]
    assert models.build("resnet18", resolution=224, stem="cifar").stem_kind == "cifar"
    assert models.build("resnet8", resolution=224).stem_kind == "cifar"


def test_adaptive_alexnet_is_the_plain_one_at_224_and_transfers_to_any_size():
    x = jnp.asarray(pictures(13))
    np.testing.assert_array_equal(adaptive_max_pool(x, 6), max_pool(x, 3, 2))
    plain, adaptive = (models.build("alexnet_rotnet", adaptive_pool=flag) for flag in (False, True))
    assert shapes(plain, 224)["params"] == shapes(adaptive, 31)["params"] == shapes(adaptive, 112)["params"]
    assert shapes(plain, 112)["params"]["fc1"]["dense"]["kernel"].shape == (1024, 4096)
    for model, least in ((plain, 63), (adaptive, 31)):
        shapes(model, least)
        with pytest.raises(UserError, match=f"{least} pixels"):
            shapes(model, least - 1)


def test_without_head_the_pooled_features_come_out():
    model = models.build("resnet8", outputs=0)
    outputs, features = feature_shapes(model, 16)
    assert outputs.shape == features["pooled"].shape == (2, 64) and "head" not in model.parts


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: models.build("resnet81"), ["'resnet81'", "choose from resnet8, resnet18, resnet101"]),
        (lambda: models.build("resnet8", depth=3), ["'depth'", "zero_init_residual"]),
        (lambda: models.build("nin", stem="cifar"), ["'stem'", "blocks", "pool_block3"]),
        (lambda: models.build("resnet18"), ["resolution=", "stem="]),
        (lambda: models.build("resnet18", stem="tiny"), ["'tiny'", "'cifar'", "'imagenet'"]),
        (lambda: models.build("nin", blocks=6), ["3, 4 or 5", "6"]),
        (lambda: models.build("nin", blocks=3, pool_block3=True), ["blocks=4"]),
        (lambda: models.build("resnet8", frozen=["block9"]), ["block9", "'stem'", "'head'"]),
        (lambda: models.build("resnet8").clone(frozen=("fc",)), ["fc"]),
        (lambda: models.build("resnet8", dtype="int8"), ["int8", "bfloat16"]),
        (lambda: models.LinearProbe(models.build("resnet8"), outputs=2, pool={"block7": 2}), ["block7", "'block3'"]),
    ],
)
def test_wrong_use_is_one_line(call, words):
    with pytest.raises(UserError) as failure:
        call()
    text = str(failure.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_flops_by_hand():
    # resnet8 at 32 pixels, per block: first 3x3, second 3x3, shortcut 1x1; then the head
    stem = 32 * 32 * 27 * 16
    block1 = 32 * 32 * 2 * 9 * 16 * 16
    block2 = 16 * 16 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32)
    block3 = 8 * 8 * (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64)
    assert costs(models.build("resnet8", outputs=10), 32)[1] == 2 * (stem + block1 + block2 + block3 + 64 * 10)
    assert costs(models.build("resnet8", outputs=0), 32, 1)[1] == 2 * (stem // 3 + block1 + block2 + block3)


@pytest.mark.parametrize("name", ["resnet50", "deit_tiny"])
def test_costs_are_those_without_remat(name):
    plain, again = (models.build(name, resolution=64, remat=remat) for remat in (False, True))
    assert costs(again, 64) == costs(plain, 64)
    assert size(shapes(again, 64)) == size(shapes(plain, 64))


def test_command_tells_the_options_of_one(capsys):
    assert command.main(["dsk_resnext50_32x4d"]) == 0
    said = capsys.readouterr().out
    assert "  branches=2\n" in said and "  selective=True\n" in said
    assert "`lam` and `lam_group` see `Unit`" in said
    assert command.main(["dsk_resnext50_32x4d", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pool"] == "average"
    assert command.main(["resnet9"]) == 2
    assert "unknown model 'resnet9': choose from resnet8" in capsys.readouterr().err


def test_command_prints_the_catalogue(capsys):
    assert command.main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    by_name = {row["name"]: row for row in rows}
    assert by_name["resnet50"]["parameters"] == 25_557_032
    assert round(by_name["resnet50"]["flops"] / 2e9, 2) == 4.09  # torchvision's table, in multiply-adds
    assert round(by_name["resnet18"]["flops"] / 2e9, 2) == 1.81
    assert by_name["nin"]["blocks"] == ["block1", "block2", "block3", "block4"]
    lines = command.table(rows).splitlines()
    assert len(lines) == len(rows) + 2 and len({line.index("block") for line in lines[:-1]}) == 1
