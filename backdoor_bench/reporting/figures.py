"""Pictures of a run, drawn without global matplotlib state; each function writes one PNG and returns its path.

Names of classes and stages come from users' folders: they are shortened, stripped of control characters and never read
as mathematics.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from backdoor_bench.progress import printable
from backdoor_bench.storage import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
MAX_PAIRS = 10
MAX_FLAGGED = 64
_MAX_NAMED = 10  # classes or clusters with a colour and a legend entry of their own
# Apart for the usual kinds of colour blindness: Paul Tol's "muted" set and orange. Black is left for poison.
_COLOURS = (
    "#332288", "#DDCC77", "#CC6677", "#44AA99", "#88CCEE", "#EE7733", "#117733", "#AA4499", "#999933", "#882255",
)  # fmt: skip
_OTHERS = "#B8BEC6"
_NOISE = "#D4D4D4"
_RIGHT, _WRONG = "#0072B2", "#D55E00"  # Okabe and Ito's blue and vermilion
# What the two stages of a method that detects epoch after epoch mean, in words.
_EPOCHS = {"detection": "each epoch alone", "isolation": "all so far"}

ArrayLike = Tensor | NDArray[Any] | Sequence[Any]


def pairs_grid(
    path: Path,
    clean: Tensor,
    poisoned: Tensor,
    labels_before: ArrayLike,
    labels_after: ArrayLike,
    class_names: Sequence[str],
    title: str,
) -> Path:
    """Rows of clean images, the same with the trigger, and their difference, amplified to full range.

    clean, poisoned: uint8 [K, 3, H, W] (the first 10 are shown); labels_before, labels_after: int [K].
    """
    count = min(len(clean), MAX_PAIRS)
    if count == 0:
        return _message(path, title, "no poisoned images to show")
    before, after = _array(labels_before), _array(labels_after)
    pixels = [_pixels(clean[:count]), _pixels(poisoned[:count])]
    difference = np.abs(pixels[1].astype(np.int16) - pixels[0].astype(np.int16))
    factor = max(1, 255 // max(1, int(difference.max())))
    pixels.append((difference * factor).clip(0, 255).astype(np.uint8))

    columns = max(count, 4)  # room for the title
    figure = _figure(1.15 * columns + 1.0, 4.6, title)
    axes = figure.subplots(3, columns, squeeze=False)
    names = ("clean", "poisoned", f"difference\n×{factor}" if factor > 1 else "difference")
    for row, (name, images) in enumerate(zip(names, pixels, strict=True)):
        for column in range(columns):
            axis = axes[row, column]
            _bare(axis)
            if column >= count:
                axis.set_visible(False)
                continue
            axis.imshow(images[column], interpolation="nearest")
            if row == 0:
                axis.set_title(_name(class_names, before[column], 13), fontsize=8)
            if row == 1:
                changed = before[column] != after[column]
                text = f"→ {_name(class_names, after[column], 11)}" if changed else "label kept"
                axis.set_title(text, fontsize=8, color=_WRONG if changed else "#444444")
        axes[row, 0].set_ylabel(name, fontsize=9)
    return _save(figure, path)


def map_scatter(
    path: Path,
    points: ArrayLike,
    given_labels: ArrayLike,
    cluster_labels: ArrayLike,
    class_names: Sequence[str],
    is_poisoned: ArrayLike | None = None,
    *,
    suspicious_ids: Sequence[int],
    flagged: ArrayLike | None,
    title: str,
    eps: float | None,
) -> Path:
    """The 2-D map of the training samples twice: by given class (poisoned ones black, where known) and by cluster
    (noise light grey, suspicious clusters on a black edge).

    points: float [N, 2]; given_labels: int [N]; cluster_labels: int [N], -1 = noise; is_poisoned, flagged: bool [N] or
    None; eps: DBSCAN's radius, drawn as a scale, or None. Of many classes the ten with most flagged samples are named.
    """
    xy = _array(points).astype(np.float64).reshape(-1, 2)
    labels, clusters = _array(given_labels), _array(cluster_labels)
    shown: NDArray[np.bool_] = np.asarray(np.isfinite(xy).all(axis=1))
    if not shown.any():
        return _message(path, title, "the map has no finite points")
    flags = np.zeros(len(xy), dtype=bool) if flagged is None else _array(flagged).astype(bool)
    truth = None if is_poisoned is None else _array(is_poisoned).astype(bool)

    figure = _figure(12.0, 6.9, title)
    left, right = figure.subplots(1, 2)
    size = float(np.clip(25_000 / len(xy), 1.2, 14))
    _by_class(left, xy, labels, class_names, truth, flags, shown, size)
    _by_cluster(right, xy, clusters, set(suspicious_ids), shown, size)
    for axis in (left, right):
        axis.set_aspect("equal", adjustable="datalim")
        _bare(axis)
        axis.margins(0.04)
    _scale(right, eps)
    left.set_title("by given class" + ("" if truth is None else ", poisoned samples black"), fontsize=11)
    found = f"by cluster: {len(set(suspicious_ids))} of {len(set(clusters[clusters >= 0].tolist()))} suspicious"
    if flagged is not None:
        found += f", {int(flags.sum()):,} of {len(xy):,} samples flagged"
    right.set_title(found, fontsize=11)
    return _save(figure, path)


def curves(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Left: ACC and ASR by epoch, one panel a stage; right: precision and recall by detection epoch, one line style a
    stage (each epoch alone, and the union so far).

    rows: as in metrics.csv, with ``stage``, ``epoch`` and, where known, ``acc``, ``asr``, ``precision``, ``recall`` as
    fractions or None. Without any of these (a folder of unknown truth) the loss is drawn.
    """
    models = _series(rows, ("acc", "asr"))
    found = _series(rows, ("precision", "recall"))
    if not models and not found:
        return _losses(path, rows)
    spans = [max(3, min(12, len({e for line in lines.values() for e, _ in line}))) for lines in models.values()]
    ratios = [*spans, *([max(8, sum(spans) * 0.6)] if found else [])]
    figure = _figure(min(14.0, max(6.5, 2.2 * len(models) + 5.0 * bool(found) + 2.5)), 4.4, "Curves of this run")
    axes = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    first = True
    for axis, (stage, lines) in zip(axes, models.items(), strict=False):
        for key, colour, marker in (("acc", _RIGHT, "o"), ("asr", _WRONG, "s")):
            _line(axis, lines[key], colour, marker, "-", key.upper())
        axis.set_title(_text(stage, 18), fontsize=10, pad=9)
        _percent_axis(axis, "ACC and ASR (%)" if first else "")
        if first:
            axis.legend(loc="best", fontsize=8, framealpha=0.85)
        first = False
    if found:
        axis = axes[-1]
        styles = ("--", "-", ":", "-.")
        # Where two stages report, the first one's epochs stand alone and the later ones gather.
        order = styles if len(found) > 1 else styles[1:]
        together = {"detection", "isolation"} <= found.keys()
        for (stage, lines), style in zip(found.items(), order * len(found), strict=False):
            name = _EPOCHS.get(stage, stage) if together else stage
            for key, colour, marker in (("precision", _COLOURS[6], "^"), ("recall", _COLOURS[7], "v")):
                _line(axis, lines[key], colour, marker, style, f"{key}, {_text(name, 18)}")
        axis.set_title("poisoned samples found", fontsize=10, pad=9)
        _percent_axis(axis, "precision and recall (%)")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=8, frameon=False)
    return _save(figure, path)


