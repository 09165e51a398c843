import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxsd.bench import __main__ as bench
from jaxsd.bench import recipe, step, turns
from jaxsd.bench.peer import step as peer_step

RECIPE = ["recipe", "--data=digits", "--threads=1", "--repeats=2", "--epochs=10"]


@pytest.fixture
def children(monkeypatch):
    """Stands for the processes: notes what was started and answers with made-up seconds."""
    started = []

    def child(command, environment):
        ours = "jaxsd.bench" in command
        started.append((ours, command, environment))
        if ours:
            calls = sum(side for side, *_ in started)
            first = 4.0 if calls % 2 else 1.0  # a cold compilation cache, then a warm one
            return {"total": 10.0, "total_with_first_steps": 10 + first, "parameters": 7, "process_s": 12 + first}
        fast = "--channels-last" in command and "OMP_WAIT_POLICY" in environment
        total = 20.0 if fast else 30.0
        return {"total": total, "total_with_first_steps": total + 1, "parameters": 7, "process_s": total + 3}

    monkeypatch.setattr(turns, "_child", child)
    monkeypatch.setattr(turns, "bind", lambda threads: None)
    return started


def test_sides_take_turns_and_the_best_peer_setting_counts(children, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # the caller's setting must not reach the default policy
    peer = tmp_path / "peer.py"
    peer.touch()
    assert bench.main([*RECIPE, "--against=python3", f"--peer={peer}"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [ours for ours, *_ in children] == [True, False] * 8
    caches = [environment["XDG_CACHE_HOME"] for ours, _, environment in children if ours]
    assert len(set(caches)) == 4 and caches[::2] == caches[1::2]
    settings = {(line["layout"], line["policy"]) for line in lines if line["side"] == "torch"}
    assert len(settings) == 4
    verdict = lines[-1]
    assert verdict["ratio"] == 2.0 and verdict["medians"]["torch_setting"] == "channels_last, passive, plain"
    assert verdict["ratio_with_first_steps"] == 1.5  # 21 s against 14 s
    assert verdict["ratio_warm_cache"] == round(21 / 11, 3)
    assert verdict["ratio_process"] == round(23 / 16, 3) and verdict["repeats"] == 2
    # Both sides are told the same.
    (_, ours, _), (_, theirs, _) = children[:2]
    assert ours[ours.index("--model") :] == theirs[theirs.index("--model") :]
    assert bench.flags().parse_args(ours[3:]).epochs == 10


def test_another_network_is_no_comparison(children, tmp_path, monkeypatch, capsys):
    peer = tmp_path / "peer.py"
    peer.touch()
    answer = turns._child
    monkeypatch.setattr(turns, "_child", lambda *given: {**answer(*given), "parameters": len(children)})
    assert bench.main([*RECIPE, "--against=python3", f"--peer={peer}"]) == 1
    assert capsys.readouterr().err.startswith("error: not the same network")


def test_an_interrupted_table_has_printed_what_it_has(children, monkeypatch, capsys):
    def child(command, environment):
        if len(children) == 24 + 5:  # two networks of 4 + 8 runs, and a part of the third
            raise KeyboardInterrupt
        children.append(command)
        if "jaxsd.bench" in command:
            return {"step_ms": 10.0, "parameters": 7}
        given = peer_step.flags().parse_args(command[2:])  # it knows every word
        return {"step_ms": 25.0 if given.channels_last else 20.0, "parameters": 7}

    monkeypatch.setattr(turns, "_child", child)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["step", "--all", "--against=python3", "--repeats=1"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["model"], line["ratio"]) for line in lines] == [(row.model, 2.0) for row in step.TABLE[:2]]
    assert Path(children[-1][1]) == step.PEER and step.PEER.is_file()


def test_networks_of_the_table_are_without_dropout():
    for row in step.TABLE:
        model = step.network(row.model, 10, row.resolution, row.stem)
        rates = {name: getattr(model, name) for name in vars(model) if "drop" in name}
        assert rates and not any(rates.values()), row


def test_the_peer_needs_nothing_of_this_project():
    for path in step.PEER.parent.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        packages = {name.split(".")[0] for name in names}
        assert packages <= {*sys.stdlib_module_names, "torch", "torchvision", "timm", "networks"}, path


def test_rates_drop_where_the_peers_do():
    stages = recipe.stages(bench.flags().parse_args(RECIPE), 10)
    assert [stage.name for stage in stages] == ["alpha0.5", "alpha1", "finetune"]
    rates = stages[1].schedule.rates(10, 1)
    np.testing.assert_allclose(rates, [0.05] * 3 + [0.01] * 3 + [0.002] * 2 + [0.0004] * 2, rtol=1e-6)
    assert stages[0].objective is stages[1].objective and stages[2].fresh == ("head",)


@pytest.mark.parametrize(
    "wrong",
    [
        ["step"],
        ["step", "--all", "--threads=1"],
        ["recipe", "--images=many"],
        ["recipe", "--data=nowhere"],
        ["recipe", "--threads=0"],
        ["recipe", "--epochs=1", "--threads=1"],
        [*RECIPE, "--against=python3", "--peer=nowhere.py"],
        [*RECIPE, "--against=python3", "--batch=100"],
        ["step", "--model=resnet8", "--threads=1", "--against=no-such-python"],
    ],
)
def test_wrong_use_is_one_line_and_status_2(wrong, monkeypatch, capsys):
    if "--threads=0" not in wrong:
        monkeypatch.setattr(turns, "bind", lambda threads: None)
    assert bench.main(wrong) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
