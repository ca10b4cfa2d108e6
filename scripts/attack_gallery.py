#!/usr/bin/env python3
"""What every attack does to a picture: clean, poisoned, amplified difference, in one picture and one HTML page.

python scripts/attack_gallery.py                                     all attacks at 32, 64, 160 and 224 pixels
python scripts/attack_gallery.py --attacks badnets,sig --sizes 32,64 --out DIR
python scripts/attack_gallery.py --dataset cifar10 --root DIR        on real images
python scripts/attack_gallery.py --full                              learned triggers as they are trained (hours)
python scripts/attack_gallery.py --sprites docs/attacks              the small pictures of docs/attacks.md

The images are square cuts of scikit-learn's two photographs unless a data set is given. Attacks that learn their
trigger run with QUICK unless --full is given: their pictures then show the form of the trigger, not the trained one.
"""

from __future__ import annotations

import argparse
import base64
import copy
import functools
import hashlib
import html
import io
import json
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a clone works without being installed

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from backdoor_bench.cache import Stages  # noqa: E402
from backdoor_bench.errors import BenchError, ConfigError  # noqa: E402
from backdoor_bench.progress import QuietProgress  # noqa: E402
from backdoor_bench.storage import write_bytes, write_text  # noqa: E402
from backdoor_bench.training.seeds import derive, generator  # noqa: E402
from backdoor_bench.types import AttackerView, Augment, Facts, ImageSet, PoisonedSet, TestCase  # noqa: E402
from scripts.make_attack_docs import fact, header, ids, papers, rule  # noqa: E402

if TYPE_CHECKING:
    from PIL import Image

SIZES, SPRITE_SIZES = (32, 64, 160, 224), (32, 160)
CLASSES = 10
COUNT, QUICK_COUNT, FULL_COUNT = 200, 100, 1000  # training images: of static attacks, of QUICK ones, with --full
# Settings with which a learned attack takes seconds; the triggers are then all but untrained. Tests use them as well.
_LBA = {"target_images": 8, "trig_batches": 1, "trig_batch": 8, "trig_steps": 3}
QUICK: dict[str, dict[str, Any]] = {
    "cl": {"steps": 2},
    "iab": {"mask_epochs": 1, "gen_epochs": 1, "gen_batch": 16, "gen_width": 4, "gen_size": 16, "gen_limit": 32},
    "ssba": {"enc_size": 16, "enc_steps": 1, "enc_batch": 100},
    "lba_14": _LBA,
    "lba_12": _LBA,
    "lba_10": _LBA,
    "natural": {"budgets": [0.04], "classes": [0], "epochs": 2, "n_images": 8, "batch_size": 4},
}
WHEN_TRAINED = {
    "iab": ", which shows on about 3 % of the pixels",
    "ssba": ", which changes a pixel by less than 4 of 255 on average",
}
PHOTOGRAPHS = "photo_digits"  # the data set whose recipe and normalisation go with the photographs
QUICK_TRAIN = ("model=tiny", "train.epochs=1", "train.batch_size=64")
# Attacks without a trigger of their own: what is said instead of a picture.
NOTHING = {
    "none": "poisons nothing and has no trigger",
    "import": "reads a set that another tool has poisoned; there is nothing to draw without one",
}
FACTORS = (1, 2, 3, 5, 8, 10, 15, 20, 30, 50)
GREY = 128  # no difference
MAX_CASES = 4  # test triggers shown of one attack
SIDE = 128  # of an image in the picture; a smaller one is enlarged by whole pixels


@dataclass(frozen=True)
class Shown:
    """One stamped image. kind: train, cover or test. row: of the training set. clean, stamped: uint8 ``[3, H, W]``."""

    kind: str
    caption: str
    row: int
    clean: Tensor
    stamped: Tensor

    @property
    def word(self) -> str:
        """What the stamped image is called."""
        return "cover" if self.kind == "cover" else "triggered"

    def difference(self) -> tuple[Tensor, int]:
        """uint8 ``[3, H, W]``: grey where nothing changed, lighter where the trigger is lighter; and the factor by
        which the difference is amplified (the largest at which nine tenths of what changed still fit)."""
        change = self.stamped.int() - self.clean.int()
        moved = change.abs()[change != 0]
        strong = float(torch.quantile(moved.float(), 0.9)) if len(moved) else GREY
        factor = max(f for f in FACTORS if f == 1 or f * strong <= GREY - 1)
        return (GREY + factor * change).clamp(0, 255).to(torch.uint8), factor


