"""Pictures that methods ask for (types.Figure), joined with the truth and the test set, which only the run has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from backdoor_bench.evaluate import Evaluator, Stamped
from backdoor_bench.inference import forward_all
from backdoor_bench.reporting.figures import (
    _COLOURS,
    _OTHERS,
    _RIGHT,
    _array,
    _bare,
    _by_class,
    _dots,
    _figure,
    _legend,
    _message,
    _name,
    _save,
    _text,
)
from backdoor_bench.types import (
    FeatureScatter,
    Figure,
    ImageRows,
    Images,
    ImageSet,
    LossLandscape,
    Reconstructions,
    SampleMap,
    ScoreHistogram,
    SplitGrid,
    StoredCase,
    TestCase,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 100
MAX_COLUMNS = 10
MAX_FEATURES = 500  # images a group in a scatter
STEPS = 25  # of the landscape, in each direction
REACH = 16 / 255  # of the landscape, root mean square a pixel
_LOG_FROM = 20  # times the highest bin of another group: a linear axis would hide that
_TAIL = 0.002  # share of the scores left out at each end where they stretch the axis
_COVER = _COLOURS[5]
_GROUPS = (("clean", _RIGHT), ("poisoned", "black"), ("cover", _COVER))


def draw(figure: Figure, path: Path, evaluator: Evaluator, train: ImageSet, class_names: Sequence[str]) -> Path | None:
    """The picture of ``figure`` at ``path``; None where what it needs (truth, test set, trigger) is not there.

    train: the poisoned training set, whose rows the scores, splits and truth are about.
    """
    if isinstance(figure, ScoreHistogram):
        return _histogram(figure, path, evaluator)
    if isinstance(figure, ImageRows):
        return _image_rows(figure, path)
    if isinstance(figure, SplitGrid):
        return _split_grid(figure, path, evaluator)
    if isinstance(figure, FeatureScatter):
        return _feature_scatter(figure, path, evaluator, class_names)
    if isinstance(figure, SampleMap):
        return _sample_map(figure, path, evaluator, train, class_names)
    if isinstance(figure, Reconstructions):
        return _reconstructions(figure, path, evaluator)
    return _loss_landscape(figure, path, evaluator, train, class_names)


# ------------------------------------------------------------------ scores


def _histogram(figure: ScoreHistogram, path: Path, evaluator: Evaluator) -> Path:
    scores = _array(figure.scores).astype(np.float64).ravel()
    finite = np.isfinite(scores)
    if not finite.any():
        return _message(path, figure.title, "no finite scores")
    low, high = _range(scores[finite])
    inside = np.clip(scores, low, high)
    groups = []
    for name, colour, mask in _groups(evaluator, len(scores)):
        shown = inside[mask & finite]
        if len(shown):
            counts = np.histogram(shown, BINS, (low, high))[0]
            groups.append((f"{name} ({int(mask.sum()):,})", colour, counts))
    edges = np.linspace(low, high, BINS + 1)

    canvas = _figure(7.5, 4.2, figure.title)
    axis = canvas.subplots()
    for name, colour, counts in groups:
        axis.stairs(counts, edges, fill=True, color=colour, alpha=0.35)
        axis.stairs(counts, edges, color=colour, linewidth=1.3, label=name)
    highest = [counts.max() for _, _, counts in groups]
    if max(highest) > _LOG_FROM * min(highest):
        axis.set_yscale("log")
        axis.set_ylim(bottom=0.7)
    axis.set_xlabel("\n".join([_text(figure.label, 80), *_left_out(scores, low, high)]))
    axis.set_ylabel("training samples a bin")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=9, framealpha=0.85)
    return _save(canvas, path)


def _range(scores: NDArray[np.float64]) -> tuple[float, float]:
    """Where the bins lie: over all scores, but for an end whose last few samples take most of the axis."""
    low, high = float(scores.min()), float(scores.max())
    first, last = (float(value) for value in np.quantile(scores, [_TAIL, 1 - _TAIL]))
    if last > first:
        low = first if first - low > 2 * (last - first) else low
        high = last if high - last > 2 * (last - first) else high
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _left_out(scores: NDArray[np.float64], low: float, high: float) -> list[str]:
    """A line about the scores that have no place of their own on the axis; no line if all have one."""
    finite = scores[np.isfinite(scores)]
    notes = [
        f"{int(rows.sum()):,} {what}"
        for rows, what in ((finite < low, "below in the first bin"), (finite > high, "above in the last bin"))
        if rows.any()
    ]
    if len(finite) < len(scores):
        notes.append(f"{len(scores) - len(finite):,} not finite")
    return [", ".join(notes)] if notes else []


def _groups(evaluator: Evaluator, count: int) -> list[tuple[str, str, NDArray[np.bool_]]]:
    """Name, colour and rows of the kinds of training samples that are known; all in one where nothing is."""
    truth = evaluator.truth
    if truth.is_poisoned is None:
        return [("training samples", _RIGHT, np.ones(count, dtype=bool))]
    poisoned = _array(truth.is_poisoned).astype(bool)
    cover = np.zeros(count, dtype=bool) if truth.is_cover is None else _array(truth.is_cover).astype(bool)
    masks = (~poisoned & ~cover, poisoned, cover)
    return [(name, colour, mask) for (name, colour), mask in zip(_GROUPS, masks, strict=True) if mask.any()]


# ------------------------------------------------------------------ images


def _image_rows(figure: ImageRows, path: Path) -> Path:
    count = min((len(images) for images in figure.rows.values()), default=0)
    count = min(count, MAX_COLUMNS)
    if count == 0:
        return _message(path, figure.title, "no images to show")
    columns = max(count, 5)  # room for the title
    canvas = _figure(1.15 * columns + 1.0, 1.25 * len(figure.rows) + 0.5, figure.title)
    axes = canvas.subplots(len(figure.rows), columns, squeeze=False)
    for row, (name, images) in enumerate(figure.rows.items()):
        pixels = images[:count].detach().float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        for column in range(columns):
            axis = axes[row, column]
            _bare(axis)
            if column >= count:
                axis.set_visible(False)
                continue
            axis.imshow(pixels[column], interpolation="nearest")
        axes[row, 0].set_ylabel(_text(name, 18), fontsize=9)
    return _save(canvas, path)


def _reconstructions(figure: Reconstructions, path: Path, evaluator: Evaluator) -> Path | None:
    """Test images without and with trigger, of the same rows where these are known, each above what is made of them."""
    stamped = next((case for case in evaluator.stamped() if len(case.wanted)), None)
    parts: dict[str, Tensor] = {}
    if evaluator.test is not None:
        rows = torch.arange(len(evaluator.test))
        if stamped is not None and isinstance(stamped.case, TestCase):
            rows = stamped.case.pool(evaluator.test.labels).nonzero().flatten()
        parts["clean"] = evaluator.test.images[rows[_spread(len(rows))]]
    if stamped is not None:
        parts["triggered"] = stamped.images[_spread(len(stamped.wanted))]
    if not parts:
        return None
    shown: dict[str, Tensor] = {}
    for name, images in parts.items():
        # figure.made is no module: the mode of its network is the method's business.
        made = forward_all(nn.Identity(), images, evaluator.hardware, figure.made)
        shown |= {name: images.cpu().float() / 255, f"{name}, decoded": made}
    return _image_rows(ImageRows(figure.name, figure.title, shown), path)


def _spread(count: int) -> Tensor:
    """int64, up to MAX_COLUMNS places evenly over ``count``."""
    return torch.linspace(0, count - 1, min(MAX_COLUMNS, count)).long()


# ------------------------------------------------------------------ splits


def _split_grid(figure: SplitGrid, path: Path, evaluator: Evaluator) -> Path | None:
    if evaluator.truth.is_poisoned is None:
        return None
    size = len(figure.names)
    maps = {key: np.full((size, size), np.nan) for key in ("clean_precision", "poison_precision")}
    for (first, second), split in figure.splits.items():
        found = evaluator.isolation_metrics(split.flagged, split.trusted)
        place = figure.names.index(first), figure.names.index(second)
        for key, values in maps.items():
            value = found[key]
            values[place] = np.nan if value is None else 100 * value

    longest = max(len(_text(name, 16)) for name in figure.names)
    canvas = _figure(2 * (0.6 * size + 0.09 * longest) + 1.6, 0.6 * size + 0.05 * longest + 1.1, figure.title)
    axes = canvas.subplots(1, 2)
    names = [_text(name, 16) for name in figure.names]
    for axis, (key, values) in zip(axes, maps.items(), strict=True):
        axis.set_facecolor("#EEEEEE")
        shown = axis.imshow(values, cmap="cividis", vmin=0, vmax=100)
        for row in range(size):
            for column in range(size):
                value = values[row, column]
                text, colour = ("–", "#444444") if math.isnan(value) else (f"{value:.0f}", _ink(value))
                axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
        axis.set_xticks(range(size), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
        axis.set_yticks(range(size), names, fontsize=8)
        axis.set_title(f"{key.replace('_', ' ')} (%)", fontsize=11)
        axis.set_xlabel(_text(figure.axes[1], 40))
    axes[0].set_ylabel(_text(figure.axes[0], 40))
    canvas.colorbar(shown, ax=list(axes), shrink=0.8)
    return _save(canvas, path)


def _ink(percent: float) -> str:
    return "white" if percent < 55 else "black"


# ------------------------------------------------------------------ features


class _Triggered(NamedTuple):
    """uint8 images of one true class (None: of any) with a trigger, and the classes to compare them with."""

    images: Images
    source: int | None
    target: int


def _feature_scatter(
    figure: FeatureScatter, path: Path, evaluator: Evaluator, class_names: Sequence[str]
) -> Path | None:
    """Clean images of the target, clean images of another class, and the latter with the trigger (T&R Fig. 2)."""
    stamped = [case for case in evaluator.stamped() if len(case.wanted)]
    if evaluator.test is None or not stamped:
        return None
    triggered = _one_class(stamped[0], evaluator.test.labels)
    labels = evaluator.test.labels
    other = triggered.source
    if other is None:
        other = next((int(c) for c in labels.unique() if c != triggered.target), triggered.target)
    groups = [
        (f"{_name(class_names, triggered.target, 24)} (target), clean", _RIGHT, triggered.target),
        (f"{_name(class_names, other, 24)}, clean", _COLOURS[5], other),
    ]
    parts = [
        (name, colour, evaluator.test.images[(labels == label).nonzero().flatten()[:MAX_FEATURES]])
        for name, colour, label in groups
    ]
    kind = "" if triggered.source is None else f"{_name(class_names, triggered.source, 24)}, "
    parts.append((f"{kind}with trigger", "black", triggered.images[:MAX_FEATURES]))
    # figure.features is no module: the mode of its network is the method's business.
    features = [forward_all(nn.Identity(), part, evaluator.hardware, figure.features).float() for _, _, part in parts]
    points, shares = principal_components(torch.cat(features))

    canvas = _figure(6.6, 5.9, figure.title)
    axis = canvas.subplots()
    entries, start = [], 0
    for (name, colour, part), own in zip(parts, features, strict=True):
        _dots(axis, points[start : start + len(own)], 11, colour)
        entries.append((f"{name} ({len(part):,})", colour))
        start += len(own)
    _bare(axis)
    axis.set_xlabel(f"first principal component ({shares[0]:.0%} of the variance)", fontsize=9)
    axis.set_ylabel(f"second ({shares[1]:.0%})", fontsize=9)
    _legend(axis, entries)
    legend = axis.get_legend()
    assert legend is not None
    legend.set_bbox_to_anchor((0.5, -0.06))
    return _save(canvas, path)


def _one_class(stamped: Stamped, labels: Tensor) -> _Triggered:
    """The triggered images of the lowest true class, and the class that most of them are to get."""
    case, images, wanted = stamped
    if isinstance(case, StoredCase):  # their true labels are unknown
        return _Triggered(images, None, int(wanted.mode().values))
    true = labels[case.pool(labels)]
    source = int(true.min())
    rows = (true == source).nonzero().flatten()
    return _Triggered(images[rows], source, int(wanted[rows.to(wanted.device)].mode().values))


def principal_components(features: Tensor) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """(float64 [B, 2], shares of the variance) of features float [B, D]; zeros where there are fewer components."""
    centred = _array(features).astype(np.float64)
    centred = centred - centred.mean(0)
    left, scale, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(centred), 2))
    shares = np.zeros(2)
    kept = min(2, len(scale))
    points[:, :kept] = left[:, :kept] * scale[:kept]
    shares[:kept] = scale[:kept] ** 2 / max(float((scale**2).sum()), 1e-30)
    return points, (float(shares[0]), float(shares[1]))


def _sample_map(
    figure: SampleMap, path: Path, evaluator: Evaluator, train: ImageSet, class_names: Sequence[str]
) -> Path:
    truth = evaluator.truth.is_poisoned
    poisoned = None if truth is None else _array(truth[figure.rows]).astype(bool)
    labels = _array(train.labels.cpu()[figure.rows])
    panels = {name: _array(points).astype(np.float64) for name, points in figure.panels.items()}
    together = np.concatenate(list(panels.values()))
    middle, reach = (together.max(0) + together.min(0)) / 2, 0.54 * max(float(np.ptp(together, axis=0).max()), 1e-6)
    size = float(np.clip(25_000 / len(labels), 1.2, 14))
    nowhere, everywhere = np.zeros(len(labels), dtype=bool), np.ones(len(labels), dtype=bool)

    canvas = _figure(6.0 * len(panels), 7.6, figure.title)  # square panels, a legend of four rows
    axes = canvas.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, points) in zip(axes, panels.items(), strict=True):
        _by_class(axis, points, labels, class_names, poisoned, nowhere, everywhere, size)
        axis.set_xlim(middle[0] - reach, middle[0] + reach)
        axis.set_ylim(middle[1] - reach, middle[1] + reach)
        axis.set_aspect("equal")
        _bare(axis)
        axis.set_title(_text(name, 60), fontsize=11)
    return _save(canvas, path)


# ------------------------------------------------------------------ loss


def _loss_landscape(
    figure: LossLandscape, path: Path, evaluator: Evaluator, train: ImageSet, class_names: Sequence[str]
) -> Path | None:
    """CE of the given label over x + a u + b v: u along the loss's gradient, v random and orthogonal (MeCa Fig. 5)."""
    truth = evaluator.truth
    if truth.is_poisoned is None or not truth.is_poisoned.any():
        return None
    cover = torch.zeros_like(truth.is_poisoned) if truth.is_cover is None else truth.is_cover
    panels = []
    for name, mask in (("clean", ~(truth.is_poisoned | cover)), ("poisoned", truth.is_poisoned)):
        rows = mask.nonzero().flatten()[:1]
        if len(rows):
            label = train.labels[rows.to(train.labels.device)]
            image = evaluator.hardware.images(train.images[rows])
            losses = landscape(figure.model, image, label.to(image.device), evaluator.hardware.autocast)
            panels.append((f"{name} sample {int(rows)}, label {_name(class_names, label, 16)}", losses))

    canvas = _figure(1.0 + 4.4 * len(panels), 4.5, figure.title)
    highest = max(float(losses.max()) for _, losses in panels)
    axes = canvas.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, losses) in zip(axes, panels, strict=True):
        shown = _surface(axis, losses, max(highest, 1e-6))
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("a: along the gradient (/255, RMS a pixel)", fontsize=9)
    axes[0].set_ylabel("b: a random orthogonal direction", fontsize=9)
    canvas.colorbar(shown, ax=list(axes), shrink=0.85, label="cross-entropy of the given label")
    return _save(canvas, path)


