"""Many command lines composed at once must be what each is alone."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from backdoor_bench import composing

CONF = Path(__file__).resolve().parents[1] / "conf"
# The overlays of one line must not be found in the next: papers, budgets and inner methods in turn.
LINES = [
    ["paper=trap", "dataset=cifar10", "attack=wanet", "defense=trap", "defense/removal=mixed_ce", "budget=small"],
    ["paper=ebd", "dataset=cifar10", "attack=sig", "defense=dbr", "budget=small"],
    ["paper=ebd", "dataset=cifar10", "attack=sig", "defense=dbr"],
    ["paper=tr", "dataset=gtsrb", "model=wrn16_1", "attack=badnets_grid", "defense=tr"],
    ["attack=none", "defense=no_defense", "train.epochs=3"],
]
WRONG = ["attack=of_nobody"]


def text(config):
    return OmegaConf.to_yaml(config)


@pytest.fixture(scope="module")
def alone():
    """Composed by Hydra itself, each for itself."""
    from hydra import compose, initialize_config_dir

    found = []
    for words in LINES:
        with composing.apart(), initialize_config_dir(str(CONF), version_base="1.3"):
            found.append(text(compose("config", words, return_hydra_config=True)))
    assert len(set(found)) == len(LINES)
    return found


@pytest.mark.parametrize("times", [1, 3], ids=["here", "in other processes"])
def test_each_line_is_what_it_is_alone(alone, times):
    lines = [*LINES, WRONG] * times
    assert (len(lines) > composing.FEW) == (times > 1)
    made = list(composing.compose_all(CONF, lines))
    assert [None if config is None else text(config) for config in made] == [*alone, None] * times


def test_two_lines_composed_by_one_composer(alone):
    with composing.apart(), composing._Composer(CONF) as composer:
        assert [text(composer(words)) for words in (*LINES, *LINES)] == alone * 2


def test_processes_that_are_killed_are_done_without(alone):
    class Pool:
        closed = False

        def shutdown(self, wait, cancel_futures):
            self.closed = True

    def made():
        yield "the first"
        raise BrokenProcessPool("killed")

    pool = Pool()
    found = list(composing._elsewhere(CONF, [["x=1"], LINES[1], WRONG], pool, made()))
    assert [found[0], text(found[1]), found[2]] == ["the first", alone[1], None]
    assert pool.closed
