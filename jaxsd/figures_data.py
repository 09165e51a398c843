"""Pictures of data before any training: copies side by side, what stages are shown, and their learning rates."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxsd.errors import UserError
from jaxsd.figures import CELL, GAP, HEADING, LETTER, MARGIN, TEXT, show_picture

DOTS = 100  # per inch
LINE = 0.2  # inches, of words under a picture
PAIRS_BESIDE = 3
PANEL, PANELS_BESIDE = (3.2, 2.3), 4  # inches, and how many plots beside each other
EDGES = (0.75, 0.15, 0.5, 0.5)  # inches beside a plot: left, right, above, below
MARKS = 6  # of a rate's axis
STEEP = 20  # from this ratio of largest to smallest rate on, rates are drawn on a logarithmic axis
BLUE = "#0072B2"


class Picture(NamedTuple):
    """An image [H, W, C], uint8 or float in [0, 1], and the words under it, in one or more short lines."""

    image: np.ndarray
    words: str


def picture_rows(path: str | Path, rows: Sequence[tuple[str, Sequence[Picture]]]) -> None:
    """Draws rows of pictures, each row under a heading; pictures are equally wide, whatever their size in pixels.

    path: where to write; its ending is the format (png, pdf, svg). rows: [(heading, pictures)]; a row without a
    heading stands close to the one above. Raises UserError where there is no picture.
    """
    columns = max((len(pictures) for _, pictures in rows), default=0)
    if not columns:
        raise UserError("picture_rows needs at least one picture")
    heights = [_height(pictures) + (HEADING if heading else 0) for heading, pictures in rows]
    letters = LETTER * max(len(heading) for heading, _ in rows)
    width = 2 * MARGIN + max(columns * (CELL + GAP) - GAP, letters)
    figure = _figure((width, 2 * MARGIN + sum(heights)))
    y = MARGIN
    for (heading, pictures), height in zip(rows, heights, strict=True):
        _row(figure, (MARGIN, y), heading, pictures)
        y += height
    figure.savefig(path, dpi=DOTS)


def picture_pairs(path: str | Path, pairs: Sequence[tuple[str, Sequence[Picture]]]) -> None:
    """Draws pairs of pictures, several beside each other, each under a heading.

    path, pairs: as in `picture_rows`.
    """
    if not pairs:
        raise UserError("picture_pairs needs at least one pair")
    beside = [pairs[start : start + PAIRS_BESIDE] for start in range(0, len(pairs), PAIRS_BESIDE)]
    heights = [HEADING + max(_height(pictures) for _, pictures in row) for row in beside]
    pair = 2 * CELL + GAP + 3 * GAP
    figure = _figure((2 * MARGIN + len(beside[0]) * pair - 3 * GAP, 2 * MARGIN + sum(heights)))
    y = MARGIN
    for row, height in zip(beside, heights, strict=True):
        for column, (heading, pictures) in enumerate(row):
            _row(figure, (MARGIN + column * pair, y), heading, pictures)
        y += height
    figure.savefig(path, dpi=DOTS)


def rate_panels(path: str | Path, courses: Mapping[str, tuple[np.ndarray, int]]) -> None:
    """Draws the learning rate of stages over their epochs, one panel each.

    path: where to write; its ending is the format. courses: {what stands above the panel: (the rate of every step,
    steps per epoch)}. Axes are logarithmic where the rate changes twentyfold and never is 0.
    Raises UserError where there is no course.
    """
    if not courses:
        raise UserError("rate_panels needs at least one stage")
    columns = min(PANELS_BESIDE, len(courses))
    lines = -(-len(courses) // columns)
    width, height = columns * PANEL[0], lines * PANEL[1]
    figure = _figure((width, height))
    left, right, top, bottom = EDGES
    for number, (title, (rates, steps)) in enumerate(courses.items()):
        x, y = number % columns * PANEL[0] + left, (lines - 1 - number // columns) * PANEL[1] + bottom
        size = ((PANEL[0] - left - right) / width, (PANEL[1] - top - bottom) / height)
        _course(figure.add_axes((x / width, y / height, *size)), title, rates, steps)
    figure.savefig(path, dpi=DOTS)


def _course(axes: Any, title: str, rates: np.ndarray, steps: int) -> None:
    """Draws one stage's rates; where they are few different ones, these are the marks of the axis."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    epochs = np.arange(len(rates) + 1) / steps
    axes.step(epochs, np.append(rates, rates[-1:]), where="post", color=BLUE)
    axes.set_title(title, fontsize=TEXT - 1)
    axes.set_xlabel("epoch", fontsize=TEXT - 2)
    axes.set_ylabel("rate", fontsize=TEXT - 2)
    axes.tick_params(labelsize=TEXT - 3)
    axes.grid(alpha=0.3)
    axes.set_xlim(0, epochs[-1])
    if rates.min() > 0 and rates.max() / rates.min() >= STEEP:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.08 * rates.max() or 1)
    if len(different := np.unique(rates)) <= MARKS:
        axes.yaxis.set_major_locator(FixedLocator(different.tolist()))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.3g}"))


def _figure(size: tuple[float, float], **options: Any) -> Any:
    """A figure of a size in inches that writes itself as pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, **options)
    FigureCanvasAgg(figure)
    return figure


def _height(pictures: Sequence[Picture]) -> float:
    """Inches of a row, with the words under it and the space below."""
    high = max(CELL * image.shape[0] / image.shape[1] for image, _ in pictures)
    return high + LINE * max(1 + words.count("\n") for _, words in pictures) + GAP


def _row(figure: Any, place: tuple[float, float], heading: str, pictures: Sequence[Picture]) -> None:
    """Draws pictures beside each other; place: inches from the left and from the top."""
    width, height = figure.get_size_inches()
    x, y = place
    if heading:
        figure.text(x / width, 1 - (y + HEADING / 2) / height, heading, fontsize=TEXT, weight="bold", va="center")
        y += HEADING
    letters = int(CELL / LETTER)
    for image, words in pictures:
        high = CELL * image.shape[0] / image.shape[1]
        axes = figure.add_axes((x / width, 1 - (y + high) / height, CELL / width, high / height))
        show_picture(axes, image)
        below = {"xytext": (0, -3), "textcoords": "offset points", "ha": "center", "va": "top"}
        text = "\n".join(_shortened(line, letters) for line in words.split("\n"))
        axes.annotate(text, (0.5, 0), xycoords="axes fraction", fontsize=TEXT - 1, **below)
        x += CELL + GAP


def _shortened(text: str, letters: int) -> str:
    """The end of a text that is too long, which tells files apart."""
    return text if len(text) <= letters else f"\N{HORIZONTAL ELLIPSIS}{text[1 - letters :]}"
