import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from jaxsd import build
from jaxsd.data import cache, describe, indoor67, kadid, koniq, live, live_itw, table, tid2013
from jaxsd.data.decode import decode_all, fit, layout
from jaxsd.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def decodings(monkeypatch):
    """The number of files of every decoding."""
    counts = []

    def counted(paths, names, target):
        counts.append(len(paths))
        return decode_all(paths, names, target)

    monkeypatch.setattr(cache, "decode_all", counted)
    return counts


def fill(root, *names):
    """Writes one image of 4 by 4 per name; the first pixel of the n-th is n // 256, n % 256."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((4, 4, 3), np.uint8)
        pixels[0, 0, :2] = divmod(number, 256)
        Image.fromarray(pixels).save(path)
    return root


def numbers(source):
    """Which images of `fill` a source holds."""
    return (source.images[:, 0, 0, 0].astype(int) * 256 + source.images[:, 0, 0, 1]).tolist()


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def cells(*texts):
    """A MATLAB row of cells with text in each."""
    row = np.empty((1, len(texts)), object)
    row[0] = texts
    return row


def wrong(match, loader, *args, **options):
    with pytest.raises(UserError, match=match) as error:
        loader(*args, **options)
    assert "\n" not in str(error.value)


# Canvases without resizing


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("canvas", ["reflect", "zeros"])
def test_a_canvas_without_resizing(canvas, channels):
    image = np.arange(10, 22, dtype=np.uint8).reshape(6, 2)  # 6 high, 2 wide: rows 1 to 4 stay
    a, b = image[1:5, 0], image[1:5, 1]
    expected = np.stack([b, a, b, a] if canvas == "reflect" else [0 * a, a, b, 0 * b], axis=1)
    image, expected = (x if channels == 1 else np.stack([x, x + 30, x + 60], 2) for x in (image, expected))
    if channels == 3 and canvas == "zeros":
        expected[:, [0, 3]] = 0
    assert np.array_equal(fit(Image.fromarray(image), layout(4, canvas, channels)), expected)


@pytest.mark.parametrize("have", range(1, 8))
@pytest.mark.parametrize("want", [1, 2, 5, 8, 31])
def test_mirroring_goes_to_and_fro_and_the_odd_pixel_is_at_the_end(have, want):
    image = np.random.default_rng(0).integers(0, 256, (3, have), np.uint8)
    start = (have - want) // 2 if have > want else -((want - have) // 2)
    period = max(2 * (have - 1), 1)
    places = [min(i % period, period - i % period) % have for i in range(start, start + want)]
    assert np.array_equal(fit(Image.fromarray(image), layout((3, want), "reflect", 1)), image[:, places])


def test_a_large_jpeg_is_cut_at_full_size(tmp_path):
    scene = np.random.default_rng(0).integers(0, 256, (90, 160, 3), np.uint8)
    Image.fromarray(scene).save(tmp_path / "a.jpg")
    whole = np.asarray(Image.open(tmp_path / "a.jpg"))
    images, bad, *_ = decode_all([str(tmp_path / "a.jpg")], ["a.jpg"], layout((10, 16), "zeros", 3))
    assert not bad and np.array_equal(images[0], whole[40:50, 72:88])


# Tables


def test_a_table_of_scores(tmp_path):
    fill(tmp_path, "b.png", "deep/a.png", "c.png", "not listed.png")
    lines = ("\ufefffile, score,std,group,kind,more", "c.png,-1.5,9,sea,blur,x", "", 'deep/a.png,2e1,,"a, b",jpeg,')
    write(tmp_path / "t.csv", *lines, "./b.png , 7 ,,sea,none,")
    splits = table(tmp_path / "t.csv", size=None, score="MOS, higher is better")
    source = splits.train
    assert splits[:1] + splits[2:] == ("t", None, None, (), "MOS, higher is better")
    assert source.names == ("c.png", "deep/a.png", "b.png") and numbers(source) == [2, 1, 0]
    assert source.scores.tolist() == [-1.5, 20, 7] and source.labels is None
    assert source.groups == ("sea", "a, b", "sea") and source.kinds == ("blur", "jpeg", "none")
    assert "train: 3 images, scores from -1.5 to 20, 2 scenes" in describe(splits)
    config = {"name": "table", "path": str(tmp_path / "t.csv"), "size": 2, "canvas": "zeros"}
    assert build.load({"data": config}).train.shape == (2, 2, 3)


def test_a_table_of_labels(tmp_path):
    fill(tmp_path, "0.png", "1.png", "2.png")
    write(tmp_path / "t.csv", "group,label,file", "x,zebra,2.png", "y,ant,0.png", "x,zebra,1.png")
    splits = table(tmp_path / "t.csv", size=4)
    source = splits.train
    assert source.classes == ("ant", "zebra") and source.labels.tolist() == [1, 0, 1]
    assert numbers(source) == [2, 0, 1] and source.groups == ("x", "y", "x")
    assert source.scores is None and splits.score == ""


def test_where_the_images_of_a_table_are(tmp_path):
    here, _, other = (fill(tmp_path / place, "a.png", "b.png") for place in ("set", "set/images", "other"))
    path = write(here / "t.csv", "file,score", "b.png,1", "a.png,2")
    Image.new("RGB", (4, 4), (0, 8, 0)).save(here / "a.png")
    Image.new("RGB", (4, 4), (0, 9, 0)).save(other / "a.png")
    assert numbers(table(path, size=4).train) == [1, 8]
    assert numbers(table(path, size=4, images=other).train) == [1, 9]
    (here / "a.png").unlink()
    assert numbers(table(path, size=4).train) == [1, 0]  # more of them are in images


def test_listed_names_from_another_system(tmp_path):
    cafe = unicodedata.normalize("NFD", "café.png")
    fill(tmp_path, f"Deep/{cafe}", "IMG.PNG", "img2.png", "Img2.png")
    path = write(tmp_path / "t.csv", "file,score", "deep\\café.png,1", "img.png,2", "img2.png,3", "Img2.png,4")
    source = table(path, size=4).train
    assert numbers(source) == [0, 1, 2, 3] and source.names == ("deep/café.png", "img.png", "img2.png", "Img2.png")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("name,score\n0.png,1", "t.csv has no column file: its first line has name, score"),
        (
            "file;score\n0.png;1",
            "no column file: its first line has file;score, and needs names in lower case",
        ),
        ("file,std\n0.png,1", "has neither a column score nor label"),
        ("file,score,label\n0.png,1,a", "has both a score and a label"),
        ("", "no column file: its first line has nothing"),
        ("file,score\n\n", "has no rows below its first line"),
        ("file,score\n0.png,1\n\n1.png,good", "has a score in line 4 that is no number, 'good'"),
        ("file,score\n0.png,nan", "line 2 that is no number, 'nan'"),
        ("file,score\n0.png,1e39", "line 2 that is no number, '1e39'"),
        ("file,score\n0.png,", "has no score in line 2"),
        ("file,score,group\n0.png,1,", "has no group in line 2"),
        ("file,label\n0.png, ", "has no label in line 2"),
        ("file,score\n,1", "has no file in line 2"),
        ("file,score\n0.png,44,5", "has 3 columns in line 2, but 2 in its first"),
        ("file,score\n0.png,1\n1.png,2\n./0.png,3", "names the same file twice, 0.png and ./0.png"),
        ("file,score\n0.png,1\n0.PNG,3", "the same file twice, 0.png and 0.PNG"),
        ("file,score\n../0.png,1", r"names ../0.png, which leads out of"),
        ("file,score\n/etc/0.png,1", "names /etc/0.png, which leads out of"),
        ("file,score\n0.png,1\n7.png,3", "1 of 2 files that .*t.csv names are not in .*: 7.png; add them"),
        ("file,score\n" + "\n".join(f"{n}.png,1" for n in range(9)), "7 of 9 .* 2.png, 3.png, .*, 6.png and 2 more"),
        ("file,score\ndeep,1", "1 of 1 files .*: deep"),
        ("file,score\nbad.png,1", r"1 image in .* cannot be read: bad.png \(no image of a known format\)"),
        (b"file,score\n\xff.png,1", "t.csv is no readable CSV file .* save it as UTF-8 text"),
    ],
)
def test_what_is_wrong_with_a_table(tmp_path, text, match):
    fill(tmp_path, "0.png", "1.png", "deep/2.png")
    (tmp_path / "bad.png").write_text("no image")
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    wrong(match, table, tmp_path / "t.csv", size=4)


def test_what_is_wrong_with_the_arguments(tmp_path):
    path = write(fill(tmp_path, "0.png") / "t.csv", "file,score", "0.png,1")
    wrong("no table is given", table, "", size=4)
    wrong("the table .*nothing.csv does not exist", table, tmp_path / "nothing.csv", size=4)
    wrong("the table .* is a folder", table, tmp_path, size=4)
    wrong("the image folder .*nowhere does not exist", table, path, images=tmp_path / "nowhere", size=4)
    wrong("canvas 'mirror' is not known: .*squash, reflect, zeros", table, path, size=4, canvas="mirror")
    wrong("on_bad_image must be", table, path, size=4, on_bad_image="drop")


def test_rows_of_unreadable_images_are_left_out(tmp_path):
    fill(tmp_path, *(f"{n}.png" for n in range(4)))
    (tmp_path / "1.png").write_text("no image")
    rows = (f"{n}.png,{10 * n},g{n},k{n}" for n in range(4))
    splits = table(write(tmp_path / "t.csv", "file,score,group,kind", *rows), size=4, on_bad_image="skip")
    source = splits.train
    assert splits.skipped == ("1.png (no image of a known format)",)
    assert (source.names, source.scores.tolist()) == (("0.png", "2.png", "3.png"), [0, 20, 30])
    assert (source.groups, source.kinds) == (("g0", "g2", "g3"), ("k0", "k2", "k3"))
    write(tmp_path / "t.csv", "file,score", "1.png,1")
    wrong("no image in the train split", table, tmp_path / "t.csv", size=4, on_bad_image="skip")


def test_a_table_is_decoded_once(tmp_path, decodings):
    fill(tmp_path / "set", "images/0.png", "images/1.png")
    first = write(tmp_path / "set/a.csv", "file,score", "0.png,1", "1.png,2")
    second = write(tmp_path / "set/b.csv", "file,score", "1.png,2")
    fingerprint = table(first, size=4).train.fingerprint()
    table(second, size=4)
    assert table(first, size=4).train.fingerprint() == fingerprint and decodings == [2, 1]
    write(first, "file,score", "0.png,1", "1.png,3")
    changed = table(first, size=4).train
    assert changed.scores.tolist() == [1, 3] and changed.fingerprint() != fingerprint and decodings == [2, 1]
    table(first, size=2, canvas="reflect")
    table(first, size=2, canvas="zeros")
    assert decodings == [2, 1, 2, 2]
    shutil.move(tmp_path / "set", tmp_path / "moved")
    assert table(tmp_path / "moved/a.csv", size=4).train.fingerprint() == changed.fingerprint()


# Published sets

FILES = {"jp2k": 227, "jpeg": 233, "wn": 174, "gblur": 174, "fastfading": 174}
LIVE = [(kind, n) for kind, count in FILES.items() for n in range(1, count + 1)]
COPIES = {"jp2k": 58, "jpeg": 58, "wn": 29, "gblur": 29, "fastfading": 29}


@pytest.fixture(scope="module")
def live_tree(tmp_path_factory):
    """LIVE release 2 with small images; two copies of references in each folder stand early, the others at the end."""
    root = fill(tmp_path_factory.mktemp("databaserelease2"), *(f"{kind}/img{n}.bmp" for kind, n in LIVE))
    copies = np.array([[n in (1, 5) or n > FILES[kind] - COPIES[kind] + 2 for kind, n in LIVE]])
    scores = np.where(copies, 0, np.arange(len(LIVE)) / 10)
    savemat(root / "dmos.mat", {"dmos": scores + 0.5, "orgs": copies})
    savemat(root / "dmos_realigned.mat", {"dmos_new": scores, "dmos_std": scores, "orgs": copies.astype(float)})
    savemat(root / "refnames_all.mat", {"refnames_all": cells(*(f"scene{i % 29}.bmp" for i in range(len(LIVE))))})
    return root, np.flatnonzero(~copies[0])


def test_live(live_tree, tmp_path):
    root, distorted = live_tree
    splits = live(root, size=4)
    source = splits.train
    assert len(source) == 779 and numbers(source) == distorted.tolist()
    assert source.names == tuple("{}/img{}.bmp".format(*LIVE[i]) for i in distorted)
    assert source.kinds == tuple(LIVE[i][0] for i in distorted)
    assert [source.kinds.count(kind) for kind in COPIES] == [169, 175, 145, 145, 145]
    assert source.groups == tuple(f"scene{i % 29}" for i in distorted)
    assert np.array_equal(source.scores, (distorted / 10).astype(np.float32))
    assert splits.score == "DMOS, realigned, about 0 to 100, higher is worse"
    shutil.copytree(root, tmp_path / "copy")
    assert live(tmp_path / "copy", size=4).train.fingerprint() == source.fingerprint()
    (tmp_path / "copy/dmos_realigned.mat").unlink()
    splits = live(tmp_path / "copy", size=4)
    assert np.allclose(splits.train.scores, source.scores + 0.5) and "not realigned" in splits.score
    assert splits.train.shape == (4, 4, 3)


def test_a_live_release_that_is_not_whole(live_tree, tmp_path):
    root, _ = live_tree
    wrong("the folder of LIVE release 2 is not there", live, tmp_path / "nowhere")
    wrong("the folder of LIVE release 2 is not there, ''", live, None)
    wrong("dmos.mat is missing: give the folder", live, tmp_path)
    shutil.copy(root / "dmos.mat", tmp_path)
    wrong("refnames_all.mat is missing", live, tmp_path)
    (tmp_path / "refnames_all.mat").write_text("a page that says no")
    wrong("refnames_all.mat is no readable MATLAB file", live, tmp_path)
    shutil.copy(root / "refnames_all.mat", tmp_path)
    wrong("779 of 779 files that .* are not in .*: jp2k/img2.bmp, .* and 774 more", live, tmp_path)
    savemat(tmp_path / "dmos.mat", {"dmos": np.ones((1, 982)), "orgs": np.zeros((1, 982))})
    wrong("must name 982 files, 779 of them distorted: got 982, 982 distorted", live, tmp_path)
    savemat(tmp_path / "refnames_all.mat", {"refnames_all": cells("a.bmp", "b.bmp")})
    wrong("982 files, 779 of them distorted: got 2 and 982,", live, tmp_path)
    savemat(tmp_path / "dmos.mat", {"dmos_new": np.ones((1, 982))})
    wrong("dmos.mat has no dmos, but dmos_new", live, tmp_path)


def test_live_in_the_wild(tmp_path):
    training = [f"t{n}.bmp" for n in range(1, 8)]
    root = fill(tmp_path / "release", "Images/9.bmp", "Images/10.bmp", "Images/3.JPG")
    fill(root, *(f"Images/trainingImages/{name}" for name in training))
    names = cells(*training, "10.bmp", "3.JPG", "9.bmp").T
    (root / "Data").mkdir()
    savemat(root / "Data/AllImages_release.mat", {"AllImages_release": names})
    wrong("Data/AllMOS_release.mat is missing", live_itw, root)
    scores = np.array([[90.0] * 7 + [10, 20.5, 30]])
    savemat(root / "Data/AllMOS_release.mat", {"AllMOS_release": scores})
    splits = live_itw(root, size=4)
    assert splits.train.names == ("10.bmp", "3.JPG", "9.bmp") and splits.train.scores.tolist() == [10, 20.5, 30]
    assert numbers(splits.train)[::2] == [1, 0] and splits.train.groups == splits.train.kinds == ()
    assert splits.score == "MOS, 0 to 100, higher is better"
    savemat(root / "Data/AllMOS_release.mat", {"AllMOS_release": scores[:, 1:]})
    wrong("names 10 images, but there are 9 scores", live_itw, root)


def test_koniq(tmp_path):
    fill(tmp_path, "1024x768/7.jpg", "1024x768/10.jpg")
    wrong("koniq10k_scores_and_distributions.csv is missing", koniq, tmp_path)
    header = '"image_name","c1","c2","c3","c4","c5","c_total","MOS","SD","MOS_zscore"'
    rows = ('"10.jpg",0,0,25,73,7,105,3.83,0.53,71.25', '"7.jpg",0,3,45,47,1,96,3.47,0.56,61.5')
    write(tmp_path / "koniq10k_scores_and_distributions.csv", header, *rows)
    splits = koniq(tmp_path, size=4)
    assert splits.train.names == ("10.jpg", "7.jpg") and splits.train.scores.tolist() == [71.25, 61.5]
    assert "higher is better" in splits.score


def test_kadid(tmp_path):
    fill(tmp_path, *(f"images/{name}.png" for name in ("I01", "I02", "I01_01_05", "I02_25_01")))
    path = write(tmp_path / "dmos.csv", "dist_img,ref_img,dmos,var", "I02_25_01.png,I02.png,4.5,.5")
    with path.open("a") as file:
        file.write("I01_01_05.png,I01.png,1.25,.3\n")
    splits = kadid(tmp_path, size=4)
    source = splits.train
    assert numbers(source) == [3, 2] and source.scores.tolist() == [4.5, 1.25]
    assert source.groups == ("I02", "I01") and source.kinds == ("25", "01")
    assert splits.score == "DMOS, 1 to 5, higher is better in spite of its name"
    write(tmp_path / "dmos.csv", "dist_img,ref_img,dmos,var", "I01.png,I01.png,5,0")
    wrong("names I01.png, not scene_kind_level", kadid, tmp_path)


def test_tid2013(tmp_path):
    fill(tmp_path, "distorted_images/i01_01_1.bmp", "distorted_images/I01_24_5.BMP", "distorted_images/i25_03_2.bmp")
    write(tmp_path / "mos_with_names.txt", "5.51429 I01_01_1.bmp", "5.5  I01_24_5.bmp", "0.25 i25_03_2.bmp", "")
    splits = tid2013(tmp_path, size=4)
    source = splits.train
    assert numbers(source) == [0, 1, 2] and np.allclose(source.scores, [5.51429, 5.5, 0.25])
    assert source.groups == ("I01", "I01", "I25") and source.kinds == ("01", "24", "03")
    assert splits.score == "MOS, 0 to 9, higher is better"
    write(tmp_path / "mos_with_names.txt", "5.51429 I01_01_1.bmp", "5.5")
    wrong("no 'score file' in line 2", tid2013, tmp_path)


def test_indoor67(tmp_path):
    names = ("pool/z.jpg", "bar/b 1.jpg", "bar/a.jpg", "attic/c.jpg", "attic/d.jpg", "pool/in no list.jpg")
    fill(tmp_path / "Images", *names)
    write(tmp_path / "TrainImages.txt", *names[:2], names[3])
    wrong("TestImages.txt is missing", indoor67, tmp_path)
    (tmp_path / "TestImages.txt").write_bytes(b"attic/d.jpg\r\nbar/a.jpg")  # no line end at the end
    splits = indoor67(tmp_path)
    assert splits.train.names == (names[0], names[1], names[3]) and splits.test.names == (names[4], names[2])
    assert splits.train.classes == splits.test.classes == ("attic", "bar", "pool")
    assert splits.train.labels.tolist() == [2, 1, 0] and splits.test.labels.tolist() == [0, 1]
    assert splits.train.shape == (256, 256, 3) and splits.validation is None and splits.score == ""
    write(tmp_path / "TestImages.txt", "bar/b 1.jpg")
    wrong("names the same file twice, bar/b 1.jpg", indoor67, tmp_path)
    write(tmp_path / "TrainImages.txt", "bar/a.jpg")
    write(tmp_path / "TestImages.txt", "pool/z.jpg")
    wrong("classes that TrainImages.txt lacks: pool", indoor67, tmp_path)
    shutil.rmtree(tmp_path / "Images")
    wrong("Images is missing", indoor67, tmp_path)