def flagged_grid(
    path: Path,
    images: Tensor,
    labels: ArrayLike,
    scores: ArrayLike | None,
    truth: ArrayLike | None,
    class_names: Sequence[str],
    total: int | None = None,
) -> Path:
    """The first 64 flagged images with label and score, framed blue where the sample is poisoned and orange where it is
    not, if the truth is known.

    images: uint8 [K, 3, H, W] in the order of display; labels: int [K]; scores: float [K] or None; truth: bool [K]
    (True = poisoned) or None; total: how many were flagged in all (K by default).
    """
    total = len(images) if total is None else total
    count = min(len(images), MAX_FLAGGED)
    if count == 0:
        return _message(path, "Flagged samples", "nothing was flagged")
    pixels, numbers = _pixels(images[:count]), _array(labels)
    values = None if scores is None else _array(scores)
    known = None if truth is None else _array(truth).astype(bool)
    columns = 8 if count > 8 else max(count, 4)
    lines = math.ceil(count / columns)
    title = f"Flagged samples: {count} of {total:,}" if count < total else f"All {total:,} flagged samples"
    height = 0.55 + (0.35 if known is not None else 0.0) + (1.55 if values is not None else 1.42) * lines
    figure = _figure(
        1.25 * columns + 0.4, height, title + (", label and score" if values is not None else ", with label")
    )
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for index, axis in enumerate(axes):
        _bare(axis)
        if index >= count:
            axis.set_visible(False)
            continue
        axis.imshow(pixels[index], interpolation="nearest")
        text = _name(class_names, numbers[index], 14)
        axis.set_title(text if values is None else f"{text}\n{values[index]:.3g}", fontsize=7.5, pad=4)
        if known is not None:
            for spine in axis.spines.values():
                spine.set(color=_RIGHT if known[index] else _WRONG, linewidth=3)
    if known is not None:
        _frame_legend(figure, known, count)
    return _save(figure, path)


