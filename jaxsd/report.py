"""What a person sees of summary rows: the tables, the notes under them, table.md and summary.json."""

import csv
import io
import json
import os
import textwrap
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsd.aggregate import GROUP, Row, gain, separated
from jaxsd.errors import UserError

Key = tuple[str, str | None, str]  # evaluation, block, metric

WIDTH = 110  # columns of a printed line
EVALUATIONS = ("pretext", "knn", "ridge", "probe", "finetune")  # as shown; the last that there is gives the answer
WORST = 20  # classes listed at most
FEW = 100  # test images, below which one of them shows in the table
FRACTIONS = ("accuracy", "balanced_accuracy", "best_accuracy", "patch_accuracy")  # shown in per cent
BESIDE = ("pearson", "mae")  # shown beside the answer where that is a rank correlation
WORDS = {
    "finetune": "fine-tune",
    "knn": "k-NN",
    "balanced_accuracy": "balanced accuracy",
    "best_accuracy": "best epoch",
    "patch_accuracy": "of patches",
    "mae": "MAE",
    "rmse": "RMSE",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "kendall": "Kendall",
    "best_mae": "best epoch's MAE",
    "pearson_logistic5": "Pearson (logistic fit)",
    "mae_logistic5": "MAE (logistic fit)",
    "rmse_logistic5": "RMSE (logistic fit)",
}


def words(row: Row) -> str:
    """The difference of a summary row in words: "better by 2.2", "worse by 0.4", "not separated", ...

    Fractions are in percentage points. Empty without a difference.
    """
    if not row["difference"]:
        return ""
    if row["difference"]["ci95"] is None:
        return "one seed: no interval"
    if separated(row) is None:
        return "the same in every seed: no interval"
    if not separated(row):
        return "not separated"
    return f"{'better' if gain(row) > 0 else 'worse'} by {_number(abs(row['difference']['mean']), row['metric'])}"


def gaps(rows: Sequence[Row]) -> list[str]:
    """What the second of two splits gives more than the first, arm by arm; [] where there are not two.

    Of a split by scene and one by image this is the leak.
    """
    rows = [row for row in rows if row["evaluation"] == "finetune"]
    ways = list(dict.fromkeys(row.get("split") for row in rows))
    if len(ways) != 2:
        return []
    found = {
        (row["split"], row["arm"], row["input"], row["labels"], row["evaluation"], row["metric"]): row for row in rows
    }
    lines = []
    for metric in ("spearman", "accuracy"):
        parts = []
        for key, row in found.items():
            other = found.get((ways[1], *key[1:]))
            if key[0] == ways[0] and key[-1] == metric and other and None not in (row["mean"], other["mean"]):
                parts.append(f"{row['arm']} {_number(other['mean'] - row['mean'], metric, sign='+')}")
        if parts:
            lines.append(f"{metric} of split {ways[1]} minus that of {ways[0]}: {', '.join(dict.fromkeys(parts))}")
    return lines


class Column(NamedTuple):
    """One column of a table: its heading and one text for each line."""

    head: str
    cells: list[str]
    right: bool = True  # aligned to the right

    @property
    def width(self) -> int:
        """Characters of the longest text."""
        return max(len(text) for text in (self.head, *self.cells))


def table(summary: Row, *, markdown: bool = False) -> str:
    """What a person sees at the end of a run: for each input and number of labels one table, then protocol and notes.

    summary: as written to summary.json; arms are listed in the order of its rows. Lines have at most 110 characters:
    columns that do not fit go into a further table below. `markdown` gives pipe tables for a README, without a limit.
    """
    parts = []
    for group, rows in _grouped(summary["rows"]).items():
        if named := _named(group):
            parts.append(("### " if markdown else "") + ", ".join(named))
        parts += _group(rows, summary["baseline"], markdown)
    parts.append(_wrapped(summary.get("protocol") or protocol(summary), markdown))
    if markdown and summary.get("pictures"):
        parts += [f"![{Path(name).stem}]({name})" for name in summary["pictures"]]
    if notes := "\n".join(_wrapped(note, markdown, "- ") for note in _notes(summary)):
        parts.append(("**Notes**\n\n" if markdown else "Notes\n") + notes)
    return "\n\n".join(parts) + "\n"


def _grouped(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in GROUP), []).append(row)
    return groups


def _named(group: tuple) -> list[str]:
    return [f"{name}: {value}" for name, value in zip(GROUP, group, strict=True) if value is not None]


