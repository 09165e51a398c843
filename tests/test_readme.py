"""What the README shows runs as it stands there."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from jaxsd import main

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_the_script_trains_a_network_and_an_objective_of_ones_own(capsys):
    (script,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    exec(compile(script, "README.md", "exec"), {"__name__": "readme"})
    assert float(capsys.readouterr().out) < 0.05  # brightness lies in [0, 1]; guessing 0 errs by 0.5


def test_every_file_and_preset_that_it_names_exists():
    for name in re.findall(r"`((?:configs|tests|jaxsd)/[\w/.]+)`", TEXT):
        assert (ROOT / name).exists(), name
    for config, preset in re.findall(r"configs/(\w+)\.py:(\w+)", TEXT):
        assert f'"{preset}":' in (ROOT / "configs" / f"{config}.py").read_text()


@pytest.mark.parametrize("config, patches", [("scalenet.py:folder", False), ("patches.py:scores", True)])
def test_every_flag_that_it_shows_is_one(config, patches, monkeypatch):
    sections = [text for text in TEXT.split("\n## ") if text.startswith("Patches") == patches]
    lines = re.findall(r"^    (--.*?)(?:  .*)?$", "\n".join(sections), re.M)
    flags = ["main", f"--config={ROOT}/configs/{config}", *(flag for line in lines for flag in shlex.split(line))]
    monkeypatch.setattr(sys, "argv", flags)  # config overrides are looked up there
    found = main.parse(flags)
    if patches:
        assert found["model"]["first"] == (8, 16, 32) and found["stages"]["patch32"]["epochs"] == 4
    else:
        assert found["labels"]["few"]["per_class"] == 50 and found["seeds"] == (0, 1, 2, 3, 4)
