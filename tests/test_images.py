"""Every kind of file or folder entry that docs/images.md lists does what stands there."""

import io
import logging
import os
import re
import socket
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from jaxsd.data import decode, folder
from jaxsd.errors import UserError

DOC = (Path(__file__).parents[1] / "docs" / "images.md").read_text()
# key -> (what happens, what is said)
ROWS = {
    key: (what, said) for key, what, said in re.findall(r"^\| `(\S+)` \|[^|]*\| ([^|]*?) \|(?: `(.*)`)? *\|", DOC, re.M)
}

SCENE = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
SOLID = np.full((4, 6, 3), (200, 30, 60), np.uint8)
GRAY = SCENE[..., :1].repeat(3, axis=-1)
TURNED = {  # EXIF orientation -> how the stored pixels of an upright scene lie
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2),
    8: lambda a: np.rot90(a, -1),
}


def encoded(pixels, kind, mode=None, **options):
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels), mode).save(file, kind, **options)
    return file.getvalue()


def png(width, height, rows, depth=8, colour=2, transparent=b""):
    """A PNG file from scratch, also of kinds that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    sealed = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
        if body or kind != b"tRNS"
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(sealed)


def sixteen_bits(levels):
    """PNG rows of 16-bit levels [H, ...]."""
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)


def white_is_zero(pixels):
    """A gray TIFF file whose tag says that its levels count from white to black."""
    entry = struct.pack("<HHIH", 262, 3, 1, 1)
    content = encoded(pixels, "TIFF")
    assert content.count(entry) == 1
    return content.replace(entry, struct.pack("<HHIH", 262, 3, 1, 0))


def lost_tag():
    """A TIFF file with a tag, a description, that is said to reach beyond the file."""
    entry = struct.pack("<HHI", 270, 2, len("a description") + 1)
    content = encoded(SOLID, "TIFF", description="a description")
    assert content.count(entry) == 1
    return content.replace(entry, struct.pack("<HHI", 270, 2, 99_999))


def flipped(content, at, bits=0x55):
    place = int(at * len(content))
    return content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :]


def of_files(**files):
    """Writes files: suffix or name -> content, or (content, pixels to be read)."""

    def case(place, monkeypatch):
        found = {}
        for name, content in files.items():
            name = name if "." in name else f"case.{name}"
            content, pixels = content if isinstance(content, tuple) else (content, None)
            (place / name).write_bytes(content)
            found[name] = pixels
        return found

    return case


def several_frames(place, monkeypatch):
    frames = [Image.fromarray(pixels) for pixels in (SOLID, SCENE)]
    for suffix in ("gif", "webp", "png", "tif"):
        options = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(place / f"case.{suffix}", save_all=True, append_images=frames[1:], **options)
    return {f"case.{suffix}": SOLID for suffix in ("gif", "webp", "png", "tif")}


def exif_turned(place, monkeypatch):
    for number, stored in TURNED.items():
        exif = Image.Exif()
        exif[0x0112] = number
        Image.fromarray(np.ascontiguousarray(stored(SCENE))).save(place / f"case{number}.png", exif=exif)
    return {f"case{number}.png": SCENE for number in TURNED}


def broken_exif(place, monkeypatch):
    for number, header in enumerate((b"XX*\0\0\0\0\x08", b"MM\0*\0\0\0\x08\xff\xff" + bytes(range(40)))):
        for suffix in ("jpg", "png", "webp"):
            options = {"lossless": True} if suffix == "webp" else {}
            Image.fromarray(SOLID).save(place / f"case{number}.{suffix}", exif=b"Exif\0\0" + header, **options)
    return {path.name: SOLID for path in place.glob("case*")}


def adobe_cmyk(place, monkeypatch):
    Image.fromarray(SOLID).convert("CMYK").save(place / "case.jpg", quality=100)
    assert b"Adobe" in (place / "case.jpg").read_bytes()
    return {"case.jpg": cv2.imread(str(place / "case.jpg"))[..., ::-1]}  # a reader of its own


def links(place, monkeypatch):
    (place / "deep").mkdir()
    (place / "deep/case.png").write_bytes(encoded(SCENE, "PNG"))
    (place / "deep/circle").symlink_to(place)
    (place / "case.png").symlink_to(place / "deep/case.png")
    return {"deep/case.png": SCENE, "case.png": SCENE}


def folder_named_as_image(place, monkeypatch):
    (place / "case.jpg").mkdir()
    (place / "case.jpg/1.png").write_bytes(encoded(SCENE, "PNG"))
    return {"case.jpg/1.png": SCENE}


def named(*names):
    def case(place, monkeypatch):
        for name in names:
            (place / name).write_bytes(encoded(SCENE, "PNG"))
        return {decode_name(name): SCENE for name in names}

    return case


def decode_name(name):
    return name.replace("\n", "\\n").replace("\r", "\\r").replace("\udce9", "\\udce9")


def link(target):
    def case(place, monkeypatch):
        (place / "case.png").symlink_to(place / target)
        return {"case.png": None}

    return case


def lost_folder(place, monkeypatch):
    (place / "case").symlink_to(place / "nowhere")
    return {"case": None}


def closed(place, monkeypatch):
    """A file that may not be read; root may read any, so its refusal is acted then."""
    path = place / "case.png"
    path.write_bytes(encoded(SCENE, "PNG"))
    path.chmod(0)
    if os.access(path, os.R_OK):
        opened = Image.open

        def refuse(name, **options):
            if str(name) == str(path):
                raise PermissionError(13, "Permission denied")
            return opened(name, **options)

        monkeypatch.setattr(decode.Image, "open", refuse)
    return {"case.png": None}


def pipe(place, monkeypatch):
    os.mkfifo(place / "pipe.png")
    monkeypatch.chdir(place)  # the path of a socket may have 107 bytes only
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket.jpg")
    return {"pipe.png": None, "socket.jpg": None}


def hidden(place, monkeypatch):
    (place / "__MACOSX").mkdir()
    for name in (".case.png", "._1.png", "__MACOSX/case.png"):
        (place / name).write_bytes(b"no image")
    return dict.fromkeys((".case.png", "._1.png", "__MACOSX/case.png"))


LEVELS = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2570  # 0, 10, ..., 230 of 255
TENS = (np.arange(24, dtype=np.uint8).reshape(4, 6, 1) * 10).repeat(3, axis=-1)
LAID = np.where(np.arange(24).reshape(4, 6, 1) == 3, 255, TENS)  # level 30 transparent, on white
ALPHA = np.array([0, 128, 255] * 8, np.uint8).reshape(4, 6, 1)
ON_WHITE = np.rint(SCENE * (ALPHA / 255) + 255 * (1 - ALPHA / 255))
FEW = Image.fromarray(SCENE).quantize(16)
HOLE = np.where((np.asarray(FEW) == 3)[..., None], 255, np.asarray(FEW.convert("RGB")))
LARGE = np.tile(SCENE, (16, 16, 1))
CUT = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "tif": "TIFF", "ppm": "PPM"}


def with_a_hole():
    file = io.BytesIO()
    FEW.save(file, "PNG", transparency=3)
    return file.getvalue()


CASES = {
    "other-suffix": of_files(png=(encoded(SOLID, "JPEG", quality=100), SOLID), jpg=(encoded(SCENE, "PNG"), SCENE)),
    "upper-case": named("CASE.PNG", "Case.PnG"),
    "progressive-jpeg": of_files(jpg=(encoded(SOLID, "JPEG", quality=100, progressive=True), SOLID)),
    "cmyk-jpeg": adobe_cmyk,
    "cmyk-tiff": of_files(tif=(encoded(np.full((4, 6, 4), (55, 225, 195, 0), np.uint8), "TIFF", "CMYK"), SOLID)),
    "gray-16": of_files(
        png=(png(6, 4, sixteen_bits(LEVELS), 16, 0), TENS), tif=(encoded(LEVELS, "TIFF"), TENS)
    ),
    "rgb-16": of_files(png=(png(6, 4, sixteen_bits(LEVELS.repeat(3, axis=1)), 16, 2), TENS)),
    "white-is-zero": of_files(
        **{"16.tif": (white_is_zero(LEVELS), 255 - TENS), "8.tif": (white_is_zero(TENS[..., 0]), 255 - TENS)}
    ),
    "one-bit": of_files(png=(encoded(SCENE[..., 0] > 127, "PNG"), (GRAY > 127) * 255)),
    "palette": of_files(png=(with_a_hole(), HOLE)),
    "alpha": of_files(
        png=(encoded(np.concatenate([SCENE, ALPHA], axis=-1), "PNG"), ON_WHITE),
        tif=(encoded(np.concatenate([SCENE, ALPHA], axis=-1), "TIFF"), ON_WHITE),
    ),
    "gray-alpha": of_files(
        png=(encoded(np.concatenate([GRAY[..., :1], ALPHA], axis=-1), "PNG", "LA"), ON_WHITE[..., :1].repeat(3, -1))
    ),
    "transparent-level": of_files(
        **{
            "8.png": (png(6, 4, b"".join(b"\0" + bytes(row) for row in TENS[..., 0]), 8, 0, b"\0\x1e"), LAID),
            "16.png": (png(6, 4, sixteen_bits(LEVELS), 16, 0, struct.pack(">H", 7710)), LAID),
            "4.png": (
                png(6, 4, b"\0\x12\x34\x56" * 4, 4, 0, b"\0\x02"),
                np.tile([17, 255, 51, 68, 85, 102], (4, 1))[..., None].repeat(3, axis=-1),
            ),
        }
    ),
    "exif-turned": exif_turned,
    "broken-exif": broken_exif,
    "broken-icc": of_files(
        jpg=(encoded(SOLID, "JPEG", quality=100, icc_profile=b"no profile" * 9), SOLID),
        png=(encoded(SCENE, "PNG", icc_profile=b"no profile" * 9), SCENE),
    ),
    "several-frames": several_frames,
    "one-pixel": of_files(png=(encoded(SOLID[:1, :1], "PNG"), SOLID)),
    "one-row": of_files(png=(encoded(np.full((1, 20_000, 3), SOLID[0, 0]), "PNG"), SOLID)),
    "odd-name": named("für 🐈.png", "it's \"quoted\".png", " -- $(x) %s {} [a]*.png", "a,b;c.png"),
    "control-name": named("two\nlines\r.png", "latin\udce9.png"),
    "long-name": named("n" * 251 + ".png"),
    "folder-as-image": folder_named_as_image,
    "link": links,
    "truncated": of_files(**{kind: encoded(LARGE, name)[:-60] for kind, name in CUT.items()}),
    "header-only": of_files(jpg=encoded(LARGE, "JPEG")[:100], bmp=encoded(LARGE, "BMP")[:54]),
    "magic-only": of_files(
        png=b"\x89PNG\r\n\x1a\n",
        gif=b"GIF89a",
        webp=b"RIFF\0\0\0\0WEBP",
        tif=encoded(LARGE, "TIFF", compression="tiff_lzw")[:-60],
    ),
    "empty": of_files(png=b"", jpg=b""),
    "text": of_files(jpg=b"<html>404 not found</html>", png=b"\0" * 500),
    "foreign": of_files(svg=b"<svg/>", heic=b"\0\0\0\x18ftypheic", avif=b"\0\0\0\x18ftypavif"),
    "bomb": of_files(png=png(29_000, 29_000, b"")),
    "long-side": of_files(png=png(50_000, 1, b"\0" * 150_001)),
    "flipped-checked": of_files(
        png=flipped(encoded(LARGE, "PNG"), 0.5), tif=flipped(encoded(LARGE, "TIFF", compression="tiff_deflate"), 0.5)
    ),
    "damaged-tags": of_files(tif=lost_tag()),
    "float": of_files(tif=encoded(SCENE[..., 0] / np.float32(255), "TIFF")),
    "bits-32": of_files(tif=encoded(np.full((4, 6), 10**6, np.int32), "TIFF")),
    "lab": of_files(tif=encoded(SCENE, "TIFF", "LAB")),
    "dangling-link": link("nowhere.png"),
    "link-loop": link("case.png"),
    "closed": closed,
    "pipe": pipe,
    "lost-folder": lost_folder,
    "hidden": hidden,
    "no-image-name": of_files(**{"notes.txt": b"words", "photo.jpg~": encoded(SCENE, "JPEG")}),
    "flipped-unchecked": of_files(
        jpg=(flipped(encoded(LARGE, "JPEG"), 0.8, 1), SCENE), bmp=(flipped(encoded(SCENE, "BMP"), 0.9), SCENE)
    ),
}  # fmt: skip


def test_the_table_and_the_cases_are_the_same():
    assert len(ROWS) >= 40 and list(ROWS) == list(CASES)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("key", CASES)
def test_it_happens_as_the_table_says(key, tmp_path, monkeypatch, caplog):
    what, said = ROWS[key]
    root, place = tmp_path / "set", tmp_path / "set" / "cat"
    for category in ("cat", "dog"):
        (root / category).mkdir(parents=True)
        (root / category / "good.png").write_bytes(encoded(SCENE, "PNG"))
    expected = CASES[key](place, monkeypatch)
    options = dict(size=(4, 6), canvas="squash", test=0.0, cache=tmp_path / "cache")
    caplog.set_level(logging.INFO)
    if what == "error":
        with pytest.raises(UserError) as error:
            folder(root, **options)
        assert "\n" not in str(error.value)
        for name in expected:
            assert re.search(rf"cat/{re.escape(name)} .*?{re.escape(said)}", str(error.value)), (name, error.value)
        return
    for _ in range(2):  # decoded, then from the cache
        caplog.clear()
        source = folder(root, **options).train
        images = dict(zip(source.names, source.images, strict=True))
        assert images.keys() - {"cat/good.png", "dog/good.png"} == (
            set() if what == "passed over" else {f"cat/{name}" for name in expected}
        )
        for name, pixels in expected.items() if what != "passed over" else ():
            difference = np.abs(images[f"cat/{name}"].astype(int) - pixels).max()
            assert difference > 9 if what == "read wrongly" else difference <= (0 if pixels is SCENE else 3), name
            assert what != "read, warned of" or f"cat/{name} ({said})" in caplog.text
        assert what != "read" or "look at them" not in caplog.text
        assert said in caplog.text or what == "read"