@dataclass
class Entry:
    """An attack with what it does at each size, or why there is nothing to see."""

    id: str
    quick: bool
    sizes: dict[int, list[Shown]] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    failed: bool = False

    @property
    def remark(self) -> str:
        """What has to be said of all its pictures."""
        if self.id in NOTHING:
            return NOTHING[self.id]
        if not self.quick or self.id not in QUICK:
            return ""
        return "quick settings: not the trained trigger" + WHEN_TRAINED.get(self.id, "")

    @property
    def lines(self) -> list[dict[int, Shown]]:
        """What belongs side by side: the same trigger at each size."""
        longest = max((len(shown) for shown in self.sizes.values()), default=0)
        return [
            {size: shown[place] for size, shown in self.sizes.items() if place < len(shown)} for place in range(longest)
        ]


# ---------------------------------------------------------------------- images


@functools.lru_cache(maxsize=8)
def photographs(size: int, count: int, seed: int = 0) -> ImageSet:
    """``count`` square cuts of two photographs, ``size`` pixels a side; class k of 10 is every tenth row.

    Every second row of a class is the same cut, the first one included, so that attacks can be compared.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    stream = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(count):
        which, side, left, top = torch.rand(4, generator=stream).tolist()
        photo = photos[int(which * len(photos))]
        length = round(min(photo.size) * (0.5 + 0.5 * side))
        x, y = round(left * (photo.width - length)), round(top * (photo.height - length))
        if (row // CLASSES) % 2 == 0:
            photo, length, x, y = photos[0], photos[0].height, 0, 0
        small = photo.resize((size, size), Image.Resampling.BILINEAR, box=(x, y, x + length, y + length))
        rows.append(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(size, size, 3))
    return ImageSet(torch.stack(rows).permute(0, 3, 1, 2).contiguous(), torch.arange(count) % CLASSES, CLASSES)


@functools.lru_cache(maxsize=8)
def real_images(size: int, *overrides: str) -> ImageSet:
    """The training images of a data set of ours, resized to ``size``."""
    from hydra.utils import instantiate

    train: ImageSet = instantiate(compose(*overrides).dataset).load(QuietProgress()).train
    images = train.images[torch.arange(len(train))]
    if images.shape[-1] != size:
        images = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return ImageSet(images, train.labels, train.num_classes)


def overrides(given: argparse.Namespace) -> list[str]:
    """The data set of the command line, nothing where none is given."""
    if not given.dataset:
        return []
    root = [f"dataset.root={json.dumps(str(given.root))}"] if given.root else []
    return [f"dataset={given.dataset}", f"dataset.limit={given.count or (FULL_COUNT if given.full else COUNT)}", *root]


def images(size: int, given: argparse.Namespace, count: int) -> ImageSet:
    """The training images that are asked for. count: how many photographs, if the command line does not say."""
    if given.dataset:
        return real_images(size, *overrides(given))
    return photographs(size, given.count or (FULL_COUNT if given.full else count))


# ---------------------------------------------------------------------- attacks


def compose(*overrides: str) -> Any:
    """The configuration of a command line."""
    return copy.deepcopy(_composed(*overrides))


@functools.lru_cache(maxsize=256)
def _composed(*overrides: str) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra_compose("config", list(overrides))


def changed(id_: str, keys: Mapping[str, Any], *overrides: str) -> Any:
    """The configuration with attack ``id_``, some of whose (dotted) keys are changed."""
    from omegaconf import OmegaConf

    config = compose(f"attack={id_}", *overrides)
    for key, value in keys.items():
        if OmegaConf.select(config.attack, key, default=config) is config:
            raise ConfigError(f"attack.{key} does not exist with attack={id_}")
        OmegaConf.update(config, f"attack.{key}", value)
    return config


def build(config: Any) -> Any:
    """The attack of a configuration; what is wrong with a value is raised as it is, not as Hydra wraps it."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(config.attack)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, BenchError):
            cause = cause.__cause__
        raise (cause or error) from None


