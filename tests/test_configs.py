"""Every YAML: its keys are exactly its class's arguments, its values build the object, nothing foreign in it."""

import inspect
from pathlib import Path

import pytest
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from tests.conftest import CONF

METHODS = sorted(
    path
    for group in ("attack", "defense", "defense/isolation", "defense/removal", "model", "dataset", "tracking")
    for path in (CONF / group).glob("*.yaml")
)
COMPOSED_ELSEWHERE = {"defaults", "isolation", "removal"}
NOT_IN_YAML = {"isolation", "removal"}


def name(path: Path) -> str:
    return str(path.relative_to(CONF))


def load(path: Path):
    node = OmegaConf.load(path)
    for base in node.get("defaults", []):
        if isinstance(base, str) and base != "_self_":
            node = OmegaConf.merge(load(path.parent / f"{base}.yaml"), node)
    return node


@pytest.mark.parametrize("path", METHODS, ids=name)
def test_yaml_lists_exactly_the_constructor_arguments(path):
    node = load(path)
    arguments = set(inspect.signature(get_class(node._target_)).parameters) - NOT_IN_YAML
    assert {key for key in node if not key.startswith("_")} - COMPOSED_ELSEWHERE == arguments


@pytest.mark.parametrize("path", METHODS, ids=name)
def test_class_has_no_defaults_and_is_frozen(path):
    cls = get_class(load(path)._target_)
    assert all(p.default is inspect.Parameter.empty for p in inspect.signature(cls).parameters.values())
    assert cls.__dataclass_params__.frozen


@pytest.mark.parametrize("path", METHODS, ids=name)
def test_first_line_says_what_it_is(path):
    """--help shows it."""
    first = path.read_text().splitlines()[0]
    assert first.startswith("# "), path
    assert 10 < len(first) < 120


def test_recipe_lists_every_value_but_the_hardware():
    from backdoor_bench.training.config import TrainConfig

    node = OmegaConf.load(CONF / "train" / "base.yaml")
    keys = {key for key in node if not key.startswith("_")}
    assert keys == set(inspect.signature(TrainConfig).parameters) - {"hardware"}
    for path in sorted((CONF / "train").glob("*/*.yaml")):
        overlay = OmegaConf.load(path)
        assert set(overlay) <= keys, path
        assert set(overlay.get("augment", {})) <= set(node.augment), path


@pytest.mark.parametrize("path", sorted((CONF / "hardware").glob("*.yaml")), ids=name)
def test_hardware_builds(path):
    node = load(path)
    node.pop("defaults", None)
    assert instantiate(node).threads >= 1
