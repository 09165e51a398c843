"""Image classification sets that TensorFlow Datasets (TFDS) has prepared, read without TensorFlow."""

import difflib
import os
import struct
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxsd.data.decode import Layout, eight_bit, fit, layout
from jaxsd.data.load import checked_pixels, held_out
from jaxsd.data.source import Source, Splits
from jaxsd.data.split import TEST_SHARE
from jaxsd.errors import UserError


class Keys(NamedTuple):
    """The features of a set that are read."""

    image: str
    label: str
    classes: tuple[str, ...]


def tfds(
    dataset: str,
    *,
    size: int | tuple[int, int] | None = None,
    canvas: str = "crop",
    channels: int | None = None,
    data_dir: str | Path | None = None,
    label: str | None = None,
    train: str = "train",
    validation: float | str | None = None,
    test: float | str | None = None,
) -> Splits:
    """Any image classification set of TFDS by name ("cifar10", "eurosat/rgb", "mnist:3.0.1"), without TensorFlow.

    It must have been prepared, as array_record, parquet or tfrecord, in data_dir (None: where TFDS keeps its sets);
    nothing is downloaded. Checksums of tfrecord files are not looked at. Images are in the order of the files.
    size, canvas: as in `folder`. channels: 3 or 1 (gray); None: as they are. label: the class to learn where there is
    more than one ("coarse_label"). A training split in which all labels are -1 is unlabelled.
    train, validation, test: splits in TFDS's notation ("train[:80%]", "train+test"); validation and test may also be
    shares held out of the training images, drawn per class, the same in every run; 0: none. None: the split of that
    name where there is one that is not read already; else no validation images, and 0.2 held out to test on.
    Raises UserError where the package, the set, a split, its images or its labels are not there.
    """
    target = layout(size, canvas, channels or 3)
    builder = _builder(dataset, data_dir)
    keys = _keys(dataset, builder.info, label)
    _check_prepared(dataset, data_dir, builder)
    named = {"train": train, "validation": _share_or_split(validation), "test": _share_or_split(test)}
    parts = [part for value in named.values() if isinstance(value, str) for part in value.split("+")]
    taken = {part.split("[")[0].strip() for part in parts}
    taken = set(builder.info.splits) if "all" in taken else taken
    for split in ("validation", "test"):
        if named[split] is None:
            own = split in builder.info.splits and split not in taken
            named[split] = split if own else TEST_SHARE if split == "test" else 0.0
    sources, shares = {}, {}
    for split, value in named.items():
        if isinstance(value, str):
            sources[split] = _source(builder, split, value, keys, target, channels)
        else:
            shares[split] = value
    return held_out(dataset, sources, shares.get("validation", 0.0), shares.get("test", 0.0), ())


def _share_or_split(value: float | str | None) -> float | str | None:
    """A share as a number, also where the command line gives it as text; the name of a split as it is."""
    try:
        return float(value) if value is not None else None
    except ValueError:
        return value or None


