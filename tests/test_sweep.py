"""Sweeps: which jobs a command line means, what is skipped, and that no job takes the others along."""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from backdoor_bench import dry_run, experiments, launch, processes
from backdoor_bench import sweep as sweeps
from backdoor_bench.errors import ConfigError, DataError, Interrupted
from backdoor_bench.reporting.sweep_screen import SweepScreen
from backdoor_bench.results import RunFolder
from backdoor_bench.sweep import Found, Options, Status, Sweep, SweepJob
from scripts import sync_wandb
from tests.conftest import CONF, TOY

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Hydra about reruns

ROOT = CONF.parent
MINI = """# @package _global_
# A table of our own, with a method that is not there yet
defaults:
  - override /paper: trap
sweep:
  cells:
    - dataset=toy model=tiny attack=none,badnets defense=no_defense
    - dataset=toy model=tiny attack=badnets defense=nosuch
    - dataset=toy model=tiny attack=badnets defense=trap defense.isolation.eps=2.5
  set: [train.epochs=12]
"""


@pytest.fixture(scope="module")
def conf(tmp_path_factory):
    """A copy of the configuration with an experiment of our own."""
    folder = tmp_path_factory.mktemp("sweep") / "conf"
    shutil.copytree(CONF, folder)
    (folder / "experiment" / "mini.yaml").write_text(MINI)
    (folder / "experiment" / "later.yaml").write_text(
        "# @package _global_\n# Nothing of it is there\nsweep:\n  cells: [attack=none defense=nosuch]\n"
    )
    return folder


def words_of(sweep):
    return [" ".join(job.words) for job in sweep.jobs]


# ------------------------------------------------------------------ which jobs


def test_the_product_of_swept_values_each_once():
    """B35: duplicate jobs run once; of two words with one key the later counts, as in Hydra."""
    sweep, options = sweeps.expand(CONF, ["attack=sig", "seed=0,1,0", "attack=none,badnets", "defense=no_defense"])
    assert words_of(sweep) == [
        "seed=0 attack=none defense=no_defense", "seed=0 attack=badnets defense=no_defense",
        "seed=1 attack=none defense=no_defense", "seed=1 attack=badnets defense=no_defense",
    ]  # fmt: skip
    assert options == Options(1, None, 0.0, 0, False)
    assert len({job.id for job in sweep.jobs}) == 4


def test_the_jobs_of_an_experiment(conf):
    sweep, _ = sweeps.expand(conf, ["experiment=mini", "seed=0,1", "output_root=somewhere", "sweep.retry=2"])
    assert sweep.name == "mini"
    assert sweep.folder == Path("somewhere/sweeps/mini")
    assert len(sweep.jobs) == 8
    for job in sweep.jobs:
        assert {"paper=trap", "dataset=toy", "model=tiny", "train.epochs=12", "output_root=somewhere"} <= {*job.words}
        assert not any(word.startswith(("experiment=", "sweep.")) for word in job.words)
    assert [job.missing for job in sweep.jobs].count(("defense=nosuch",)) == 2
    # A table is complete at one seed before the next begins.
    assert ["seed=0" in job.words for job in sweep.jobs] == [True] * 4 + [False] * 4


def test_the_command_line_narrows_replaces_and_overrides(conf):
    def jobs(*words):
        return words_of(sweeps.expand(conf, ["experiment=mini", *words])[0])

    assert jobs("defense=trap") == [
        "paper=trap dataset=toy model=tiny attack=badnets defense=trap defense.isolation.eps=2.5 train.epochs=12"
    ]
    assert len(jobs("attack=none")) == 1
    assert all("dataset=photo_digits" in job for job in jobs("dataset=photo_digits"))
    assert jobs("attack=none", "train.epochs=3,4") == [
        f"paper=trap dataset=toy model=tiny attack=none defense=no_defense train.epochs={n}" for n in (3, 4)
    ]
    assert {job.split()[0] for job in jobs("paper=null")} == {"dataset=toy"}
    small = jobs("budget=small", "defense=trap")
    assert "model=small_cnn" in small[0]
    assert "budget=small" in small[0]
    assert "model=tiny" in jobs("budget=small", "model=tiny", "defense=trap")[0]


def test_two_experiments_at_once_share_their_jobs(conf):
    sweep, _ = sweeps.expand(conf, ["experiment=mini,later"])
    assert len(sweep.jobs) == 5
    assert sweep.name.startswith("sweep-")


def test_jobs_side_by_side_have_one_thread_each():
    def threads(*words):
        (job,) = sweeps.expand(CONF, ["attack=none", *words])[0].jobs
        return [word for word in job.words if word.startswith("hardware.threads")]

    assert threads() == []
    assert threads("sweep.jobs=2") == ["hardware.threads=1"]
    assert threads("sweep.jobs=2", "hardware.threads=3") == ["hardware.threads=3"]


def test_the_name_is_that_of_what_is_computed():
    def name(*words):
        return sweeps.expand(CONF, ["attack=none", "seed=0,1", *words])[0].name

    assert name() == name("sweep.retry=3", "hydra.launcher.grace=5")
    assert name() != name("train.epochs=2")
    assert name("sweep.name=mine") == "mine"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sweep.name=../up"], "sweep.name='../up' is not allowed"),
        (["sweep.name=.hidden"], "sweep.name='.hidden' is not allowed"),
        (["sweep.name=a/b"], "sweep.name='a/b' is not allowed"),
        ([f"sweep.name={'n' * 300}"], "is not allowed: it must be 1 to 100 letters"),
        (["sweep.jobs=0"], "sweep.jobs=0 is not allowed"),
        (["sweep.jobs=two"], "sweep.jobs='two' is not allowed"),
        (["sweep.retry=-1"], "sweep.retry=-1 is not allowed"),
        (["sweep.time_limit=-1"], "sweep.time_limit=-1 is not allowed"),
        (["sweep.dry_run=maybe"], "sweep.dry_run='maybe' is not allowed"),
        (["sweep.gpus=[a]"], "sweep.gpus=['a'] is not allowed: it must be auto or a list of numbers"),
        (["sweep.gpus=all"], "sweep.gpus='all' is not allowed"),
        (["sweep.gpus=null"], "sweep.gpus=None is not allowed"),
        (["sweep.gpus=1"], "sweep.gpus=1 is not allowed"),
        (["hydra/launcher=basic", "sweep.retry=1"], "sweep.retry=1 is not allowed with hydra/launcher=basic"),
        (["output_root=a,b"], "output_root belongs to the whole sweep and takes one value"),
        (["resume.redo=true,false"], "resume.redo belongs to the whole sweep and takes one value"),
        (["sweep.jobs=1,2"], "sweep.jobs belongs to the whole sweep and takes one value"),
        (["experiment=mimi"], "experiment=mimi is unknown (did you mean mini?)"),
        (["experiment=mini", "attack=badnet"], "attack=badnet is unknown (did you mean badnets?)"),
        (["experiment=mini", "seed=range(3,3)"], "the sweep is empty"),
        (["experiment=mini", "seed=range(10001)"], "the sweep has 10001 jobs, more than 10000"),
        (["experiment=mini", "seed=range(2600)"], "the sweep has 10400 jobs"),
        (["sweep=3"], "sweep=3 is not allowed: it is a section of keys"),
    ],
)
def test_what_is_wrong_with_a_sweep(conf, words, told):
    with pytest.raises(ConfigError) as caught:
        sweeps.expand(conf, ["defense=no_defense", *words] if "mini" not in words[0] else words)
    assert told in str(caught.value)