def _frame_legend(figure: Figure, known: NDArray[np.bool_], count: int) -> None:
    from matplotlib.patches import Patch

    right = int(known[:count].sum())
    handles = [Patch(facecolor="none", edgecolor=colour, linewidth=3) for colour in (_RIGHT, _WRONG)]
    names = [f"poisoned ({right})", f"not poisoned ({count - right})"]
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=9, frameon=False)


def _by_class(
    axis: Axes,
    xy: NDArray[np.float64],
    labels: NDArray[Any],
    class_names: Sequence[str],
    truth: NDArray[np.bool_] | None,
    flags: NDArray[np.bool_],
    shown: NDArray[np.bool_],
    size: float,
) -> None:
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) > _MAX_NAMED:
        hits = [int((flags & (labels == c)).sum()) for c in classes]
        order = sorted(range(len(classes)), key=lambda i: (-hits[i], -counts[i], i))
        named = sorted(int(classes[i]) for i in order[:_MAX_NAMED])
    else:
        named = [int(c) for c in classes]
    colour_of = dict(zip(named, _COLOURS, strict=False))
    benign = shown if truth is None else shown & ~truth
    entries = [(_name(class_names, c, 16), colour_of[c]) for c in named]
    if len(classes) > len(named):
        entries.append((f"{len(classes) - len(named)} other classes", _OTHERS))
        rest = benign & ~np.isin(labels, named)
        _dots(axis, xy[rest], size, _OTHERS)
    rows = np.flatnonzero(benign & np.isin(labels, named))
    # Mixed order: no class lies on top of the others.
    rows = np.random.default_rng(0).permutation(rows)
    _dots(axis, xy[rows], size, [colour_of[int(c)] for c in labels[rows]])
    if truth is not None:
        _dots(axis, xy[shown & truth], size * 1.3, "black")
        entries.append((f"poisoned ({int(truth.sum()):,})", "black"))
    _legend(axis, entries)


def _by_cluster(
    axis: Axes,
    xy: NDArray[np.float64],
    clusters: NDArray[Any],
    suspicious: set[int],
    shown: NDArray[np.bool_],
    size: float,
) -> None:
    noise = shown & (clusters < 0)
    _dots(axis, xy[noise], size, _NOISE)
    ids, counts = np.unique(clusters[clusters >= 0], return_counts=True)
    count_of = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    by_size = sorted(count_of, key=lambda i: (-count_of[i], i))
    # In the legend: the largest, then the suspicious ones, then the rest, as far as there are colours.
    named = sorted(by_size, key=lambda i: (i != by_size[0], i not in suspicious))[:_MAX_NAMED]
    colour_of = dict(zip(named, _COLOURS, strict=False))
    for cluster in sorted(by_size, key=lambda i: i in suspicious):  # suspicious ones on top
        rows = shown & (clusters == cluster)
        if cluster in suspicious:
            _dots(axis, xy[rows], (math.sqrt(size) + 2.4) ** 2, "black")
        _dots(axis, xy[rows], size, colour_of.get(cluster, _OTHERS))
    marked = [cluster in suspicious for cluster in named]
    entries = [
        (f"{cluster}: {count_of[cluster]:,}{' suspicious' if mark else ''}", colour_of[cluster])
        for cluster, mark in zip(named, marked, strict=True)
    ]
    if len(by_size) > len(named):
        rest = sum(count_of.values()) - sum(count_of[i] for i in named)
        entries.append((f"{len(by_size) - len(named)} more: {rest:,}", _OTHERS))
    if noise.any():
        entries.append((f"noise: {int(noise.sum()):,}", _NOISE))
    _legend(axis, entries, marked)


def _dots(axis: Axes, points: NDArray[np.float64], size: float, colour: str | Sequence[str]) -> None:
    axis.scatter(points[:, 0], points[:, 1], s=size, c=colour, linewidths=0, rasterized=True)


