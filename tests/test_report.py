import json
import math
import os

import numpy as np
import pytest
from scipy import stats

from jaxsd import report
from jaxsd.aggregate import aggregate, interval, separated
from jaxsd.errors import UserError

VALUES = {
    "scratch": (0.900, 0.912, 0.897),
    "scratch_matched": (0.905, 0.909, 0.902),
    "rotnet": (0.931, 0.940, 0.929),
    "scalenet": (0.949, 0.953, 0.941),
}


def row(arm, seed, value, evaluation="finetune", block=None, metric="accuracy", **more):
    budget = {"images": 480_000, "pixels": 376_320_000, "seconds": 60.0 + seed}
    place = {"arm": arm, "input": "colour", "labels": "all", "seed": seed, "evaluation": evaluation, "block": block}
    return place | {"metric": metric, "value": value, "n": 1000} | budget | more


def run(seeds=(0, 1, 2), blocks=("block1", "block2", "block3"), **more):
    rows = []
    for arm, values in VALUES.items():
        for seed in seeds:
            if not arm.startswith("scratch"):
                rows.append(row(arm, seed, values[seed] - 0.1, "pretext"))
            rows += [
                row(arm, seed, values[seed] - 0.2 + 0.05 * depth, "ridge", block) for depth, block in enumerate(blocks)
            ]
            rows.append(row(arm, seed, values[seed], **more))
            rows.append(row(arm, seed, values[seed] - 0.01, metric="balanced_accuracy"))
    return rows


def summary(rows, seeds=(0, 1, 2), **more):
    return {
        "config": "scalenet",
        "preset": None,
        "version": "0.1.0",
        "seeds": list(seeds),
        "baseline": "scratch",
        "environment": {"jax": "0.6", "device": "cpu", "devices": 1, "python": "3.11"},
        "data": {"name": "mnist5k", "train": 4000, "test": 1000, "classes": 10, "duplicates_train_test": 0},
        "notes": [],
        "rows": aggregate(rows, baseline="scratch"),
    } | more


def find(rows, arm, evaluation="finetune", block=None, metric="accuracy"):
    wanted = {"arm": arm, "evaluation": evaluation, "block": block, "metric": metric}
    (found,) = [row for row in rows if wanted == {name: row[name] for name in wanted}]
    return found


# Numbers


def test_means_intervals_and_paired_differences_against_scipy():
    rows = aggregate(run(), baseline="scratch")
    for arm, values in VALUES.items():
        found = find(rows, arm)
        assert found["values"] == list(values) and found["seeds"] == [0, 1, 2]
        assert found["mean"] == pytest.approx(np.mean(values))
        oracle = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
        assert found["ci95"] == pytest.approx(list(oracle))
        if arm != "scratch":
            pair = stats.ttest_rel(values, VALUES["scratch"])
            assert found["difference"]["to"] == "scratch"
            assert found["difference"]["mean"] == pytest.approx(np.mean(values) - np.mean(VALUES["scratch"]))
            assert found["difference"]["ci95"] == pytest.approx(list(pair.confidence_interval(0.95)))
            assert separated(found) == (pair.pvalue < 0.05)
    assert find(rows, "scratch")["difference"] is None and separated(find(rows, "scratch")) is None


def test_interval_by_hand():
    # Mean 2, standard deviation 1, t(2, 0.975) = 4.3027: 2 -+ 4.3027 / sqrt(3).
    mean, (low, high) = interval([1, 2, 3])
    assert (mean, low, high) == pytest.approx((2, 2 - 2.48414, 2 + 2.48414), abs=1e-5)
    assert interval([0.25] * 4) == (0.25, [0.25, 0.25])
    assert interval([0.5]) == (0.5, None)
    assert interval([]) == (None, None)


def test_rows_have_the_fields_of_summary_json_and_keep_their_order():
    rows = aggregate(run(), baseline="scratch")
    assert list(rows[0]) == (
        [
            "arm",
            "input",
            "labels",
            "split",
            "evaluation",
            "block",
            "metric",
            "seeds",
            "values",
            "mean",
            "ci95",
            "difference",
        ]
        + ["images", "pixels", "seconds", "chosen_on_test"]
    )
    assert list(dict.fromkeys(r["arm"] for r in rows)) == list(VALUES)
    assert (rows[0]["images"], rows[0]["pixels"], rows[0]["seconds"]) == (480_000, 376_320_000, 61.0)


