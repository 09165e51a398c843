"""Published sets of scored photographs, and MIT Indoor67, read from the folders that their authors give out."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from jaxsd.data.cache import read_images
from jaxsd.data.decode import layout
from jaxsd.data.files import listed
from jaxsd.data.load import by_split
from jaxsd.data.scored import Columns, Listing, Reading, read_csv, read_listed
from jaxsd.data.source import Splits
from jaxsd.errors import UserError

LIVE_FILES = {"jp2k": 227, "jpeg": 233, "wn": 174, "gblur": 174, "fastfading": 174}  # in the order of the scores
LIVE_DISTORTED = 779  # of these 982 files; the rest are copies of the references
ITW_TRAINING = 7  # images at the beginning that only showed people how to score


def live(
    path: str | Path,
    *,
    size: int | tuple[int, int] | None = 512,
    canvas: str = "reflect",
    channels: int = 3,
    on_bad_image: str = "error",
    cache: str | Path | None = "auto",
) -> Splits:
    """LIVE release 2 (Sheikh et al., 2006): 779 distorted images of 29 scenes, five kinds of distortion.

    path: the folder with jp2k, jpeg, wn, gblur, fastfading, refnames_all.mat, and dmos_realigned.mat or dmos.mat; the
    realigned scores are taken where they are there. The copies of references among the files are left out: their score
    of 0, seven times per scene, would raise every correlation. groups: the reference's name. kinds: the folder's name.
    size, canvas, channels, on_bad_image, cache: as in `folder`; 0.8 MB of memory for each colour image of 512 pixels.
    Raises UserError where something is not as in the release.
    """
    root = _root(path, "LIVE release 2")
    realigned = (root / "dmos_realigned.mat").is_file()
    of = root / ("dmos_realigned.mat" if realigned else "dmos.mat")
    scores, copies = _mat(of, "dmos_new" if realigned else "dmos", "orgs")
    (references,) = _mat(root / "refnames_all.mat", "refnames_all")
    names = [(kind, f"{kind}/img{n}.bmp") for kind, count in LIVE_FILES.items() for n in range(1, count + 1)]
    sizes = {len(scores), len(copies), len(references)}
    kept = np.flatnonzero(copies == 0)
    if sizes != {len(names)} or len(kept) != LIVE_DISTORTED:
        raise UserError(
            f"{of} and refnames_all.mat must name {len(names)} files, {LIVE_DISTORTED} of them distorted: got "
            f"{' and '.join(map(str, sorted(sizes)))}, {len(kept)} distorted; take the files of LIVE release 2"
        )
    listing = Listing(
        of,
        tuple(names[i][1] for i in kept),
        scores[kept].astype(np.float32),
        groups=tuple(_stem(references[i]) for i in kept),
        kinds=tuple(names[i][0] for i in kept),
    )
    reading = Reading(layout(size, canvas, channels), on_bad_image, cache)
    which = "realigned" if realigned else "not realigned"
    return read_listed("live", root, listing, reading, score=f"DMOS, {which}, about 0 to 100, higher is worse")


def live_itw(
    path: str | Path,
    *,
    size: int | tuple[int, int] | None = 512,
    canvas: str = "reflect",
    channels: int = 3,
    on_bad_image: str = "error",
    cache: str | Path | None = "auto",
) -> Splits:
    """LIVE In the Wild (Ghadiyaram, Bovik, 2016): 1,162 photographs as people took them.

    path: the folder with Images and Data (AllImages_release.mat, AllMOS_release.mat). The seven images that opened the
    study as examples are left out. size, canvas, channels, on_bad_image, cache: as in `folder`.
    Raises UserError where something is not as in the release.
    """
    root = _root(path, "LIVE In the Wild")
    of = root / "Data/AllImages_release.mat"
    (names,) = _mat(of, "AllImages_release")
    (scores,) = _mat(root / "Data/AllMOS_release.mat", "AllMOS_release")
    if len(names) != len(scores):
        raise UserError(f"{of} names {len(names)} images, but there are {len(scores)} scores: take both of one release")
    listing = Listing(of, tuple(map(str, names[ITW_TRAINING:])), scores[ITW_TRAINING:].astype(np.float32))
    reading = Reading(layout(size, canvas, channels), on_bad_image, cache)
    return read_listed("live_itw", root / "Images", listing, reading, score="MOS, 0 to 100, higher is better")


def koniq(
    path: str | Path,
    *,
    size: int | tuple[int, int] | None = 512,
    canvas: str = "reflect",
    channels: int = 3,
    on_bad_image: str = "error",
    cache: str | Path | None = "auto",
) -> Splits:
    """KonIQ-10k (Hosu et al., 2020): 10,073 photographs.

    path: the folder with 1024x768 and koniq10k_scores_and_distributions.csv; its column MOS_zscore is the score.
    size, canvas, channels, on_bad_image, cache: as in `folder`; 8 GB of memory in colour with 512 pixels.
    Raises UserError where something is not as in the release.
    """
    root = _root(path, "KonIQ-10k")
    of = _present(root / "koniq10k_scores_and_distributions.csv")
    columns = read_csv(of, ("image_name", "MOS_zscore"))
    listing = Listing(of, columns.texts("image_name"), columns.numbers("MOS_zscore"))
    reading = Reading(layout(size, canvas, channels), on_bad_image, cache)
    score = "MOS from z-scores, about 0 to 100, higher is better"
    return read_listed("koniq", root / "1024x768", listing, reading, score=score)


def kadid(
    path: str | Path,
    *,
    size: int | tuple[int, int] | None = 512,
    canvas: str = "reflect",
    channels: int = 3,
    on_bad_image: str = "error",
    cache: str | Path | None = "auto",
) -> Splits:
    """KADID-10k (Lin et al., 2019): 10,125 images of 81 scenes, 25 kinds of distortion at five levels.

    path: the folder with images and dmos.csv. groups: "I01" and so on. kinds: "01" to "25", as in the file names.
    size, canvas, channels, on_bad_image, cache: as in `folder`; 8 GB of memory in colour with 512 pixels.
    Raises UserError where something is not as in the release.
    """
    root = _root(path, "KADID-10k")
    of = _present(root / "dmos.csv")
    columns = read_csv(of, ("dist_img", "ref_img", "dmos"))
    names = columns.texts("dist_img")
    groups = tuple(map(_stem, columns.texts("ref_img")))
    listing = Listing(of, names, columns.numbers("dmos"), groups=groups, kinds=_parts(of, names, 1))
    reading = Reading(layout(size, canvas, channels), on_bad_image, cache)
    score = "DMOS, 1 to 5, higher is better in spite of its name"
    return read_listed("kadid", root / "images", listing, reading, score=score)


def tid2013(
    path: str | Path,
    *,
    size: int | tuple[int, int] | None = 512,
    canvas: str = "reflect",
    channels: int = 3,
    on_bad_image: str = "error",
    cache: str | Path | None = "auto",
) -> Splits:
    """TID2013 (Ponomarenko et al., 2015): 3,000 images of 25 scenes, 24 kinds of distortion at five levels.

    path: the folder with distorted_images and mos_with_names.txt. groups: "I01" and so on. kinds: "01" to "24", as in
    the file names. size, canvas, channels, on_bad_image, cache: as in `folder`; 2.4 GB of memory in colour with 512
    pixels. Raises UserError where something is not as in the release.
    """
    root = _root(path, "TID2013")
    of = _present(root / "mos_with_names.txt")
    rows = [(number, line.split()) for number, line in enumerate(_lines(of), start=1) if line.strip()]
    for number, row in rows:
        if len(row) != 2:
            raise UserError(f"{of} has no 'score file' in line {number}: take the file as it was published")
    cells = {"score": [row[0] for _, row in rows], "file": [row[1] for _, row in rows]}
    columns = Columns(of, [number for number, _ in rows], cells)
    names = columns.texts("file")
    groups = tuple(part.upper() for part in _parts(of, names, 0))  # i01 and I01 are both in use
    listing = Listing(of, names, columns.numbers("score"), groups=groups, kinds=_parts(of, names, 1))
    reading = Reading(layout(size, canvas, channels), on_bad_image, cache)
    return read_listed("tid2013", root / "distorted_images", listing, reading, score="MOS, 0 to 9, higher is better")


def indoor67(
    path: str | Path,
    *,
    size: int | tuple[int, int] | None = 256,
    canvas: str = "squash",
    channels: int = 3,
    on_bad_image: str = "error",
    cache: str | Path | None = "auto",
) -> Splits:
    """MIT Indoor67 (Quattoni, Torralba, 2009): 67 kinds of rooms, 5,360 training and 1,340 test images.

    path: the folder with Images, TrainImages.txt and TestImages.txt (one `class/file` a line); the images of neither
    list are passed over. Classes are sorted. size, canvas, channels, on_bad_image, cache: as in `folder`.
    Raises UserError where something is not as in the release, or an image is in both lists.
    """
    root = _root(path, "MIT Indoor67")
    lists = {split: _present(root / name) for split, name in (("train", "TrainImages.txt"), ("test", "TestImages.txt"))}
    named = {split: [line.strip() for line in _lines(of) if line.strip()] for split, of in lists.items()}
    splits = [split for split, names in named.items() for _ in names]
    names = [name for names in named.values() for name in names]
    folder = _present(root / "Images")
    entries = [
        entry._replace(split=split, category=PurePosixPath(entry.name).parts[0])
        for entry, split in zip(listed(folder, names, f"{lists['train']} or TestImages.txt"), splits, strict=True)
    ]
    known, tested = ({str(entry.category) for entry in entries if entry.split == split} for split in lists)
    if tested - known:
        lacking = ", ".join(sorted(tested - known))
        raise UserError(f"{lists['test']} has classes that TrainImages.txt lacks: {lacking}; take the published lists")
    target = layout(size, canvas, channels)
    of = str(lists["train"].resolve())
    decoded, skipped = read_images(folder, entries, target, on_bad_image=on_bad_image, cache=cache, of=of)
    sources = by_split(folder, entries, decoded)
    return Splits("indoor67", sources["train"], None, sources["test"], skipped)


def _root(path: str | Path, what: str) -> Path:
    """The folder of a published set."""
    if not path or not Path(path).expanduser().is_dir():
        raise UserError(f"the folder of {what} is not there, '{path or ''}': give the path of one that has it")
    return Path(path).expanduser()


def _present(path: Path) -> Path:
    """A path that leads to something."""
    if not path.exists():
        raise UserError(f"{path} is missing: give the folder that has it, as it was published")
    return path


def _mat(path: Path, *names: str) -> list[np.ndarray]:
    """Variables [N] of a MATLAB file, whichever way they lie; cells become the texts in them."""
    from scipy.io import loadmat  # not before it is needed

    _present(path)
    try:
        content = loadmat(path, squeeze_me=True)
    except Exception as error:  # damaged bytes can raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is no readable MATLAB file ({reason}): take the file as it was published") from error
    for name in names:
        if name not in content:
            found = ", ".join(key for key in content if not key.startswith("__")) or "nothing"
            raise UserError(f"{path} has no {name}, but {found}: take the file as it was published")
    return [np.asarray(content[name]).reshape(-1) for name in names]


def _lines(path: Path) -> list[str]:
    """The lines of a text file; bytes of an unknown encoding stay as they are in file names."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from error


def _stem(name: object) -> str:
    return PurePosixPath(str(name)).stem


def _parts(of: Path, names: Sequence[str], position: int) -> tuple[str, ...]:
    """A part of file names such as I01_05_2.png: the scene at position 0, the kind at 1."""
    for name in names:
        if len(_stem(name).split("_")) != 3:
            raise UserError(f"{of} names {name}, not scene_kind_level: take the file as it was published")
    return tuple(_stem(name).split("_")[position] for name in names)
