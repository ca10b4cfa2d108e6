"""What one run leaves behind: progress and log while it works, then pictures, tables, model, result.json, W&B."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from backdoor_bench.cache import PICTURES, WAITING
from backdoor_bench.evaluate import Evaluator, Recorder, Truth, detection_metrics
from backdoor_bench.plan import Plan
from backdoor_bench.progress import RichProgress
from backdoor_bench.results import RunFolder, cell_hash, environment, flagged_rows, save_model, write_table
from backdoor_bench.types import Dataset, DefenseResult, Figure, PoisonedSet

FLAGGED_SHOWN = 64
CURVE_COLUMNS = (
    "stage", "epoch", "loss", "acc", "asr", "target_class_acc", "dummy_triggered", "precision", "recall", "n_flagged",
    "ce", "mse", "tv",
)  # fmt: skip


class Report:
    """``with Report(plan, folder) as report``: opens the log and the W&B run, closes both whatever happens."""

    def __init__(self, plan: Plan, folder: RunFolder) -> None:
        self.plan = plan
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self._defense_seconds: dict[str, float] = {}
        self.progress = RichProgress(folder.path / "log.txt")
        self._diagnostics: list[dict[str, Any]] = []
        self._embedding: str | None = None
        self._step = 0

    def __enter__(self) -> Report:
        from backdoor_bench import tracking

        names = self.plan.names
        title = f"{names['dataset']} {names['model']} {names['attack']} {names['defense']} seed {self.plan.seed}"
        self.progress.say(title)
        self._tracker = tracking.start(
            self.plan.tracking,
            self.folder.path,
            self.plan.config,
            title.replace(" ", "-"),
            tuple(names.values()),
            self.progress.warn,
        )
        self._recorder: Recorder | None = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.progress.say(f"ended early: {type(error).__name__}: {error}")
            self._write_curves()
            self._tracker.finish({}, failed=True)

    # ------------------------------------------------------------------ while it runs

    def poisoned(self, dataset: Dataset, poisoned: PoisonedSet, truth: Truth) -> None:
        """Say what was poisoned and draw clean beside poisoned images."""
        from backdoor_bench.reporting import figures

        self._dataset, self._poisoned = dataset, poisoned
        known = "poison unknown"
        if truth.is_poisoned is not None and truth.is_cover is not None:
            known = f"{int(truth.is_poisoned.sum())} poisoned, {int(truth.is_cover.sum())} cover"
        self.progress.say(f"{len(poisoned.train)} training images, {poisoned.train.num_classes} classes, {known}")
        if len(poisoned.example_index):
            rows = poisoned.example_index
            path = figures.pairs_grid(
                self._figure("poisoned_pairs"),
                poisoned.originals.cpu(),
                poisoned.train.images[rows].cpu(),
                poisoned.true_labels[rows],
                poisoned.train.labels[rows],
                dataset.class_names,
                f"attack {self.plan.names['attack']}: clean, poisoned, difference",
            )
            self._tracker.image("poisoned pairs", path)

    @contextlib.contextmanager
    def defending(self) -> Iterator[None]:
        """Tells the defence's stages from those of the attack and of the evaluation, which may load a victim."""
        before = dict(self.seconds)
        yield
        booked = {name: seconds - before.get(name, 0.0) for name, seconds in self.seconds.items()}
        self._defense_seconds = {
            name: seconds for name, seconds in booked.items() if seconds > 0 and name not in (WAITING, PICTURES)
        }

    def recorder(self, evaluator: Evaluator) -> Recorder:
        """The probe of this run."""
        self._evaluator = evaluator
        self._recorder = Recorder(evaluator, self._tracker_row, self._on_map, self._on_figure)
        return self._recorder

    def _tracker_row(self, row: Mapping[str, Any]) -> None:
        stage = row["stage"]
        values = {f"{stage}/{k}": v for k, v in row.items() if k not in ("stage", "epoch") and v is not None}
        self._tracker.log({**values, f"{stage}/epoch": row["epoch"]}, step=self._step)
        self._step += 1

    def _on_map(self, epoch: int, detail: Mapping[str, Any]) -> None:
        """A map of the training set: its picture, and what the truth says of its clusters (which nobody else sees)."""
        from backdoor_bench.reporting import figures

        report = dict(detail["report"])
        truth = self._evaluator.truth.is_poisoned
        clusters = detail["clusters"]
        flagged = detail["flagged"]
        if truth is not None:
            for row in report["table"]:
                row["poisoned_share"] = truth[clusters == row["id"]].double().mean().item()
            metrics = detection_metrics(flagged, truth)
            report |= {name: metrics[name] for name in ("precision", "recall")}
        used = report["map"]
        self._embedding = f"{used['backend']} {used['version']}"
        self._diagnostics.append(report)
        path = figures.map_scatter(
            self._figure(f"map_epoch_{epoch:03d}"),
            detail["points"],
            self._poisoned.train.labels.cpu(),
            clusters,
            self._dataset.class_names,
            is_poisoned=truth,
            suspicious_ids=report["suspicious"],
            flagged=flagged,
            eps=report["eps"],
            title=f"features after epoch {epoch}, {self._embedding}",
        )
        self._tracker.image(f"map epoch {epoch:03d}", path)

    def _on_figure(self, figure: Figure) -> None:
        from backdoor_bench.reporting import method_figures

        path = method_figures.draw(
            figure, self._figure(figure.name), self._evaluator, self._poisoned.train, self._dataset.class_names
        )
        if path is not None:
            self._tracker.image(figure.name.replace("_", " "), path)

    def _figure(self, name: str) -> Path:
        return self.folder.path / "figures" / f"{name}.png"

    def _write_curves(self) -> None:
        if self._recorder is not None and self._recorder.history():
            write_table(self.folder.path / "metrics.csv", self._recorder.history(), CURVE_COLUMNS)

    # ------------------------------------------------------------------ at the end

    def finish(
        self,
        result: DefenseResult,
        metrics: Mapping[str, Any],
        undefended: Mapping[str, Any] | None,
        floor: float | None,
        total_seconds: float,
    ) -> Path:
        """Write everything, result.json last; print the summary; returns result.json's path."""
        from backdoor_bench.reporting import figures
        from backdoor_bench.reporting.summary import print_summary

        plan, folder, dataset = self.plan, self.folder.path, self._dataset
        assert self._recorder is not None
        self._write_curves()
        self._tracker.image("curves", figures.curves(self._figure("curves"), self._recorder.history()))
        labels = self._poisoned.train.labels.cpu()
        truth = self._evaluator.truth
        if result.flagged is not None:
            rows = flagged_rows(
                labels, dataset.class_names, dataset.file_names, result.flagged, result.score, truth.is_poisoned
            )
            write_table(folder / "flagged.csv", rows)
            self._tracker.table("flagged", folder / "flagged.csv", 1000)
            shown = torch.tensor([row["index"] for row in rows if row["flagged"]][:FLAGGED_SHOWN], dtype=torch.int64)
            path = figures.flagged_grid(
                self._figure("flagged"),
                self._poisoned.train.images[shown].cpu(),
                labels[shown],
                result.score[shown] if result.score is not None else None,
                truth.is_poisoned[shown] if truth.is_poisoned is not None else None,
                dataset.class_names,
                total=int(result.flagged.sum()),
            )
            self._tracker.image("flagged", path)
        outputs = getattr(result.model, "num_classes", dataset.train.num_classes)
        save_model(
            folder,
            result.model,
            {
                "class_names": list(dataset.class_names),
                "num_outputs": outputs,
                "dummy_class": outputs - 1 if outputs > dataset.train.num_classes else None,
                "image_size": dataset.train.images.shape[-1],
                "mean": list(plan.dataset.mean),
                "std": list(plan.dataset.std),
            },
        )
        # Before the record is made: until then W&B may still warn.
        times = {"total": total_seconds - self.seconds.get(WAITING, 0.0), **self.seconds}
        self._tracker.finish({**metrics, **{f"seconds/{name}": value for name, value in times.items()}})
        n_poisoned = int(truth.is_poisoned.sum()) if truth.is_poisoned is not None else None
        record = {
            "run_dir": str(folder),
            **plan.names,
            "paper": plan.config["paper"],
            "budget": plan.config["budget"],
            "experiment": plan.config["experiment"],
            "seed": plan.seed,
            "variant": plan.variant,
            "settings": plan.settings,
            "metrics": {**metrics, "asr_floor": floor},
            "oracle": oracle_row(self._recorder.history()),
            "undefended": dict(undefended) if undefended is not None else None,
            "poison": {
                "n_train": len(labels),
                "n_poisoned": n_poisoned,
                "n_cover": int(truth.is_cover.sum()) if truth.is_cover is not None else None,
                "n_flagged": int(result.flagged.sum()) if result.flagged is not None else None,
            },
            "seconds": times,
            "defense_seconds": self._defense_seconds,
            "cell_hash": cell_hash(plan.config),
            "data": plan.config["files"].get("dataset"),
            "finished": datetime.now(UTC).isoformat(timespec="microseconds"),
            "environment": environment(plan.hardware.describe(), self._embedding),
            "diagnostics": {**_plain(result.extra), "maps": self._diagnostics} if result.extra else None,
            "warnings": list(self.progress.warnings),
            "status": "done",
        }
        path = self.folder.write_result(record)
        print_summary(self.progress, record, undefended)
        return path


def oracle_row(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The row of the last curve with the best ACC - ASR; None without one.

    Some papers report this epoch (``select: oracle``). It is chosen on test data, so it stands beside ``metrics``, never
    in their place, and no model of it is saved.
    """
    rows = [row for row in history if row.get("acc") is not None and row.get("asr") is not None]
    last = [row for row in rows if row["stage"] == rows[-1]["stage"]]
    return max(last, key=lambda row: row["acc"] - row["asr"]) if last else None


def _plain(extra: Mapping[str, Any]) -> dict[str, Any]:
    """A method's own notes; its reports of single maps are kept with their diagnosis instead."""
    return {key: value for key, value in extra.items() if key != "epochs"}