def test_ids_say_what_a_job_is_and_do_not_depend_on_where_it_goes():
    job = SweepJob(("dataset=cifar10", "attack=sig", "defense=trap", "output_root=a", "tracking=offline"))
    assert job.id == SweepJob(("defense=trap", "attack=sig", "output_root=b", "dataset=cifar10")).id
    assert job.id.startswith("cifar10-sig-trap-")
    assert job.id != SweepJob((*job.words, "seed=1")).id
    hostile = SweepJob(("attack=../../x", "defense='a b'"))
    assert "/" not in hostile.id
    assert " " not in hostile.id


def test_jobs_of_one_victim():
    one = SweepJob(("attack=sig", "defense=trap", "defense.isolation.eps=3", "seed=1"))
    assert one.victim == SweepJob(("seed=1", "attack=sig", "defense/removal=retrain", "defense=dbr")).victim
    assert one.victim != SweepJob(("attack=sig", "defense=trap", "seed=2")).victim


def test_the_list_of_jobs_is_kept(tmp_path):
    jobs = (SweepJob(("seed=0",)), SweepJob(("defense=nosuch",), ("defense=nosuch",)))
    sweep = Sweep("s", tmp_path / "sweeps" / "s", jobs)
    Status(sweeps.FAILED, jobs[0].words).write(sweep, jobs[0])
    sweep.begin(["seed=0"])
    assert sweeps.read(sweep.folder / "jobs.json") == sweep
    assert sweeps.status(sweep, jobs[0]) is None  # of an earlier time
    assert sweeps.status(sweep, jobs[1]).state == sweeps.MISSING


def test_a_sweep_has_its_folder_for_itself(tmp_path):
    """Two of one name would run each other's jobs; what a killed one left half-written is removed."""
    sweep = Sweep("s", tmp_path / "sweeps" / "s", (SweepJob(("seed=0",)),))
    stale = sweep.folder / "status" / ".x.json.999999999.tmp"
    stale.parent.mkdir(parents=True)
    stale.touch()
    with sweep.held():
        sweep.begin([])
        assert not stale.exists()
        with pytest.raises(ConfigError) as caught, sweep.held():
            raise AssertionError("held twice")
    assert f"sweep.name=s is not free: process {os.getpid()} on " in str(caught.value)
    assert "set sweep.name=OTHER" in str(caught.value)
    with sweep.held():
        pass


def test_what_cannot_be_written_is_still_known(tmp_path):
    """A lost status file loses no failure, and a job without an end is one."""
    jobs = tuple(SweepJob((f"seed={n}",)) for n in range(4))
    sweep = Sweep("s", tmp_path / "sweeps" / "s", jobs)
    (tmp_path / "sweeps").touch()  # nothing can be written below a file
    said = []
    journal = sweeps.Journal()
    journal.note(sweep, jobs[0], Status(sweeps.DONE, jobs[0].words), said.append)
    journal.note(sweep, jobs[1], Status(sweeps.FAILED, jobs[1].words, reason="no space"), said.append)
    journal.note(sweep, jobs[2], Status(sweeps.RUNNING, jobs[2].words), said.append)
    assert len(said) == 1
    assert said[0].startswith("warning: could not write")
    summary = sweeps.Summary.of(sweep, journal)
    told = summary.failures()
    assert told.startswith("1 of 4 jobs failed, 2 were not finished, the others finished:\n")
    assert "seed=1\n    no space" in told
    assert "seed=2\n    not finished: its end is not known" in told
    assert "seed=3\n    not finished: it was not started" in told
    assert "seed=3" not in summary.failures(stopped=True)
    unknown = sweeps.Summary.of(sweep)
    assert unknown.failures().startswith("4 of 4 jobs were not finished:\n")
    one = Sweep("s", tmp_path / "none", jobs[1:2])
    assert sweeps.Summary.of(one, journal).failures().startswith("1 of 1 jobs failed:\n")


# ------------------------------------------------------------------ through Hydra, in this process


@pytest.fixture
def go(tmp_path, conf, capsys):
    """``go("seed=1", ...)``: the command line with Hydra's basic launcher and a task that only notes its plan."""

    class Go:
        def task(self, plan):
            self.plans.append(plan)
            return tmp_path / "result.json"

        def __call__(self, *argv):
            self.plans = []
            root = [f"output_root={tmp_path}/outputs", "hydra/launcher=basic", "hardware=cpu", "tracking=offline"]
            code = launch.main(self.task, conf, [*root, *argv])
            self.out, self.err = capsys.readouterr()
            return code

    return Go()


