"""Every dataset YAML fits its class, and prepare_data uses them."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "conf/dataset").glob("*.yaml"))


def read(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load(path.read_text())
    return fields


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_yaml_lists_exactly_the_constructor_arguments(path: Path) -> None:
    fields = read(path)
    module, _, name = fields["_target_"].rpartition(".")
    loader = getattr(importlib.import_module(module), name)
    values = {key: value for key, value in fields.items() if not key.startswith("_")}
    assert list(values) == list(inspect.signature(loader).parameters)
    assert fields["_convert_"] == "all"
    assert fields["name"] == path.stem
    made = loader(**values)
    assert made.num_classes is None or made.num_classes >= 2
    assert all(parameter.default is parameter.empty for parameter in inspect.signature(loader).parameters.values())


def test_the_defaults_that_the_readme_promises_exist() -> None:
    names = {path.stem for path in CONFIGS}
    expected = {"photo_digits", "toy", "cifar10", "cifar100", "gtsrb", "tinyimagenet", "imagenette", "imagenet200"}
    assert expected | {"imagenet12", "folder"} <= names


def test_loaders_import_nothing_heavy() -> None:
    """A configuration error must be told within seconds, with only torch imported."""
    modules = ", ".join(sorted({read(path)["_target_"].rpartition(".")[0] for path in CONFIGS}))
    code = (
        f"import sys, {modules}; print(*[m for m in ('torchvision', 'sklearn', 'pandas', 'hydra') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert out.stdout.strip() == ""


@pytest.fixture(scope="module")
def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_data", REPOSITORY / "scripts/prepare_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_prepare_unpacks_and_checks_an_archive(
    prepare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in ("ant/1.png", "ant/2.png", "bee/1.png"):
            Image.new("RGB", (16, 16), "red").save(tmp_path / "x.png")
            file.write(tmp_path / "x.png", name)
    arguments = [
        "folder",
        "--root",
        str(tmp_path / "out"),
        "--cache",
        str(tmp_path / "cache"),
        "--set",
        "image_size=16",
    ]
    assert prepare.main([*arguments, "--from-archive", str(tmp_path / "a.zip")]) == 0
    out = capsys.readouterr().out
    assert "folder: 3 training images, no test set, 3 x 16 x 16, 2 classes of 1 to 2 images" in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["cifar10", "--root", "{tmp}", "--no-fetch"], 3, "dataset.root"),
        (["folder"], 2, "dataset.root"),
        (["folder", "--root", "{tmp}", "--set", "size=3"], 2, "no key 'size'"),
        (["folder", "--root", "{tmp}", "--set", "_target_=os.system"], 2, "no key '_target_'"),
        (["folder", "--root", "{tmp}", "--set", "truth=[1"], 2, "not YAML"),
        (["folder", "--from-archive", "x.zip"], 2, "--root"),
        (["folder", "--root", "{tmp}", "--from-archive", "{tmp}/none.zip"], 3, "cannot be read"),
        (["folder", "--root", "{tmp}", "--from-archive", "{tmp}/bad.zip", "--md5", "0"], 3, "MD5 expected 0, found"),
        (["toy", "--root", "{tmp}"], 2, "--root is not allowed"),
        (["toy"], 0, ""),
    ],
)
def test_prepare_reports_errors_with_their_exit_code(
    prepare: ModuleType,
    arguments: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("BACKDOOR_BENCH_DATA", raising=False)
    (tmp_path / "bad.zip").write_bytes(b"x")
    assert prepare.main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments]) == code
    assert words in capsys.readouterr().err
