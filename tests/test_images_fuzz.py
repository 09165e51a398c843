"""A thousand damaged image files: each is read or named, as a strict decoder has it; nothing crashes or hangs."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

COUNT = 1_000
SECONDS = 2  # for one file of 24 x 32 pixels
ROOT = Path(__file__).parents[1]


def test_a_damaged_file_is_read_whole_or_named(capsys):
    command = [sys.executable, str(ROOT / "tests" / "fuzz_images.py"), str(COUNT)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-2000:]  # its last line names the file
    files = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(files) == COUNT
    outcomes = Counter()
    for number, file in enumerate(files):
        what = (number, file)
        assert file["seconds"] < SECONDS, what
        if file["reason"] is None:
            assert file["strict"], what  # nothing is read that a strict decoder refuses
            assert file["as_strict"] or not file["same_size"], what
            # A missing end is noticed in every format, and in a PNG every change.
            assert file["as_original"] or (file["format"] != "PNG" and file["mutation"] != "truncate"), what
            outcomes[file["format"], "read", "unharmed" if file["as_original"] else "with other pixels"] += 1
        else:
            assert not file["strict"] or file["reason"].startswith(("too large", "32-bit", "CIELAB", "floating")), what
            assert "\n" not in file["reason"] and file["reason"], what
            outcomes[file["format"], "named as bad", ""] += 1
    assert len({kind for kind, *_ in outcomes}) == 5 and all(
        outcomes[kind, "named as bad", ""] for kind, *_ in outcomes
    )
    with capsys.disabled():
        print()
        for (kind, outcome, how), count in sorted(outcomes.items()):
            print(f"{kind:5} {outcome} {how}: {count}")
