"""The true split."""

from types import SimpleNamespace

import pytest
import torch

from backdoor_bench.detection.oracle import OracleIsolation, informed
from backdoor_bench.errors import ConfigError

POISONED = torch.arange(100) < 20
COVER = (torch.arange(100) >= 20) & (torch.arange(100) < 30)
VIEW = SimpleNamespace(generator=torch.Generator().manual_seed(0))


def test_the_split_is_the_truth_and_cover_is_in_neither_part():
    found = OracleIsolation(1.0, 1.0).told(POISONED, COVER).isolate(VIEW)
    assert torch.equal(found.flagged, POISONED)
    assert torch.equal(found.trusted, torch.arange(100) >= 30)
    assert torch.equal(found.score > 0, POISONED)


def test_shares_thin_both_parts_alike_at_every_call():
    oracle = OracleIsolation(0.5, 0.1).told(POISONED, None)
    first, second = oracle.isolate(VIEW), oracle.isolate(VIEW)
    assert int(first.flagged.sum()) == 10
    assert int(first.trusted.sum()) == 8
    assert not (first.flagged & ~POISONED).any()
    assert not (first.trusted & POISONED).any()
    assert torch.equal(first.flagged, second.flagged)
    assert torch.equal(first.trusted, second.trusted)


def test_only_an_oracle_is_told_and_only_where_somebody_knows():
    other = SimpleNamespace(isolation=object())
    assert informed(other, POISONED, None) is other
    with pytest.raises(ConfigError, match="oracle needs the truth"):
        OracleIsolation(1.0, 1.0).told(None, None)


def test_a_removal_from_the_true_split(bench):
    outcome = bench("attack=badnets", "defense=isolate_only", "defense/isolation=oracle")
    assert outcome.code == 0, outcome.err
    assert outcome.result["metrics"]["precision"] == outcome.result["metrics"]["recall"] == 1.0
    assert outcome.result["oracle"]["stage"] == "train"
