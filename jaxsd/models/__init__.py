"""Networks: `build` makes one by name, the families' classes make any other."""

from jaxsd.models.catalogue import BACKBONES, build
from jaxsd.models.convnet import NIN, AlexNetRotNet
from jaxsd.models.patchnet import PatchNet
from jaxsd.models.probe import LinearProbe
from jaxsd.models.resnet import ResNet

__all__ = ["BACKBONES", "NIN", "AlexNetRotNet", "LinearProbe", "PatchNet", "ResNet", "build"]
