"""A defence sees no truth: neither by walking what it is given, nor through its result."""

import collections.abc
import types as python_types
from dataclasses import replace

import pytest
import torch

from backdoor_bench.evaluate import Evaluator, Recorder, Truth
from backdoor_bench.types import TestCase


def public_values(value, depth=0, seen=None):
    """Every value reachable by public attributes, items of containers and dataclass fields."""
    seen = seen if seen is not None else set()
    if id(value) in seen or depth > 8:
        return
    seen.add(id(value))
    yield value
    if isinstance(value, (str, bytes, int, float, bool, torch.Tensor, torch.Generator, python_types.ModuleType, type)):
        return
    if isinstance(value, collections.abc.Mapping):
        for key, item in value.items():
            yield from public_values(key, depth + 1, seen)
            yield from public_values(item, depth + 1, seen)
        return
    if isinstance(value, (list, tuple, set)):
        for item in value:
            yield from public_values(item, depth + 1, seen)
        return
    for name in dir(value):
        if not name.startswith("_"):
            try:
                item = getattr(value, name)
            except Exception:
                continue
            yield from public_values(item, depth + 1, seen)


@pytest.fixture
def prepared(bench, monkeypatch):
    """The view and the truth of a real toy run, caught where the defence would start."""
    import backdoor_bench.defenses.isolate_and_remove as isolate_and_remove

    caught = {}

    def defend(self, view):
        caught["view"] = view
        raise RuntimeError("caught")

    monkeypatch.setattr(isolate_and_remove.IsolateAndRemove, "defend", defend)
    import backdoor_bench.reporting.run as report

    original = report.Report.recorder

    def recorder(self, evaluator):
        caught["evaluator"], caught["poisoned"] = evaluator, self._poisoned
        return original(self, evaluator)

    monkeypatch.setattr(report.Report, "recorder", recorder)
    with pytest.raises(RuntimeError, match="caught"):
        bench("attack=badnets")
    return caught


def test_nothing_public_in_a_view_tells_the_truth(prepared):
    view, evaluator, poisoned = prepared["view"], prepared["evaluator"], prepared["poisoned"]
    secrets = [poisoned.is_poisoned, poisoned.trigger_id, poisoned.true_labels]
    rows = set(poisoned.is_poisoned.nonzero().flatten().tolist())
    test_image = evaluator.test.images[0]
    values = list(public_values(view))
    assert len(values) > 40
    for value in values:
        assert not isinstance(value, (Evaluator, Truth, TestCase))
        if isinstance(value, torch.Tensor):
            for secret in secrets:
                if value.shape == secret.shape and value.dtype != torch.uint8:
                    assert not torch.equal(value.long(), secret.long())
            if value.dim() == 4 and value.shape[1:] == test_image.shape:
                assert not (value == test_image).flatten(1).all(1).any()
            if not value.is_floating_point() and value.dim() == 1 and len(value) == len(rows):
                assert set(value.tolist()) != rows
        if isinstance(value, str):
            assert "badnets" not in value.lower()


def test_nothing_that_was_recorded_can_be_read_back(prepared):
    """The probe only takes; progress only listens."""
    view = prepared["view"]
    assert [name for name in dir(view.probe) if not name.startswith("_")] == []
    assert {name for name in dir(view.progress) if not name.startswith("_")} == {"task", "say", "warn"}
    view.probe(view.victim(), stage="x", epoch=1)


def test_result_does_not_change_when_truth_and_test_set_are_replaced(prepared, monkeypatch):
    """TRAP for real, twice from an empty cache, with two evaluators that disagree about everything."""
    from backdoor_bench.cache import Stages
    from backdoor_bench.defenses.isolate_and_remove import IsolateAndRemove
    from backdoor_bench.detection.trap import TrapIsolation
    from backdoor_bench.progress import QuietProgress
    from backdoor_bench.removal.hiding import Hiding
    from backdoor_bench.training.victim import CachedVictim

    monkeypatch.undo()
    view, evaluator = prepared["view"], prepared["evaluator"]
    other = Evaluator(
        replace(evaluator.test, labels=evaluator.test.labels.flip(0), images=evaluator.test.images.flip(0) ^ 255),
        (),
        Truth(~evaluator.truth.is_poisoned, None),
        evaluator.num_classes,
        evaluator.hardware,
    )
    isolation = TrapIsolation(**_isolation_settings())
    removal = Hiding(2, 0.1, 0.9, 5e-4, 32, "cosine", True, False)
    results = []
    for number, judge in enumerate((evaluator, other)):
        recorder = Recorder(judge, lambda row: None, lambda epoch, detail: None)
        progress = QuietProgress()
        stages = Stages(view.stages._root.parent / f"fresh{number}", "s", progress, {}, recorder)
        victim = CachedVictim(
            view.train, lambda: view.new_model(view.num_classes), view.train_config,
            lambda: torch.Generator().manual_seed(3), stages, recorder, progress,
        )  # fmt: skip
        fresh = replace(view, victim=victim, stages=stages, probe=recorder, progress=progress)
        results.append(IsolateAndRemove(isolation, removal).defend(fresh))
    one, two = results
    assert torch.equal(one.flagged, two.flagged)
    assert torch.equal(one.score, two.score)
    for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def _isolation_settings():
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from tests.conftest import CONF

    config = OmegaConf.load(CONF / "defense" / "isolation" / "trap.yaml")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    settings["embedding"] = instantiate(config.embedding)
    return {**settings, "reducer": "pca", "detect_epochs": 2, "first_detection_step": 0}
