"""Loaders of image folders and NumPy archives. The embedded sets are in `embedded`, those of TFDS in `prepared`."""

from pathlib import Path

import numpy as np

from jaxsd.data.cache import read_images
from jaxsd.data.decode import Decoded, layout
from jaxsd.data.files import Entry, scan
from jaxsd.data.source import Source, Splits
from jaxsd.data.split import TEST_SHARE, carve
from jaxsd.errors import UserError

SPLIT_SEED = 0  # shares are carved off in the same way in every run


def folder(
    path: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    canvas: str = "crop",
    channels: int = 3,
    validation: float = 0.0,
    test: float | str | None = None,
    groups: str | None = None,
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
    groups: for frames of a film, bursts, several images of a patient: a regular expression that finds the scene in a
    file's name below the folder (below train, val, test where there are such), with "/" between folders. Its group
    `(?P<group>...)`, or else its first, is the scene: "(?P<group>[^_]+)_[0-9]+" makes cat/tom of cat/tom_12.png. Shares
    are then held out scene by scene, and splits can be by group; None or "": nothing is known of scenes.
    on_bad_image: "error", or "skip" to leave unreadable files out and list them in `Splits.skipped`.
    cache: folder for decoded images, "auto" for the user's cache folder, None or "" for none.
    Raises UserError for a wrong path, layout, option, or unreadable image, and where `groups` does not find the scene
    of every file or finds but one scene.
    """
    if not str(path):
        raise UserError("no image folder is given: give its path")
    root = Path(path).expanduser()
    target = layout(size, canvas, channels)
    for name, share in (("test", test), ("validation", validation)):
        if isinstance(share, float | int) and not 0 <= share < 1:
            raise UserError(f"{name} must be a share of the images in [0, 1): got {share}")
    entries = scan(root, test=test if isinstance(test, str) else None, groups=groups)
    decoded, skipped = read_images(root, entries, target, on_bad_image=on_bad_image, cache=cache)
    sources = by_split(root, entries, decoded)
    share = test if isinstance(test, float | int) else TEST_SHARE
    return held_out(root.resolve().name, sources, validation, share, skipped)


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
        split: Source(checked_pixels(f"{found[split]}_images of {path}", value), labels.get(split), classes)
        for split, value in pixels.items()
    }
    return held_out(path.stem, sources, validation, 0.0, ())


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
            groups = tuple(entry.group for entry in read[part]) if read[part][0].group else ()
            sources[split] = Source(decoded.images[part], labels, classes, names, groups=groups)
    return sources


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


def checked_pixels(what: str, pixels: np.ndarray) -> np.ndarray:
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


def held_out(name: str, sources: dict[str, Source], validation: float, test: float, skipped: tuple) -> Splits:
    """Carves the splits that are not there off the training images: first test, then validation; scenes stay whole."""
    sources = dict(sources)
    for split, share in (("test", test), ("validation", validation)):
        if split not in sources and share:
            train = sources["train"]
            of = len(train) if train.labels is None else train.labels
            kept, carved = carve(of, share, seed=SPLIT_SEED, groups=train.groups)
            if not len(carved) or not len(kept):
                scenes = f" of {len(set(train.groups))} scenes" if train.groups else ""
                raise UserError(f"{name} is too small to hold out {split}={share}: it has {len(train)} images{scenes}")
            sources |= {"train": train.take(kept), split: train.take(carved)}
    shapes = {source.shape for source in sources.values()}
    if len(shapes) > 1:
        raise UserError(f"the splits of {name} differ in image size: {', '.join(map(str, sorted(shapes)))}")
    return Splits(name, sources["train"], sources.get("validation"), sources.get("test"), skipped)