def _builder(name: str, data_dir: str | Path | None) -> Any:
    """The builder of a set by name."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(f"TFDS cannot be imported ({error}): pip install 'jaxsd[tfds]'") from error
    place = None if data_dir is None else Path(data_dir).expanduser()
    try:
        builder = tensorflow_datasets.builder(name, data_dir=None if place is None else str(place))
        _ = builder.info  # where a set's own code runs
        return builder
    except Exception as error:  # a set's code may raise anything; a version that is not there is an AssertionError
        known = sorted({*tensorflow_datasets.list_builders(with_community_datasets=False), *_folders(place)})
        base = name.split("/")[0].split(":")[0]
        if base not in known:
            near = difflib.get_close_matches(base, known, 5)
            hint = f"did you mean {', '.join(near)}?" if near else "tfds.list_builders() in Python lists them"
            raise UserError(f"TFDS has no set {name}, nor has data_dir: {hint}") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the TFDS set {name} cannot be opened ({reason}): check the name and data_dir") from error


def _folders(place: Path | None) -> list[str]:
    """The folders in a data_dir: sets may have been prepared there whose code is not at hand."""
    return [item.name for item in place.iterdir() if item.is_dir()] if place is not None and place.is_dir() else []


def _check_prepared(name: str, data_dir: str | Path | None, builder: Any) -> None:
    """Raises UserError, with the command to prepare a set, where it has no files."""
    if builder.is_prepared() and builder.info.splits:
        return
    folder = Path(builder.data_dir)
    others = sorted(path.parent.name for path in folder.parent.glob("*/dataset_info.json"))
    where = "" if data_dir is None else f", data_dir='{data_dir}'"
    raise UserError(
        f"the TFDS set {name} is not prepared in {folder}"
        + (f" (but version {' and '.join(others)} is: give it after a colon)" if others else "")
        + ": prepare it once, where there is a network and, for most sets, TensorFlow: "
        + 'python -c "import tensorflow_datasets as tfds; '
        + f"tfds.builder('{name}'{where}, file_format='array_record').download_and_prepare()\""
    )


def _keys(name: str, info: Any, label: str | None) -> Keys:
    """Which features are the image and its class."""
    from tensorflow_datasets import features as kinds

    def is_image(feature: Any) -> bool:
        if not isinstance(feature, kinds.Image | kinds.Tensor) or isinstance(feature, kinds.LabeledImage):
            return False
        dtype, shape = cast(Any, feature.np_dtype), cast(Any, feature.shape)
        return np.dtype(dtype) == np.uint8 and len(shape) in (2, 3)

    features = dict(info.features.items()) if hasattr(info.features, "items") else {}
    images = [key for key, feature in features.items() if is_image(feature)]
    labels = [key for key, feature in features.items() if isinstance(feature, kinds.ClassLabel)]
    if not images or not labels:
        found = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items()) or "other things"
        raise UserError(f"the TFDS set {name} has no 8-bit image with a class label: it has {found}; take another set")
    if label is not None and label not in labels:
        raise UserError(f"the TFDS set {name} has no class label {label}: it has {', '.join(labels)}")
    usual = [key for key in info.supervised_keys or () if isinstance(key, str)]
    image = next((key for key in usual if key in images), images[0])
    chosen = label or next((key for key in usual if key in labels), labels[0] if len(labels) == 1 else None)
    if chosen is None:
        raise UserError(f"the TFDS set {name} has several class labels, {', '.join(labels)}: give label")
    return Keys(image, chosen, tuple(features[chosen].names))


def _source(builder: Any, split: str, notation: str, keys: Keys, target: Layout, channels: int | None) -> Source:
    """All images of a split, read into memory, with their labels."""
    count, examples = _examples(builder, notation)
    if not count:
        raise UserError(f"the split {notation} of the TFDS set {builder.name} is empty: take another for {split}")
    labels, images = np.empty(count, np.int32), np.empty(0, np.uint8)
    for position in tqdm(range(count), desc=f"reading {notation}", unit="", disable=None):
        try:
            example = next(examples, None)
            if example is None:
                raise ValueError(f"the files hold {position} images of {count}")
        except Exception as error:  # damaged bytes can raise nearly anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            what = f"image {position} of {notation} in {builder.data_dir} cannot be read ({reason})"
            raise UserError(f"{what}: prepare {builder.name} again") from error
        image = _fitted(f"{builder.name} image {position} of {notation}", example[keys.image], target, channels)
        if position == 0:
            images = np.empty((count, *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            shapes = f"{list(images.shape[1:])}, {list(image.shape)}"
            raise UserError(f"images of {builder.name} differ in size or channels ({shapes}): give size, or channels")
        images[position], labels[position] = image, example[keys.label]
    if (labels == -1).all():
        if split == "train":
            return Source(images)
        raise UserError(f"the split {notation} of the TFDS set {builder.name} has no labels: take another for {split}")
    return Source(images, labels, keys.classes)


def _examples(builder: Any, notation: str) -> tuple[int, Iterator[dict[str, Any]]]:
    """How many examples a split has, and these one by one."""
    try:
        parts = builder.info.splits[notation].file_instructions
    except (ValueError, AssertionError) as error:  # no such split, or a slice that is none
        known = ", ".join(builder.info.splits)
        raise UserError(f"the TFDS set {builder.name} has no split {notation}: it has {known}") from error
    count = sum(part.take for part in parts)
    if builder.info.file_format.value == "tfrecord":
        return count, (builder.info.features.deserialize_example_np(record) for record in _records(parts))
    try:
        return count, iter(builder.as_data_source(notation)) if count else iter(())
    except NotImplementedError as error:
        form = builder.info.file_format.value
        raise UserError(
            f"the TFDS set {builder.name} was prepared as {form}, which needs TensorFlow: prepare it again with "
            "file_format='array_record'"
        ) from error


def _records(parts: Sequence[Any]) -> Iterator[bytes]:
    """The records of tfrecord files; parts: TFDS's instructions, which files and how many records of each."""
    for part in parts:
        with open(os.fspath(part.filename), "rb") as file:
            yield from islice(_framed(file), part.skip, part.skip + part.take)


def _framed(file: Any) -> Iterator[bytes]:
    """The records of one tfrecord file: each is 8 bytes of length, 4 of its checksum, the record, 4 of its checksum."""
    while head := file.read(12):
        (length,) = struct.unpack("<Q", head[:8].ljust(8, b"\xff"))
        left = os.fstat(file.fileno()).st_size - file.tell()
        if length + 4 > left:
            raise ValueError(f"{file.name} is cut off or damaged")
        yield file.read(length)
        file.seek(4, os.SEEK_CUR)


def _fitted(what: str, pixels: np.ndarray, target: Layout, channels: int | None) -> np.ndarray:
    """One image uint8 [H, W] or [H, W, C] on the target's canvas, as [H, W, C], with the channels asked for."""
    pixels = checked_pixels(what, np.asarray(pixels)[None])[0]
    depth = pixels.shape[-1]
    if channels in (None, depth) and target.size in (None, pixels.shape[:2]):
        return pixels
    if depth not in ((1, 3) if channels is None else (1, 3, 4)):
        cure = "give channels=3" if depth == 4 else "only images with 1, 3 or 4 can be changed"
        raise UserError(f"{what} has {depth} channels: {cure}")
    image = Image.fromarray(pixels.squeeze(-1) if depth == 1 else pixels)
    fitted = np.asarray(fit(image if channels is None else eight_bit(image, channels), target))
    return fitted.reshape(*fitted.shape[:2], -1)