def test_an_experiment_needs_no_option_and_names_what_is_missing(go, tmp_path):
    assert go("experiment=mini") == 0, go.err
    assert [plan.names["defense"] for plan in go.plans] == ["no_defense", "no_defense", "trap"]
    assert {plan.tracking.group for plan in go.plans} == {"mini"}  # the sweep's name is W&B's group
    assert {plan.config["paper"] for plan in go.plans} == {"trap"}
    assert go.plans[2].settings == ["defense.isolation.eps=2.5", "train.epochs=12"]
    assert "sweep mini: 4 jobs in " in go.out
    assert "3 done now, 1 missing" in go.out
    assert "missing, no file in conf/: defense=nosuch (1 job)" in go.out
    folder = tmp_path / "outputs" / "sweeps" / "mini"
    states = sorted(json.loads(file.read_text())["state"] for file in (folder / "status").iterdir())
    assert states == ["done", "done", "done", "missing"]
    assert not list(folder.rglob(".*.tmp"))


def test_an_experiment_of_which_nothing_is_there(go):
    assert go("experiment=later") == 0
    assert go.plans == []
    assert "1 jobs in" in go.out
    assert "1 missing" in go.out


def test_a_job_that_cannot_be_composed_stops_no_other(go):
    """A key that one of the defences does not have."""
    assert go("-m", "dataset=toy", "model=tiny", "attack=badnets,none", "attack.poison_rate=0.1") == 8
    assert len(go.plans) == 1
    assert "1 of 2 jobs failed, the others finished" in go.err
    assert "attack.poison_rate does not exist with the groups chosen here" in go.err


def test_showing_the_configuration_starts_nothing(go, tmp_path):
    assert go("experiment=mini", "--cfg", "job") == 0
    assert "train.epochs=1" in go.out
    assert go.plans == []
    assert not (tmp_path / "outputs").exists()


def test_a_sweep_whose_jobs_have_no_end_fails(go, monkeypatch):
    monkeypatch.setattr(launch.InProcess, "__call__", lambda self, config: None)
    assert go("-m", "attack=none", "seed=0") == 8
    assert "1 of 1 jobs were not finished" in go.err


def test_names_and_folders_are_taken_as_they_are(go, tmp_path, monkeypatch):
    """All find the same folder, whatever the words look like."""
    monkeypatch.chdir(tmp_path)
    assert go("-m", "attack=none", "dataset=toy", "model=tiny", "++output_root='a,b 1'", "sweep.name='007,a=b'") == 0, (
        go.err
    )
    assert [plan.tracking.group for plan in go.plans] == ["007,a=b"]
    assert "1 done now" in go.out
    (status,) = (tmp_path / "a,b 1" / "sweeps" / "007,a=b" / "status").iterdir()
    assert json.loads(status.read_text())["state"] == "done"


def test_a_stopped_sweep_says_what_failed_before(go):
    def task(plan):
        raise DataError("a file is broken") if plan.seed == 0 else Interrupted("stopped by SIGTERM")

    go.task = task
    assert go("-m", "attack=none", "dataset=toy", "model=tiny", "seed=0,1,2") == 7
    assert "1 of 3 jobs failed, 2 were not finished:\n" in go.err
    assert "DataError: a file is broken" in go.err
    assert go.err.endswith("error: stopped by SIGTERM\n")


def test_a_dry_run_of_one_job_starts_nothing(go):
    assert go("attack=none", "dataset=toy", "model=tiny", "sweep.dry_run=true") == 0
    assert go.plans == []
    assert "nothing was started" in go.out


def test_a_single_run_may_be_of_a_group(go):
    assert go("dataset=toy", "model=tiny", "sweep.name=mine", "attack=none") == 0
    assert go.plans[0].tracking.group == "mine"


def test_another_launcher_that_is_not_installed(go):
    if importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is not None:
        pytest.skip("the Ray launcher is installed")
    assert go("-m", "attack=none", "hydra/launcher=ray") == 2
    assert "hydra/launcher=ray is unknown" in go.err
    assert "pip install 'backdoor-bench[ray]'" in go.err


# ------------------------------------------------------------------ dry run


def finished(root, **changes):
    """A result.json as a run leaves it."""
    value = {
        "dataset": "toy", "model": "tiny", "attack": "badnets", "defense": "no_defense", "paper": None, "budget": None,
        "seed": 0, "settings": [], "seconds": {"total": 30.0, "train": 20.0},
        "environment": {"device": "cpu", "threads": 1, "precision": "fp32"}, **changes,
    }  # fmt: skip
    names = [str(value[name]) for name in ("dataset", "model", "attack", "defense")]
    folder = root.joinpath(*names, f"v{len(list(root.rglob('result.json')))}", "seed0")
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(value))


def test_past_runs(tmp_path):
    finished(tmp_path)
    finished(tmp_path, defense="trap", seconds={"total": 12.0, "train": 20.0, "embedding": 5.0})
    finished(tmp_path, defense="dbr", seconds={"total": 9.0})
    torn = tmp_path / "a" / "b" / "c" / "d" / "e" / "f"
    torn.mkdir(parents=True)
    (torn / "result.json").write_text('{"data')
    past = {run.defense: run for run in dry_run.history(tmp_path)}
    assert (past["no_defense"].alone, past["no_defense"].training) == (10.0, 20.0)
    assert past["trap"].alone == 12.0  # its victim came from the cache
    assert past["dbr"].training is None
    assert past["trap"].victim == past["no_defense"].victim
    runs = list(past.values())

    def estimate(defense, model="tiny", settings=()):
        names = {"dataset": "toy", "model": model, "attack": "sig", "defense": defense}
        config = {"budget": None, "paper": None}
        guess = dry_run.estimate(runs, SimpleNamespace(names=names, config=config, settings=settings))
        return guess.alone, guess.training

    assert estimate("no_defense") == (10.0, 20.0)
    assert estimate("trap", settings=["attack.poison_rate=0.2"]) == (12.0, 20.0)
    assert estimate("trap", model="resnet18") == (None, None)  # a small run says nothing of a large one
    assert estimate("trap", settings=["train.epochs=3000"]) == (None, None)
    assert estimate("dbr") == (9.0, 0.0)  # needs no victim
    assert estimate("tr") == (None, 20.0)
    assert estimate("tr", model="resnet18") == (None, None)


