"""What is compared with other libraries: each of our networks beside its published counterpart."""

from typing import Any, NamedTuple

import numpy as np

from jaxsd import models


class Case(NamedTuple):
    """One network and its counterpart; `train`: one training step too, with everything random off on both sides."""

    model: str
    peer: str  # timm's name, or tv: and torchvision's
    resolutions: tuple[int, int]
    options: dict[str, Any] = {}
    peer_options: dict[str, Any] = {}
    train: bool = False
    slow: bool = False  # not in the default run of the tests
    outputs: int = 10

    def build(self, resolution: int):
        """Our network."""
        return models.build(self.model, outputs=self.outputs, resolution=resolution, **self.options)


CASES = {
    "resnet18": Case("resnet18", "resnet18", (64, 96), {"stem": "imagenet"}, train=True),
    "resnet50": Case("resnet50", "resnet50", (64, 96), {"stem": "imagenet"}, slow=True),
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
