"""Pictures of predicted scores; matplotlib without a display and without the state of pyplot.

Colours are told apart by colour-blind readers too (Okabe and Ito; viridis), and never carry a meaning alone.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsd.errors import UserError
from jaxsd.figures import LETTER, TEXT, show_picture

DOTS = 150  # per inch
PICTURE, PANEL = 2.4, 3.0  # inches: the width of a picture, the side of a plot
SPACE, TITLE, BAR, LINE = 0.1, 0.35, 1.1, 0.25  # inches: between pictures, a title, room for the colour bar, a line
ROW = 4  # panels beside each other at most
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MANY = 500  # points, from where on they are drawn smaller
SHADE = 0.65  # brightness of colours where the picture is black; 1 where it is white


def quality_map(
    path: str | Path,
    image: np.ndarray,
    maps: Mapping[str, np.ndarray],
    *,
    score: float | None = None,
    unit: str = "",
    name: str = "",
) -> None:
    """Draws a picture and, beside it, one panel for each patch size: the patches' scores as colours over the picture.

    The picture is the brightness of the colours. Panels share one colour scale; their titles have the patches' mean,
    which is the image's predicted score.
    path: where to write; its ending is the format (png, pdf, svg). image: uint8 [H, W, C] with 1 or 3 channels. maps:
    {patch size: scores [rows, cols] of the patches, row by row}, each spread evenly over the picture (exactly where
    patches do not overlap). score: the true one. unit: what scores are ("DMOS"), beside the colour bar. name: the
    picture's.
    Raises UserError where there is no map or one that is not [rows, cols] of finite numbers.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    if image.ndim != 3 or image.shape[-1] not in (1, 3) or image.dtype != np.uint8:
        raise UserError(f"quality_map needs an image uint8 [H, W, 1 or 3]: got {image.dtype} {list(image.shape)}")
    if not maps:
        raise UserError("quality_map needs the scores of at least one patch size")
    for name, values in maps.items():
        _check_numbers(f"the map of patch size {name}", values, dimensions=2)
    low, high = min(v.min() for v in maps.values()), max(v.max() for v in maps.values())
    if low == high:
        low, high = low - 0.5, high + 0.5  # one score everywhere: the middle of the scale
    colours = ScalarMappable(Normalize(low, high), "viridis")
    rows, columns = _layout(len(maps) + 1)
    high_picture = PICTURE * image.shape[0] / image.shape[1]
    high_bar = rows * (high_picture + TITLE) - TITLE
    label = _wrapped(unit, high_bar)
    size = (columns * (PICTURE + SPACE) + BAR + LINE * label.count("\n"), high_bar + TITLE + SPACE)
    figure = _figure(size)

    def axes_at(cell: int) -> Any:
        """Axes of the cell at a place in reading order."""
        x, y = SPACE + cell % columns * (PICTURE + SPACE), (cell // columns + 1) * (high_picture + TITLE)
        return figure.add_axes((x / size[0], 1 - y / size[1], PICTURE / size[0], high_picture / size[1]))

    panel = axes_at(0)
    show_picture(panel, image)
    title = [name or "picture"] if score is None else [*([name] if name else []), f"true score {score:.4g}"]
    panel.set_title(textwrap.shorten(", ".join(title), 34, placeholder="…"), fontsize=TEXT)
    for cell, (name, values) in enumerate(maps.items(), start=1):
        panel = axes_at(cell)
        show_picture(panel, _coloured(image, colours.to_rgba(values)[..., :3]))
        panel.set_title(f"{name}: mean {values.mean():.4g}", fontsize=TEXT)
    left = columns * (PICTURE + SPACE) + SPACE
    place = figure.add_axes((left / size[0], SPACE / size[1], 0.15 / size[0], high_bar / size[1]))
    bar = figure.colorbar(colours, cax=place)
    bar.set_label(label, fontsize=TEXT)
    figure.savefig(path, dpi=DOTS)


def predicted_scores(
    path: str | Path,
    predictions: Mapping[str, np.ndarray],
    scores: np.ndarray,
    *,
    unit: str = "",
    kinds: Sequence[str] = (),
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    titles: Mapping[str, str] | None = None,
) -> None:
    """Draws true scores over predicted ones, one panel for each arm, with the line on which both are equal.

    path: where to write; its ending is the format (png, pdf, svg). predictions: {arm: finite numbers [N]}. scores: the
    true ones [N]. unit: what both are ("DMOS"). kinds: the kind of each image [N], told apart by colour and shape.
    curves: {arm: (predictions [M], fitted scores [M])}, drawn as a line: the logistic fit. titles: {arm: a line under
    its name}, such as its correlations. Both axes reach half the range of the true scores beyond it at most: an arm
    that is far off does not hide the others; what lies beyond is drawn at the border and counted in the title.
    Raises UserError where these do not fit together.
    """
    if not predictions:
        raise UserError("predicted_scores needs the predictions of at least one arm")
    _check_numbers("scores", scores, dimensions=1)
    for arm, values in predictions.items():
        _check_numbers(f"predictions of {arm}", values, dimensions=1)
        if len(values) != len(scores):
            raise UserError(f"predictions of {arm} must be one per score: got {len(values)} for {len(scores)} scores")
    if len(kinds) not in (0, len(scores)):
        raise UserError(f"kinds must be one per score: got {len(kinds)} for {len(scores)} scores")
    for arm, (x, y) in (curves or {}).items():
        if arm not in predictions or np.shape(x) != np.shape(y):
            raise UserError(f"the curve of {arm!r} must be (x, y) of one length for an arm that has predictions")
    known = sorted(set(kinds))
    bounds = _bounds(scores)
    beyond = {arm: int(((x < bounds[0]) | (x > bounds[1])).sum()) for arm, x in predictions.items()}
    predictions = {arm: np.clip(values, *bounds) for arm, values in predictions.items()}
    low, high = _limits([scores, *predictions.values()])
    notes = {arm: [(titles or {}).get(arm, ""), f"{n} beyond the axis" if n else ""] for arm, n in beyond.items()}
    headings = [_heading(arm, ", ".join(filter(None, notes[arm]))) for arm in predictions]
    figure, panels, columns = _scatter_panels(headings, unit, len(known))
    for panel, (arm, values) in zip(panels, predictions.items(), strict=True):
        _scatter(panel, values, scores, known, np.asarray(kinds))
        panel.plot([low, high], [low, high], "--", color="0.6", linewidth=1.2, zorder=1, label="predicted = true")
        if curves and arm in curves:
            order = np.argsort(curves[arm][0])
            x, y = (np.clip(np.asarray(part)[order], *bounds) for part in curves[arm])
            panel.plot(x, y, color="white", linewidth=3.5, zorder=3)
            panel.plot(x, y, color="black", linewidth=1.6, zorder=3, label="logistic fit")
        panel.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    entries = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    style = {
        "fontsize": TEXT - 1,
        "frameon": False,
        "borderaxespad": 0,
        "borderpad": 0.8,
        "markerscale": 1 if len(scores) <= MANY else 2,
    }
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=2 * columns, **style)
    figure.savefig(path, dpi=DOTS)


