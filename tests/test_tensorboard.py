"""Numbers as TensorBoard events."""

import struct
import subprocess
import sys
import time

from jaxsd.workdir import tensorboard


def events(content):
    """The whole events of a file, each framed by its length and two checksums."""
    from tensorboardX.proto.event_pb2 import Event

    while len(content) >= 8:
        (size,) = struct.unpack("<Q", content[:8])
        if len(content) < 16 + size:  # not yet written to its end
            return
        yield Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]


def test_numbers_are_written(tmp_path):
    write, found = tensorboard(tmp_path), []
    for _ in range(1000):  # a thread of its own writes the file, when it is asked again
        write({"step": 3, "epoch": 1, "split": "train", "loss": 0.5})
        for path in tmp_path.iterdir():
            found = [(e.step, v.tag, v.simple_value) for e in events(path.read_bytes()) for v in e.summary.value]
        if found:
            break
        time.sleep(0.01)
    assert set(found) == {(3, "train/loss", 0.5)}


def test_pytorch_is_not_loaded_for_it(tmp_path):
    fake, marker = tmp_path / "torch", tmp_path / "loaded"
    fake.mkdir()
    (fake / "__init__.py").write_text(f"open({str(marker)!r}, 'w').close()")
    program = f"""
import pathlib, sys
sys.path.insert(0, {str(tmp_path)!r})
from jaxsd.workdir import tensorboard
tensorboard(pathlib.Path({str(tmp_path / "events")!r}))
assert "torch" not in sys.modules and "tensorboardX" in sys.modules
import torch
"""
    subprocess.run([sys.executable, "-c", program.replace("import torch\n", "")], check=True)
    assert not marker.exists()
    subprocess.run([sys.executable, "-c", program], check=True)  # whoever wants it has it
    assert marker.exists()