def test_a_dry_run_lists_and_starts_nothing(tmp_path, conf, capsys):
    root = tmp_path / "outputs"
    finished(root, attack="badnets", paper="trap", settings=["train.epochs=12"])
    same = {"paper": "trap", "settings": ["train.epochs=12"]}
    finished(root, attack="wanet", defense="trap", seconds={"total": 52.0, "train": 22.0}, **same)
    (root / "cache" / "victim-0123").mkdir(parents=True)
    before = sorted(root.rglob("*"))
    words = [f"output_root={root}", "experiment=mini", "sweep.dry_run=true", "sweep.jobs=2", "hardware=cpu"]

    def task(plan):
        raise AssertionError("started")

    assert launch.main(task, conf, words) == 0
    out = capsys.readouterr().out.splitlines()
    assert sorted(root.rglob("*")) == before
    assert out[0] == f"sweep mini: 4 jobs, results below {root}"
    # 10 s of its own and 21 s for a victim that nobody has trained: the median of 20 and 22.
    assert out[1].split("attack=")[0].split() == ["to", "do", "about", "31.0", "s"]
    # Its victim is that of the finished run.
    assert "about 10.0 s" in out[2]
    assert out[2].endswith("[victim in the cache]")
    assert out[3].split()[0] == "missing"
    assert "about 30.0 s" in out[4]
    assert out[5] == "3 to do, 1 missing"
    assert out[6] == "time: about 35.5 s with sweep.jobs=2"
    assert out[7].startswith("disk: about ")
    assert out[8] == "nothing was started (sweep.dry_run=true)"


def test_a_dry_run_knows_what_is_done_and_what_is_refused(bench, tmp_path):
    words = ("attack=badnets", "defense=no_defense", "train.epochs=1", "attack.poison_rate=0.1,7")
    first = bench("attack=badnets", "defense=no_defense", "train.epochs=1", "attack.poison_rate=0.1")
    assert first.code == 0
    dry = bench("-m", *words, "seed=0,1", "sweep.dry_run=true")
    assert dry.code == 0
    assert f"done                        attack.poison_rate=0.1 seed=0  [{first.path.parent}]" in dry.out
    assert "attack.poison_rate=7 is not allowed" in dry.out
    assert "1 done, 1 to do, 2 refused" in dry.out
    again = bench("-m", *words, "sweep.dry_run=true", "resume.redo=true")
    assert "1 to do, 1 refused" in again.out
    assert "made again" in again.out


