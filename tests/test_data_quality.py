import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from jaxsd.data import photos_quality, quality
from jaxsd.data.embedded import PHOTOS, photograph
from jaxsd.errors import RunError, UserError


@pytest.fixture(scope="module")
def made():
    """Two scenes of each photograph, with three levels."""
    return photos_quality(size=64, levels=3, scenes_per_photo=2, cache=None)


def original(scene, size):
    name, place = scene.split("/")
    top, left = (int(part[1:]) for part in place.split("_"))
    return np.asarray(photograph(name))[top : top + size, left : left + size]


def test_every_scene_is_there_in_every_kind_and_level(made):
    source = made.train
    assert made.validation is None and made.test is None and "no human opinion; higher is worse" in made.score
    assert source.shape == (64, 64, 3) and len(source) == 10 * 2 * 5 * 3 == len(set(source.names))
    assert source.scores.dtype == np.float32 and source.labels is None
    kinds = ("jp2k", "jpeg", "wn", "gblur", "fastfading")
    assert Counter(zip(source.groups, source.kinds, strict=True)) == {
        (scene, kind): 3 for scene in set(source.groups) for kind in kinds
    }
    assert Counter(scene.split("/")[0] for scene in set(source.groups)) == dict.fromkeys(PHOTOS, 2)
    assert source.names[:4] == tuple(f"{source.groups[0]}/{end}" for end in ("jp2k1", "jp2k2", "jp2k3", "jpeg1"))
    for name, scene, kind in zip(source.names, source.groups, source.kinds, strict=True):
        assert name.startswith(f"{scene}/{kind}")


def test_scores_are_wide_and_rise_with_the_level_in_every_kind(made):
    scores = made.train.scores.reshape(20, 5, 3)  # scenes, kinds, levels
    assert (np.diff(scores.mean(axis=0), axis=1) > 5).all()
    assert (scores[..., 0].min(axis=0) < 5).all() and (scores[..., 2].max(axis=0) > 60).all()
    assert (np.diff(scores[:, [2, 3]], axis=2) > 0).all()  # noise and blur: in every scene


def test_scores_are_structural_similarity(made):
    source = made.train
    for index in (0, 4, 8, 100, 203, 299):
        gray = [Image.fromarray(x).convert("L") for x in (source.images[index], original(source.groups[index], 64))]
        options = {"data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        wanted = structural_similarity(*map(np.asarray, gray), **options)
        assert source.scores[index] == pytest.approx(100 * (1 - wanted), abs=1e-4)
    assert quality.dissimilarity(source.images[0], source.images[0]) == 0


@pytest.mark.parametrize("name", ["astronaut", "cat"])
def test_scenes_do_not_overlap(name):
    whole = np.asarray(photograph(name))
    covered = np.zeros(whole.shape[:2], int)
    for scene in quality._scenes(name, 64, 100):  # all that there are
        top, left = (int(part[1:]) for part in scene.name.split("/")[1].split("_"))
        assert np.array_equal(scene.pixels, whole[top : top + 64, left : left + 64])
        covered[top : top + 64, left : left + 64] += 1
    height, width = (side // 64 * 64 for side in covered.shape)
    assert (covered[:height, :width] == 1).all() and covered.sum() == height * width


def test_equal_in_another_process_and_in_a_larger_set(made):
    code = (
        "from jaxsd.data import photos_quality as load; print(load(size=64, levels=3, scenes_per_photo=2, cache=None)"
    )
    out = subprocess.run([sys.executable, "-c", f"{code}.train.fingerprint())"], capture_output=True, text=True)
    assert out.stdout.strip() == made.train.fingerprint(), out.stderr
    fewer = photos_quality(size=64, levels=3, scenes_per_photo=1, cache=None).train
    where = [made.train.names.index(name) for name in fewer.names]
    assert np.array_equal(made.train.images[where], fewer.images)


def test_degradations_do_what_they_say():
    scene, random = quality._scenes("astronaut", 64, 1)[0].pixels, np.random.default_rng(0)
    for decibels in (34, 24):
        error = np.square(quality.jp2k(scene, decibels, random) - scene.astype(float)).mean()
        assert 10 * np.log10(255**2 / error) == pytest.approx(decibels, abs=1)
    gray = np.full((64, 64, 3), 128, np.uint8)
    noise = quality.wn(gray, 10, random) - 128.0
    assert noise.std() == pytest.approx(10, rel=0.03) and abs(np.corrcoef(noise.reshape(-1, 3).T)[0, 1]) < 0.05
    point = gray * 0
    point[32, 32] = 255
    blurred = quality.gblur(point, 1.0, random)[..., 0].astype(float)
    assert blurred[32, 32] == round(255 / (2 * np.pi)) and blurred[32, 33] == round(255 / (2 * np.pi) * np.exp(-0.5))
    clean, faded = (quality.fastfading(scene, errors, random) for errors in (0, 1))
    changed = (clean != faded).any(axis=2)
    assert 0 < changed.sum() and sum(changed[y : y + 32, x : x + 32].any() for y in (0, 32) for x in (0, 32)) == 1


def test_only_the_body_of_a_stream_is_damaged():
    scene = quality._scenes("cat", 64, 1)[0].pixels
    stream = quality._jpeg2000(scene, 30.0, tile_size=(32, 32))
    body = quality._body(stream)
    spared = bytes(np.delete(np.frombuffer(stream, np.uint8), body))
    assert spared.count(b"\xff\x90\x00\x0a") == 4 and spared.count(b"\xff\x93") == 4  # the tiles' headers
    assert spared.startswith(b"\xff\x4f\xff\x51") and spared.endswith(b"\xff\x93\xff\xd9")
    assert len(body) > len(stream) / 2


def test_a_stream_that_stays_unreadable_ends(monkeypatch):
    def never(_):
        raise OSError("broken data stream")

    monkeypatch.setattr(quality, "_decoded", never)
    with pytest.raises(RunError, match="no damaged"):
        quality.fastfading(np.zeros((32, 32, 3), np.uint8), 2, np.random.default_rng(0))


def test_the_cache_gives_the_same_and_is_made_again_for_other_libraries(tmp_path, monkeypatch):
    asked = {"size": 32, "levels": 2, "scenes_per_photo": 1, "cache": tmp_path}
    calls, make = [], quality._made
    monkeypatch.setattr(quality, "_made", lambda *args: (calls.append(args), make(*args))[1])
    first, again = photos_quality(**asked), photos_quality(**asked)
    assert len(calls) == 1 and first.train.fingerprint() == again.train.fingerprint()
    monkeypatch.setattr(quality, "_versions", lambda: ("another",))
    photos_quality(**asked)
    assert len(calls) == 2 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"size": 31}, "size 31"),
        ({"size": 513}, "32 to 512"),
        ({"levels": 1}, "2 to 20"),
        ({"scenes_per_photo": 0}, "1 scene"),
    ],
)
def test_what_cannot_be(asked, what):
    with pytest.raises(UserError, match=what):
        photos_quality(**asked)


def test_a_pillow_without_jpeg_2000(monkeypatch):
    monkeypatch.setattr(quality.features, "check", lambda _: False)
    with pytest.raises(UserError, match="JPEG 2000"):
        photos_quality()


def test_a_large_size_takes_the_photographs_that_have_it():
    found = {name: len(quality._scenes(name, 512, 4)) for name in PHOTOS}
    assert {name: count for name, count in found.items() if count} == {
        "astronaut": 1, "galaxies": 1, "retina": 4, "tissue": 1,
    }  # fmt: skip