def _legend(axis: Axes, entries: Sequence[tuple[str, str]], marked: Sequence[bool] = ()) -> None:
    from matplotlib.lines import Line2D

    edges = [*marked, *[False] * (len(entries) - len(marked))]
    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker="o",
            markersize=7,
            color=colour,
            markeredgecolor="black" if edge else colour,
            markeredgewidth=1.6 if edge else 0.0,
        )
        for (_, colour), edge in zip(entries, edges, strict=True)
    ]
    # Numbers first, texts after: matplotlib drops entries whose label starts with an underscore.
    legend = axis.legend(
        handles,
        [str(i) for i in range(len(entries))],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=4 if max((len(name) for name, _ in entries), default=0) <= 15 else 3,
        fontsize=8,
        frameon=False,
        columnspacing=1.2,
        handletextpad=0.2,
    )
    for text, (name, _) in zip(legend.get_texts(), entries, strict=True):
        text.set_text(name)


def _scale(axis: Axes, eps: float | None) -> None:
    """A bar of length eps: whether eps fits the extent of the map is the first thing to look at."""
    if eps is None:
        return
    from matplotlib.transforms import blended_transform_factory

    low, high = axis.get_xlim()
    start = low + 0.03 * (high - low)
    across = blended_transform_factory(axis.transData, axis.transAxes)
    axis.plot([start, start + eps], [0.03, 0.03], color="black", linewidth=3, solid_capstyle="butt", transform=across)
    axis.text(start, 0.04, f"eps {eps:g}", fontsize=8, va="bottom", transform=across)


def _losses(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """The loss by epoch of each stage: what there is to show without test set and truth."""
    stages: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get("loss") is not None:
            stages.setdefault(str(row["stage"]), []).append((float(row["epoch"]), float(row["loss"])))
    if not stages:
        return _message(path, "Curves", "no epochs were recorded")
    figure = _figure(6.5, 4.2, "Training loss (no test set, no known truth)")
    axis = figure.subplots()
    for (stage, points), colour, marker in zip(
        stages.items(), (_RIGHT, _WRONG) * len(stages), "os" * len(stages), strict=False
    ):
        _line(axis, points, colour, marker, "-", _text(stage, 18))
    axis.set_xlabel("epoch")
    axis.set_ylabel("loss")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    return _save(figure, path)


def _series(
    rows: Sequence[Mapping[str, Any]], keys: tuple[str, str]
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By stage, in the order of the rows: (epoch, percent) of each key where there is a value."""
    result: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for key in keys:
            value = row.get(key)
            if value is not None and math.isfinite(value):
                lines = result.setdefault(str(row["stage"]), {name: [] for name in keys})
                lines[key].append((float(row["epoch"]), 100 * float(value)))
    return result


def _line(axis: Axes, points: Sequence[tuple[float, float]], colour: str, marker: str, style: str, label: str) -> None:
    if points:
        x, y = zip(*sorted(points), strict=True)
        size = 4.5 if len(x) <= 30 else 0.0
        axis.plot(x, y, style, color=colour, marker=marker, markersize=size, linewidth=1.6, label=label, clip_on=False)


def _percent_axis(axis: Axes, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_ylim(0, 100)
    axis.set_ylabel(label)
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _bare(axis: Axes) -> None:
    axis.set_xticks([])
    axis.set_yticks([])


def _message(path: Path, title: str, text: str) -> Path:
    figure = _figure(6.0, 2.2, title)
    figure.text(0.5, 0.42, _text(text, 80), ha="center", va="center", fontsize=11, color="#444444")
    return _save(figure, path)


def _figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.06))
    figure.suptitle(_text(title, int(width * 10)), fontsize=12)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A class name in a script that the font lacks is drawn as boxes, which needs no word.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())
    return path


def _text(value: object, length: int) -> str:
    """One line of at most ``length`` characters that matplotlib shows as it is."""
    line = " ".join(printable(str(value)).split())
    line = line if len(line) <= length else line[: length - 1] + "…"
    return line.replace("$", r"\$")


def _name(class_names: Sequence[str], label: Any, length: int) -> str:
    return _text(class_names[int(label)], length)


def _array(values: ArrayLike) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _pixels(images: Tensor) -> NDArray[np.uint8]:
    """uint8 [K, 3, H, W] -> [K, H, W, 3]."""
    return images.detach().cpu().permute(0, 2, 3, 1).contiguous().numpy()
