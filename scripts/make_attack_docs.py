#!/usr/bin/env python3
"""docs/attacks.md from conf/attack/*.yaml: a table of all attacks, and of each its options with defaults and sources.

python scripts/make_attack_docs.py            write docs/attacks.md
python scripts/make_attack_docs.py --check    end with 1 if it is not what the files say

What an attack is comes from the YAML (first line, header, comments); FACTS adds what no option says.
"""

from __future__ import annotations

import argparse
import csv
import functools
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a clone works without being installed

CONF = ROOT / "conf" / "attack"
PAGE = ROOT / "docs" / "attacks.md"
REFERENCE = ROOT / "backdoor_bench" / "reference"  # what the papers print
PAPERS = {"trap": "TRAP", "ebd": "EBD", "tr": "T&R", "meca": "MeCa"}
PICTURES = "attacks"  # folder beside the page
COMMAND = "python scripts/make_attack_docs.py"


class Fact(NamedTuple):
    """kind: family; form: what the trigger does to an image. learns: what is trained before anything is poisoned.
    tests: which test images count, where the label rule alone does not say it."""

    kind: str
    form: str
    learns: str = ""
    tests: str = ""


_TWO = "no image of the part's target class; the mean over the two triggers"
_LBA = Fact(
    "adaptive", "an optimised patch that looks like the target class at a hidden layer", "a model, then the patch"
)
FACTS = {
    "none": Fact("no poison", "nothing", tests="no triggered images: the ASR is null"),
    "badnets": Fact("patch", "static, overwrites"),
    "badnets_grid": Fact("patch", "static, overwrites"),
    "badnets_white": Fact("patch", "static, overwrites"),
    "badnets_all2all": Fact("patch", "static, overwrites"),
    "trojan": Fact("patch", "static, adds and wraps"),
    "trojan_sq": Fact("patch", "static, adds and saturates"),
    "trojan_wm": Fact("patch", "static, sparse, adds"),
    "l0_inv": Fact("patch", "static, nine pixels"),
    "physical": Fact("patch", "static, with random transformations in training"),
    "blend_strip": Fact("blend", "static, whole image"),
    "blend_kitty": Fact("blend", "static, whole image"),
    "l2_inv": Fact("blend", "static, adds to the whole image"),
    "smooth": Fact(
        "blend", "static, low frequencies, then stretched", "only when regenerated: a model, then the pattern"
    ),
    "sig": Fact("clean label", "static, whole image"),
    "cl": Fact(
        "clean label", "adversarial noise and corner patches; at test the patches alone",
        "a classifier, then adversarial images",
    ),
    "instagram": Fact("feature space", "a colour filter, differs an image"),
    "wanet": Fact("feature space", "a warp, differs an image; cover images with another warp"),
    "iab": Fact("feature space", "a generated pattern, differs an image", "two generators"),
    "ssba": Fact("feature space", "a hidden message, differs an image", "an encoder and a decoder"),
    "adap_blend": Fact("adaptive", "a blend in random pieces in training, whole at test; cover images"),
    "adap_patch": Fact("adaptive", "four patches, apart in training, together at test; cover images"),
    "tact": Fact(
        "adaptive", "static patch; cover images of other classes",
        tests="images of the source class; the other classes are listed apart",
    ),
    "multi_1trig_2target": Fact(
        "adaptive", "one patch, two targets",
        tests="every image, against one of the two targets drawn by seed (never its own class): about half can succeed",
    ),
    "multi_1trig_sub2sub": Fact(
        "adaptive", "one patch, two source classes with a target each", tests="images of the source classes"
    ),
    "multi_2trig_1target": Fact("adaptive", "two patches, one target", tests=_TWO),
    "multi_2trig_2target": Fact("adaptive", "two patches, a target each", tests=_TWO),
    "multi_2trig_all2all": Fact(
        "adaptive", "two patches, every class", tests="all images; the mean over the two triggers"
    ),
    "lba_14": _LBA,
    "lba_12": _LBA,
    "lba_10": _LBA,
    "loss_adaptive": Fact("adaptive", "any trigger; the training loss hides it"),
    "natural": Fact(
        "no poison", "a patch that is looked for in the finished model", "a patch for each class, after the training",
        "images of the other classes; per budget the best class",
    ),
    "import": Fact("import", "whatever another tool made", tests="the triggered images that come with the set"),
}  # fmt: skip
KINDS = ("no poison", "patch", "blend", "clean label", "feature space", "adaptive", "import", "other")
UNKNOWN = Fact("other", "")
TESTED = {
    "all2one": "images of the other classes",
    "clean": "images of the other classes",
    "all2all": "all images, against their own wanted class",
    "source2target": "images of the source class",
}


class Option(NamedTuple):
    """One leaf of a YAML: dotted key, default as written, comment."""

    key: str
    default: str
    comment: str