def make_view(config: Any, train: ImageSet, cache: Path, sets: Path | None = None) -> AttackerView:
    """What run.py would hand the attack of ``config``, with ``train`` as training set. cache: folder of what is learnt,
    and of the stamped rows unless ``sets`` is given."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    hardware = instantiate(config.hardware).resolve()
    recipe = instantiate(config.train, _partial_=True)(hardware=hardware)
    model, dataset = instantiate(config.model), config.dataset
    seed = int(config.attack.get("seed", config.seed))

    def new_model(num_classes: int) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, "model"))
            return model.build(num_classes, train.images.shape[-1], tuple(dataset.mean), tuple(dataset.std))

    class NoRows:
        def record(self, row: Any) -> None: ...
        def listen(self, listener: Any) -> None: ...

    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    content = hashlib.sha256(train.labels.numpy().tobytes())
    content.update(train.images[torch.arange(len(train))].numpy().tobytes())
    shared = [content.hexdigest(), train.num_classes, plain["model"], recipe.key(), seed]
    return AttackerView(
        train=train,
        num_classes=train.num_classes,
        new_model=new_model,
        train_config=recipe,
        generator=generator(seed, "attack"),
        stages=Stages(sets or cache, [*shared, plain["attack"]], QuietProgress(), {}, NoRows()),
        learned=Stages(cache, shared, QuietProgress(), {}, NoRows()),
        device=torch.device(hardware.device),
        progress=QuietProgress(),
    )


def show(view: AttackerView, poisoned: PoisonedSet) -> list[Shown]:
    """One poisoned image of each trigger, one cover image, and the test triggers that differ from those in training."""
    found = []
    triggers = sorted(set(poisoned.trigger_id[poisoned.is_poisoned].tolist()))
    for trigger in triggers:
        which = f"train {triggers.index(trigger) + 1}/{len(triggers)}" if len(triggers) > 1 else "train"
        found.append(_row("train", which, view, poisoned, poisoned.is_poisoned & (poisoned.trigger_id == trigger)))
    if poisoned.train.augment is not None and found:
        found.append(_augmented(found[0], poisoned.train.augment))
    if poisoned.is_cover.any():
        found.append(_row("cover", "cover", view, poisoned, poisoned.is_cover))
    cases: Sequence[Any] = poisoned.tests
    if poisoned.tests_of is not None:
        cases = [*cases, *poisoned.tests_of(view.new_model(view.num_classes).to(view.device).eval())]
    counted = [case for case in cases if isinstance(case, TestCase) and case.counts]
    for case in counted[:MAX_CASES]:
        mine = _case(case, view, found[0].row if found else 0)
        twins = [one for one in found if torch.equal(one.clean, mine.clean) and torch.equal(one.stamped, mine.stamped)]
        if twins:  # a static trigger: the same picture again would say nothing
            known = found.index(twins[0])
            found[known] = replace(twins[0], caption=f"{twins[0].caption}; {mine.caption}")
        else:
            found.append(mine)
    return found


def _row(kind: str, name: str, view: AttackerView, poisoned: PoisonedSet, mask: Tensor) -> Shown:
    """A training row of ``mask``: one with the image that all attacks show and a new label, if there is any."""
    rows = mask.nonzero().flatten()
    same = (view.train.images[rows] == view.train.images[:1]).flatten(1).all(1)
    relabelled = (poisoned.true_labels != poisoned.train.labels)[rows]
    row = int(rows[(2 * same.int() + relabelled.int()).argmax()])
    before, after = int(poisoned.true_labels[row]), int(poisoned.train.labels[row])
    told = f"{name}: label {before} stays" if before == after else f"{name}: label {before} becomes {after}"
    at = torch.tensor([row])
    return Shown(kind, told, row, view.train.images[at][0].cpu(), poisoned.train.images[at][0].cpu())


def _augmented(shown: Shown, augment: Augment) -> Shown:
    """The triggered image as one step of the training gets it, where the attack brings a transform of its own."""
    moved = augment(shown.stamped[None] / 255, torch.Generator().manual_seed(0))[0]
    told = "train, moved as in one step of the training"
    return replace(shown, caption=told, stamped=(moved.clamp(0, 1) * 255).round().to(torch.uint8))


def _case(case: TestCase, view: AttackerView, row: int) -> Shown:
    """A test trigger on the image of training row ``row``."""
    at = torch.tensor([row])
    labels = torch.cat([view.train.labels[at], torch.arange(view.num_classes)])
    label = labels[case.pool(labels)][:1]  # the image's own if it counts
    clean = view.train.images[at]
    told = f"test {case.name}: label {int(label)} is to become {int(case.label_rule(label, at))}"
    return Shown("test", told, row, clean[0].cpu(), case.trigger(clean, at)[0].cpu())


def draw(id_: str, given: argparse.Namespace, cache: Path) -> Entry:
    """Everything there is to see of one attack; an attack that refuses a size, or fails, says so in its notes."""
    entry = Entry(id_, quick=not given.full)
    for size in () if id_ in NOTHING else given.sizes:
        try:
            entry.sizes[size] = _draw(id_, size, given, cache)
        except BenchError as error:
            entry.notes[size] = f"refused: {error}"
        except Exception as error:  # one attack must not stop the others; main then ends with 1
            entry.notes[size] = f"failed: {type(error).__name__}: {error}"
            entry.failed = True
            traceback.print_exc()
    return entry


def _draw(id_: str, size: int, given: argparse.Namespace, cache: Path) -> list[Shown]:
    quick = QUICK.get(id_, {}) if not given.full else {}
    train = images(size, given, QUICK_COUNT if id_ in QUICK else COUNT)
    data = overrides(given) or [f"dataset={PHOTOGRAPHS}"]
    recipe = (f"model={given.model}",) if given.full else QUICK_TRAIN
    config = changed(id_, quick, *data, *recipe, "hardware=cpu", f"hardware.threads={given.threads}")
    _first_rows(config.attack)
    attack = build(config)
    attack.check(Facts(train.num_classes, size, len(train), 1, 1))
    view = make_view(config, train, cache)
    return show(view, attack.poison(view))


def _first_rows(node: Any) -> None:
    """Makes the attack, and those it is composed of, take the first rows: the ones that all attacks show."""
    for key in node:
        if key == "poison_order":
            node[key] = "first"
        elif hasattr(node[key], "keys"):
            _first_rows(node[key])


# ---------------------------------------------------------------------- the picture


def _image(pixels: Tensor) -> Image.Image:
    """A PIL image of uint8 ``[3, H, W]``."""
    from PIL import Image

    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _fitted(pixels: Tensor) -> Image.Image:
    """The same, SIDE pixels wide: enlarged by whole pixels, or reduced by area."""
    from PIL import Image

    image = _image(pixels)
    enlarged = SIDE // image.width * image.width
    if enlarged:
        image = image.resize((enlarged, enlarged), Image.Resampling.NEAREST)
        return image.resize((SIDE, SIDE), Image.Resampling.NEAREST) if enlarged != SIDE else image
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


GAP, TEXT, NAMES = 4, 15, 210  # pixels: between images, a line of text, the column of names


def strip(entry: Entry, sizes: Sequence[int]) -> Image.Image:
    """One attack: a line for each trigger, three images for each size; without images what is to be said instead."""
    from PIL import Image, ImageDraw, ImageFont

    width = NAMES + len(sizes) * (3 * (SIDE + GAP) + 2 * GAP)
    lines = entry.lines
    if lines:
        texts = [part for line in lines[:1] for part in next(iter(line.values())).caption.split("; ")]
        texts = [part for text in (*texts, entry.remark) for part in textwrap.wrap(text, 34)]
    else:
        notes = [f"{size} px: {note}" for size, note in entry.notes.items()]
        texts = [part for text in (entry.remark, *notes) for part in textwrap.wrap(text, 120)]
    height = max(len(lines) * (SIDE + TEXT + GAP), 20 + TEXT * len(texts))
    canvas = Image.new("RGB", (width, height), "white")
    pen, small = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    pen.text((GAP, 0), entry.id, "black", ImageFont.load_default(15))
    pen.multiline_text((GAP, 20), "\n".join(texts), "#444", small)
    for number, line in enumerate(lines):
        top = number * (SIDE + TEXT + GAP)
        if number:
            told = [part for text in next(iter(line.values())).caption.split("; ") for part in textwrap.wrap(text, 34)]
            pen.multiline_text((GAP, top), "\n".join(told), "#444", small)
        for place, size in enumerate(sizes):
            left = NAMES + place * (3 * (SIDE + GAP) + 2 * GAP)
            if size in line:
                _three_fitted(canvas, line[size], size, left, top, small)
            elif not number:
                note = textwrap.wrap(entry.notes.get(size, ""), 60)
                pen.multiline_text((left, top), "\n".join(note), "#a00", small)
    return canvas


def _three_fitted(canvas: Image.Image, shown: Shown, size: int, left: int, top: int, font: Any) -> None:
    """Clean, triggered and difference, with a line below each."""
    from PIL import ImageDraw

    change, factor = shown.difference()
    words = (f"{size} px, clean", shown.word, f"difference x {factor}")
    for column, (pixels, word) in enumerate(zip((shown.clean, shown.stamped, change), words, strict=True)):
        x = left + column * (SIDE + GAP)
        canvas.paste(_fitted(pixels), (x, top))
        ImageDraw.Draw(canvas).text((x, top + SIDE), word, "#444", font)


def picture(entries: Sequence[Entry], sizes: Sequence[int]) -> Image.Image:
    """All attacks, one below the other."""
    from PIL import Image, ImageDraw

    strips = [strip(entry, sizes) for entry in entries]
    space = 10
    canvas = Image.new("RGB", (strips[0].width, sum(one.height + space for one in strips)), "white")
    pen, top = ImageDraw.Draw(canvas), 0
    for one in strips:
        pen.line((0, top, canvas.width, top), "#999")
        canvas.paste(one, (0, top + space // 2))
        top += one.height + space
    return canvas


def _bytes(image: Image.Image, kind: str = "PNG") -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **({"lossless": True, "quality": 60} if kind == "WEBP" else {"optimize": True}))
    return held.getvalue()


# ---------------------------------------------------------------------- the page

STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.45 system-ui,sans-serif;margin:0 auto;max-width:1240px;padding:0 16px 48px}
h1{font-size:1.5rem}h2{margin:0;font-size:1.25rem;font-family:ui-monospace,monospace}
nav ul{display:flex;flex-wrap:wrap;gap:2px 14px;padding:0;list-style:none}
nav b{display:block;margin-top:8px}nav p{margin:0}
article{border-top:1px solid #8888;margin-top:28px;padding-top:14px}
p{margin:6px 0}.small{font-size:.85rem;opacity:.8}.remark{font-size:.9rem;border-left:4px solid #c80;padding-left:8px}
.sizes{display:flex;flex-wrap:wrap;gap:6px 28px;align-items:flex-start}
.three{display:flex;gap:6px;margin:6px 0;max-width:100%}
figure{margin:0;flex:0 1 auto;min-width:0;width:var(--side)}
img{width:100%;height:auto;display:block;image-rendering:pixelated;background:#808080}
.same{aspect-ratio:1;background-size:100% 100%;image-rendering:pixelated}
figcaption{font-size:.75rem;line-height:1.25;overflow-wrap:anywhere}
h3{font-size:.95rem;margin:14px 0 0;font-weight:600}
"""


