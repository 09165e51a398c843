"""Networks: `build` makes one by name, the families' classes make any other."""

from jaxsd.models.catalogue import BACKBONES, build
from jaxsd.models.convnet import NIN, AlexNet, AlexNetRotNet
from jaxsd.models.efficientnet import EfficientNet
from jaxsd.models.patchnet import PatchNet
from jaxsd.models.probe import LinearProbe
from jaxsd.models.pvt import PVT
from jaxsd.models.resnest import ResNeSt
from jaxsd.models.resnet import ResNet
from jaxsd.models.t2t import T2TViT
from jaxsd.models.vgg import VGG
from jaxsd.models.vit import VisionTransformer

__all__ = [
    "BACKBONES",
    "NIN",
    "PVT",
    "VGG",
    "AlexNet",
    "AlexNetRotNet",
    "EfficientNet",
    "LinearProbe",
    "PatchNet",
    "ResNeSt",
    "ResNet",
    "build",
    "T2TViT",
    "VisionTransformer",
]