def test_one_seed_has_a_difference_but_no_interval():
    found = find(aggregate(run(seeds=(1,)), baseline="scratch"), "rotnet")
    assert found["ci95"] is None
    assert found["difference"] == {"to": "scratch", "mean": pytest.approx(0.028), "ci95": None}
    assert separated(found) is None and report.words(found) == "one seed: no interval"


def test_only_seeds_that_both_have_are_paired():
    rows = [row("scratch", s, v) for s, v in ((3, 0.5), (1, 0.6), (2, 0.4))]
    rows += [row("rotnet", s, v) for s, v in ((2, 0.6), (4, 0.9), (3, 0.8))]
    found = find(aggregate(rows, baseline="scratch"), "rotnet")
    assert (found["seeds"], found["values"]) == ([2, 3, 4], [0.6, 0.8, 0.9])
    assert found["difference"]["mean"] == pytest.approx(0.25)  # (0.6 - 0.4 + 0.8 - 0.5) / 2
    half = stats.t.ppf(0.975, 1) * 0.05  # deviation 0.1 / sqrt(2), divided by sqrt(2)
    assert found["difference"]["ci95"] == pytest.approx([0.25 - half, 0.25 + half])


def test_differences_stay_within_one_input_and_number_of_labels():
    rows = [row("scratch", 0, 0.5, labels=50), row("scratch", 0, 0.7)]
    rows += [row("rotnet", 0, 0.8), row("rotnet", 0, 0.9, input="gray")]
    found = aggregate(rows, baseline="scratch")
    assert [r["difference"] and r["difference"]["mean"] for r in found] == [None, None, pytest.approx(0.1), None]


@pytest.mark.parametrize("baseline", ["elsewhere", None])
def test_without_the_baseline_there_are_no_differences(baseline):
    rows = aggregate(run(), baseline=baseline)
    assert not any(r["difference"] for r in rows)
    text = report.table(summary(run()) | {"rows": rows})
    assert "94.8 ± 1.5" in text and "difference to" not in text and "▲" not in text


def test_equal_differences_say_nothing_of_how_sure_they_are():
    """An interval of no width is not a certain difference: one test image more, in each of three seeds."""
    rows = [row(arm, s, v) for s in range(3) for arm, v in (("scratch", 0.5), ("same", 0.5), ("worse", 0.25))]
    found = aggregate(rows, baseline="scratch")
    assert [(separated(r), report.words(r)) for r in found[1:]] == [
        (None, "the same in every seed: no interval"),
        (None, "the same in every seed: no interval"),
    ]


def test_words_know_which_way_is_better():
    def said(metric, low, high):
        middle = {"to": "scratch", "mean": (low + high) / 2, "ci95": [low, high]}
        return report.words({"metric": metric, "difference": middle})

    assert said("accuracy", 0.01, 0.03) == "better by 2.0"
    assert said("mae", 0.01, 0.03) == "worse by 0.020"
    assert said("rmse", -0.5, -0.1) == "better by 0.300"
    assert said("pearson", -0.1, 0.3) == "not separated"
    assert said("accuracy", 0.0, 0.1) == "not separated"  # zero belongs to the interval
    assert said("accuracy", 0.0001, 0.0003) == "better by 0.02"  # never "by 0.0"


def test_a_value_that_is_not_finite_is_named_and_gives_no_mean():
    rows = [row("scratch", s, 0.5, metric="pearson") for s in (0, 1)]
    rows += [row("rotnet", 0, 0.9, metric="pearson"), row("rotnet", 1, math.nan, metric="pearson")]
    found = find(aggregate(rows, baseline="scratch"), "rotnet", metric="pearson")
    assert found["values"] == [0.9, None] and found["undefined"] == "not finite in seed 1"
    assert found["mean"] is found["ci95"] is found["difference"] is None
    text = report.table(summary(rows, seeds=(0, 1)))
    assert "undefined" in text and "rotnet, fine-tune Pearson: not finite in seed 1" in text


