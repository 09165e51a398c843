"""Loaders of image folders, NumPy archives and TensorFlow Datasets. The embedded sets are in `embedded`."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxsd.data.cache import read_images
from jaxsd.data.decode import Decoded, Layout, fit, layout
from jaxsd.data.files import Entry, scan
from jaxsd.data.source import Source, Splits
from jaxsd.data.split import carve
from jaxsd.errors import UserError

SPLIT_SEED = 0  # shares are carved off in the same way in every run
TEST_SHARE = 0.2  # held out of a folder that has no test folder


def folder(
    path: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    canvas: str = "crop",
    channels: int = 3,
    validation: float = 0.0,
    test: float | str | None = None,
    on_bad_image: str = "error",
    cache: str | Path | None = "auto",
) -> Splits:
    """Images in class folders, with or without a train / val / test level above; or a flat folder: unlabelled.

    size: pixels, or (height, width); None where all images have one size. canvas: "crop" (centre), "pad" (with the
    mean colour of the edge), "squash", or without resizing "reflect" or "zeros" (cut, or continued by mirroring or in
    black); images that have the size already are untouched. channels: 3, or 1 for gray.
    JPEG, PNG, WebP, BMP, GIF, TIFF, PPM are read: turned upright, transparency on white, 16 bits scaled, first frame.
    validation, test: shares held out where there is no such folder, drawn per class, the same in every run; test may
    also name the folder to test on. test None: 0.2.
    on_bad_image: "error", or "skip" to leave unreadable files out and list them in `Splits.skipped`.
    cache: folder for decoded images, "auto" for the user's cache folder, None or "" for none.
    Raises UserError for a wrong path, layout, option, or unreadable image.
    """
    if not str(path):
        raise UserError("no image folder is given: give its path")
    root = Path(path).expanduser()
    target = layout(size, canvas, channels)
    entries = scan(root, test=test if isinstance(test, str) else None)
    decoded, skipped = read_images(root, entries, target, on_bad_image=on_bad_image, cache=cache)
    sources = by_split(root, entries, decoded)
    share = test if isinstance(test, float | int) else TEST_SHARE
    return _held_out(root.resolve().name, sources, validation, share, skipped)


def arrays(path: str | Path, *, validation: float = 0.0) -> Splits:
    """A NumPy archive (.npz) with `train_images` uint8 [N, H, W, C] or [N, H, W], and `train_labels` [N] or [N, 1].

    Likewise `test_images`, `test_labels`, and `validation_...` or `val_...`, as far as there are any; without
    labels everything is unlabelled. `classes`: the class names, optional. validation: share held out of the training
    images where the archive has none. Raises UserError for a wrong file, shape or type.
    """
    path = Path(path).expanduser()
    file = _archive(path)
    found = {"train": "train", "validation": "validation" if "validation_images" in file else "val", "test": "test"}
    pixels = {split: file[f"{key}_images"] for split, key in found.items() if f"{key}_images" in file}
    if "train" not in pixels:
        raise UserError(f"{path} has no train_images: it has {', '.join(sorted(file)) or 'nothing'}")
    labels = {split: file[f"{found[split]}_labels"] for split in pixels if f"{found[split]}_labels" in file}
    if labels and labels.keys() != pixels.keys():
        missing = ", ".join(f"{found[split]}_labels" for split in pixels if split not in labels)
        raise UserError(f"{path} has labels for some images only: add {missing}")
    labels = {split: _checked_labels(f"{found[split]}_labels of {path}", value) for split, value in labels.items()}
    classes = tuple(str(name) for name in file["classes"]) if "classes" in file else ()
    if labels and not classes:
        classes = tuple(str(label) for label in range(1 + max(int(value.max(initial=0)) for value in labels.values())))
    sources = {
        split: Source(_checked_pixels(f"{found[split]}_images of {path}", value), labels.get(split), classes)
        for split, value in pixels.items()
    }
    return _held_out(path.stem, sources, validation, 0.0, ())


def tfds(
    dataset: str,
    *,
    size: int | tuple[int, int] | None = None,
    canvas: str = "crop",
    data_dir: str | Path | None = None,
    train: str = "train",
    validation: float | str = 0.0,
    test: str | None = "test",
) -> Splits:
    """An image classification set of TensorFlow Datasets, read without TensorFlow.

    The set must have been prepared in data_dir as array_record or parquet; nothing is downloaded. train, validation,
    test: splits in the notation of TFDS ("train[:80%]"); validation may be a share held out of the training images,
    test None for no test images. size, canvas: as in `folder`; channels stay as they are.
    Raises UserError where the package, the set, a split or its images are not there.
    """
    target = layout(size, canvas, 3)
    builder = _tfds_builder(dataset, data_dir)
    keys = builder.info.supervised_keys or ("image", "label")
    features = builder.info.features
    if len(keys) != 2 or any(key not in features for key in keys) or not hasattr(features[keys[1]], "names"):
        raise UserError(f"the TFDS set {dataset} has no image with a class label: it has {', '.join(features)}")
    classes = tuple(features[keys[1]].names)
    names = {"train": train, "validation": validation if isinstance(validation, str) else None, "test": test}
    sources = {}
    for split, notation in names.items():
        if notation:
            images, labels = _tfds_split(builder, notation, keys, target)
            sources[split] = Source(images, labels, classes)
    return _held_out(dataset, sources, 0.0 if isinstance(validation, str) else validation, 0.0, ())


def by_split(root: Path, entries: list[Entry], decoded: Decoded) -> dict[str, Source]:
    """A Source for every split that a folder has; its entries are in order, split after split.

    Raises UserError where no image of the training split, of one of its classes, or of a whole split was read.
    """
    read = [entry for position, entry in enumerate(entries) if position not in decoded.bad]
    lost = {(entry.split, entry.category) for entry in entries} - {(entry.split, entry.category) for entry in read}
    for split, category in sorted(lost, key=str):
        if split == "train" or not any(entry.split == split for entry in read):
            what = f"no image of class '{category}'" if category else "no image"
            raise UserError(f"{what} in the {split} split of {root} can be read: repair or remove it")
    classes = tuple(sorted({entry.category for entry in read if entry.category is not None}))
    number = {name: label for label, name in enumerate(classes)}
    sources = {}
    for split in ("train", "validation", "test"):
        positions = [position for position, entry in enumerate(read) if entry.split == split]
        if positions:
            part = slice(positions[0], positions[-1] + 1)
            names = tuple(entry.name for entry in read[part])
            labels = np.array([number[entry.category or ""] for entry in read[part]]) if classes else None
            sources[split] = Source(decoded.images[part], labels, classes, names)
    return sources


def _tfds_builder(name: str, data_dir: str | Path | None) -> Any:
    """The builder of a prepared TFDS set whose files can be read without TensorFlow."""
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(f"TFDS cannot be imported ({error}): pip install 'jaxsd[tfds]'") from error
    place = None if data_dir is None else str(Path(data_dir).expanduser())
    try:
        builder = tensorflow_datasets.builder(name, data_dir=place)
    except (ValueError, AssertionError, ImportError, OSError) as error:  # not found, or a version that is not there
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the TFDS set {name} cannot be opened ({reason}): check the name and data_dir") from error
    how = f"prepare it first: tfds.builder('{name}', data_dir=..., file_format='array_record').download_and_prepare()"
    if not builder.is_prepared() or not builder.info.splits:
        raise UserError(f"the TFDS set {name} is not prepared in {builder.data_dir}: {how}")
    return builder


def _tfds_split(builder: Any, split: str, keys: tuple, target: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, C] and labels [N] of one split, read into memory."""
    try:
        examples = builder.as_data_source(split)
    except NotImplementedError as error:
        raise UserError(
            f"the TFDS set {builder.name} was prepared as {builder.info.file_format.value}, which needs TensorFlow: "
            "prepare it with file_format='array_record'"
        ) from error
    except ValueError as error:
        known = ", ".join(builder.info.splits)
        raise UserError(f"the TFDS set {builder.name} has no split {split}: it has {known}") from error
    labels = np.empty(len(examples), np.int32)
    images = np.empty((0,), np.uint8)
    for position, example in enumerate(examples):
        image = _fit_array(f"{builder.name} image {position} of {split}", example[keys[0]], target)
        if position == 0:
            images = np.empty((len(examples), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise UserError(f"images of {builder.name} differ in size ({image.shape}, {images.shape[1:]}): give size")
        images[position], labels[position] = image, example[keys[1]]
    return images, labels


def _fit_array(what: str, pixels: np.ndarray, target: Layout) -> np.ndarray:
    """One image uint8 [H, W] or [H, W, C] on the target's canvas, as [H, W, C]."""
    pixels = _checked_pixels(what, np.asarray(pixels)[None])[0]
    if target.size in (None, pixels.shape[:2]):
        return pixels
    if pixels.shape[-1] not in (1, 3):
        raise UserError(f"{what} has {pixels.shape[-1]} channels: only images with 1 or 3 can be resized")
    fitted = np.asarray(fit(Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels), target))
    return fitted.reshape(*fitted.shape[:2], -1)


def _archive(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file."""
    if not path.is_file():
        raise UserError(f"the archive {path} does not exist: check the path")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # damaged bytes can raise nearly anything; pickled objects raise ValueError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is no readable .npz of plain arrays ({reason}): write it with numpy.savez") from error


def _checked_pixels(what: str, pixels: np.ndarray) -> np.ndarray:
    """Images as [N, H, W, C], or UserError with what to do."""
    if pixels.dtype != np.uint8:
        cure = "(images * 255).round().astype('uint8') if they are in [0, 1]" if pixels.dtype.kind == "f" else "uint8"
        raise UserError(f"{what} must be uint8 from 0 to 255, not {pixels.dtype}: save them as {cure}")
    if pixels.ndim == 3:
        return pixels[..., None]
    if pixels.ndim == 4 and pixels.shape[1] in (1, 3) and pixels.shape[3] > 4:
        raise UserError(f"{what} seem to be [N, C, H, W], {list(pixels.shape)}: transpose them to [N, H, W, C]")
    if pixels.ndim != 4:
        raise UserError(f"{what} must be [N, H, W, C] or [N, H, W]: got {list(pixels.shape)}")
    return pixels


def _checked_labels(what: str, labels: np.ndarray) -> np.ndarray:
    """Labels as [N]."""
    if labels.dtype.kind not in "iu" or not (labels.ndim == 1 or labels.shape[1:] == (1,)):
        raise UserError(f"{what} must be whole numbers [N] or [N, 1]: got {labels.dtype} {list(labels.shape)}")
    return labels.reshape(-1)


def _held_out(name: str, sources: dict[str, Source], validation: float, test: float, skipped: tuple) -> Splits:
    """Carves the splits that are not there off the training images: first test, then validation."""
    sources = dict(sources)
    for split, share in (("test", test), ("validation", validation)):
        if split not in sources and share:
            train = sources["train"]
            kept, carved = carve(len(train) if train.labels is None else train.labels, share, seed=SPLIT_SEED)
            if not len(carved) or not len(kept):
                raise UserError(f"{name} is too small to hold out {split}={share}: it has {len(train)} images")
            sources |= {"train": train.take(kept), split: train.take(carved)}
    shapes = {source.shape for source in sources.values()}
    if len(shapes) > 1:
        raise UserError(f"the splits of {name} differ in image size: {', '.join(map(str, sorted(shapes)))}")
    return Splits(name, sources["train"], sources.get("validation"), sources.get("test"), skipped)
