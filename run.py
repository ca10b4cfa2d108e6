#!/usr/bin/env python3
"""One experiment: compose -> load -> poison -> defend -> evaluate -> save. The only place where all parts meet."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backdoor_bench.plan import Plan
    from backdoor_bench.results import RunFolder


def job(plan: Plan) -> Path:
    """One job; returns the path of its result.json."""
    from backdoor_bench.results import RunFolder

    with RunFolder(plan.run_dir, plan.config) as folder:
        if folder.finished() is not None and not plan.redo:
            print(f"already done, nothing to do (resume.redo=true makes it again): {folder.path}")
            return folder.path / "result.json"
        folder.begin()
        return experiment(plan, folder)


def experiment(plan: Plan, folder: RunFolder) -> Path:
    """The experiment itself, with its evidence written to ``folder``."""
    from backdoor_bench import assemble
    from backdoor_bench.detection.oracle import informed
    from backdoor_bench.reporting.run import Report
    from backdoor_bench.training.interrupt import raise_if_requested

    start = time.perf_counter()
    plan.hardware.apply()
    with Report(plan, folder) as report:
        dataset, holdout = assemble.load(plan, report.progress)
        run = assemble.prepare_run(plan, dataset, report.progress, report.seconds, holdout)
        poisoned = plan.attack.poison(assemble.attacker_view(run, dataset))
        poisoned = assemble.with_holdout(plan, poisoned, holdout)
        # One copy of the data from here on; an imported set's rows are not those that the file names belong to.
        names = None if getattr(plan.attack, "own_rows", False) else dataset.file_names
        dataset = replace(dataset, train=poisoned.train, file_names=names)
        evaluator = assemble.evaluator_for(run, dataset, poisoned)
        report.poisoned(dataset, poisoned, evaluator.truth)
        raise_if_requested()

        view = assemble.defender_view(run, poisoned, holdout, report.recorder(evaluator))
        defense = informed(plan.defense, evaluator.truth.is_poisoned, evaluator.truth.is_cover)
        with report.defending():
            result = assemble.checked(defense.defend(view), len(view.train))
        raise_if_requested()

        metrics = evaluator.model_metrics(result.model, final=True)
        metrics |= evaluator.isolation_metrics(result.flagged, result.trusted, result.score)
        undefended = evaluator.model_metrics(view.victim(), final=True) if view.victim.is_cached() else None
        floor = assemble.asr_floor(run, evaluator)
        return report.finish(result, metrics, undefended, floor, time.perf_counter() - start)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from backdoor_bench import launch

    conf = Path(__file__).resolve().parent / "conf"
    return launch.main(job, conf, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
