"""The one evaluator: what a model does on clean and on triggered test images, and how well poison was found.

It alone holds the test set and the truth. Methods reach it only through ``probe``, which returns nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backdoor_bench.inference import predict
from backdoor_bench.training.hardware import Hardware
from backdoor_bench.types import Figure, Images, ImageSet, StoredCase, TestCase

STAMPED_VALUES = 2**24  # pixel values stamped at a time: a float64 trigger then needs 128 MiB at any image size


def detection_metrics(
    flagged: Tensor | None,
    is_poisoned: Tensor | None,
    is_cover: Tensor | None = None,
    trusted: Tensor | None = None,
    score: Tensor | None = None,
) -> dict[str, float | None]:
    """How well the flagged samples match the poisoned ones, as fractions or None.

    flagged, is_poisoned, is_cover, trusted: bool[N]; score: float[N], higher = more suspicious. Cover samples count as
    not poisoned (``precision_with_cover`` counts them as poisoned, ``cover_flagged`` is their flagged share). precision
    is None when nothing is flagged, recall None when nothing is poisoned; all are None where the truth is unknown.
    """
    names = ("precision", "recall", "f1", "fpr", "auroc", "poison_precision", "clean_precision")
    result: dict[str, float | None] = dict.fromkeys((*names, "precision_with_cover", "cover_flagged"))
    if is_poisoned is None:
        return result
    cover = is_cover if is_cover is not None else torch.zeros_like(is_poisoned)
    clean = ~is_poisoned
    if flagged is not None:
        hits = int((flagged & is_poisoned).sum())
        n_flagged = int(flagged.sum())
        if n_flagged:
            result["precision"] = result["poison_precision"] = hits / n_flagged
            result["precision_with_cover"] = int((flagged & (is_poisoned | cover)).sum()) / n_flagged
        if is_poisoned.any():
            result["recall"] = hits / int(is_poisoned.sum())
            if n_flagged:
                result["f1"] = 2 * hits / (n_flagged + int(is_poisoned.sum()))
        if cover.any():
            result["cover_flagged"] = int((flagged & cover).sum()) / int(cover.sum())
        if clean.any():
            result["fpr"] = int((flagged & clean).sum()) / int(clean.sum())
        picked_clean = trusted if trusted is not None else ~flagged
        if picked_clean.any():
            result["clean_precision"] = int((picked_clean & clean).sum()) / int(picked_clean.sum())
    if score is not None and is_poisoned.any() and clean.any():
        from sklearn.metrics import roc_auc_score

        result["auroc"] = float(roc_auc_score(is_poisoned.numpy(), score.double().numpy()))
    return result


# What a curve keeps of a probe's detail: the loss and, where a method adds several, its parts.
LOSSES = ("loss", "ce", "mse", "tv")


@dataclass(frozen=True)
class Truth:
    """What the evaluator knows of the training rows: bool[N], bool[N]; None where nobody knows (a user's folder)."""

    is_poisoned: Tensor | None
    is_cover: Tensor | None


class Stamped(NamedTuple):
    """A triggered test set: uint8 images and the labels the attacker wants."""

    case: TestCase | StoredCase
    images: Images
    wanted: Tensor


class Evaluator:
    """Clean and triggered test sets, stamped once and kept on the device.

    test: clean test set or None. tests: the attack's test cases. truth: of the training rows. tests_of: the triggers
    that the attack looks for in a finished model.
    """

    def __init__(
        self,
        test: ImageSet | None,
        tests: tuple[TestCase | StoredCase, ...],
        truth: Truth,
        num_classes: int,
        hardware: Hardware,
        tests_of: Callable[[nn.Module], tuple[TestCase, ...]] | None = None,
    ) -> None:
        self.test = test
        self.tests = tests
        self.truth = truth
        self.num_classes = num_classes
        self.hardware = hardware
        self._tests_of = tests_of
        self._stamped: list[Stamped] | None = None

    def stamped(self) -> list[Stamped]:
        """The triggered test sets of all test cases."""
        if self._stamped is None:
            # Stored test sets need no clean one.
            usable = [case for case in self.tests if self.test is not None or isinstance(case, StoredCase)]
            self._stamped = [self._stamp(case) for case in usable]
        return self._stamped

    def _stamp(self, case: TestCase | StoredCase) -> Stamped:
        if isinstance(case, StoredCase):
            return Stamped(case, case.test.images, case.test.labels)
        assert self.test is not None
        rows = case.pool(self.test.labels).nonzero().flatten()
        chunk = max(1, STAMPED_VALUES // self.test.images.shape[1:].numel())
        parts = [case.trigger(self.test.images[part], part) for part in rows.split(chunk)]
        images = torch.cat(parts) if parts else self.test.images[rows]
        return Stamped(case, images, case.label_rule(self.test.labels[rows], rows))

    def model_metrics(self, model: nn.Module, final: bool = False) -> dict[str, Any]:
        """ACC, ASR and their relatives as fractions (None where there is no test set, trigger or target).

        acc: share of all clean test images classified right. acc_nontarget: the same without the target class (None where
        there is not one target).
        target_class_acc: on the target class alone. asr: share of the triggered images that get the attacker's label,
        the mean over the test cases that count. dummy_clean/dummy_triggered: share sent to TRAP's extra class. final:
        the model is finished, so that triggers are looked for in it where the attack does so (which takes long).
        """
        names = ("acc", "acc_nontarget", "asr", "target_class_acc", "dummy_clean", "dummy_triggered", "acc_per_class")
        result: dict[str, Any] = dict.fromkeys((*names, "asr_per_trigger"))
        if self.test is not None:
            result |= self._clean(model, self.test)
        stamped: Iterable[Stamped] = self.stamped()
        if final and self._tests_of is not None and self.test is not None:
            # One at a time: there may be as many as classes times sizes.
            stamped = chain(stamped, (self._stamp(case) for case in self._tests_of(model)))
        result |= self._triggered(model, stamped)
        return result

    def _clean(self, model: nn.Module, test: ImageSet) -> dict[str, Any]:
        """What ``model`` makes of the clean test set."""
        result: dict[str, Any] = {}
        labels = test.labels
        predictions = predict(model, test.images, self.hardware)
        right = predictions == labels
        result["acc"] = right.double().mean().item()
        result["dummy_clean"] = (predictions == self.num_classes).double().mean().item()
        counts = torch.bincount(labels, minlength=self.num_classes)
        hits = torch.bincount(labels[right], minlength=self.num_classes)
        per_class = [int(h) / int(c) if c else None for h, c in zip(hits, counts, strict=True)]
        result["acc_per_class"] = per_class
        targets = {case.target_class for case in self.tests if case.counts}
        target = targets.pop() if len(targets) == 1 else None
        if target is not None:
            result["target_class_acc"] = per_class[target]
            others = labels != target
            result["acc_nontarget"] = right[others].double().mean().item() if others.any() else None
        return result

    def _triggered(self, model: nn.Module, stamped: Iterable[Stamped]) -> dict[str, Any]:
        """What ``model`` makes of the triggered test sets; nothing where there are none."""
        by_trigger: dict[str, float] = {}
        best: dict[str, tuple[float, float]] = {}  # group -> (success, share sent to the dummy class)
        for case, images, wanted in stamped:
            if not len(wanted):
                continue
            predictions = predict(model, images, self.hardware)
            success = (predictions == wanted).double().mean().item()
            by_trigger[case.name] = success
            if case.counts:
                group = case.group or case.name
                dummy = (predictions == self.num_classes).double().mean().item()
                best[group] = max(best.get(group, (0.0, 0.0)), (success, dummy))
        if not best:
            return {}
        asr, dummy = (sum(values) / len(best) for values in zip(*best.values(), strict=True))
        return {"asr": asr, "dummy_triggered": dummy, "asr_per_trigger": by_trigger}

    def isolation_metrics(
        self, flagged: Tensor | None, trusted: Tensor | None = None, score: Tensor | None = None
    ) -> dict[str, float | None]:
        """detection_metrics against the truth."""
        return detection_metrics(flagged, self.truth.is_poisoned, self.truth.is_cover, trusted, score)


class Recorder:
    """types.Probe: evaluates what a method shows and keeps the rows (one a stage and epoch).

    on_row: called with every new row (tracking). on_map: called with (epoch, detail) where a method shows a map of its
    samples, on_figure with each of the other figures it shows.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        on_row: Callable[[Mapping[str, Any]], None],
        on_map: Callable[[int, Mapping[str, Any]], None],
        on_figure: Callable[[Figure], None] = lambda figure: None,
    ) -> None:
        self._evaluator = evaluator
        self._on_row = on_row
        self._on_map = on_map
        self._on_figure = on_figure
        self._rows: dict[tuple[str, int], Mapping[str, Any]] = {}
        self._listener: Callable[[Mapping[str, Any]], None] | None = None

    def __call__(
        self,
        model: nn.Module | None = None,
        flagged: Tensor | None = None,
        *,
        stage: str,
        epoch: int,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        row: dict[str, Any] = {"stage": stage, "epoch": epoch}
        row |= {name: (detail or {})[name] for name in LOSSES if name in (detail or {})}
        if model is not None:
            metrics = self._evaluator.model_metrics(model)
            row |= {name: metrics[name] for name in ("acc", "asr", "target_class_acc", "dummy_triggered")}
        if flagged is not None:
            metrics = self._evaluator.isolation_metrics(flagged)
            row |= {name: metrics[name] for name in ("precision", "recall")} | {"n_flagged": int(flagged.sum())}
        if detail is not None and "points" in detail:
            self._on_map(epoch, detail)
        for figure in (detail or {}).get("figures", ()):
            self._on_figure(figure)
        if len(row) > 2:
            self.record(row)

    def record(self, row: Mapping[str, Any]) -> None:
        """Keep a row; the newest of a stage and epoch counts, one known already is not told again."""
        if self._rows.get((row["stage"], row["epoch"])) == row:
            return
        self._rows[(row["stage"], row["epoch"])] = row
        if self._listener is not None:
            self._listener(row)
        self._on_row(row)

    def listen(self, listener: Callable[[Mapping[str, Any]], None] | None) -> None:
        """Have every new row told to ``listener`` as well, until None."""
        self._listener = listener

    def history(self) -> list[Mapping[str, Any]]:
        """All rows in the order in which their stages began."""
        return list(self._rows.values())
