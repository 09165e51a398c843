"""Networks full of numbers that depend on the tensors' paths alone, so that another library can have the same."""

import math

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxsd.models.catalogue import shapes


def filled(model, resolution, channels=3, gain=1.0):
    """(params, collections) drawn leaf by leaf in the order of their paths; nothing is zero, variances are positive.

    gain: a factor of all kernels; below 1 it keeps the maps of deep networks from growing.
    """
    rng = np.random.default_rng(0)
    values = {}
    for path, leaf in sorted(flatten_dict(shapes(model, resolution, channels)).items()):
        draw = rng.standard_normal(leaf.shape, np.float32)
        rules = {
            "kernel": lambda draw: draw * gain * (2 / math.prod(draw.shape[:-1])) ** 0.5,
            "scale": lambda draw: 1 + 0.1 * draw,
            "var": lambda draw: 0.5 + draw**2,
        }
        values[path] = rules.get(path[-1], lambda draw: 0.1 * draw)(draw).astype(np.float32)
    tree = unflatten_dict(values)
    return tree.pop("params"), tree


def pictures(resolution, n=3, channels=3, contrast=False):
    """Images [n, resolution, resolution, channels] of standard normal noise; with `contrast` unlike on the average."""
    noise = np.random.default_rng(1).standard_normal((n, resolution, resolution, channels), np.float32)
    i = np.arange(n, dtype=np.float32)[:, None, None, None]
    return noise * 2**i + i if contrast else noise
