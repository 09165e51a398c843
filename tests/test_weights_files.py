"""Where published weights come from: files of every kind and the hub, and what is said when they cannot be read."""

import pickle
import sys

import numpy as np
import pytest
from small import same
from test_weights import RESNET, VGG, network, written, zeros

from jaxsd import weights
from jaxsd.errors import UserError
from jaxsd.weights import files


def test_numpy_files(tmp_path):
    params, collections = network(RESNET)
    np.savez(tmp_path / "x.npz", **weights.to_timm(RESNET, params, collections))
    same(weights.load(tmp_path / "x.npz", RESNET, *zeros((params, collections)))[0], params)


def keras_file(path, params, pattern, group=""):
    """The convolutions and dense layers of a network as a version of Keras writes them."""
    h5py = pytest.importorskip("h5py")
    layers = {
        "block1_conv1": params["block1"]["layer1"]["conv"],
        "block2_conv1": params["block2"]["layer1"]["conv"],
        "block2_conv2": params["block2"]["layer2"]["conv"],
        "fc1": params["fc1"],
        "fc2": params["fc2"],
        "predictions": params["head"],
    }
    with h5py.File(path, "w") as file:
        root = file.create_group(group) if group else file
        root.create_group("block1_pool")  # layers without weights stand there too
        for name, layer in layers.items():
            kernel = layer["kernel"] if name.startswith("block") else layer["kernel"].reshape(-1, len(layer["bias"]))
            for leaf, value in (("kernel", kernel), ("bias", layer["bias"])):
                root[pattern.format(layer=name, leaf=leaf, letter={"kernel": "W", "bias": "b"}[leaf])] = value


@pytest.mark.parametrize(
    ("pattern", "group"),
    [
        ("{layer}/{layer}_{letter}_1:0", ""),
        ("{layer}/{layer}/{leaf}:0", ""),
        ("{layer}/{layer}/{leaf}:0", "model_weights"),
    ],
)
def test_keras_files_of_both_patterns(pattern, group, tmp_path):
    """Blue comes first in them, unless it is said that the network was shown something else."""
    params, collections = network(VGG)
    path = tmp_path / "vgg.h5"
    keras_file(path, params, pattern, group)
    found, _, lines = weights.load(weights.published(str(path), "unit"), VGG, *zeros((params, collections)))
    same(found, params)
    assert {line["action"] for line in lines} == {"copied"}
    published = weights.published(str(path))
    found, _, lines = weights.load(published, VGG, *zeros((params, collections)))
    kernel = params["block1"]["layer1"]["conv"]["kernel"]
    np.testing.assert_array_equal(found["block1"]["layer1"]["conv"]["kernel"], kernel[:, :, ::-1])
    assert [line["note"] for line in lines if line["action"] == "adapted"] == ["blue first to red first"]
    mean, std = published.standard((np.zeros(3, np.float32), np.ones(3, np.float32)))
    np.testing.assert_allclose((1 - mean) / std, 255 - np.array([123.68, 116.779, 103.939]), rtol=1e-5)


def test_wrong_files_are_one_line(tmp_path):
    for name in ("x.safetensors", "x.npz", "x.h5"):
        for content in (b"", b"no such file", b"\x80" * 4000):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match=f"{name} are damaged or no .*: fetch them again") as error:
                files.read(tmp_path / name)
            assert "\n" not in str(error.value)
    whole, _ = written(tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-5])
    np.savez(tmp_path / "whole.npz", x=np.ones(1000))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-500])
    for name in ("cut.safetensors", "cut.npz"):
        with pytest.raises(UserError, match=f"{name} are damaged"):
            weights.load(tmp_path / name, RESNET, *network(RESNET))
    for name, message in (
        ("none.safetensors", "none.safetensors is not there: give a file's path or hf:owner/name"),
        (".", "is a folder"),
        ("x.onnx", "x.onnx are of no known kind: give a file that ends in .safetensors, .npz"),
    ):
        (tmp_path / "x.onnx").touch()
        with pytest.raises(UserError, match=message):
            files.find(tmp_path / name)


def test_pickles_are_not_read(tmp_path):
    for suffix in (".pth", ".pt", ".bin", ".ckpt", ".pkl"):
        path = tmp_path / f"net{suffix}"
        path.write_bytes(pickle.dumps({}))
        with pytest.raises(UserError, match=rf"net{suffix} are a pickle file.*s.save_file.*'net.safetensors'") as error:
            files.find(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="pickle"):
        files.find("hf:owner/name/pytorch_model.bin")
    np.savez(tmp_path / "x.npz", x=np.array([{}], object))
    with pytest.raises(UserError, match="damaged or no .npz file .*pickle"):
        files.read(tmp_path / "x.npz")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An offline hub whose cache holds owner/name with model.safetensors and sub/other.safetensors."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    root = tmp_path / "models--owner--name"
    snapshot = root / "snapshots" / ("a" * 40)
    (snapshot / "sub").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    for name in ("model.safetensors", "sub/other.safetensors"):
        written(snapshot / name)
    return snapshot


def test_the_hubs_cache(hub):
    assert files.find("hf:owner/name") == hub / "model.safetensors"
    assert files.find("hf:owner/name/sub/other.safetensors") == hub / "sub" / "other.safetensors"
    params, collections = network(RESNET)
    same(weights.load("hf:owner/name", RESNET, *zeros((params, collections)))[0], params)
    for name in ("hf:owner/none", "hf:owner/name/none.safetensors"):
        with pytest.raises(UserError, match=f"{name} is not in the cache and the hub cannot be reached"):
            files.find(name)
    for name in ("hf:", "hf:owner", "hf:owner/a b", "hf:owner/na--me..x"):
        with pytest.raises(UserError, match="names no repository"):
            files.find(name)


@pytest.mark.parametrize(("package", "name"), [("huggingface_hub", "hf:owner/name"), ("h5py", "x.h5")])
def test_what_is_not_installed_is_named(package, name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    extra = {"huggingface_hub": "hf", "h5py": "keras"}[package]
    with pytest.raises(UserError, match=rf"pip install 'jaxsd\[{extra}\]'"):
        files.find(name) if name.startswith("hf:") else files.read(tmp_path / name)


def test_what_the_hub_answers(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import errors

    answers = {
        "EntryNotFoundError": "the repository owner/name has no file model.safetensors",
        "RepositoryNotFoundError": "the hub has no repository owner/name",
        "ConnectionError": r"cannot be fetched \(ConnectionError: two lines",
    }
    for kind, message in answers.items():
        made = getattr(errors, kind, None) or ConnectionError

        def download(*names, local_files_only=False, made=made):
            error = errors.LocalEntryNotFoundError.__new__(errors.LocalEntryNotFoundError)
            raise error if local_files_only else made.__new__(made, "two lines\nof it")

        monkeypatch.setattr(hub, "hf_hub_download", download)
        with pytest.raises(UserError, match=message) as error:
            files.find("hf:owner/name")
        assert "\n" not in str(error.value)
