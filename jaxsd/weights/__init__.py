"""Published weights in and out: the files, names and layouts of timm, torchvision and Keras."""

from jaxsd.models.vit import resized
from jaxsd.weights.fit import Published, load, published
from jaxsd.weights.names import check, published_name, save, to_timm

__all__ = ["Published", "check", "load", "published", "published_name", "resized", "save", "to_timm"]
