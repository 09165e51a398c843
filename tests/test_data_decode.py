import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxsd.data.decode import decode_all, fit, layout
from jaxsd.errors import UserError

SCENE = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)  # no symmetry
RED = (255, 0, 0)


def decoded(path, size=None, canvas="crop", channels=3):
    images, bad, *_ = decode_all([str(path)], [path.name], layout(size, canvas, channels))
    assert not bad, bad
    return images[0]


def smooth(height, width):
    y, x = np.mgrid[:height, :width] / max(height, width)
    levels = np.stack([np.sin(5 * x + y), np.cos(3 * y), np.sin(4 * x * y)], axis=-1)
    return np.rint(127.5 + 127.5 * levels).astype(np.uint8)


TURNED = {  # EXIF orientation -> what undoes it
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.swapaxes(a, 0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("orientation", TURNED)
def test_images_are_turned_upright(tmp_path, suffix, orientation):
    plain, turned = tmp_path / f"plain.{suffix}", tmp_path / f"turned.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(SCENE).save(plain, **options)
    Image.fromarray(SCENE).save(turned, exif=exif, **options)
    stored = SCENE if suffix != "jpg" else decoded(plain)
    assert np.array_equal(decoded(turned), TURNED[orientation](stored))


def test_a_large_jpeg_is_shrunk_while_decoding_without_a_loss(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    scene = smooth(912, 1600)
    scene[..., 1] = 127.5 + 100 * np.sin(np.arange(1600) / 5)  # waves of 4 pixels after resizing
    Image.fromarray(scene).save(tmp_path / "a.jpg", exif=exif, quality=98, subsampling=0)
    upright = Image.fromarray(np.rot90(scene, -1))
    for canvas in ("crop", "pad", "squash"):
        expected = np.asarray(fit(upright, layout((160, 120), canvas, 3))).astype(int)
        got = decoded(tmp_path / "a.jpg", (160, 120), canvas)
        assert np.abs(got - expected).mean() < 0.5 and np.abs(got - expected).max() <= 4


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    levels = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for suffix in ("png", "tif"):
        Image.fromarray(levels).save(tmp_path / f"a.{suffix}")
        assert np.array_equal(decoded(tmp_path / f"a.{suffix}", channels=1)[..., 0], np.arange(256).reshape(16, 16))
        assert decoded(tmp_path / f"a.{suffix}").shape == (16, 16, 3)
    rows = b"".join(b"\0" + levels[i : i + 1].repeat(3).astype(">u2").tobytes() for i in range(16))
    (tmp_path / "rgb.png").write_bytes(png(16, 16, rows, depth=16, colour=2))
    difference = decoded(tmp_path / "rgb.png")[..., 0].astype(int) - np.arange(256).reshape(16, 16)
    assert np.abs(difference).max() <= 1


def png(width, height, rows, depth=8, colour=2):
    """A PNG file from scratch, also of kinds that Pillow does not write."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        parts.append(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))
    return b"".join(parts)


def test_colour_models(tmp_path):
    solid = Image.new("RGB", (4, 4), (200, 30, 60))
    solid.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(decoded(tmp_path / "cmyk.jpg").astype(int) - (200, 30, 60)).max() <= 3
    Image.fromarray(SCENE[..., 0]).save(tmp_path / "gray.png")
    assert np.array_equal(decoded(tmp_path / "gray.png"), SCENE[..., :1].repeat(3, axis=-1))
    Image.fromarray(SCENE).save(tmp_path / "rgb.bmp")
    luma = SCENE @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(decoded(tmp_path / "rgb.bmp", channels=1)[..., 0] - luma).max() <= 1
    Image.fromarray(SCENE[..., 0] > 127).save(tmp_path / "bits.png")
    assert np.array_equal(decoded(tmp_path / "bits.png", channels=1)[..., 0], (SCENE[..., 0] > 127) * 255)
    Image.fromarray(SCENE).quantize(16).save(tmp_path / "palette.png")
    few = np.asarray(Image.fromarray(SCENE).quantize(16).convert("RGB"))
    assert np.array_equal(decoded(tmp_path / "palette.png"), few)


def test_transparency_lies_on_white(tmp_path):
    half = np.full((4, 4, 4), (255, 0, 0, 128), np.uint8)
    half[0, 0], half[1, 1] = (9, 9, 9, 0), (1, 2, 3, 255)
    Image.fromarray(half).save(tmp_path / "rgba.png")
    image = decoded(tmp_path / "rgba.png")
    assert image[0, 0].tolist() == [255] * 3 and image[1, 1].tolist() == [1, 2, 3]
    assert image[2, 2].tolist() == [255, 127, 127]  # 255 * (1 - 128 / 255)
    Image.fromarray(half[..., [0, 3]], "LA").save(tmp_path / "la.png")
    assert decoded(tmp_path / "la.png", channels=1)[:2, :2, 0].tolist() == [[255, 255], [255, 1]]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, *RED])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    image = decoded(tmp_path / "p.png")
    assert image[0, 0].tolist() == [255] * 3 and image[2, 2].tolist() == list(RED)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_several_frames_the_first_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (5, 4), colour) for colour in (RED, (0, 0, 255), (0, 255, 0))]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(decoded(tmp_path / f"a.{suffix}"), np.full((4, 5, 3), RED))


def test_an_image_of_the_right_size_is_untouched(tmp_path):
    Image.fromarray(SCENE).save(tmp_path / "a.png")
    for canvas in ("crop", "pad", "squash"):
        assert np.array_equal(decoded(tmp_path / "a.png", (6, 9), canvas), SCENE)


def test_crop_takes_the_centre():
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 41, 3), np.uint8))
    target = layout(32, "crop", 3)
    assert np.array_equal(fit(wide, target), np.asarray(wide)[:, 4:36])  # nothing to resize: exact pixels
    tall = Image.fromarray(np.asarray(wide).transpose(1, 0, 2))
    assert np.array_equal(fit(tall, target), np.asarray(tall)[4:36])
    scene = Image.fromarray(smooth(120, 200))
    whole = scene.resize((100, 60), Image.Resampling.BICUBIC)  # shorter side first, then the centre
    difference = np.asarray(fit(scene, layout(60, "crop", 3))).astype(int) - np.asarray(whole.crop((20, 0, 80, 60)))
    assert np.abs(difference).max() <= 1


def test_pad_shows_everything_on_the_mean_of_the_edge():
    wide = np.random.default_rng(2).integers(0, 256, (16, 32, 3), np.uint8)
    padded = np.asarray(fit(Image.fromarray(wide), layout(32, "pad", 3)))
    assert np.array_equal(padded[8:24], wide)
    edge = np.concatenate([wide[0], wide[-1], wide[1:-1, 0], wide[1:-1, -1]]).mean(axis=0)
    assert np.array_equal(padded[:8], np.broadcast_to(np.rint(edge), (8, 32, 3)))
    assert np.array_equal(padded[24:], padded[:8])
    sliver = fit(Image.new("L", (300, 1), 77), layout(8, "pad", 1))  # a side that would vanish keeps one pixel
    assert np.array_equal(sliver, np.full((8, 8), 77))


def test_squash_fills_the_canvas_and_shrinking_is_antialiased():
    scene = Image.fromarray(smooth(50, 90))
    assert np.array_equal(fit(scene, layout((20, 30), "squash", 3)), scene.resize((30, 20), Image.Resampling.BICUBIC))
    chequered = Image.fromarray(((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8))
    for canvas in ("crop", "pad", "squash"):
        assert np.abs(np.asarray(fit(chequered, layout(16, canvas, 1)))[2:-2, 2:-2] - 127.5).max() < 5


def broken(folder):
    """Files that give no image, and the reason that is told."""
    whole = folder / "whole.jpg"
    Image.fromarray(smooth(90, 90)).save(whole)
    files = {
        "cut.jpg": (whole.read_bytes()[:-200], "truncated"),
        "stump.jpg": (whole.read_bytes()[:300], "truncated"),
        "empty.png": (b"", "empty file"),
        "page.jpg": (b"<html>not found</html>", "no image"),
        "bomb.png": (png(29_000, 29_000, b""), "too large"),
        "long.png": (png(50_000, 1, b"\0" * 150_001), "too large: 50000x1"),
        "drawing.svg": (b"<svg/>", "no image"),
        "header.png": (b"\x89PNG\r\n\x1a\n", "no image"),
    }
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    Image.fromarray(np.ones((3, 3), np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((3, 3), 10**6, np.int32)).save(folder / "wide.tif")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    reasons = {name: reason for name, (_, reason) in files.items()}
    return whole, reasons | {"float.tif": "floating-point", "wide.tif": "32-bit", "gone.png": "No such file"}


@pytest.mark.filterwarnings("error")
def test_files_that_give_no_image_are_told_with_the_reason(tmp_path):
    whole, reasons = broken(tmp_path)
    names = [*reasons, whole.name]
    images, bad, _, lasting = decode_all([str(tmp_path / name) for name in names], names, layout(16, "crop", 3))
    assert images.shape == (1, 16, 16, 3)
    assert {names[position] for position in bad} == set(reasons)
    for position, said in bad.items():
        assert reasons[names[position]].lower() in said.lower() and "\n" not in said, (names[position], said)
    assert not lasting  # a file that is gone may come back
    positions = [position for position, name in enumerate(names) if name != "gone.png"]
    kept = [names[position] for position in positions]
    assert decode_all([str(tmp_path / name) for name in kept], kept, layout(16, "crop", 3)).lasting


@pytest.mark.filterwarnings("error")
def test_large_images_that_pillow_only_warns_of_are_read(tmp_path, monkeypatch):
    Image.fromarray(SCENE).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # a warning above, an error above twice that
    assert np.array_equal(decoded(tmp_path / "a.png"), SCENE)


def test_without_a_size_all_images_must_have_one(tmp_path):
    for name, side in (("a.png", 4), ("b.png", 6)):
        Image.new("RGB", (side, 4)).save(tmp_path / name)
    with pytest.raises(UserError, match=r"\(a.png 4x4, b.png 6x4\): give size"):
        decode_all([str(tmp_path / name) for name in ("a.png", "b.png")], ["a.png", "b.png"], layout(None, "crop", 3))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((0, "crop", 3), "size"),
        ((32, "middle", 3), "canvas 'middle'"),
        ((32, "pad", 4), "channels"),
        (((1, 2, 3), "pad", 3), "size"),
    ],
)
def test_unknown_layouts_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        layout(*options)