def _surface(axis: Axes, losses: NDArray[np.float64], highest: float) -> Any:
    reach = 255 * REACH
    extent = (-reach, reach, -reach, reach)
    shown = axis.imshow(losses, origin="lower", extent=extent, cmap="cividis", vmin=0, vmax=highest)
    if np.ptp(losses) > 0.02 * highest:
        levels = np.linspace(losses.min(), losses.max(), 8)[1:-1]
        lines = axis.contour(losses, levels=levels, extent=extent, colors="white", linewidths=0.8)
        axis.clabel(lines, fontsize=7, fmt="%.2g")
    axis.plot(0, 0, "o", color=_OTHERS, markersize=6, markeredgecolor="black")
    return shown


def landscape(model: nn.Module, image: Tensor, label: Tensor, autocast: Any) -> NDArray[np.float64]:
    """float64 [25, 25]: the loss at x + a u + b v, rows by b, columns by a, both in +-16/255 sqrt(d) for d pixels.

    image: float [1, 3, H, W] in [0, 1]; label: int64 [1]. u, v have length 1, so that a moves a pixel by up to 16/255
    (root mean square); values beyond [0, 1] are not clipped. A gradient of zero gives a random u.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    point = image.detach().clone().requires_grad_()
    with torch.enable_grad(), autocast():
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(point).float(), label), point)
    stream = torch.Generator().manual_seed(0)
    random = torch.randn(2, *image.shape[1:], generator=stream).to(image.device)
    u = gradient if float(gradient.norm()) > 0 else random[:1]
    u = u / u.norm()
    v = random[1:] - (random[1:] * u).sum() * u
    v = v / v.norm()
    steps = torch.linspace(-1, 1, STEPS, device=image.device) * REACH * math.sqrt(image.numel())
    rows = []
    with torch.no_grad(), autocast():
        for b in steps:
            points = image + steps.view(-1, 1, 1, 1) * u + b * v
            rows.append(F.cross_entropy(model(points).float(), label.expand(STEPS), reduction="none"))
    for module, mode in modes:
        module.training = mode
    return _array(torch.stack(rows)).astype(np.float64)
