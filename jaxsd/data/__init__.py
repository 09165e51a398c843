"""Image sets in memory: sources, splits, loaders. Index batches are in `jaxsd.data.batches` (which needs JAX)."""

from jaxsd.data.copies import duplicates
from jaxsd.data.embedded import digits, mnist5k, photos
from jaxsd.data.load import arrays, folder
from jaxsd.data.prepared import tfds
from jaxsd.data.published import indoor67, kadid, koniq, live, live_itw, tid2013
from jaxsd.data.quality import photos_quality
from jaxsd.data.scored import table
from jaxsd.data.source import Source, Splits, describe, standardisation
from jaxsd.data.split import carve, subset

__all__ = [
    "Source",
    "Splits",
    "arrays",
    "carve",
    "describe",
    "digits",
    "duplicates",
    "folder",
    "indoor67",
    "kadid",
    "koniq",
    "live",
    "live_itw",
    "mnist5k",
    "photos",
    "photos_quality",
    "standardisation",
    "subset",
    "table",
    "tfds",
    "tid2013",
]