def metric_by_stage(
    path: str | Path,
    stages: Sequence[str],
    means: Sequence[float | None],
    intervals: Sequence[Sequence[float] | None],
    *,
    baseline: tuple[float, Sequence[float] | None] | None = None,
    against: str = "baseline",
    metric: str = "",
    unit: str = "",
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> None:
    """Draws a metric over the stages of a chain, with its intervals as bars, against the baseline as a band.

    path: where to write; its ending is the format (png, pdf, svg). stages: names, such as patch sizes, from left to
    right. means: one per stage; None leaves a gap. intervals: (low, high) per stage; None (one seed) draws no bar.
    baseline: mean and interval of what the chain is compared with, which is called `against`. metric, unit: beside the
    axis. limits: what the metric cannot pass; intervals end there.
    Raises UserError where there is not one mean and one interval for each stage.
    """
    if not stages or not len(stages) == len(means) == len(intervals):
        raise UserError(
            "metric_by_stage needs one mean and one interval for each stage: "
            f"got {len(stages)} stages, {len(means)} means, {len(intervals)} intervals"
        )
    figure, (axes,) = _panels((max(4.5, 1.0 + 0.9 * len(stages)), 3.6), 1, 1, 1, layout="constrained")
    places = np.arange(len(stages))
    values = np.array([math.nan if mean is None else mean for mean in means], float)
    if baseline is not None:
        mean, band = baseline
        axes.axhline(mean, linestyle="--", color=COLOURS[3], linewidth=1.6, label=against, zorder=1)
        if band is not None:
            axes.axhspan(*np.clip(band, *limits), color=COLOURS[3], alpha=0.18, linewidth=0, zorder=0)
    axes.plot(places, values, "o-", color=COLOURS[0], linewidth=1.8, markersize=6, label="growing patches", zorder=3)
    barred = [place for place in range(len(stages)) if intervals[place] is not None and not math.isnan(values[place])]
    if barred:
        ends = np.clip(np.array([intervals[place] for place in barred], float), *limits)
        reach = np.abs(ends.T - values[barred])  # [2, bars]: down, up
        axes.errorbar(barred, values[barred], reach, fmt="none", color=COLOURS[0], capsize=4, zorder=2)
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, stages)) > 9 else {}
    axes.set_xticks(places, stages, **turned)
    axes.set_xlim(-0.4, len(stages) - 0.6)
    axes.set_ylabel(_wrapped(f"{metric} ({unit})" if unit else metric, 2.8), fontsize=TEXT)
    axes.set_xlabel("patch size (pixels)" if all(stage.isdigit() for stage in stages) else "stage", fontsize=TEXT)
    axes.tick_params(labelsize=TEXT - 1)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if baseline is not None:
        figure.legend(loc="outside upper center", ncols=2, fontsize=TEXT - 1, frameon=False)
    figure.savefig(path, dpi=DOTS)


