"""Pictures of trials and studies: arrays in, a PIL image or a matplotlib Figure out.

Every trial gets Pillow pictures (some milliseconds each); matplotlib figures (some 100 ms each) are for
reports and the best trials, so matplotlib is imported only by the functions that draw with it.
"""

import io
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]
Box = tuple[float, float, float, float]  # x low, x high, y low, y high

MAX_UNITS = 100
LOUDEST = 2.0
RUN_LENGTHS = 3  # zlib's Z_RLE: on these pictures faster than its default, and not larger
TILE = 64
GAP = 2
ACROSS = 4  # panels in a row
BACKGROUND = (255, 255, 255)
INK = (40, 40, 40)
TRAIN, VALIDATION = "#1f77b4", "#ff7f0e"


# ---- Pillow: a picture of every trial


def weight_tiles(
    w: Array,
    image_shape: Sequence[int] | None,
    *,
    scale: Array | None = None,
    classes: Sequence[str] | None = None,
    tile: int = TILE,
) -> Image.Image:
    """The units of a first layer w [d, h] side by side, at most 100 of them.

    image_shape: (H, W) or (H, W, 3), the inputs being channel-first flattened; None draws a heat map.
    scale [d]: draw w * scale, the weights in pixel space: a network that is given (x - mean) * scale and has
    the weights w is the same function of the pixels x as one with the weights w * scale. Pixels that hardly vary
    have a huge scale: they are drawn with at most LOUDEST times the median one, or nothing else would show.
    tile: about how many pixels a side a unit gets. It spans its own mean plus and minus 2.5 deviations, so that
    its pattern shows whatever its size.
    """
    w = np.nan_to_num(np.asarray(w[:, :MAX_UNITS], np.float32), posinf=0.0, neginf=0.0)
    if scale is not None:
        w = w * np.minimum(scale, LOUDEST * np.median(scale)).astype(np.float32)[:, None]
    if image_shape is None:
        return _heat(w)
    tiles = _stretch(w.T)
    if len(image_shape) == 3 and image_shape[2] > 1:
        height, width, channels = image_shape
        tiles = tiles.reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
    else:
        height, width = image_shape[:2]
        tiles = tiles.reshape(-1, height, width, 1).repeat(3, axis=3)
    return _mosaic(tiles, classes, tile)