@pytest.mark.slow
@pytest.mark.parametrize("name", experiments.names(CONF))
def test_every_experiment_dry_runs(name, capsys):
    """No job of a table is one that its run would refuse."""
    assert launch.main(lambda plan: Path(), CONF, [f"experiment={name}", "sweep.dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert f"sweep {name}: " in out
    assert " refused" not in out, out


# ------------------------------------------------------------------ processes

STUB = """
import ctypes, os, signal, sys, time
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[1:])
out = Path(words["out"]); out.mkdir(parents=True, exist_ok=True)
with (out / "calls").open("a") as file:
    file.write(words["do"] + " " + os.environ.get("CUDA_VISIBLE_DEVICES", "-") + "\\n")
calls = (out / "calls").read_text().count(words["do"] + " ")
def stop(number, frame):
    (out / "checkpoint").touch()
    sys.exit(7)
def finish():
    (out / "result.json").write_text("{}")
    print("result:", out / "result.json")
match words["do"].split("-")[0]:
    case "ok": finish()
    case "exit9": os._exit(9)
    case "segfault": ctypes.string_at(0)
    case "killed": os.kill(os.getpid(), signal.SIGKILL)
    case "nothing": pass
    case "diverged": print("error: the loss is NaN", file=sys.stderr); sys.exit(4)
    case "config": print("error: a=1 is not allowed", file=sys.stderr); sys.exit(2)
    case "bug": raise ZeroDivisionError("a bug")
    case "second": finish() if calls == 2 else os._exit(9)
    case "parent":
        import subprocess
        child = subprocess.Popen(["sleep", "600"])
        (out / "child").write_text(str(child.pid))
        os._exit(9)
    case "busy":
        if calls == 1:
            print("error:", out, "is in use by process 1 on there; wait for it", file=sys.stderr); sys.exit(2)
        finish()
    case "long":
        if (out / "checkpoint").exists(): finish(); sys.exit()
        signal.signal(signal.SIGTERM, stop)
        time.sleep(600)
    case "deaf": signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)
    case "work":
        signal.signal(signal.SIGTERM, stop)
        sys.path.insert(0, words["root"])
        from backdoor_bench.processes import watch_parent
        watch_parent()
        (out / "working").touch()
        time.sleep(600)
"""


class Notes(processes.Quiet):
    def __init__(self):
        self.order, self.ends, self.said = [], [], []

    def started(self, job, attempt):
        self.order.append(job)

    def ended(self, job, status, again):
        self.ends.append((status.state, again))

    def say(self, message):
        self.said.append(message)


@pytest.fixture
def pool(tmp_path):
    """``pool("ok", "exit9", slots=2)`` runs jobs of a stub that does what it is told; returns their states by word."""
    script = tmp_path / "stub.py"
    script.write_text(STUB)

    class Stubs:
        def __init__(self):
            self.notes = Notes()

        def make(self, *whats, slots=1, minutes=0.0, retry=0, grace=1.0, look=None, gpus=None, extra=(), **more):
            jobs = [SweepJob((f"do={what}", f"out={tmp_path}/{what}", f"root={ROOT}", *extra)) for what in whats]
            self.sweep = Sweep("stubs", tmp_path / "sweeps" / "stubs", tuple(jobs))
            self.sweep.begin([])
            options = Options(slots, None, minutes, retry, False)
            return processes.Pool(
                self.sweep, script, options, look=look, screen=self.notes, gpus=gpus, grace=grace, **more
            )

        def __call__(self, *whats, **options):
            made = self.make(*whats, **options)
            made.run(self.sweep.jobs)
            return self.states()

        def states(self):
            summary = sweeps.Summary.of(self.sweep)
            return dict(zip((job.words[0][3:] for job in self.sweep.jobs), summary.states, strict=True))

    return Stubs()


def test_no_end_of_a_job_takes_the_others_along(pool, tmp_path):
    """F09, F10 and their kind: every job ends as its own process does."""
    states = pool(
        "exit9", "ok-1", "segfault", "killed", "nothing", "diverged", "config", "bug", "ok-2", slots=2
    )  # fmt: skip
    assert {what: state.state for what, state in states.items()} == {
        "exit9": "killed", "ok-1": "done", "segfault": "killed", "killed": "killed", "nothing": "failed",
        "diverged": "failed", "config": "failed", "bug": "failed", "ok-2": "done",
    }  # fmt: skip
    assert states["exit9"].reason == "its process ended with exit code 9 and without a word"
    assert "SIGSEGV" in states["segfault"].reason
    assert "SIGKILL (the system does so when memory runs out)" in states["killed"].reason
    assert states["diverged"].reason == "the loss is NaN"
    assert states["bug"].reason == "ZeroDivisionError: a bug"
    assert states["nothing"].reason == "its process ended without a result"
    assert states["ok-1"].result == f"{tmp_path}/ok-1/result.json"
    assert Path(states["bug"].log).read_text().startswith("--- ")
    summary = sweeps.Summary.of(pool.sweep)
    assert "2 done now, 4 failed, 3 killed" in summary.text(1.0)
    told = summary.failures()
    assert told.startswith("7 of 9 jobs failed, the others finished:\n")
    assert "killed: its process was ended by SIGSEGV" in told
    assert f"(log: {states['bug'].log})" in told


def test_a_job_that_hangs_is_ended_at_its_limit(pool):
    """F11: it is asked first; one that does not hear is killed."""
    states = pool("deaf", "ok", slots=2, minutes=0.1)
    assert states["deaf"].state == "timed out"
    assert states["deaf"].reason.startswith("took longer than sweep.time_limit=0.1 minutes; raise it, or go on")
    assert states["deaf"].exit_code == -9
    assert states["ok"].state == "done"


def test_a_job_that_took_too_long_goes_on_from_its_checkpoint(pool):
    states = pool("long", minutes=0.05, retry=20, grace=30.0)
    assert states["long"].state == "done"
    assert states["long"].attempts >= 2
    assert pool.notes.ends[0] == ("timed out", True)


def test_failed_jobs_are_tried_again(pool):
    states = pool("second", "exit9", "config", retry=2)
    assert (states["second"].state, states["second"].attempts) == ("done", 2)
    assert (states["exit9"].state, states["exit9"].attempts) == ("killed", 3)
    assert states["config"].attempts == 1  # as wrong the second time
    assert ("killed", True) in pool.notes.ends
    assert Path(states["exit9"].log).read_text().count("--- ") == 3


def test_what_a_job_that_died_had_started_ends_with_it(pool, tmp_path):
    assert pool("parent")["parent"].state == "killed"
    child = int((tmp_path / "parent" / "child").read_text())
    end = time.monotonic() + 30
    while "sleep" in subprocess.run(["ps", "-o", "stat=,args=", str(child)], capture_output=True, text=True).stdout:
        assert time.monotonic() < end, "it goes on"
        time.sleep(0.05)


def test_a_full_disk_under_the_logs(pool, tmp_path):
    """No job can be started: all are failures, tried as often as others, and the sweep comes to its end."""
    states = sweeps.Journal()
    made = pool.make("ok-1", "ok-2", retry=1, states=states)
    (pool.sweep.folder / "logs").touch()  # no folder: as good as a disk without space
    shutil.rmtree(pool.sweep.folder / "status", ignore_errors=True)
    (pool.sweep.folder / "status").touch()
    made.run(pool.sweep.jobs)
    summary = sweeps.Summary.of(pool.sweep, states)
    assert [(state.state, state.exit_code, state.attempts) for state in summary.states] == [("failed", 6, 2)] * 2
    assert "could not be started" in summary.failures()
    assert sum(said.startswith("warning: could not write") for said in pool.notes.said) == 1


def test_what_is_done_or_refused_is_not_started(pool, tmp_path):
    def look(job):
        if "do=ok-done" in job.words:
            return Found(None, tmp_path / "result.json")
        if "do=ok-wrong" in job.words:
            return Found(None, None, ConfigError("a=1 is not allowed"))
        return Found(None, None)

    states = pool("ok-done", "ok-wrong", "ok-new", look=look)
    assert [state.state for state in states.values()] == ["done before", "failed", "done"]
    assert states["ok-wrong"].reason == "a=1 is not allowed"
    assert len(pool.notes.order) == 1


def test_one_victim_is_trained_in_one_place(pool):
    """A job whose victim is being made does not take a slot while another could."""
    made = pool.make(*("ok-1", "ok-2", "ok-3"), slots=2)
    jobs = [
        SweepJob((*job.words[1:], f"attack={attack}", f"defense={job.words[0][3:]}", job.words[0]))
        for job, attack in zip(pool.sweep.jobs, ("sig", "sig", "blend"), strict=True)
    ]
    jobs = [
        SweepJob(tuple(w if not w.startswith(("out=", "do=")) else f"defense.{w}" for w in job.words)) for job in jobs
    ]
    assert jobs[0].victim == jobs[1].victim != jobs[2].victim
    started = []
    made._take = lambda turn: (  # type: ignore[method-assign]
        started.append(jobs.index(turn.job)),
        made._running.append(SimpleNamespace(turn=turn)),
    )
    made._waiting = [processes._Waiting(job) for job in jobs]
    while made._start_next():
        pass
    assert started == [0, 2, 1]


def test_gpus_are_shared_out(pool, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,-1,4")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)  # what it says of that
    assert processes.visible_gpus(Options(2, None, 0.0, 0, False)) == ["3", "5"]
    assert processes.visible_gpus(Options(1, None, 0.0, 0, False)) is None
    assert processes.visible_gpus(Options(2, (1,), 0.0, 0, False)) == ["5"]
    assert processes.visible_gpus(Options(1, (), 0.0, 0, False)) == []
    with pytest.raises(ConfigError, match=r"sweep.gpus=\[2\] is not allowed: there is no GPU 2, 2 can be seen"):
        processes.visible_gpus(Options(2, (2,), 0.0, 0, False))
    pool("ok-1", "ok-2", slots=2, gpus=["3", "5"])
    assert {(tmp_path / name / "calls").read_text().split()[1] for name in ("ok-1", "ok-2")} == {"3", "5"}
    pool("ok-3", gpus=[])
    assert (tmp_path / "ok-3" / "calls").read_text() == "ok-3 \n"


def test_a_run_folder_that_is_still_held_is_waited_for(pool, tmp_path):
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    lock = FileLock(tmp_path / "run" / ".lock", thread_local=False)
    lock.acquire()
    threading.Timer(1.0, lock.release).start()
    plan = SimpleNamespace(run_dir=tmp_path / "run")
    (tmp_path / "ok").mkdir()
    (tmp_path / "run" / "result.json").touch()
    states = pool("ok", look=lambda job: Found(plan, None))
    assert states["ok"].state == "done"
    assert len(pool.notes.said) == 1
    assert "another process still has" in pool.notes.said[0]


def test_a_run_folder_that_somebody_was_quicker_to_take(pool, tmp_path):
    """The job that was refused it is no failure; it waits like one that was looked at, whoever runs it."""
    states = pool("busy", "ok")
    assert {name: (state.state, state.attempts) for name, state in states.items()} == {
        "busy": ("done", 1),
        "ok": ("done", 1),
    }
    assert pool.notes.said == [f"another process still has {tmp_path}/busy; waiting for it"]
    with RunFolder(tmp_path / "run", {}), pytest.raises(ConfigError) as caught, RunFolder(tmp_path / "run", {}):
        raise AssertionError("held twice")
    assert str(caught.value).partition(processes._IN_USE)[0] == str(tmp_path / "run")


def wait_for(path, seconds=60.0):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_stops_its_jobs(pool, tmp_path, number):
    def ask():
        wait_for(tmp_path / "work" / "working")
        os.kill(os.getpid(), number)

    made = pool.make("work", "ok-later", grace=30.0)
    threading.Thread(target=ask).start()
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name}; run the same command again to go on"):
        made.run(pool.sweep.jobs)
    assert signal.getsignal(number) == before
    assert (tmp_path / "work" / "checkpoint").exists()
    assert pool.states()["work"].state == "stopped"
    assert pool.states()["ok-later"] is None
    assert "2 not finished" in sweeps.Summary.of(pool.sweep).text(1.0)


def test_a_second_ctrl_c_kills(pool, tmp_path):
    def ask():
        wait_for(tmp_path / "deaf" / "calls")
        time.sleep(0.5)  # until it hears nothing
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    made = pool.make("deaf", grace=300.0)
    threading.Thread(target=ask).start()
    start = time.monotonic()
    with pytest.raises(Interrupted, match="stopped by SIGINT"):
        made.run(pool.sweep.jobs)
    assert time.monotonic() - start < 60
    assert pool.states()["deaf"].exit_code == -signal.SIGKILL


def test_an_exception_in_the_parent_leaves_jobs_their_grace(pool, tmp_path):
    """As Ctrl-C in a worker of another launcher: they write their checkpoints."""
    made = pool.make("work", grace=30.0, signals=False)
    reap = made._reap

    def interrupted():
        reap()
        if (tmp_path / "work" / "working").exists() and not made._ending:
            raise KeyboardInterrupt

    made._reap = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        made.run(pool.sweep.jobs)
    assert (tmp_path / "work" / "checkpoint").exists()
    assert pool.states()["work"].state == "stopped"


def test_a_screen_that_nobody_reads(pool, tmp_path):
    """A closed pipe or a full disk under the sweep's own output ends no job."""
    pool.make("ok-1", "ok-2")
    file = pool.sweep.folder / "jobs.json"
    source = PARENT.format(root=str(ROOT), jobs=str(file), script=str(tmp_path / "stub.py"), grace=1.0)
    source = source.replace("grace=1.0).run", "grace=1.0, screen=SweepScreen(sweep, 2).__enter__()).run")
    source = f"from backdoor_bench.reporting.sweep_screen import SweepScreen\n{source}\n"
    source = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{source}from backdoor_bench.progress import let_go; let_go()"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", source], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert {state.state for state in pool.states().values()} == {"done"}
    for job in pool.sweep.jobs:
        pool.sweep.status_file(job).unlink()
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", source], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    assert {state.state for state in pool.states().values()} == {"done"}


PARENT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from backdoor_bench import processes, sweep as sweeps
from backdoor_bench.sweep import Options, Sweep, SweepJob
sweep = sweeps.read(Path({jobs!r}))
options = Options(2, None, 0.0, 0, False)
processes.Pool(sweep, Path({script!r}), options, look=None, grace={grace}).run(sweep.jobs)
"""


@pytest.mark.parametrize("what", ["work", "deaf"])
def test_jobs_end_when_their_sweep_is_killed(pool, tmp_path, what):
    """F14: they write their checkpoint and go; what does not hear is gone after the grace."""
    if what == "deaf":
        script = tmp_path / "stub.py"
        script.write_text(
            script.read_text().replace("def stop(number, frame):", "def stop(number, frame):\n    return")
        )
    pool.make("work")
    file = pool.sweep.folder / "jobs.json"
    source = PARENT.format(root=str(ROOT), jobs=str(file), script=str(tmp_path / "stub.py"), grace=1.0)
    parent = subprocess.Popen([sys.executable, "-c", source])
    wait_for(tmp_path / "work" / "working", 120.0)
    parent.kill()
    parent.wait()
    if what == "work":
        wait_for(tmp_path / "work" / "checkpoint")
    end = time.monotonic() + 60
    while subprocess.run(["pgrep", "-f", f"out={tmp_path}/work"], capture_output=True, check=False).stdout:
        assert time.monotonic() < end, "it goes on without its parent"
        time.sleep(0.1)
    assert pool.states()["work"].state == "running"  # nobody was there to say otherwise


def test_the_screen(pool, tmp_path, capsys):
    from rich.console import Console

    pool.make("ok-1", "exit9")
    one, two = pool.sweep.jobs
    with SweepScreen(pool.sweep, 1) as screen:
        screen.started(one, 1)
        screen.ended(one, Status(sweeps.DONE, one.words, seconds=61.0, result="r.json"), False)
        screen.started(two, 1)
        screen.ended(two, Status(sweeps.KILLED, two.words, reason="gone"), True)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == f"sweep stubs: 2 jobs, 1 at a time; logs in {pool.sweep.folder}/logs"
    assert lines[1] == f"[1/2] done in 1 min 01 s: do=ok-1 out={tmp_path}/ok-1"
    assert lines[2] == "result: r.json"
    assert err == f"[1/2] killed: do=exit9 out={tmp_path}/exit9: gone; it is tried again\n"

    terminal = io.StringIO()
    with SweepScreen(pool.sweep, 1, Console(file=terminal, force_terminal=True, width=200)) as screen:
        screen.ended(one, Status(sweeps.DONE, one.words, seconds=60.0), False)
        screen.started(two, 1)
        line = screen._line().plain
    assert line.startswith("1/2 ended, about 1 min 00 s left; running: do=exit9")


# ------------------------------------------------------------------ whole runs

SITE = """
import os, sys, time
if any(word.endswith("run.py") for word in sys.orig_argv):
    if "seed=1" in sys.orig_argv:
        os._exit(9)
    if "seed=2" in sys.orig_argv:
        time.sleep(600)
"""


def test_a_sweep_with_a_crash_and_one_with_a_hang(bench, tmp_path, monkeypatch):
    """F09 and F11 with real runs: the others finish, exit 8; what is done is not made again."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    paths = [str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    words = ("-m", "attack=none", "defense=no_defense", "train.epochs=1", "sweep.jobs=2", "sweep.name=s")
    crash = bench(*words, "seed=1,0")
    assert crash.code == 8, crash.out + crash.err
    assert crash.out.count("result: ") == 1
    assert "1 done now, 1 killed" in crash.out
    assert "1 of 2 jobs failed, the others finished" in crash.err
    assert "killed: its process ended with exit code 9" in crash.err

    hang = bench(*words, "seed=2,0", "sweep.time_limit=0.05", "hydra.launcher.grace=1")
    assert hang.code == 8
    assert "1 done before, 1 timed out" in hang.out
    assert "nothing to do: seed=0" in hang.out
    assert "timed out: took longer than sweep.time_limit=0.05 minutes" in hang.err


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_as_an_undisturbed_one(tmp_path):
    """F14 with real runs: parent and one child killed half-way, the same command again: no work twice, equal results."""
    words = [
        *TOY, "attack=none,badnets", "defense=no_defense", "seed=0,1", "train.epochs=40", "dataset.train_size=1200",
        "train.checkpoint_seconds=0", "sweep.jobs=2", "sweep.name=s",
    ]  # fmt: skip

    def start(root):
        command = [sys.executable, "run.py", "-m", *words, f"output_root={root}"]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def metrics(root):
        files = sorted(root.glob("toy/**/result.json"))
        return {str(file.relative_to(root)): json.loads(file.read_text())["metrics"] for file in files}

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = start(whole)
    out, _ = undisturbed.communicate(timeout=900)
    assert undisturbed.returncode == 0, out

    first = start(broken)
    while not list(broken.glob("toy/**/result.json")):
        assert first.poll() is None
        time.sleep(0.05)
    running = [json.loads(file.read_text()) for file in (broken / "sweeps" / "s" / "status").glob("*.json")]
    assert any(status["state"] == "running" for status in running)
    logs = {file: file.read_text() for file in (broken / "sweeps" / "s" / "logs").glob("*.log")}
    children = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True, text=True, check=False)
    first.kill()
    for child in children.stdout.split()[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(child), signal.SIGKILL)
    first.communicate()
    done = {file: file.stat().st_mtime_ns for file in broken.glob("toy/**/result.json")}

    second = start(broken)
    out, _ = second.communicate(timeout=900)
    assert second.returncode == 0, out
    assert out.count("already done, nothing to do") >= len(done) >= 1
    assert metrics(broken) == metrics(whole)
    assert len(metrics(whole)) == 4
    for file, stamp in done.items():
        assert file.stat().st_mtime_ns == stamp
    assert logs
    for log in (broken / "sweeps" / "s" / "logs").glob("*.log"):
        assert log.read_text().count("train: 40/40 in ") == 1, log.read_text()