def page(entries: Sequence[Entry], sizes: Sequence[int], told: str) -> str:
    """The HTML page: no script, nothing fetched, every image inside and without loss."""
    kinds: dict[str, list[str]] = {}
    for entry in entries:
        kinds.setdefault(fact(entry.id).kind, []).append(entry.id)
    links = "".join(
        f"<b>{_text(kind)}</b><ul>" + "".join(f'<li><a href="#{_text(id_)}">{_text(id_)}</a></li>' for id_ in members)
        + "</ul>" for kind, members in kinds.items()
    )  # fmt: skip
    shared: dict[bytes, str] = {}
    body = "".join(_article(entry, sizes, shared) for entry in entries)
    rules = "".join(f".{name}{{background-image:url({_data(pixels)})}}" for pixels, name in shared.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><title>The attacks</title>'
        f"<style>{STYLE}{rules}</style></head><body><h1>The attacks</h1>"
        f"<p>{_text(told)}</p><p>Each row: clean, triggered, and their difference on grey (the same grey: unchanged; "
        "lighter or darker: so is the triggered image), amplified by the factor given. Images up to 64 pixels are "
        f"enlarged.</p><nav>{links}</nav>{body}</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _data(image: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(image).decode()}"


def _article(entry: Entry, sizes: Sequence[int], shared: dict[bytes, str]) -> str:
    """shared: clean images -> the style class that holds them once for all attacks."""
    about = fact(entry.id)
    facts = [about.kind, about.form, f"labels: {rule(entry.id)}", f"papers: {papers(entry.id) or 'none'}"]
    parts = [
        f'<article id="{_text(entry.id)}"><h2>{_text(entry.id)}</h2><p>{_text(header(entry.id)[0])}</p>'
        f'<p class="small">{_text(" · ".join(fact for fact in facts if fact))}</p>'
    ]
    if entry.remark:
        parts.append(f'<p class="remark">{_text(entry.remark)}</p>')
    for size, note in entry.notes.items():
        parts.append(f'<p class="remark">{size} px: {_text(note)}</p>')
    for line in entry.lines:
        parts.append(f"<h3>{_text(next(iter(line.values())).caption)}</h3><div class=sizes>")
        parts += [_three(line[size], size, entry.id, shared) for size in sizes if size in line]
        parts.append("</div>")
    return "".join(parts) + "</article>"


def _three(shown: Shown, size: int, id_: str, shared: dict[bytes, str]) -> str:
    """Clean, triggered and difference at one size."""
    change, factor = shown.difference()
    words = ("clean", shown.word, f"difference × {factor}")
    side = size * max(1, SIDE // size)
    figures = []
    for word, pixels in zip(words, (shown.clean, shown.stamped, change), strict=True):
        image = _bytes(_image(pixels), "WEBP")
        alt = f"{_text(id_)}, {size} pixels, {_text(word)}"
        if word == "clean":
            name = shared.setdefault(image, f"clean{len(shared)}")
            picture = f'<div class="same {name}" role="img" aria-label="{alt}"></div>'
        else:
            picture = f'<img loading="lazy" width="{size}" height="{size}" alt="{alt}" src="{_data(image)}">'
        figures.append(
            f'<figure style="--side:{side}px">{picture}<figcaption>{size} px {_text(word)}</figcaption></figure>'
        )
    return f"<div class=three>{''.join(figures)}</div>"


# ---------------------------------------------------------------------- the command line


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ends the program with 2 where it cannot work."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--attacks", default="", help="ids, with commas; default all")
    parser.add_argument("--sizes", help="pixels, with commas (default 32,64,160,224)")
    parser.add_argument("--out", type=Path, help="folder for gallery.png and gallery.html (default outputs/gallery)")
    parser.add_argument("--sprites", type=Path, metavar="DIR", help="write DIR/<id>.png instead, at 32 and 160 pixels")
    parser.add_argument("--full", action="store_true", help="train what is learnt with the attack's own settings")
    parser.add_argument("--model", default="small_cnn", help="network of --full (default %(default)s)")
    sets = sorted(path.stem for path in (ROOT / "conf" / "dataset").glob("*.yaml"))
    parser.add_argument("--dataset", choices=sets, help="a data set of conf/dataset instead of the photographs")
    parser.add_argument("--root", type=Path, help="its folder")
    parser.add_argument("--count", type=int, help=f"training images (default {COUNT}, {FULL_COUNT} with --full)")
    parser.add_argument("--cache", type=Path, help="folder that keeps what was trained, for the next time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    given = parser.parse_args(argv)
    known = ids()
    given.attacks = [id_ for id_ in given.attacks.split(",") if id_] or known
    for id_ in given.attacks:
        if id_ not in known:
            parser.error(f"--attacks {id_} is unknown; valid: {', '.join(known)}")
    try:
        sizes = SPRITE_SIZES if given.sprites else SIZES
        given.sizes = [int(size) for size in given.sizes.split(",")] if given.sizes else sizes
    except ValueError:
        parser.error(f"--sizes {given.sizes} is no list of numbers")
    if not all(8 <= size <= 512 for size in given.sizes):
        parser.error(f"--sizes {given.sizes}: 8 to 512 pixels")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 if an attack failed, which refusing a size is not."""
    given = parsed(argv)
    torch.set_num_threads(given.threads)
    try:
        images(given.sizes[0], given, COUNT)
    except BenchError as error:  # no attack can be drawn without them
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    with tempfile.TemporaryDirectory() as temporary:
        entries = []
        for id_ in given.attacks:
            start = time.perf_counter()
            entries.append(draw(id_, given, given.cache or Path(temporary)))
            print(
                f"{id_}: {time.perf_counter() - start:.1f} s {'; '.join(dict.fromkeys(entries[-1].notes.values()))}",
                flush=True,
            )
    told = f"Drawn on {f'images of {given.dataset}' if given.dataset else 'square cuts of photographs'}. "
    told += "Learned triggers were trained." if given.full else "Learned triggers are drawn with quick settings."
    if given.sprites:
        for entry in entries:
            if entry.sizes:
                small = strip(entry, given.sizes).quantize(256)  # a third of the bytes
                write_bytes(given.sprites / f"{entry.id}.png", _bytes(small))
    else:
        out = given.out or Path("outputs/gallery")
        write_bytes(out / "gallery.png", _bytes(picture(entries, given.sizes)))
        write_text(out / "gallery.html", page(entries, given.sizes, told))
        print(f"{out / 'gallery.png'}\n{out / 'gallery.html'}")
    return int(any(entry.failed for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