def _stretch(rows: Array) -> Array:
    """Each row to bytes: its mean at 127.5, 2.5 deviations to either side at the ends."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    deviation = centred.std(axis=1, keepdims=True)
    deviation[deviation == 0] = 1
    centred *= 51 / deviation  # 127.5 / 2.5
    centred += 127.5
    return np.asarray(np.clip(centred, 0, 255), np.uint8)


def _mosaic(tiles: Array, names: Sequence[str] | None, size: int) -> Image.Image:
    """tiles [n, H, W, 3] bytes in about as many rows as columns (at most five columns of ten), with names below."""
    n, height, width, _ = tiles.shape
    columns = min(n, 5) if n <= 10 else math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    zoom = max(1, round(size / max(height, width)))
    label = 14 if names else 0
    cell_h, cell_w = height * zoom + GAP + label, width * zoom + GAP
    canvas = np.full((rows * cell_h + GAP, columns * cell_w + GAP, 3), 255, np.uint8)
    enlarged = tiles.repeat(zoom, axis=1).repeat(zoom, axis=2)
    for i, tile in enumerate(enlarged):
        top, left = GAP + i // columns * cell_h, GAP + i % columns * cell_w
        canvas[top : top + height * zoom, left : left + width * zoom] = tile
    image = Image.fromarray(canvas)
    if names:
        draw = ImageDraw.Draw(image)
        for i, name in enumerate(names[:n]):
            middle = GAP + i % columns * cell_w + width * zoom // 2
            baseline = (i // columns + 1) * cell_h
            draw.text((middle, baseline), name, fill=INK, font=_font(10), anchor="ms")
    return image


def _heat(w: Array) -> Image.Image:
    """w [d, h] as blue (negative), white (zero) and red: one row for each input, one column for each unit."""
    size = np.abs(w).max(initial=0) or 1
    strength = np.clip(w / size, -1, 1)
    fade = 255 * (1 - np.abs(strength))
    red, blue = np.where(strength > 0, 255, fade), np.where(strength < 0, 255, fade)
    image = Image.fromarray(np.stack([red, fade, blue], axis=2).astype(np.uint8))
    rows, columns = w.shape
    zoom_y, zoom_x = max(1, round(320 / rows)), max(1, round(320 / columns))
    return image.resize((columns * zoom_x, min(rows * zoom_y, 800)), Image.Resampling.NEAREST)


def confusion_matrix(counts: ArrayLike, classes: Sequence[str] = ()) -> Image.Image:
    """counts [c, c], true class (rows) by predicted class (columns), shaded by the share of the true class."""
    table = np.asarray(counts)
    c = len(table)
    names = list(classes) or [str(i) for i in range(c)]
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    cell = 36 if c <= 20 else max(4, 720 // c)
    font = _font(11)
    margin = 12 + int(max(font.getlength(name) for name in names))
    upright = margin > cell >= 12  # the names do not fit above their columns
    top = 20 + (margin if upright else 20)
    image = Image.new("RGB", (margin + c * cell + 8, top + c * cell + 8), BACKGROUND)
    draw = ImageDraw.Draw(image)
    draw.text((margin + c * cell / 2, 12), "predicted", fill=INK, font=font, anchor="mm")
    draw.text((4, 12), "true", fill=INK, font=font, anchor="lm")
    if upright:
        strip = Image.new("RGB", (margin, c * cell), BACKGROUND)
        for j, name in enumerate(names):
            ImageDraw.Draw(strip).text((6, (j + 0.5) * cell), name, fill=INK, font=font, anchor="lm")
        image.paste(strip.rotate(90, expand=True), (margin, top - margin))
    for i in range(c):
        y = top + i * cell
        if cell >= 12:
            draw.text((margin - 6, y + cell / 2), names[i], fill=INK, font=font, anchor="rm")
            if not upright:
                draw.text((margin + (i + 0.5) * cell, top - 10), names[i], fill=INK, font=font, anchor="mm")
        for j in range(c):
            x, s = margin + j * cell, float(share[i, j])
            colour = (round(255 - 224 * s), round(255 - 136 * s), round(255 - 75 * s))
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colour)
            if cell == 36:
                ink = BACKGROUND if s > 0.5 else INK
                draw.text((x + cell / 2, y + cell / 2), str(table[i, j]), fill=ink, font=font, anchor="mm")
    return image


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # what Pillow gives when it is asked for a size
    return font


def thumbnail(image: Image.Image, largest: int = 420) -> bytes:
    """WebP, at most `largest` pixels a side: shrunk by a whole number, which is quick and keeps pixels pixels."""
    buffer = io.BytesIO()
    image.reduce(math.ceil(max(image.size) / largest)).save(buffer, "WEBP", quality=80, method=0)
    return buffer.getvalue()


def png(picture: "Image.Image | Figure") -> bytes:
    buffer = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(buffer, "PNG", compress_level=1, compress_type=RUN_LENGTHS)
    else:
        picture.savefig(buffer, format="png", dpi=100, pil_kwargs={"compress_level": 1})
    return buffer.getvalue()


def svg(figure: "Figure") -> bytes:
    """The same bytes for the same figure."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "sieve"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


# ---- matplotlib: figures of reports