# ------------------------------------------------------------------ other launchers


@pytest.fixture
def handed(tmp_path, monkeypatch):
    """``handed("RayLauncher", act, retry=1)`` hands two jobs over to a launcher that does ``act(seed, sweep, job)`` for each
    and then gives up; returns which it was handed, and the sweep with what is known of its jobs."""
    from hydra_plugins.backdoor_bench_launcher import sweeper

    monkeypatch.setattr(sweeper, "QUIET", 0.2)
    monkeypatch.setenv("PYTHONPATH", "")  # given back

    def hand_over(kind, act, retry=0, cluster=False):
        jobs = tuple(SweepJob((f"seed={n}", "++cache_root='a b'")) for n in range(2))
        sweep = Sweep("s", tmp_path / "sweeps" / "s", jobs)
        sweep.begin([])
        calls = []

        class Launcher:
            def launch(self, lines, initial_job_idx):
                calls.append([line[1] for line in lines])
                for line in lines:
                    assert f"cache_root='{Path('a b').absolute()}'" in line
                    assert "sweep.name='s'" in line
                    act(sweep, jobs[int(line[1][-1])])
                raise RuntimeError("gave up")

        made = sweeper.JobSweeper(None)
        made.kind, made.cluster, made.conf = f"of.{kind}", cluster, CONF
        made.options, made.states, made.launcher = Options(1, None, 0.0, retry, False), sweeps.Journal(), Launcher()
        made._hand_over(sweep, jobs)
        return calls, sweeps.Summary.of(sweep, made.states)

    return hand_over