def ids() -> list[str]:
    """Every attack, by kind, then as FACTS lists them, then by name."""
    known = list(FACTS)

    def place(id_: str) -> tuple[int, int, str]:
        return KINDS.index(fact(id_).kind), known.index(id_) if id_ in FACTS else len(known), id_

    return sorted((path.stem for path in CONF.glob("*.yaml")), key=place)


def fact(id_: str) -> Fact:
    return FACTS.get(id_, UNKNOWN)


@functools.cache
def _tables() -> dict[str, dict[str, set[str]]]:
    """Attack -> paper -> the tables that print results of it."""
    found: dict[str, dict[str, set[str]]] = {}
    for path in sorted(REFERENCE.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["attack"], {}).setdefault(row["paper"], set()).add(row["table"])
    return found


def papers(id_: str) -> str:
    """``TRAP 1, 3, 4; EBD 1-3``: who prints results of an attack, in which tables."""
    found = _tables().get(id_, {})
    return "; ".join(f"{name} {_ranges(found[key])}" for key, name in PAPERS.items() if key in found)


def _ranges(tables: set[str]) -> str:
    """Table numbers, runs of three or more shortened; ``text`` only where there is no table."""
    runs: list[list[int]] = []
    for number in sorted(int(table) for table in tables if table.isdigit()):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts) or "text"


