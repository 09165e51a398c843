"""Damages image files at random, decodes them, and prints one JSON line per file: python tests/fuzz_images.py COUNT.

A process of its own, so that a decoder that crashes or hangs is seen by the test that started it.
"""

import io
import json
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from jaxsd.data.decode import FORMATS, decode_all, layout

HEIGHT, WIDTH = 24, 32
OPTIONS = {
    "JPEG": [{}, {"progressive": True}, {"optimize": True, "subsampling": 0}],
    "PNG": [{}, {"compress_level": 0}],
    "WEBP": [{}, {"lossless": True}],
    "BMP": [{}],
    "TIFF": [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}, {"compression": "jpeg"}],
}
# Pillow's warnings that mean damage: tags of a TIFF file that were skipped.
DAMAGE = r"(Possibly c|C)orrupt EXIF data|Tag |Truncated File Read"


def flip(content, draw):
    for _ in range(draw.choice((1, 1, 2, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)


def overwrite(content, draw):
    start = draw.randrange(len(content))
    content[start : start + 16] = draw.randbytes(len(content[start : start + 16]))


def truncate(content, draw):
    del content[draw.randrange(len(content)) :]


def blank(content, draw):
    """The end overwritten with zeros: what a file system leaves of a download that was broken off."""
    start = draw.randrange(len(content))
    content[start:] = bytes(len(content) - start)


def insert(content, draw):
    start = draw.randrange(len(content))
    content[start:start] = draw.randbytes(draw.choice((1, 2, 16, 100)))


def duplicate(content, draw):
    start = draw.randrange(len(content))
    part = content[start : start + draw.choice((4, 32, 200))]
    place = draw.choice((start, draw.randrange(len(content))))
    content[place:place] = part


MUTATIONS = (flip, overwrite, truncate, blank, insert, duplicate)


def scene():
    y, x = np.mgrid[:HEIGHT, :WIDTH] / WIDTH
    levels = 127.5 + 100 * np.stack([np.sin(9 * x + y), np.cos(7 * y), np.sin(8 * x * y)], axis=-1)
    return np.clip(levels + np.random.default_rng(0).integers(-20, 20, levels.shape), 0, 255).astype(np.uint8)


def strict(content):
    """The pixels of a file as Pillow verifies and decodes it, or None where it refuses or warns of damage."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", DAMAGE)
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                image.verify()
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                image.load()
                return np.asarray(image.convert("RGB"))
        except Exception:
            return None


def main(count):
    original = Image.fromarray(scene())
    target = layout((HEIGHT, WIDTH), "squash", 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image")
        for number in range(count):
            kind = list(OPTIONS)[number % len(OPTIONS)]
            draw = random.Random(number)
            options, mutation = draw.choice(OPTIONS[kind]), MUTATIONS[number // len(OPTIONS) % len(MUTATIONS)]
            file = io.BytesIO()
            original.save(file, kind, **options)
            content = bytearray(file.getvalue())
            mutation(content, draw)
            path.write_bytes(content)
            print(f"{number} {kind} {options} {mutation.__name__}", file=sys.stderr, flush=True)
            start = time.monotonic()
            images, bad, *_ = decode_all([str(path)], ["image"], target)
            seconds = time.monotonic() - start
            expected, whole = strict(content), strict(file.getvalue())
            found = {
                "format": kind,
                "mutation": mutation.__name__,
                "changed": bytes(content) != file.getvalue(),
                "reason": bad.get(0),
                "strict": expected is not None,
                "as_strict": bool(len(images)) and expected is not None and np.array_equal(images[0], expected),
                "same_size": expected is not None and expected.shape == (HEIGHT, WIDTH, 3),
                "as_original": bool(len(images)) and np.array_equal(images[0], whole),
                "seconds": seconds,
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