def stack(
    runs: Sequence[Sequence[tuple[float, Mapping[str, float]]]],
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Histories as one table: (x [t], metric -> [r, t]); a run that lacks a point has NaN there.

    runs: for each of r runs its points (x, metrics).
    """
    xs = sorted({x for run in runs for x, _ in run})
    keys = dict.fromkeys(key for run in runs for _, metrics in run for key in metrics)
    table = {key: np.full((len(runs), len(xs)), np.nan) for key in keys}
    place = {x: i for i, x in enumerate(xs)}
    for r, run in enumerate(runs):
        for x, metrics in run:
            for key, value in metrics.items():
                table[key][r, place[x]] = value
    return np.array(xs, dtype=np.float64), table


def curves(x: ArrayLike, history: Mapping[str, ArrayLike], *, title: str = "", x_label: str = "epoch") -> "Figure":
    """Loss, cost, accuracy (train and validation) and eta against x [t], as the reports draw them.

    history: metric ("loss/train", "loss/val", ..., "eta") -> [t], or [r, t] for r repeats: their mean is
    drawn, in a band of one deviation to either side. Panels without any data are left out.
    """
    tables = {key: np.atleast_2d(np.asarray(values, np.float64)) for key, values in history.items()}
    panels = [name for name in ("loss", "cost", "accuracy", "eta") if any(_belongs(k, name) for k in tables)]
    figure, axes = _figure(max(len(panels), 1), title)
    for axis, panel in zip(axes, panels, strict=False):
        lines = {
            "training": (tables.get(f"{panel}/train"), TRAIN),
            "validation": (tables.get(f"{panel}/val"), VALIDATION),
            "eta": (tables.get(panel), TRAIN),
        }
        for label, (values, colour) in lines.items():
            if values is not None:
                _band(axis, np.asarray(x, np.float64), values, label, colour)
        axis.set(xlabel=x_label, ylabel=panel)
        axis.grid(alpha=0.3)
        if panel != "eta":
            axis.legend(loc="best")
    return figure


def _belongs(key: str, panel: str) -> bool:
    return key == panel or key in (f"{panel}/train", f"{panel}/val")


def _band(axis: "Axes", x: Array, values: Array, label: str | None, colour: Any, style: str = "-") -> None:
    """The mean of values [r, t] over x [t], and one deviation to either side; NaN means no value."""
    values = np.where(np.isfinite(values), values, np.nan)
    there = ~np.isnan(values).all(axis=0)
    if not there.any():
        return
    x, values = x[there], values[:, there]
    mean = np.nanmean(values, axis=0)
    axis.plot(x, mean, style, label=label, color=colour, marker="o" if len(x) == 1 else None)
    if len(values) > 1:
        runs = (~np.isnan(values)).sum(axis=0)
        deviation = np.nanstd(values, axis=0) * np.sqrt(runs / np.maximum(runs - 1, 1))  # of a sample
        axis.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)


def overlay(runs: Mapping[str, tuple[ArrayLike, Mapping[str, ArrayLike]]], *, x_label: str = "epoch") -> "Figure":
    """Loss and accuracy of several settings over each other, validation as lines and training dashed.

    runs: setting -> (x [t], metric -> [r, t] for r repeats), as from `stack`.
    """
    figure, axes = _figure(2, "", width=11, height=3.8)
    for axis, panel in zip(axes, ("loss", "accuracy"), strict=True):
        for (name, (x, history)), colour in zip(runs.items(), _colours([*runs]).values(), strict=True):
            for part, style in (("train", "--"), ("val", "-")):
                values = np.atleast_2d(np.asarray(history.get(f"{panel}/{part}", np.nan), np.float64))
                label = name if part == "val" else None
                _band(axis, np.asarray(x, np.float64), values, label, colour, style)
        axis.set(xlabel=x_label, ylabel=panel, yscale="log" if panel == "loss" else "linear")
        axis.grid(alpha=0.3, which="both")
    for formatter in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
        formatter("{x:g}")
    figure.subplots_adjust(right=0.76)
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False)
    return figure


def heat_map(xs: Sequence[Any], ys: Sequence[Any], values: Sequence[float], *, names: tuple[str, str, str]) -> "Figure":
    """A grid of results: the mean of values where xs and ys meet, as colour and number.

    xs, ys, values: one entry for each trial. names: of x, y and the value.
    """
    columns, rows = _ordered(xs), _ordered(ys)
    cells = np.full((len(rows), len(columns)), np.nan)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            met = [v for x, y, v in zip(xs, ys, values, strict=True) if (x, y) == (column, row)]
            finite = [v for v in met if math.isfinite(v)]
            cells[i, j] = np.mean(finite) if finite else np.nan
    figure, (axis,) = _figure(1, "", width=2.5 + 0.9 * len(columns), height=1.6 + 0.6 * len(rows))
    image = axis.imshow(cells, origin="lower", aspect="auto", cmap="viridis")
    axis.set(xlabel=names[0], ylabel=names[1])
    axis.set_xticks(range(len(columns)), [_short(v) for v in columns])
    axis.set_yticks(range(len(rows)), [_short(v) for v in rows])
    middle = np.nanmean(cells) if np.isfinite(cells).any() else 0.0
    for i, j in np.argwhere(np.isfinite(cells)):
        colour = "black" if cells[i, j] > middle else "white"
        axis.text(j, i, f"{cells[i, j]:#.4g}", ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axis, label=names[2])
    return figure


def search_path(
    xs: Sequence[float],
    ys: Sequence[float],
    stages: Sequence[str],
    *,
    names: tuple[str, str],
    log: tuple[bool, bool] = (False, False),
    boxes: Mapping[str, Box] | None = None,
    best: tuple[float, float] | None = None,
) -> "Figure":
    """Where a coarse-to-fine search looked: a point for each trial, coloured by stage, and each stage's box.

    names, log: of the two axes. boxes: stage -> its limits. best: marked with a star.
    """
    from matplotlib.patches import Rectangle

    figure, (axis,) = _figure(1, "", width=7, height=5)
    for stage, colour in _colours([*stages, *(boxes or {})]).items():
        points = [(x, y) for x, y, s in zip(xs, ys, stages, strict=True) if s == stage]
        axis.scatter([x for x, _ in points], [y for _, y in points], color=colour, s=24, label=stage)
        if boxes and stage in boxes:
            x0, x1, y0, y1 = boxes[stage]
            axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.5))
    if best is not None:
        axis.scatter(*best, marker="*", s=220, color="red", edgecolor="black", label="best", zorder=3)
    axis.set(
        xlabel=names[0],
        ylabel=names[1],
        xscale="log" if log[0] else "linear",
        yscale="log" if log[1] else "linear",
    )
    axis.autoscale_view()
    axis.grid(alpha=0.3)
    figure.subplots_adjust(right=0.84)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False)
    return figure


def slices(
    points: Mapping[str, Sequence[Any]],
    values: Sequence[float],
    stages: Sequence[str],
    *,
    y_label: str,
    log: Collection[str] = (),
    choices: Mapping[str, Sequence[Any]] | None = None,
) -> "Figure":
    """A result by each parameter: one panel for each, one point for each trial, coloured by stage.

    points: parameter -> one entry for each trial. log: the parameters on a logarithmic axis. choices: the
    parameters that are no numbers on an axis, with their values. Far outliers (see fences) are drawn as
    triangles at the edge.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    rows = math.ceil(len(points) / ACROSS)
    across = math.ceil(len(points) / rows)
    figure, axes = _figure(len(points), "", width=max(3.2 * across, 4.5), height=3.6 * rows, rows=rows)
    figure.subplots_adjust(bottom=0.8 / (3.6 * rows), hspace=0.3)
    for axis in axes[::across]:
        axis.set_ylabel(y_label)
    low, high = fences(values)
    for axis, (name, xs) in zip(axes, points.items(), strict=True):
        words = _ordered(choices[name]) if choices and name in choices else None
        for stage, colour in _colours(stages).items():
            for marker, label in (("o", stage), ("v", None), ("^", None)):
                met = [
                    (x if words is None else words.index(x), min(max(y, low), high))
                    for x, y, s in zip(xs, values, stages, strict=True)
                    if s == stage and marker == ("v" if y < low else "^" if y > high else "o")
                ]
                if met:
                    at, height = zip(*met, strict=True)
                    axis.scatter(at, height, color=colour, s=18, marker=marker, label=label)
        axis.set(xlabel=name, xscale="log" if name in log else "linear")
        if name in log and max(xs) < 10 * min(xs):
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.xaxis.set_major_formatter("{x:g}")
        if name in log:
            axis.xaxis.set_minor_formatter(NullFormatter())
        if words is not None:
            axis.set_xticks(range(len(words)), [_short(w) for w in words], rotation=20 if len(words) > 3 else 0)
        axis.grid(alpha=0.3)
    if len(set(stages)) > 1:
        figure.subplots_adjust(right=1 - 1 / figure.get_figwidth())
        axes[across - 1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False)
    return figure


def fences(values: Sequence[float]) -> tuple[float, float]:
    """The least and the most of the values, but for those more than three interquartile ranges beyond the quartiles."""
    found = np.asarray(values, np.float64)
    first, third = np.quantile(found, (0.25, 0.75))
    reach = 3 * (third - first)
    inside = found[(found >= first - reach) & (found <= third + reach)]
    return float(inside.min()), float(inside.max())


def _colours(stages: Sequence[str]) -> dict[str, Any]:
    """Each stage's colour, from dark to bright in the order of their first appearance."""
    from matplotlib import colormaps

    order = list(dict.fromkeys(stages))
    return {stage: colormaps["viridis"](i / max(len(order) - 1, 1) * 0.9) for i, stage in enumerate(order)}


def _figure(
    panels: int, title: str, width: float | None = None, height: float = 3.4, rows: int = 1
) -> "tuple[Figure, list[Axes]]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width = 4.3 * panels if width is None else width
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, math.ceil(panels / rows), squeeze=False).flat)
    for spare in axes[panels:]:
        spare.remove()
    figure.subplots_adjust(
        left=0.7 / width,
        right=1 - 0.2 / width,
        bottom=0.6 / height,
        top=1 - (0.4 if title else 0.15) / height,
        wspace=0.3,
    )
    if title:
        figure.suptitle(title, fontsize="medium")
    return figure, axes[:panels]


def _ordered(values: Sequence[Any]) -> list[Any]:
    """Each value once; numbers by size, anything else in order of appearance."""
    once = list(dict.fromkeys(values))
    return sorted(once) if all(isinstance(v, int | float) for v in once) else once


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