def protocol(summary: Row) -> str:
    """One line: data set, its sizes, seeds, kind of interval, device."""
    data, seeds, devices = summary["data"], summary["seeds"], summary["environment"]["devices"]
    sizes = [f"{data[part]:,} {part}" for part in ("train", "validation", "test") if data.get(part)]
    kind = "95 % Student-t intervals over seeds, differences paired by seed" if len(seeds) > 1 else "no intervals"
    device = (f"{devices} x " if devices > 1 else "") + summary["environment"]["device"]
    return f"{data['name']}: {', '.join(sizes)}, {data['classes']} classes; {_seeds(seeds)}; {kind}; {device}"


def _seeds(seeds: list[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(str(seed) for seed in seeds)}"


def _group(rows: list[Row], baseline: str, markdown: bool) -> list[str]:
    """The tables of one input and number of labels: the answer, then arms x blocks, then what else was measured."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    found = {(row["arm"], row["evaluation"], row["block"], row["metric"]): row for row in rows}
    place = {name: number for number, name in enumerate(EVALUATIONS)}
    keys = sorted(dict.fromkeys(key[1:] for key in found), key=lambda key: place.get(key[0], -1))
    first = _primary(keys)
    counts = Counter((evaluation, metric) for evaluation, _, metric in keys)
    deep = [key for key in keys if counts[key[0], key[2]] > 1]
    single = [key for key in keys if key not in deep and key != first]
    beside = [key for key in single if key[2] in (first[2], *BESIDE) and key[0] == first[0] or key[0] == "pretext"]
    beside += [key for key in single if key[2] == first[2] and key not in beside]
    legend = f"; ▲ better, ▼ worse than {baseline}" if any(separated(row) is not None for row in rows) else ""

    def lines(shown: dict[Key, str], *more: Column, marks: bool = True) -> str:
        columns = [_values(head, [found.get((arm, *key)) for arm in arms], marks) for key, head in shown.items()]
        return _lines(Column("arm", arms, right=False), [*columns, *more], markdown)

    answers = [found.get((arm, *first)) for arm in arms]
    more = [_changes(f"difference to {baseline}", answers, baseline)] if any(r["difference"] for r in rows) else []
    more += _budget(answers)
    kind = "mean ± half-width of the 95 % interval" if any(row["ci95"] for row in rows) else "one seed"
    scored = first[2] not in FRACTIONS  # then metrics are told apart, and the one evaluation needs no name
    title = _word(first[2]) + (" correlation" if scored else " in per cent")
    parts = [f"{title[0].upper()}{title[1:]}, {kind}"]
    heads = {key: _word(key[2]) if scored and key[0] == first[0] else _head(key, first[2]) for key in (first, *beside)}
    heads = heads if scored else {key: heads[key] for key in (*beside, first)}
    parts.append(lines(heads, *more, marks=False))
    for evaluation, metric in dict.fromkeys((key[0], key[2]) for key in deep):
        blocks = {key: str(key[1]) for key in deep if (key[0], key[2]) == (evaluation, metric)}
        parts += [f"By block: {_head((evaluation, None, metric), first[2])}{legend}", lines(blocks)]
    if rest := {key: _word(key[2]) if scored else _head(key, "") for key in single if key not in beside}:
        parts += [f"Further measures{legend}", lines(rest)]
    return parts


def _primary(keys: list[Key]) -> Key:
    """What the answer is read from: the last evaluation as shown, its accuracy or rank correlation, its last block."""
    metrics = [key[2] for key in keys if key[0] == keys[-1][0]]
    metric = next((name for name in ("accuracy", "spearman") if name in metrics), metrics[0])
    return [key for key in keys if (key[0], key[2]) == (keys[-1][0], metric)][-1]


def _head(key: Key, metric: str) -> str:
    return " ".join(_word(part) for part in key if part and part != metric)


def _word(name: str) -> str:
    return WORDS.get(name, name)


def _number(value: float, metric: str, *, sign: str = "") -> str:
    """One decimal for fractions (in per cent), three for other numbers; one more where nothing but zeros would show."""
    scaled, digits = (100 * value, 1) if metric in FRACTIONS else (value, 3)
    if value and abs(scaled) < 0.5 * 10**-digits:
        digits += 1
    return f"{scaled:{sign}.{digits}f}"


def _values(head: str, rows: list[Row | None], marks: bool) -> Column:
    """Means with half-widths; with marks where the difference to the baseline leaves out zero."""
    texts = []
    for row in rows:
        if row is None or row["mean"] is None:
            texts.append(("–" if row is None else "undefined", "", ""))
            continue
        half = "" if row["ci95"] is None else " ± " + _number((row["ci95"][1] - row["ci95"][0]) / 2, row["metric"])
        sign = " " + ("▲" if gain(row) > 0 else "▼") if marks and separated(row) else ""
        note = "†" * row["chosen_on_test"] + "‡" * ("collapsed" in row)
        texts.append((_number(row["mean"], row["metric"]), half, note + sign))
    wide = [max(len(text[i]) for text in texts) for i in range(3)]
    return Column(head, [f"{a:>{wide[0]}}{b:<{wide[1]}}{c:<{wide[2]}}" if b or c else a for a, b, c in texts])


def _changes(head: str, rows: list[Row | None], baseline: str) -> Column:
    """Mean difference, interval, words."""
    texts = []
    for row in rows:
        if row is None or not row["difference"]:
            texts.append(("baseline" if row and row["arm"] == baseline else "–", ""))
            continue
        numbers = (row["difference"]["mean"], *(row["difference"]["ci95"] or ()))
        mean, *ends = (_number(number, row["metric"], sign="+") for number in numbers)
        texts.append((f"{mean} [{', '.join(ends)}]" if ends else mean, words(row)))
    wide = max((len(change) for change, said in texts if said), default=0)
    return Column(head, [f"{change:<{wide}}  {said}" if said else change for change, said in texts], right=False)


def _budget(rows: list[Row | None]) -> list[Column]:
    """What each arm was shown, all its stages together, and how long it took."""
    most = max((row["pixels"] or 0 for row in rows if row), default=0)
    unit, size = ("Gpx", 1e9) if most >= 1e10 else ("Mpx", 1e6)

    def column(head: str, name: str, size: float = 1) -> Column:
        spent = [None if row is None or row[name] is None else row[name] / size for row in rows]
        short = 1 if name != "images" and max((x for x in spent if x is not None), default=0) < 10 else 0
        return Column(head, ["–" if x is None else f"{x:,.{short}f}" for x in spent])

    return [column("images", "images"), column(unit, "pixels", size), column("seconds", "seconds")]


def _lines(names: Column, columns: list[Column], markdown: bool) -> str:
    """One table; in plain text as many as the width asks for, the names before each."""
    if markdown:
        return _pipes([names, *columns])

    tables, room = [[names]], WIDTH - names.width
    for column in columns:
        if column.width + 2 > room and len(tables[-1]) > 1:
            tables.append([names])
            room = WIDTH - names.width
        tables[-1].append(column)
        room -= column.width + 2
    texts = []
    for shown in tables:
        padded = [[f"{text:{'>' if c.right else '<'}{c.width}}" for text in (c.head, *c.cells)] for c in shown]
        head, *body = ("  ".join(line).rstrip() for line in zip(*padded, strict=True))
        rule = "─" * max(len(line) for line in (head, *body))
        texts.append("\n".join([head, rule, *body]))
    return "\n\n".join(texts)


def _pipes(columns: list[Column]) -> str:
    lines = [[c.head for c in columns], ["---:" if c.right else "---" for c in columns]]
    lines += [list(cells) for cells in zip(*(c.cells for c in columns), strict=True)]
    return "\n".join("| " + " | ".join(" ".join(t.split()).replace("|", "\\|") for t in line) + " |" for line in lines)


def _notes(summary: Row) -> list[str]:
    rows, notes = summary["rows"], []
    if any(row["chosen_on_test"] for row in rows):
        notes.append("† chosen on the test images: too good, not to be compared with unmarked numbers")
    if any(row["metric"].endswith("logistic5") for row in rows):
        notes.append(
            "(logistic fit): after a curve of five parameters has been fitted to the test scores themselves, as is "
            "usual for scores; answers that are far off can look good in it"
        )
    count = summary["data"].get("test") or 0
    if 0 < count < FEW and any(row["metric"] == "accuracy" for row in rows):
        notes.append(
            f"{count} test images: each is worth {100 / count:.1f} points; intervals are over seeds, not over images"
        )
    copies = summary["data"].get("duplicates_train_test")
    if copies is not None:
        harm = " (results are too good)" if copies else ""
        notes.append(f"test images that are pixel-equal to a training image: {copies or 'none'}{harm}")
    for row in rows:
        if row["seeds"] != summary["seeds"]:
            ran = f"{_seeds(row['seeds'])} of {len(summary['seeds'])}; differences pair the seeds that both have"
            notes.append(f"{row['arm']}, {_word(row['evaluation'])}: {ran}")
        if "undefined" in row:
            name = _head((row["evaluation"], row["block"], row["metric"]), "")
            notes.append(f"{row['arm']}, {name}: {row['undefined']}, so there is no mean")
    return list(dict.fromkeys([*notes, *summary["notes"]]))


def _wrapped(text: str, markdown: bool, bullet: str = "") -> str:
    if markdown:
        return bullet + text
    return textwrap.fill(text, WIDTH, initial_indent=bullet, subsequent_indent=" " * len(bullet))


def per_class_table(summary: Row, *, markdown: bool = False) -> str:
    """Fine-tuned accuracy of each class, worst first by the mean over arms, at most 20 lines; "" without such rows."""
    chosen = [r for r in summary["rows"] if r["evaluation"] == "finetune" and r["metric"] == "accuracy"]
    parts = []
    for group, rows in _grouped(row for row in chosen if row.get("per_class")).items():
        known: dict[str, dict[str, Row]] = {}  # class -> arm -> its count and accuracy
        for row in rows:
            for part in row["per_class"]:
                known.setdefault(part["class"], {})[row["arm"]] = part
        order = sorted(known, key=lambda name: np.mean([part["accuracy"] for part in known[name].values()]))
        shown = [known[name] for name in order[:WORST]]
        columns = [Column("n", [f"{max(part['n'] for part in arms.values()):,}" for arms in shown])]
        for arm in dict.fromkeys(row["arm"] for row in rows):
            cells = [_number(arms[arm]["accuracy"], "accuracy") if arm in arms else "–" for arms in shown]
            columns.append(Column(arm, cells))
        names = Column("class", [textwrap.shorten(name, 40, placeholder="…") for name in order[:WORST]], right=False)
        left = f", the worst {WORST} of {len(order)}" if len(order) > WORST else ""
        title = ", ".join(["Fine-tune accuracy by class in per cent" + left, *_named(group)])
        parts += [title, _lines(names, columns, markdown)]
    return "\n\n".join(parts) + "\n" if parts else ""


def per_kind_table(summary: Row, *, markdown: bool = False) -> str:
    """Spearman's correlation within each kind of test images; "" where no kinds are named."""
    parts = []
    for group, rows in _grouped(row for row in summary["rows"] if row.get("per_kind")).items():
        known = {row["arm"]: {part["kind"]: part for part in row["per_kind"]} for row in rows}
        kinds = sorted({kind for parts in known.values() for kind in parts})
        columns = []
        for arm, found in known.items():
            values = [found.get(kind, {}).get("spearman") for kind in kinds]
            columns.append(Column(arm, ["–" if value is None else _number(value, "spearman") for value in values]))
        title = ", ".join(["Spearman correlation by kind", *_named(group)])
        parts += [title, _lines(Column("kind", kinds, right=False), columns, markdown)]
    return "\n\n".join(parts) + "\n" if parts else ""


def plain(value: Any) -> Any:
    """A value as JSON gives it back: no tuples, no arrays, numbers that are not finite null."""
    text = json.dumps(value, default=lambda number: number.tolist())  # numpy's numbers and arrays
    return json.loads(text, parse_constant=lambda name: None)


def write(workdir: str | Path, summary: Row) -> None:
    """Writes summary.json and table.md into the workdir, each as a whole or not at all.

    Numbers that are not finite become null, so that any JSON reader takes the file.
    """
    text = json.dumps(plain(summary), indent=1, ensure_ascii=False)
    classes = per_class_table(summary, markdown=True) or per_kind_table(summary, markdown=True)
    _replace(Path(workdir) / "table.md", table(summary, markdown=True) + ("\n" + classes if classes else ""))
    _replace(Path(workdir) / "summary.json", text + "\n")


def write_predictions(workdir: str | Path, rows: Iterable[Row]) -> None:
    """Writes predictions.csv: the answer for every test image of every row that has them; nothing where none has."""
    rows = [row for row in rows if "predictions" in row]
    if not rows:
        return
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    place = ("arm", *GROUP, "seed")
    table.writerow([*place, "file", "score", "prediction"])
    for row in rows:
        names = row.get("names") or [""] * len(row["scores"])
        for name, score, answer in zip(names, row["scores"], row["predictions"], strict=True):
            table.writerow([*("" if row.get(key) is None else row[key] for key in place), name, score, answer])
    _replace(Path(workdir) / "predictions.csv", text.getvalue())


def load(workdir: str | Path) -> Row:
    """The summary of a finished run; UserError where there is none."""
    path = Path(workdir) / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        summary["rows"]
    except FileNotFoundError:
        raise UserError(f"no summary.json in {workdir}: give the workdir of a run that came to its end") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it and start the run again") from None
    return summary


def read(workdir: str | Path) -> list[Row]:
    """The rows of a finished run, a list of dicts as pandas.DataFrame takes it; UserError where there are none."""
    return load(workdir)["rows"]


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error.strerror}): make room or choose another workdir") from None
