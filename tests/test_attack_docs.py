"""docs/attacks.md says what conf/attack says, and the gallery shows what the attacks do."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from scripts import attack_gallery as gallery
from scripts import make_attack_docs as docs


def test_the_page_is_that_of_the_configs() -> None:
    text = docs.PAGE.read_text(encoding="utf-8") if docs.PAGE.is_file() else ""
    expected = docs.page()
    differing = [(old, new) for old, new in zip(text.splitlines(), expected.splitlines(), strict=False) if old != new]
    assert text == expected, f"run: {docs.COMMAND}; the first line that differs: {differing[:1]}"


@pytest.mark.parametrize("id_", docs.ids())
def test_every_option_is_listed_with_its_value(id_: str) -> None:
    def leaves(node: dict[str, object], prefix: str = "") -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in node.items():
            if key.startswith("_") or (not prefix and key == "defaults"):
                continue
            found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
        return found

    values = leaves(yaml.safe_load((docs.CONF / f"{id_}.yaml").read_text(encoding="utf-8")))
    listed = {option.key: yaml.safe_load(option.default) for option in docs.options(id_)}
    assert listed == values


@pytest.mark.parametrize("id_", docs.ids())
def test_every_attack_is_placed(id_: str) -> None:
    about = docs.fact(id_)
    assert about is not docs.UNKNOWN, f"add {id_} to FACTS in scripts/make_attack_docs.py"
    assert about.kind in docs.KINDS
    assert docs.tests(id_)


def test_comments_are_read_and_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "CONF", tmp_path)
    (tmp_path / "x.yaml").write_text(
        "# One <b>sentence</b>.\n# Source: somebody | else.\ndefaults:\n  - /attack@part: y  # why\n  - _self_\n"
        "_target_: a.b.C\ncolour: '#222b6d'  # a colour\nlist: [[0, 1],\n  [2, 3]]  # two rows\n"
        "plain: 1\nlong: 2  # first\n         # second\npart:\n  _partial_: true\n  rate: 0.1  # a | b\n"
    )
    assert docs.header("x") == ["One <b>sentence</b>.", "Source: somebody | else."]
    assert docs.options("x") == [
        ("colour", "'#222b6d'", "a colour"), ("list", "[[0, 1], [2, 3]]", "two rows"), ("plain", "1", ""),
        ("long", "2", "first second"), ("part.rate", "0.1", "a | b"),
    ]  # fmt: skip
    assert docs.parts("x") == {"part": ("y", "why")}
    section = "\n".join(docs._section("x"))
    assert "One &lt;b&gt;sentence&lt;/b&gt;." in section
    assert "| `part.rate` | `0.1` | a \\| b |" in section


def test_pictures_are_small() -> None:
    folder = docs.PAGE.parent / docs.PICTURES
    assert sum(path.stat().st_size for path in folder.glob("*")) < 3_000_000


# --- the gallery ---


class Page(HTMLParser):
    """The tags that are open, what images point at, what is linked and what there is to link to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.seen.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [str(values["src"])] if "src" in values else []
        self.links += [str(values["href"])] if "href" in values else []
        self.ids += [str(values["id"])] if "id" in values else []
        assert tag != "img" or values["alt"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_picture_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.setattr(gallery, "header", lambda id_: [f"<script>alert('{id_}')</script> & \"more\""])
    words = ["--attacks", "none,badnets,sig,tact,natural", "--sizes", "32,64", "--out", str(tmp_path), "--count", "100"]
    assert gallery.main(words) == 0
    text = (tmp_path / "gallery.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.open == []
    assert "script" not in page.seen
    assert page.ids == ["none", "badnets", "sig", "tact", "natural"]
    assert sorted(page.links) == sorted(f"#{id_}" for id_ in page.ids)
    assert all(source.startswith("data:image/webp;base64,") for source in page.sources)
    # Triggered image and difference at two sizes: badnets 1, sig 2 (stronger at test), tact 2 (cover), natural 1.
    assert len(page.sources) == 2 * 2 * 6
    assert "http" not in text.replace("data:", "")
    assert "quick settings: not the trained trigger" in text
    assert "poisons nothing" in text
    with Image.open(tmp_path / "gallery.png") as picture:
        assert picture.width > 900


def test_an_attack_that_fails_or_refuses_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(id_: str, *rest: object) -> list[gallery.Shown]:
        if id_ == "sig":
            raise ZeroDivisionError("<b>oh</b>")
        return drawn(id_, *rest)  # type: ignore[arg-type]

    drawn = gallery._draw
    monkeypatch.setattr(gallery, "_draw", broken)
    assert gallery.main(["--attacks", "sig,ssba,badnets", "--sizes", "8", "--out", str(tmp_path)]) == 1
    text = (tmp_path / "gallery.html").read_text(encoding="utf-8")
    assert "failed: ZeroDivisionError: &lt;b&gt;oh" in text
    assert "refused: attack=ssba needs images of at least 16 px" in text
    assert 'alt="badnets, 8 pixels, triggered"' in text


def test_small_pictures_for_the_docs(tmp_path: Path) -> None:
    assert gallery.main(["--attacks", "badnets,none", "--sprites", str(tmp_path), "--count", "20"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["badnets.png"]


@pytest.mark.parametrize("words", [["--attacks", "badnet"], ["--sizes", "a"], ["--sizes", "4"], ["--size", "32"]])
def test_what_cannot_be_drawn(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gallery.main(words)
    assert ended.value.code == 2


def test_the_difference_is_amplified_as_far_as_it_fits() -> None:
    clean = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    stamped = clean.clone()
    stamped[:, 0, 0], stamped[:, 0, 1] = 104, 92
    picture, factor = gallery.Shown("train", "", 0, clean, stamped).difference()
    assert factor == 15  # 8 x 15 = 120 fits beside grey, 8 x 20 does not
    assert picture[0, 0].tolist() == [128 + 60, 128 - 120, 128, 128]
    assert gallery.Shown("train", "", 0, clean, clean).difference()[0].unique().tolist() == [128]
