"""What a user can get wrong with an attack, through the command line: exit code, key in the message, nothing left.

Exit codes: faults.md, rules 1 and 2; the toy set has 512 images of 16 pixels in 4 classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BEFORE_DATA = [  # refused before anything is loaded or written: (command line, what the message holds)
    (["attack=sig", "attack.poison_rate=1.0"], r"attack\.poison_rate=1\.0 .*clean-label.* below 1"),
    (["attack=cl", "attack.poison_rate=1.5"], r"attack\.poison_rate=1\.5 .*<= 1"),
    (["attack=badnets", "attack.pattern=white", "attack.side=17"], r"attack\.side=17 .*<= 16"),
    (["attack=badnets_white", "attack.margin=13"], r"attack\.margin=13 .*<= 12"),
    (["attack=lba_14", "attack.side_ratio=1"], r"attack\.margin=1 leaves no room .* 16 pixels"),
    (["attack=multi_2trig_2target", "attack.first.margin=14"], r"attack\.first\.margin=14 .*<= 13"),
    (["attack=tact", "attack.target_class=4"], r"attack\.target_class=4 .*<= 3"),
    (["attack=wanet", "attack.target_class=-1"], r"attack\.target_class=-1 .*>= 0"),
    (["attack=multi_2trig_2target", "attack.second.target_class=9"], r"attack\.second\.target_class=9 .*<= 3"),
    (["attack=tact", "attack.source_class=null"], r"attack\.source_class=None .*>= 0"),
    (["attack=tact", "attack.source_class=7"], r"attack\.source_class=7 .*<= 3"),
    (["attack=tact", "attack.source_class=1"], r"attack\.source_class=1 is attack\.target_class too"),
    (["attack=blend_kitty", "attack.asset=nowhere/cat.png"], r"attack\.asset='nowhere/cat\.png' .*kitty_white"),
    (["attack=adap_blend", "attack.asset=nowhere/cat.png"], r"attack\.asset='nowhere/cat\.png'"),
    (["attack=cl", "attack.perturbed=nowhere.npy"], r"attack\.perturbed='nowhere\.npy' is no file"),
    (["attack=import"], r"attack\.path is not set"),
]  # fmt: skip


def written(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


@pytest.mark.parametrize(("words", "message"), BEFORE_DATA, ids=[" ".join(words) for words, _ in BEFORE_DATA])
def test_refused_before_the_data(words: list[str], message: str, bench: Callable[..., Any], tmp_path: Path) -> None:
    done = bench("defense=no_defense", *words)
    assert done.code == 2, done.err
    (line,) = done.err.splitlines()  # one message, no traceback
    assert re.search(message, line), line
    assert written(tmp_path) == []


def text_file(folder: Path) -> Path:
    path = folder / "cat.png"
    path.write_text("no picture")
    return path


def cut_picture(folder: Path) -> Path:
    from PIL import Image

    path = folder / "cat.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:500])
    return path


def wrong_array(folder: Path) -> Path:
    np.save(folder / "perturbed.npy", np.zeros((10, 16, 16, 3), np.uint8))
    return folder / "perturbed.npy"


def objects(folder: Path) -> Path:
    np.savez(folder / "set.npz", train_images=np.array([{"a": 1}], object))
    return folder / "set.npz"


def cut_archive(folder: Path) -> Path:
    path = folder / "set.npz"
    np.savez(path, train_images=np.zeros((512, 16, 16, 3), np.uint8), train_labels=np.zeros(512, np.int64))
    path.write_bytes(path.read_bytes()[:1000])
    return path


def nothing(folder: Path) -> Path:
    return folder / "nowhere.npz"


@pytest.mark.parametrize(
    ("id_", "key", "make"),
    [
        ("blend_kitty", "asset", text_file),
        ("adap_blend", "asset", cut_picture),
        ("cl", "perturbed", wrong_array),
        ("import", "path", objects),
        ("import", "path", cut_archive),
        ("import", "path", nothing),
    ],
)
def test_a_damaged_file_is_named(
    id_: str, key: str, make: Callable[[Path], Path], bench: Callable[..., Any], tmp_path: Path
) -> None:
    file = make(tmp_path)
    done = bench(f"attack={id_}", "defense=no_defense", f"attack.{key}={file}")
    assert done.code == 3, done.out + done.err
    (line,) = done.err.splitlines()
    assert file.name in line
    nothing_half_written(tmp_path / "outputs")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attack=sig", "attack.poison_count=129"], r"attack\.poison_count=129 .*target has 128; set it to at most 128"),
        (
            ["attack=badnets_grid", "attack.poison_rate=0.9"],
            r"attack\.poison_rate=0\.9 .*non_target has 384; set it to at most 0\.75",
        ),
    ],
)  # fmt: skip
def test_more_than_the_class_has(words: list[str], message: str, bench: Callable[..., Any], tmp_path: Path) -> None:
    done = bench("defense=no_defense", *words)
    assert done.code == 2, done.out + done.err
    assert re.search(message, done.err), done.err
    nothing_half_written(tmp_path / "outputs")


def nothing_half_written(outputs: Path) -> None:
    """The folder of the run may hold its settings and its log, but nothing that looks like a result or a piece of one."""
    left = {path.name for path in written(outputs)}
    assert left <= {"config.yaml", "log.txt", "lock"} | {name for name in left if name.startswith(".lock")}, left


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("attack=loss_adaptive", "defense=meca"), "owns the training loss, which defense=meca cannot honour"),
        (
            ("attack=lba_14", "attack.mode=loss", "defense=dst"),
            "owns the training loss, which defense=dst cannot honour",
        ),
        (("attack=wanet", "attack.mode=online", "defense=trap"), "draws its poison anew in every batch"),
        (("attack=iab", "attack.mode=online", "defense=dbr"), "draws its poison anew in every batch"),
    ],
)
def test_an_attack_that_owns_the_training_is_refused_where_the_defence_cannot_go_along(bench, words, told):
    outcome = bench(*words)
    assert outcome.code == 2
    assert told in outcome.err