def _heading(arm: str, below: str) -> str:
    """What stands above a panel: the arm and, on lines of its own, what is said of it."""
    return "\n".join(_wrapped(text, PANEL) for text in (arm, below) if text)


def _scatter_panels(headings: Sequence[str], unit: str, kinds: int) -> tuple[Any, list[Any], int]:
    """A figure with room for a legend of so many kinds, its square panels with their words, its columns."""
    from matplotlib.ticker import MaxNLocator

    rows, columns = _layout(len(headings))
    across, up = _wrapped(f"predicted {unit}", PANEL), _wrapped(f"true {unit}", PANEL)
    lines = max(heading.count("\n") for heading in headings) + across.count("\n") + 2
    high = rows * (PANEL + LINE * (lines + 1)) + LINE * (1 + math.ceil((kinds + 2) / (2 * columns)))
    wide = columns * (PANEL + 0.4) + LINE * (up.count("\n") + 1)
    figure, panels = _panels((wide, high), rows, columns, len(headings), layout="compressed")
    for index, (panel, heading) in enumerate(zip(panels, headings, strict=True)):
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.yaxis.set_major_locator(MaxNLocator(5))
        panel.tick_params(labelsize=TEXT - 2)
        panel.set_title(heading, fontsize=TEXT)
        if index + columns >= len(headings):
            panel.set_xlabel(across, fontsize=TEXT)
        if index % columns == 0:
            panel.set_ylabel(up, fontsize=TEXT)
    return figure, panels, columns


def _panels(size: tuple[float, float], rows: int, columns: int, count: int, *, layout: str) -> tuple[Any, list[Any]]:
    """A figure of a size in inches, and the first `count` of its axes in reading order; the others are taken away."""
    figure = _figure(size, layout=layout)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in axes[count:]:
        empty.remove()
    return figure, axes[:count]


def _figure(size: tuple[float, float], **options: Any) -> Any:
    """A figure of a size in inches that writes itself as pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, **options)
    FigureCanvasAgg(figure)
    return figure


def _wrapped(text: str, room: float) -> str:
    """Words on as many lines as they need where a line has so many inches."""
    return textwrap.fill(text, max(12, int(room / LETTER)))


def _layout(count: int) -> tuple[int, int]:
    """Rows and columns for so many panels: one row up to ROW, then rows of nearly equal length."""
    rows = -(-count // ROW)
    return rows, -(-count // rows)


def _check_numbers(what: str, values: np.ndarray, *, dimensions: int) -> None:
    """Raises UserError unless values are finite numbers with so many dimensions, and not empty."""
    shape = "[rows, cols]" if dimensions == 2 else "[N]"
    if np.ndim(values) != dimensions or not np.size(values) or np.asarray(values).dtype.kind not in "fiu":
        raise UserError(f"{what} must be numbers {shape}: got shape {list(np.shape(values))}")
    if not np.isfinite(values).all():
        raise UserError(f"{what} must be finite: {np.count_nonzero(~np.isfinite(values))} are not")


def _coloured(image: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The picture in gray, float [H, W, 3], tinted with colours [rows, cols, 3] spread evenly over it."""
    height, width = image.shape[:2]
    light = SHADE + (1 - SHADE) * image.mean(axis=-1, keepdims=True) / 255
    rows, columns = (np.arange(n) * part // n for n, part in zip((height, width), colours.shape, strict=False))
    return light * colours[rows][:, columns]


def _bounds(scores: np.ndarray) -> tuple[float, float]:
    """The range of true scores, and half of it more on either side."""
    low, high = float(scores.min()), float(scores.max())
    more = (high - low) / 2 or 0.5
    return low - more, high + more


def _limits(parts: Sequence[np.ndarray]) -> tuple[float, float]:
    """A range that holds all values, with a margin."""
    low, high = float(min(part.min() for part in parts)), float(max(part.max() for part in parts))
    margin = 0.04 * (high - low) or 0.5
    return low - margin, high + margin


def _scatter(axes: Any, x: np.ndarray, y: np.ndarray, known: Sequence[str], kinds: np.ndarray) -> None:
    """Points, one colour and shape for each kind; smaller and paler where they are many."""
    size, opacity = (16, 0.7) if len(x) <= MANY else (7, 0.5)
    style = {"s": size, "alpha": opacity, "linewidths": 0, "zorder": 2}
    if not known:
        axes.scatter(x, y, color=COLOURS[0], **style)
    for index, kind in enumerate(known):
        chosen = kinds == kind
        marker = MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
        axes.scatter(x[chosen], y[chosen], color=COLOURS[index % len(COLOURS)], marker=marker, label=kind, **style)