def header(id_: str) -> list[str]:
    """The comment lines at the top; the first one is the sentence that says what the attack is."""
    lines = []
    for line in (CONF / f"{id_}.yaml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines


def options(id_: str) -> list[Option]:
    """Every value that the file itself sets, in its order, with the comment behind it (or the lines below it)."""
    text = (CONF / f"{id_}.yaml").read_text(encoding="utf-8")
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(node, yaml.MappingNode), f"{id_}.yaml holds no keys"
    return list(_leaves(node, "", text.splitlines()))


def _leaves(node: yaml.MappingNode, prefix: str, lines: list[str]) -> Iterator[Option]:
    for name, value in node.value:
        if name.value.startswith("_") or (not prefix and name.value == "defaults"):
            continue
        if isinstance(value, yaml.MappingNode) and not value.flow_style and value.value:
            yield from _leaves(value, f"{prefix}{name.value}.", lines)
            continue
        start, end = value.start_mark, value.end_mark
        rows = [(lines[row] if row < end.line else lines[row][: end.column]) for row in range(start.line, end.line + 1)]
        rows[0] = rows[0][start.column :]
        default = " ".join(row.split(" #")[0].strip() for row in rows) if len(rows) > 1 else rows[0]
        yield Option(prefix + name.value, default or "null", _comment(lines, end.line, end.column))


def _comment(lines: list[str], row: int, column: int) -> str:
    """The comment after a value, with the comment lines that continue it."""
    found = []
    rest = lines[row][column:].strip()
    if rest.startswith("#"):
        found.append(rest)
        for line in lines[row + 1 :]:
            if not line.strip().startswith("#"):
                break
            found.append(line.strip())
    return " ".join(part.lstrip("#").strip() for part in found)


def parts(id_: str) -> dict[str, tuple[str, str]]:
    """Attacks that this one is composed of: place -> (their id, the comment), from the defaults list."""
    text = (CONF / f"{id_}.yaml").read_text(encoding="utf-8")
    found = {}
    for entry in (yaml.safe_load(text) or {}).get("defaults", []):
        if isinstance(entry, dict):
            ((group, choice),) = entry.items()
            line = next(line for line in text.splitlines() if f"{group}: {choice}" in line)
            found[group.partition("@")[2]] = (str(choice), line.partition(" #")[2].strip())
        elif entry != "_self_":
            found[""] = (entry, "")
    return found


def settings(id_: str) -> dict[str, Any]:
    """The plain values of a file with those of the file it extends, but not of the attacks it is composed of."""
    node: dict[str, Any] = yaml.safe_load((CONF / f"{id_}.yaml").read_text(encoding="utf-8")) or {}
    base = parts(id_).get("")
    return (settings(base[0]) if base else {}) | node


def owns_loss(id_: str) -> str:
    """``no``, ``yes``, or which of its options decides."""
    from hydra.utils import get_class

    found = inspect.getattr_static(get_class(settings(id_)["_target_"]), "controls_training", False)
    if isinstance(found, bool):
        return "yes" if found else "no"
    values = settings(id_)
    default = getattr(found, "fget", found)(argparse.Namespace(**values))
    return f"{'yes' if default else 'no'}, as mode={values['mode']}" if "mode" in values else "by its options"


def rate(id_: str) -> str:
    """``0.1 of the eligible images``; of a composition one for each part; nothing where nothing is poisoned."""
    values = settings(id_)
    if "poison_rate" not in values:
        inner = {name: value for name, value in values.items() if isinstance(value, dict) and "poison_rate" in value}
        return " + ".join(_rate(value) for value in inner.values()) or "-"
    if values.get("noise_ratio"):
        return f"{_rate(values)}, cover {values['noise_ratio']:g} x as many"
    return _rate(values) + (f", cover {values['cover_rate']:g}" if values.get("cover_rate") else "")


def _rate(values: dict[str, Any]) -> str:
    pool = {"target": "target", "source": "source"}.get(values.get("poison_pool", ""), "eligible")
    return f"{values['poison_rate']:g} of the {'set' if values.get('poison_base') == 'whole' else f'{pool} images'}"


def rule(id_: str) -> str:
    """The label rule, of a composition those of its parts."""
    values = settings(id_)
    if "label_rule" in values:
        return str(values["label_rule"])
    rules = []
    for place, (choice, _) in parts(id_).items():
        if place and isinstance(values.get(place), dict) and "label_rule" in settings(choice):
            rules.append(values[place].get("label_rule", settings(choice)["label_rule"]))
    return ", ".join(dict.fromkeys(rules)) or "-"


def _cell(text: str) -> str:
    """Text for a table cell: what Markdown or HTML would read is escaped."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    for old, new in (("\\", "\\\\"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("*", "\\*")):
        text = text.replace(old, new)
    return text


def _code(text: str) -> str:
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"


def page() -> str:
    """The whole page as Markdown."""
    shown = ids()
    lines = [
        "# The attacks",
        "",
        f"Made from `conf/attack/*.yaml` by `{COMMAND}`; a test compares it with them. The pictures",
        "come from `python scripts/attack_gallery.py --sprites docs/attacks`; without `--sprites` it draws all attacks",
        "at four sizes into one picture and one page. Triggers that are learnt are drawn with quick settings here: they",
        "show the form, not what a full training finds (`--full`).",
        "",
        "`python run.py attack=ID` runs one; each option below is a key of the command line, as in",
        "`attack.poison_rate=0.05`. *Rate*: share of poisoned images, and of which; *cover*: triggered images that keep",
        "their label. *Counts for the ASR*: the test images that the trigger is put on. *Learns*: what is trained first",
        "(once; it is kept and found again). *Owns the loss*: the attacker sets the loss of the training, so only",
        "defences that train with it go along. Papers: TRAP, EBD (Effective Backdoor Defense), T&R (Trap and Replace),",
        "MeCa (Mellivora Capensis), with the numbers of the tables in which they print results of it.",
        "",
        "| id | category | trigger | labels | rate | counts for the ASR | learns | owns the loss | papers |",
        "|" + " --- |" * 9,
    ]
    for id_ in shown:
        about = fact(id_)
        cells = (
            f"[`{id_}`](#{id_})", about.kind, about.form, rule(id_), rate(id_), tests(id_), about.learns or "-",
            owns_loss(id_), papers(id_) or "-",
        )  # fmt: skip
        lines.append("| " + " | ".join([cells[0], *map(_cell, cells[1:])]) + " |")
    for id_ in shown:
        lines += ["", f"## {id_}", "", *_section(id_)]
    return "\n".join(lines) + "\n"


def tests(id_: str) -> str:
    """Which test images count."""
    return fact(id_).tests or TESTED.get(rule(id_), "-")


def _section(id_: str) -> Iterator[str]:
    first, *sources = header(id_)
    yield _cell(first)
    if sources:
        yield ""
        yield _cell(" ".join(sources))
    yield ""
    yield f"Class {_code(settings(id_)['_target_'])}."
    if (PAGE.parent / PICTURES / f"{id_}.png").is_file():
        yield ""
        yield f"![{id_}: clean, poisoned, difference]({PICTURES}/{id_}.png)"
    for place, (choice, comment) in parts(id_).items():
        yield ""
        if place:
            told = f" ({_cell(comment.lstrip('# '))})" if comment else ""
            yield f"`attack.{place}` is [`{choice}`](#{choice}){told}: all its options, with the values below."
        else:
            yield f"The options of [`{choice}`](#{choice}), with the values below."
    yield ""
    yield "| option | default | meaning and source |"
    yield "| --- | --- | --- |"
    for option in options(id_):
        yield f"| {_code(option.key)} | {_code(option.default)} | {_cell(option.comment)} |"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if docs/attacks.md is old")
    given = parser.parse_args(argv)
    text = page()
    if given.check:
        old = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
        if old != text:
            print(f"{PAGE} is not what conf/attack says: run {COMMAND}", file=sys.stderr)
        return int(old != text)
    from backdoor_bench.storage import write_text

    write_text(PAGE, text)
    print(f"{PAGE}: {len(ids())} attacks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
