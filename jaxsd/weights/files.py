"""Tensors by name from files of published weights: safetensors, npz, Keras' h5; from disk or the Hugging Face hub."""

import functools
import hashlib
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from jaxsd.errors import UserError

Tensors = dict[str, np.ndarray]  # PyTorch's layout: kernels [O, I, h, w] or [O, I]
FORMATS = (".safetensors", ".npz", ".h5", ".hdf5")
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
HUB = "hf:"
CONVERT = (
    "import torch, safetensors.torch as s; s.save_file(torch.load('{0}', map_location='cpu', weights_only=True), "
    "'{1}.safetensors')"
)


def find(name: str | Path) -> Path:
    """The local file of published weights: a path, or "hf:owner/name[/file]", which is fetched once and then kept.

    On the hub the file is model.safetensors where none is named; the cache is huggingface_hub's own, and HF_HOME and
    HF_HUB_OFFLINE are respected. Raises UserError where there is no such file, where it cannot be fetched, and for
    kinds of files that are not read.
    """
    if str(name).startswith(HUB):
        return _fetched(str(name))
    path = Path(name).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise UserError(f"the file of weights {name} {what}: give a file's path or {HUB}owner/name")
    _check_kind(path.name)
    return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, hex."""
    state = path.stat()
    return _sha256(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=16)
def _sha256(path: Path, modified: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path, name: str = "") -> Tensors:
    """All tensors of a file, in the dtypes that it has. Raises UserError, which says `name`, where it is damaged."""
    _check_kind(path.name)
    reader = {".safetensors": _read_safetensors, ".npz": _read_npz}.get(path.suffix.lower(), _read_keras)
    wrong = (
        safetensors.SafetensorError,
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
    )
    try:
        return reader(path)
    except wrong as error:
        raise UserError(
            f"the weights {name or path} are damaged or no {path.suffix} file ({_first_line(error)}): fetch them again"
        ) from error


def _read_safetensors(path: Path) -> Tensors:
    return safetensors.numpy.load_file(path)


def _read_npz(path: Path) -> Tensors:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _read_keras(path: Path) -> Tensors:
    """Layers of a Keras model: "block1_conv1.weight" and ".bias", kernels turned into PyTorch's layout.

    A layer is the first part of a dataset's path, whatever the version of Keras calls its kernel behind it:
    "block1_conv1/block1_conv1_W_1:0" or "block1_conv1/block1_conv1/kernel:0".
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError("Keras' .h5 files need h5py: pip install 'jaxsd[keras]'") from error
    tensors: Tensors = {}

    def note(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            value = np.asarray(item[()])
            leaf = "weight" if value.ndim > 1 else "bias"
            tensors[f"{name.split('/')[0]}.{leaf}"] = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T

    with h5py.File(path, "r") as file:
        group = file.get("model_weights", file)
        if isinstance(group, h5py.Group):
            group.visititems(note)
    return tensors


def _check_kind(name: str) -> None:
    """Raises UserError for a file that is not read, and above all for a pickle."""
    suffix = Path(name).suffix.lower()
    if suffix in PICKLES:
        line = CONVERT.format(name, Path(name).stem)
        raise UserError(
            f"the weights {name} are a pickle file, which can run any code when it is read: where you trust it, "
            f'convert it with PyTorch, python -c "{line}"'
        )
    if suffix not in FORMATS:
        raise UserError(f"the weights {name} are of no known kind: give a file that ends in {', '.join(FORMATS)}")


def _fetched(name: str) -> Path:
    """A file of the Hugging Face hub, from its cache or fetched into it."""
    owner, model, file = [*name.removeprefix(HUB).split("/", 2), "", ""][:3]
    if not owner or not model or re.search(r"\s", name):
        raise UserError(f"{name!r} names no repository: write {HUB}owner/name or {HUB}owner/name/file.safetensors")
    file = file or "model.safetensors"
    _check_kind(file)
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise UserError(f"{name} needs huggingface_hub: pip install 'jaxsd[hf]'") from error
    try:  # what is in the cache stays what it is, and needs no network
        return Path(hf_hub_download(f"{owner}/{model}", file, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    except ValueError as error:
        raise UserError(f"{name} names no repository ({_first_line(error)})") from error
    try:
        return Path(hf_hub_download(f"{owner}/{model}", file))
    except LocalEntryNotFoundError as error:  # first: it is an EntryNotFoundError too
        raise UserError(
            f"{name} is not in the cache and the hub cannot be reached: go online once, unset HF_HUB_OFFLINE, or give "
            "a file"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{name}: the hub has no repository {owner}/{model}, or it is not open to you") from error
    except EntryNotFoundError as error:
        raise UserError(f"{name}: the repository {owner}/{model} has no file {file}: name one behind it") from error
    except Exception as error:  # whatever the network and the libraries under it make of a failure
        raise UserError(f"{name} cannot be fetched ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