def lost(sweep, job):
    Status(sweeps.RUNNING, job.words).write(sweep, job)


def test_each_lost_job_has_its_own_retries(handed):
    calls, summary = handed("JoblibLauncher", lost, retry=1)
    assert sorted(map(str, calls[1:])) == ["['seed=0']"] * 2 + ["['seed=1']"] * 2
    assert summary.count(sweeps.KILLED) == 2


def test_a_lost_job_that_is_done_the_second_time_is_done(handed):
    """Its worker writes that: what the sweep had noted of the first time must not stand before it."""
    seen = []

    def act(sweep, job):
        seen.append(job.id)
        Status(sweeps.RUNNING if seen.count(job.id) == 1 else sweeps.DONE, job.words, exit_code=0).write(sweep, job)

    calls, summary = handed("JoblibLauncher", act)
    assert calls == [["seed=0", "seed=1"], ["seed=0"], ["seed=1"]]
    assert summary.count(sweeps.DONE) == 2
    assert not summary.failures()


@pytest.mark.parametrize(("kind", "cluster"), [("SlurmLauncher", False), ("RayLauncher", True)])
def test_what_may_wait_in_a_queue_is_not_handed_over_again(handed, capsys, kind, cluster):
    calls, summary = handed(
        kind, lambda sweep, job: job.words[0] == "seed=0" and lost(sweep, job), retry=3, cluster=cluster
    )
    assert calls == [["seed=0", "seed=1"]]
    assert summary.failures().startswith("1 of 2 jobs failed, 1 were not finished:")
    assert "may still be waiting in its queue" in capsys.readouterr().err