def test_two_values_of_one_seed_are_an_error():
    with pytest.raises(UserError, match="two values for rotnet colour all finetune accuracy, seed 0"):
        aggregate([row("rotnet", 0, 0.1), row("rotnet", 0, 0.2)], baseline=None)


# Text


def test_table_shows_the_answer():
    lines = report.table(summary(run(), notes=["1 unreadable image left out: train/cat/3.png"])).splitlines()
    assert max(map(len, lines)) <= 110
    assert lines[0] == "input: colour, labels: all"
    assert lines[2] == "Accuracy in per cent, mean ± half-width of the 95 % interval"
    assert lines[4].split() == "arm pretext fine-tune difference to scratch images Mpx seconds".split()
    assert lines[6].split() == "scratch – 90.3 ± 2.0 baseline 480,000 376 61".split()
    assert lines[7].split() == "scratch_matched – 90.5 ± 0.9 +0.2 [-0.9, +1.4] not separated 480,000 376 61".split()
    assert lines[9].split() == "scalenet 84.8 ± 1.5 94.8 ± 1.5 +4.5 [+3.5, +5.5] better by 4.5 480,000 376 61".split()
    assert lines[11] == "By block: ridge; ▲ better, ▼ worse than scratch"
    assert lines[18].split() == "scalenet 74.8 ± 1.5 ▲ 79.8 ± 1.5 ▲ 84.8 ± 1.5 ▲".split()
    assert "fine-tune balanced accuracy" in lines[22]
    text = " ".join(lines)
    assert "mnist5k: 4,000 train, 1,000 test, 10 classes; seeds 0, 1, 2; 95 % Student-t intervals over seeds" in text
    assert lines[-2:] == [
        "- test images that are pixel-equal to a training image: none",
        "- 1 unreadable image left out: train/cat/3.png",
    ]


def test_columns_line_up():
    lines = report.table(summary(run())).splitlines()
    assert len({line.index("±", 30) for line in lines[6:10]}) == 1
    assert len({len(line) for line in lines[4:10]}) == 1


@pytest.mark.parametrize("blocks", [(), ("pooled",), tuple(f"a_block_of_stage_{i}" for i in range(12))])
def test_no_line_is_too_wide(blocks):
    text = report.table(summary(run(blocks=blocks), notes=["a warning of many words " * 20]))
    assert max(map(len, text.splitlines())) <= 110
    assert all(block in text for block in blocks)
    assert ("By block" in text) == (len(blocks) > 1)
    assert ("ridge pooled" in text) == (blocks == ("pooled",))


def test_table_of_one_seed_claims_nothing():
    text = report.table(summary(run(seeds=(0,)), seeds=(0,)))
    assert "Accuracy in per cent, one seed" in text and "+4.9  one seed: no interval" in text
    assert "±" not in text and "▲" not in text and "better" not in text


def test_without_fine_tuning_the_last_block_answers():
    rows = [r for r in run() if r["evaluation"] == "ridge"]
    assert "ridge block3" in report.table(summary(rows)).splitlines()[4]


def test_rows_chosen_on_test_are_marked():
    found = summary(run(chosen_on_test=True))
    assert find(found["rows"], "rotnet")["chosen_on_test"]
    assert not find(found["rows"], "rotnet", "pretext")["chosen_on_test"]
    assert "93.3 ± 1.5†" in report.table(found) and "- † chosen on the test images" in report.table(found)


def test_lost_seeds_are_noted():
    rows = [r for r in run() if (r["arm"], r["seed"]) != ("rotnet", 1)]
    text = report.table(summary(rows))
    assert "- rotnet, fine-tune: seeds 0, 2 of 3; differences pair the seeds that both have" in text


def test_groups_have_tables_of_their_own():
    rows = run() + [r | {"labels": 50, "value": r["value"] / 2} for r in run()]
    text = report.table(summary(rows))
    assert text.count("fine-tune  difference to scratch") == 2 and "input: colour, labels: 50" in text
    assert text.count("Student-t") == 1


def test_markdown_has_pipe_tables():
    text = report.table(summary(run()), markdown=True)
    assert "### input: colour, labels: all" in text
    assert "| rotnet | 83.3 ± 1.5 | 93.3 ± 1.5 | +3.0 [+2.5, +3.6] better by 3.0 | 480,000 | 376 | 61 |" in text
    for block in text.split("\n\n"):
        assert not block.startswith("|") or len({line.count("|") for line in block.splitlines()}) == 1


