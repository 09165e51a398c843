"""What is compared with other libraries: each of our networks beside its published counterpart."""

from typing import Any, NamedTuple

import numpy as np
from filled import filled, pictures

from jaxsd import models


class Case(NamedTuple):
    """One network and its counterpart; `train`: one training step too, with everything random off on both sides."""

    model: str
    peer: str  # timm's name, tv: and torchvision's, or own: and one of jaxsd.bench.peer's twins, or blur: and timm's
    resolutions: tuple[int, int]
    options: dict[str, Any] = {}
    peer_options: dict[str, Any] = {}
    train: bool = False
    slow: bool = False  # not in the default run of the tests
    outputs: int = 10
    sized: bool = False  # the peer is told the side of the images
    published: bool = True  # else the peer's tensors are called as ours
    # Where float32 loses the digits that are compared: a softmax over large numbers needs smaller kernels, batch
    # statistics over three pooled values need images that differ.
    gain: float = 1.0
    contrast: bool = False

    def build(self, resolution: int):
        """Our network."""
        return models.build(self.model, outputs=self.outputs, resolution=resolution, **self.options)

    def filled(self, resolution: int):
        """(network, params, collections)."""
        model = self.build(resolution)
        return model, *filled(model, resolution, gain=self.gain)

    def pictures(self, resolution: int, n: int):
        """Images [n, resolution, resolution, 3]."""
        return pictures(resolution, n, contrast=self.contrast)


T2T = ("t2t_vit_10", "t2t_vit_12", "t2t_vit_14", "t2t_vit_19", "t2t_vit_24", "t2t_vit_t_14")
CALM = {"drop_path": 0.0, "dropout": 0.0}
CAREFUL = {"gain": 0.5, "contrast": True}
EFFICIENTNETS = [f"efficientnet_b{i}" for i in range(1, 5)]
DEEP = [f"efficientnet_b{i}" for i in range(5, 8)]  # at gain 1 PyTorch's float32 is a tenth of the logits off
PVTS = [*(f"pvt_v2_b{i}" for i in range(1, 6)), "pvt_v2_b2_li"]
RESNESTS = ("resnest26d", "resnest50d", "resnest101e", "resnest200e", "resnest269e")
RESNETS = ("resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x4d")
BLURRED = {"stem": "imagenet", "blur": True}
NARROW = {"hidden": (64, 4096), "dropout": 0.0}  # the published first dense layer has 103 million parameters
CASES = {
    "resnet18": Case("resnet18", "resnet18", (64, 96), {"stem": "imagenet"}, train=True),
    **{name: Case(name, name, (64, 96), {"stem": "imagenet"}, slow=True) for name in RESNETS},
    "skresnext50_32x4d": Case(
        "skresnext50_32x4d", "skresnext50_32x4d", (64, 96), {"stem": "imagenet"}, slow=True, **CAREFUL
    ),
    "resnet18_blur": Case(
        "resnet18", "blur:resnet18", (64, 89), {**BLURRED, "pool": "dual"}, {"global_pool": "avgmax"}, slow=True
    ),
    "resnet50_blur": Case(
        "resnet50", "blur:resnet50", (64, 96), {**BLURRED, "pool": "concat"}, {"global_pool": "catavgmax"}, slow=True
    ),
    "skresnext50_32x4d_blur": Case(
        "skresnext50_32x4d", "blur:skresnext50_32x4d", (64, 96), BLURRED, slow=True, **CAREFUL
    ),
    "dsk_resnext50_32x4d": Case(
        "dsk_resnext50_32x4d",
        "own:dsk_resnext50_32x4d",
        (64, 96),
        {"stem": "imagenet"},
        slow=True,
        published=False,
        **CAREFUL,
    ),
    "deit_tiny": Case("deit_tiny", "deit_tiny_patch16_224", (64, 96), train=True, sized=True),
    "deit_small": Case("deit_small", "deit_small_patch16_224", (64, 96), slow=True, sized=True),
    "deit_base": Case("deit_base", "deit_base_patch16_224", (64, 96), slow=True, sized=True),
    # a frozen embedding has no dropout
    "t2t_vit_7": Case(
        "t2t_vit_7", "own:t2t_vit_7", (64, 96), {"frozen": ("embed",)}, {"dropout": 0}, train=True, sized=True
    ),
    **{name: Case(name, f"own:{name}", (64, 96), slow=True, sized=True) for name in T2T},
    "efficientnet_b0": Case("efficientnet_b0", "efficientnet_b0", (64, 96), CALM, train=True),
    "tf_efficientnet_b0": Case("efficientnet_b0", "tf_efficientnet_b0", (64, 81), {"tf": True}, slow=True),
    **{name: Case(name, name, (64, 96), slow=True) for name in EFFICIENTNETS},
    **{name: Case(name, name, (64, 96), slow=True, **CAREFUL) for name in DEEP},
    "pvt_v2_b0": Case("pvt_v2_b0", "pvt_v2_b0", (64, 96), CALM, train=True),
    **{name: Case(name, name, (64, 96), slow=True) for name in PVTS},
    "resnest14d": Case("resnest14d", "resnest14d", (32, 89), train=True, contrast=True),
    **{name: Case(name, name, (48, 89), gain=0.5, slow=True) for name in RESNESTS},
    "vgg16": Case("vgg16", "vgg16", (64, 224), NARROW, {"mlp_ratio": 1 / 64}, slow=True),
    "vgg16_bn": Case("vgg16_bn", "vgg16_bn", (32, 96), NARROW, {"mlp_ratio": 1 / 64}, train=True, contrast=True),
    "alexnet": Case("alexnet", "tv:alexnet", (64, 224), slow=True),
}


def features_of(value):
    """A torch feature as [B, h, w, D]: maps are turned, tokens laid out, class tokens left away."""
    if value.ndim == 4:
        return value.permute(0, 2, 3, 1)
    side = int((value.shape[1]) ** 0.5)
    return value[:, value.shape[1] - side * side :].reshape(value.shape[0], side, side, -1)


def entries(value: np.ndarray) -> dict[str, Any]:
    """A few numbers that stand for an array."""
    flat = np.asarray(value, np.float64).ravel()
    places = np.linspace(0, flat.size - 1, 6).astype(int)
    return {
        "shape": list(value.shape),
        "mean": float(flat.mean()),
        "magnitude": float(np.abs(flat).mean()),
        "some": flat[places].tolist(),
    }