# for real


def installed(*packages):
    return all(importlib.util.find_spec(name) is not None for name in packages)


LAUNCHERS = [
    pytest.param(
        "submitit_local",
        marks=pytest.mark.skipif(not installed("submitit"), reason="pip install 'backdoor-bench[slurm]' for this test"),
    ),
    pytest.param(
        "ray", marks=pytest.mark.skipif(not installed("ray"), reason="pip install 'backdoor-bench[ray]' for this test")
    ),
    pytest.param(
        "joblib",
        marks=pytest.mark.skipif(
            not installed("hydra_plugins.hydra_joblib_launcher"), reason="pip install 'backdoor-bench[joblib]' for this"
        ),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("victim", ["job", "worker"])
def test_a_worker_killed_in_mid_job(bench, tmp_path, monkeypatch, launcher, victim):
    """By another launcher: what runs is killed by the system; the others are done, the summary says what became of it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("hydra_plugins.backdoor_bench_launcher.sweeper.QUIET", 30.0)
    status = tmp_path / "outputs" / "sweeps" / "s" / "status"

    def kill():
        """Seed 1 trains for long: there is time to find it."""
        while True:
            for file in status.glob("*.json"):
                value = json.loads(file.read_text())
                log = value["log"] and Path(value["log"])
                if value["state"] == "running" and "seed=1" in value["words"] and log and "training images" in (
                    log.read_text() if log.exists() else ""
                ):  # fmt: skip
                    worker = value["pid"]
                    children = subprocess.run(["pgrep", "-P", str(worker)], capture_output=True, text=True, check=False)
                    os.kill(int(children.stdout.split()[0]) if victim == "job" else worker, signal.SIGKILL)
                    return
            time.sleep(0.2)

    threading.Thread(target=kill, daemon=True).start()
    done = bench(
        "-m", f"hydra/launcher={launcher}", "attack=none", "defense=no_defense", "seed=0,1,2", "train.epochs=60",
        "dataset.train_size=1200", "sweep.name=s", *(["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []),
    )  # fmt: skip
    states = {}
    for file in status.glob("*.json"):
        value = json.loads(file.read_text())
        states[next(word for word in value["words"] if word.startswith("seed="))] = value["state"]
    assert states["seed=0"] == states["seed=2"] == "done", done.out + done.err
    if victim == "job":
        assert states["seed=1"] == "killed"
        assert done.code == 8
        assert "killed: its process was ended by SIGKILL" in done.err
    else:  # Ray starts it again by itself, and a pool of which several were lost is worked off one by one
        assert states["seed=1"] in ("killed", "done")
        assert done.code == (8 if states["seed=1"] == "killed" else 0), done.out + done.err
        if launcher == "submitit_local":
            assert states["seed=1"] == "killed"
    again = bench("-m", "attack=none", "defense=no_defense", "seed=0,1,2", "train.epochs=60", "dataset.train_size=1200",
                  "sweep.name=s")  # fmt: skip
    assert again.code == 0
    assert again.out.count("nothing to do") >= 2


# ------------------------------------------------------------------ W&B


def test_offline_runs_are_sent_in_order_and_once(tmp_path, monkeypatch, capsys):
    def run(place, name, synced=False):
        folder = tmp_path / place / "tracking" / "wandb" / name
        folder.mkdir(parents=True)
        file = folder / f"run-{name.rsplit('-', 1)[1]}.wandb"
        file.touch()
        if synced:
            file.with_name(f"{file.name}.synced").touch()
        return folder

    later = run("a/seed0", "offline-run-20260102_000000-abc123")
    first = run("a/seed0", "offline-run-20260101_000000-abc123")
    run("b/seed0", "offline-run-20260101_120000-def456", synced=True)
    (tmp_path / "c" / "tracking" / "wandb" / "offline-run-20260101_000000-empty0").mkdir(parents=True)

    assert sync_wandb.main([str(tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "3 offline runs, 1 of them sent before, 2 to send"
    assert out.splitlines()[1] == f"  20260101_000000  abc123  {tmp_path}/a/seed0"

    calls = []

    def sync(command, check):
        calls.append(command[1:])
        for folder in command[4:]:
            (file,) = Path(folder).glob("*.wandb")
            file.with_name(f"{file.name}.synced").touch()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(sync_wandb.subprocess, "run", sync)
    assert sync_wandb.main([str(tmp_path)]) == 0
    assert calls == [["-m", "wandb", "sync", str(first), str(later)]]
    assert sync_wandb.main([str(tmp_path)]) == 0
    assert len(calls) == 1
    assert sync_wandb.main([str(tmp_path / "nowhere")]) == 2


def test_a_run_that_goes_on_is_not_sent(tmp_path, monkeypatch, capsys):
    from filelock import FileLock

    folder = tmp_path / "seed0" / "tracking" / "wandb" / "offline-run-20260101_000000-abc123"
    folder.mkdir(parents=True)
    (folder / "run-abc123.wandb").touch()
    monkeypatch.setattr(sync_wandb.subprocess, "run", lambda *args, **kwargs: pytest.fail("sent"))
    with FileLock(tmp_path / "seed0" / ".lock"):
        assert sync_wandb.main([str(tmp_path)]) == 0
    assert f"left out, it is still running: {tmp_path}/seed0" in capsys.readouterr().out


def test_runs_that_could_not_be_sent(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "tracking" / "wandb" / "offline-run-20260101_000000-abc123"
    folder.mkdir(parents=True)
    (folder / "run-abc123.wandb").touch()
    monkeypatch.setattr(sync_wandb.subprocess, "run", lambda command, check: SimpleNamespace(returncode=1))
    assert sync_wandb.main([str(tmp_path)]) == 1
    assert "1 runs were not sent; check `wandb login`" in capsys.readouterr().err
