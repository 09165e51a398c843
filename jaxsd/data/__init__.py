"""Image sets in memory: sources, splits, loaders. Index batches are in `jaxsd.data.batches` (which needs JAX)."""

from jaxsd.data.embedded import digits, mnist5k
from jaxsd.data.source import Source, Splits, describe, standardisation
from jaxsd.data.split import carve, duplicates, subset

__all__ = ["Source", "Splits", "carve", "describe", "digits", "duplicates", "mnist5k", "standardisation", "subset"]
