"""Pictures of images and of where networks look; matplotlib without a display and without the state of pyplot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxsd.errors import UserError

CELL, SPACE, GROUP = 1.6, 0.05, 0.25  # inches: width of a picture, between pictures, between those of two images
GAP = 0.15  # inches, between pictures with words under them
HEADING, MARGIN, BAR = 0.3, 0.1, 0.75  # inches: line of block names, border, room for the colour bar
TEXT = 11  # points
LETTER = 0.09  # inches, the average width of a letter at that size
OPACITY = 0.5  # of the colours over the image


def attention_figure(
    path: str | Path,
    images: np.ndarray,
    rows: Mapping[str, Mapping[str, np.ndarray]],
    *,
    titles: Mapping[str, str] | None = None,
) -> None:
    """Draws ScaleNet's Figure 3: every image on top and, under it, one row of attention maps for each model.

    A row shows the maps of all blocks side by side over the image, from blue (0) to red (1).

    path: where to write; its ending is the format (png, pdf, svg). images: uint8, or float in [0, 1], [B, H, W, C] with
    1 or 3 channels. rows: {model: {block: maps [B, H, W] in [0, 1]}}, the same blocks in each. titles: {block: what to
    write above its maps} where the block's name will not do.
    Raises UserError where the maps do not fit the images or each other.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    blocks = _checked_blocks(images, rows)
    titles = {block: block for block in blocks} | dict(titles or {})
    count, high = len(images), CELL * images.shape[1] / images.shape[2]
    left = 2 * MARGIN + LETTER * max(map(len, rows))
    group = len(blocks) * (CELL + SPACE) + GROUP
    size = (left + count * group - GROUP + BAR, 2 * MARGIN + high + HEADING + len(rows) * (high + SPACE))
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)

    def axes_at(x: float, y: float, width: float, height: float) -> Any:
        """Axes whose upper left corner lies x inches from the left and y from the top."""
        return figure.add_axes((x / size[0], 1 - (y + height) / size[1], width / size[0], height / size[1]))

    top = MARGIN + high + HEADING  # of the first row of maps
    for index, image in enumerate(images):
        x = left + index * group
        show_picture(axes_at(x + (group - GROUP - SPACE - CELL) / 2, MARGIN, CELL, high), image)
        for line, (model, maps) in enumerate(rows.items()):
            for column, block in enumerate(blocks):
                axes = axes_at(x + column * (CELL + SPACE), top + line * (high + SPACE), CELL, high)
                show_picture(axes, image)
                axes.imshow(maps[block][index], cmap="jet", vmin=0, vmax=1, alpha=OPACITY, interpolation="bilinear")
                if line == 0:
                    axes.set_title(titles[block], fontsize=TEXT)
                if index == column == 0:
                    beside = {"xytext": (-7, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
                    axes.annotate(model, (0, 0.5), xycoords="axes fraction", fontsize=TEXT, **beside)
    bar = figure.colorbar(ScalarMappable(cmap="jet"), cax=axes_at(size[0] - BAR + 0.1, top, 0.12, high), ticks=[0, 1])
    bar.ax.set_yticklabels(["low", "high"], fontsize=TEXT - 2)
    figure.savefig(path, dpi=150)


def image_rows(path: str | Path, rows: Mapping[str, tuple[np.ndarray, Sequence[str]]]) -> None:
    """Draws some images of each split, one split a line, with a few words under each image.

    path: where to write; its ending is the format (png, pdf, svg). rows: {what the line shows: (images uint8
    [N, H, W, C] with 1 or 3 channels, captions [N])}; the lines may differ in N.
    Raises UserError where there are no images, or not one caption each.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for name, (images, captions) in rows.items():
        if images.ndim != 4 or images.shape[-1] not in (1, 3) or len(images) != len(captions):
            raise UserError(f"{name}: {len(captions)} captions for images {list(images.shape)}: give one for each")
    columns = max((len(images) for images, _ in rows.values()), default=0)
    if not columns:
        raise UserError("image_rows needs at least one image")
    highs = [CELL * images.shape[1] / images.shape[2] for images, _ in rows.values()]
    size = (2 * MARGIN + columns * (CELL + GAP) - GAP, 2 * MARGIN + sum(highs) + len(rows) * (2 * HEADING + GAP) - GAP)
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    letters = int(CELL / LETTER)
    y = MARGIN
    for (name, (images, captions)), high in zip(rows.items(), highs, strict=True):
        figure.text(MARGIN / size[0], 1 - (y + HEADING / 2) / size[1], name, fontsize=TEXT, weight="bold", va="center")
        for column, (image, caption) in enumerate(zip(images, captions, strict=True)):
            x, top = MARGIN + column * (CELL + GAP), y + HEADING
            axes = figure.add_axes((x / size[0], 1 - (top + high) / size[1], CELL / size[0], high / size[1]))
            show_picture(axes, image)
            short = caption if len(caption) <= letters else f"{caption[: letters - 1]}\N{HORIZONTAL ELLIPSIS}"
            below = {"xytext": (0, -3), "textcoords": "offset points", "ha": "center", "va": "top"}
            axes.annotate(short, (0.5, 0), xycoords="axes fraction", fontsize=TEXT - 1, **below)
        y += high + 2 * HEADING + GAP
    figure.savefig(path, dpi=100)


def _checked_blocks(images: np.ndarray, rows: Mapping[str, Mapping[str, np.ndarray]]) -> list[str]:
    """The blocks that every row shows; raises UserError where something is missing or has another shape."""
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise UserError(f"attention_figure needs images [B, H, W, 1 or 3]: got {list(images.shape)}")
    if not rows or not all(rows.values()):
        raise UserError("attention_figure needs the maps of at least one model and block")
    blocks = list(next(iter(rows.values())))
    for model, maps in rows.items():
        if list(maps) != blocks:
            raise UserError(
                f"attention_figure needs the same blocks in each row: {model} has {list(maps)}, not {blocks}"
            )
        for block, values in maps.items():
            if values.shape != images.shape[:3]:
                raise UserError(f"maps of {model} {block} must be {list(images.shape[:3])}: got {list(values.shape)}")
    return blocks


def show_picture(axes: Any, image: np.ndarray) -> None:
    """Shows an image [H, W, C], uint8 or float in [0, 1], in axes without ticks or frame; one channel is gray."""
    gray = image.shape[-1] == 1
    top = 255 if image.dtype == np.uint8 else 1
    axes.imshow(image[..., 0] if gray else image, cmap="gray" if gray else None, vmin=0, vmax=top)
    axes.set_axis_off()
