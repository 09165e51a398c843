"""Rows to answer: means and intervals over seeds, differences to the baseline paired by seed.

A row is a dict, one number of one arm and seed; a summary row is the same with its seeds gathered. What arms, inputs,
labels, evaluations, blocks and metrics are called is up to the caller.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from jaxsd.errors import UserError

Row = dict[str, Any]

GROUP = ("input", "labels", "split")  # what is compared only within itself
LOWER_IS_BETTER = ("mae", "rmse", "best_mae", "mae_logistic5", "rmse_logistic5")


def aggregate(rows: Iterable[Row], *, baseline: str | None) -> list[Row]:
    """Gathers the seeds of each (arm, input, labels, evaluation, block, metric), in order of first appearance.

    rows: one dict per seed, {"arm", "input", "labels", "seed", "evaluation", "block", "metric", "value", "n", "images",
        "pixels", "seconds"}, and where it applies "split", "chosen_on_test": True, "undefined" (why the value is None)
        "collapsed" (why the features are called so) and "per_class": [{"class", "n", "accuracy"}].
    Returns one dict for each: those six, "seeds", "values" in order of seeds, "mean", "ci95" (Student-t, null for one
    seed), "difference" {"to", "mean", "ci95"} paired over the seeds that this arm and the baseline share (null for the
    baseline itself and where it has none), "images", "pixels", "seconds" (means over seeds), "chosen_on_test", and
    "per_class" averaged. A value that is not finite becomes null, takes mean, interval and difference with it, and is
    named in "undefined".
    Raises UserError when one seed has two values.
    """
    gathered: dict[tuple, dict[int, Row]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("arm", *GROUP, "evaluation", "block", "metric"))
        seeds = gathered.setdefault(key, {})
        if row["seed"] in seeds:
            name = " ".join(str(part) for part in key if part is not None)
            raise UserError(f"two values for {name}, seed {row['seed']}: name each arm and evaluation once")
        seeds[row["seed"]] = row
    return [_summary(key, seeds, baseline, gathered.get((baseline, *key[1:]), {})) for key, seeds in gathered.items()]


def _summary(key: tuple, seeds: dict[int, Row], baseline: str | None, others: dict[int, Row]) -> Row:
    order = sorted(seeds)
    values = [_finite(seeds[seed]["value"]) for seed in order]
    mean, ci95 = interval(values)
    pairs = [(_finite(seeds[s]["value"]), _finite(others[s]["value"])) for s in order if s in others]
    difference = None
    if pairs and key[0] != baseline:
        change, change_ci95 = interval([None if a is None or b is None else a - b for a, b in pairs])
        difference = None if change is None else {"to": baseline, "mean": change, "ci95": change_ci95}
    summary: Row = dict(zip(("arm", *GROUP, "evaluation", "block", "metric"), key, strict=True))
    summary |= {"seeds": order, "values": values, "mean": mean, "ci95": ci95, "difference": difference}
    for name in ("images", "pixels", "seconds"):
        spent = interval([_finite(seeds[seed].get(name)) for seed in order])[0]
        summary[name] = spent if spent is None or name == "seconds" else round(spent)
    summary["chosen_on_test"] = any(row.get("chosen_on_test", False) for row in seeds.values())
    if None in values:
        lost = ", ".join(str(seed) for seed, value in zip(order, values, strict=True) if value is None)
        reasons = {
            seeds[seed].get("undefined", "not finite") for seed in order if _finite(seeds[seed]["value"]) is None
        }
        summary["undefined"] = f"{' and '.join(sorted(reasons))} in seed {lost}"
    if flat := {seed: seeds[seed]["collapsed"] for seed in order if "collapsed" in seeds[seed]}:
        summary["collapsed"] = "; ".join(f"{reason} in seed {seed}" for seed, reason in flat.items())
    if all(row.get("per_kind") for row in seeds.values()):
        summary["per_kind"] = _mean_per_kind(part for seed in order for part in seeds[seed]["per_kind"])
    if all(row.get("per_class") for row in seeds.values()):
        summary["per_class"] = _mean_per_class(part for seed in order for part in seeds[seed]["per_class"])
    return summary


def collapses(rows: Iterable[Row]) -> list[str]:
    """A line for each arm and block of summary rows whose features collapsed."""
    lines = {}
    for row in rows:
        if "collapsed" in row:
            place = ", ".join(
                str(row[name]) for name in ("arm", "input", "split", "block") if row.get(name) is not None
            )
            lines[place] = (
                f"‡ {place}: the features collapsed, they tell hardly any image from another: {row['collapsed']}"
            )
    return list(lines.values())


def interval(values: Sequence[float | None]) -> tuple[float | None, list[float] | None]:
    """Mean and 95 % Student-t interval [low, high]; the interval is None for one value, both for a None among them."""
    known = [float(value) for value in values if value is not None]
    if not known or len(known) < len(values):
        return None, None
    mean, n = float(np.mean(known)), len(known)
    if n == 1:
        return mean, None
    half = float(stdtrit(n - 1, 0.975)) * float(np.std(known, ddof=1)) / math.sqrt(n)
    return mean, [mean - half, mean + half]


def _finite(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _mean_per_kind(rows: Iterable[Row]) -> list[Row]:
    """Mean correlations and error within each kind of images over the seeds in which they are defined."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    return [
        {"kind": name, "n": round(np.mean([r["n"] for r in seen]))}
        | {m: interval([r[m] for r in seen if r[m] is not None])[0] for m in ("pearson", "spearman", "mae")}
        for name, seen in kinds.items()
    ]


def _mean_per_class(rows: Iterable[Row]) -> list[Row]:
    """Mean accuracy of each class over the seeds in which it occurs."""
    classes: dict[str, list[Row]] = {}
    for row in rows:
        if row["n"]:
            classes.setdefault(row["class"], []).append(row)
    return [
        {
            "class": name,
            "n": round(np.mean([r["n"] for r in seen])),
            "accuracy": interval([r["accuracy"] for r in seen])[0],
        }
        for name, seen in classes.items()
    ]


def separated(row: Row) -> bool | None:
    """Whether the interval of a summary row's difference leaves out zero; None where there is no interval.

    There is none either where every seed has the same difference: such an interval has no width, and tells how coarse
    the numbers are, not how sure they are.
    """
    if not row["difference"] or not row["difference"]["ci95"]:
        return None
    low, high = row["difference"]["ci95"]
    return None if low == high else low > 0 or high < 0


def gain(row: Row) -> float:
    """The mean difference of a summary row, counted so that more is better."""
    return row["difference"]["mean"] * (-1 if row["metric"] in LOWER_IS_BETTER else 1)