def test_per_class_table_lists_the_worst_classes_first():
    rows = []
    for seed in (0, 1):
        for arm in ("scratch", "rotnet"):
            gain = 0.1 * (arm == "rotnet")
            found = [{"class": f"c{i}", "n": 10, "accuracy": (i + seed) / 40 + gain} for i in range(30)]
            rows.append(row(arm, seed, 0.5, per_class=[*found, {"class": "absent", "n": 0, "accuracy": None}]))
    found = summary(rows, seeds=(0, 1))
    assert find(found["rows"], "rotnet")["per_class"][1] == {"class": "c1", "n": 10, "accuracy": pytest.approx(0.1375)}
    lines = report.per_class_table(found).splitlines()
    assert lines[0] == "Fine-tune accuracy by class in per cent, the worst 20 of 30, input: colour, labels: all"
    assert lines[2].split() == ["class", "n", "scratch", "rotnet"] and len(lines) == 4 + 20
    assert lines[5].split() == ["c1", "10", "3.8", "13.8"]
    assert report.per_class_table(summary(run())) == ""


# Files


def test_what_is_written_is_read(tmp_path):
    made = summary(run(per_class=[{"class": "ä", "n": 3, "accuracy": 0.5}]))
    report.write(tmp_path, made)
    assert report.load(tmp_path) == made and report.read(tmp_path) == made["rows"]
    assert report.table(report.load(tmp_path)) == report.table(made)
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert text.startswith(report.table(made, markdown=True)) and "| ä | 3 |" in text
    assert sorted(os.listdir(tmp_path)) == ["summary.json", "table.md"]


def test_the_file_is_plain_json_without_nan(tmp_path):
    rows = [row("scratch", np.int64(0), np.float32(0.5)), row("rotnet", np.int64(0), float("nan"), seconds=np.inf)]
    made = summary(rows, seeds=(np.int64(0),))
    made["data"]["mean"] = np.array([0.5, np.nan])

    def refuse(name):
        raise AssertionError(name)

    report.write(tmp_path, made)
    found = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert found["data"]["mean"] == [0.5, None] and found["rows"][1]["values"] == [None]
    assert found["rows"][1]["undefined"] == "not finite in seed 0" and found["rows"][1]["seconds"] is None


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    report.write(tmp_path, summary(run()))
    before = (tmp_path / "summary.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        report.write(tmp_path, summary(run(seeds=(0,)), seeds=(0,)))
    assert (tmp_path / "summary.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["summary.json", "table.md"]


def test_reading_nothing_or_damage_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no summary\.json in"):
        report.read(tmp_path)
    for text in ('{"rows": [', "{}", "[]"):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(UserError, match="cannot be read") as caught:
            report.read(tmp_path)
        assert "\n" not in str(caught.value)


def test_the_gap_between_two_splits_by_hand():
    def of(arm, split, value, metric="spearman", **more):
        return {"arm": arm, "split": split, "input": "original", "labels": "all", "metric": metric, "mean": value} | {
            "evaluation": "finetune",
            **more,
        }

    two = [of("scratch", "by_scene", 0.5), of("patch32", "by_scene", 0.7), of("lost", "by_scene", None)]
    two += [of("scratch", "by_image", 0.875), of("patch32", "by_image", 0.65), of("lost", "by_image", 0.1)]
    two += [of("scratch", "by_scene", 3.0, "mae"), of("scratch", "by_image", 1.0, "mae")]
    two += [of("scratch", "by_scene", 0.9, evaluation="pretext")]
    wanted = "spearman of split by_image minus that of by_scene: scratch +0.375, patch32 -0.050"
    assert report.gaps(two) == [wanted]
    assert report.gaps([row for row in two if row["split"] == "by_scene"]) == []
    shares = [of("scratch", "by_scene", 0.25, "accuracy"), of("scratch", "by_image", 0.5, "accuracy")]
    assert report.gaps(shares) == ["accuracy of split by_image minus that of by_scene: scratch +25.0"]
