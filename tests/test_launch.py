"""Before and around a run: nothing foreign is imported, sweeps are counted, errors become one line and an exit code."""

import os
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from backdoor_bench import launch
from backdoor_bench.errors import ConfigError, DataError, DiskError, Diverged, Interrupted
from tests.conftest import CONF, TOY

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Hydra about callbacks and reruns


@pytest.fixture
def go(tmp_path, capsys):
    """``go("seed=1", ...)`` runs the command line with a task that only notes its plan."""

    class Go:
        def __init__(self):
            self.plans, self.out, self.err = [], "", ""

        def task(self, plan):
            self.plans.append(plan)
            return tmp_path / "result.json"

        def __call__(self, *argv, task=None):
            self.plans = []
            root = f"output_root={tmp_path}/outputs"
            # Jobs as processes of their own would know nothing of a task of ours.
            basic = ["hydra/launcher=basic"] if "-m" in argv else []
            code = launch.main(task or self.task, CONF, [*TOY, root, *basic, *argv])
            self.out, self.err = capsys.readouterr()
            return code

    return Go()


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that leaves a file behind when it is imported, and one when its function is called."""
    imported, called = tmp_path / "imported", tmp_path / "called"
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "evil_for_test.py").write_text(
        f"from pathlib import Path\nPath({str(imported)!r}).touch()\n"
        f"def run(*args, **kwargs):\n    Path({str(called)!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.delitem(__import__("sys").modules, "evil_for_test", raising=False)
    return lambda: imported.exists() or called.exists()


# ------------------------------------------------------------------ foreign targets


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("attack._target_=evil_for_test.run", "attack._target_"),
        ("+attack.x={_target_:evil_for_test.run}", "attack.x._target_"),
        ("+a.b.c._target_=evil_for_test.run", "a.b.c._target_"),
        ("+a=[1,{b:[{_target_:evil_for_test.run}]}]", "a.1.b.0._target_"),
        ("+hydra.callbacks.x={_target_:evil_for_test.run}", "hydra.callbacks.x._target_"),
        ("hydra.launcher._target_=evil_for_test.run", "hydra.launcher._target_"),
        ("hydra.sweeper._target_=evil_for_test.run", "hydra.sweeper._target_"),
        ("dataset._target_=backdoor_bench_evil.run", "dataset._target_"),
        ("dataset._target_=xbackdoor_bench.run", "dataset._target_"),
        ("dataset._target_=hydra.utils.instantiate", "dataset._target_"),
        ("dataset._target_=7", "dataset._target_"),
        ("dataset._target_=null", "dataset._target_"),
        ("dataset._target_=${attack.name_of_class}", "dataset._target_"),
        ("dataset._target_='${oc.env:HOME}'", "dataset._target_"),
        ("+attack.x={_target_:evil_for_test.run,_partial_:true}", "attack.x._target_"),
    ],
)
def test_a_foreign_target_is_refused_before_anything_is_imported(go, evil, override, key):
    assert go(override) == 2
    assert go.err.startswith(f"error: {key}=")
    assert "nothing was imported" in go.err
    assert go.plans == []
    assert not evil()


def test_a_foreign_target_in_a_file_of_a_search_path_is_refused(go, evil, tmp_path):
    folder = tmp_path / "mine" / "attack"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("_target_: evil_for_test.run\nseed: 0\n")
    assert go(f"hydra.searchpath=[file://{tmp_path}/mine]", "attack=mine") == 2
    assert "attack._target_='evil_for_test.run' is not allowed" in go.err
    assert go.plans == []
    assert not evil()


def test_a_foreign_target_among_swept_values_stops_its_job_only(go, evil):
    code = go("-m", "attack=none", "attack._target_=backdoor_bench.attacks.none.NoAttack,evil_for_test.run")
    assert code == 8
    assert len(go.plans) == 1
    assert "evil_for_test.run" in go.err
    assert "1 of 2 jobs failed" in go.err
    assert not evil()


@pytest.mark.parametrize(
    "target",
    [
        "backdoor_bench.results.Path.touch",  # names that our modules imported
        "backdoor_bench.results.Path",
        "backdoor_bench.plan.instantiate",
        "backdoor_bench.results.load_model",  # ours, but no class
        "backdoor_bench.no_such_module.Thing",
        "backdoor_bench.attacks.badnets.Missing",
        "backdoor_bench...results.RunFolder",
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher.launch",
        "hydra._internal.core_plugins.bash_completion.os.Launcher",
    ],
)
def test_only_classes_written_here_are_ours(target):
    config = OmegaConf.create({"hydra": {"callbacks": {"x": {"_target_": target}}}})
    with pytest.raises(ConfigError, match=re.escape(f"hydra.callbacks.x._target_={target!r} is not allowed")):
        launch.refuse_foreign_targets(config)


@pytest.mark.parametrize("key", ["attack.x", "hydra.callbacks.x"])
def test_a_name_that_our_module_imported_is_not_called(go, tmp_path, key):
    assert go(f"+{key}={{_target_:backdoor_bench.results.Path.touch,self:{tmp_path}/sentinel}}") == 2
    assert not (tmp_path / "sentinel").exists()


def test_ours_and_hydras_own_pass():
    targets = [
        "backdoor_bench.attacks.badnets.BadNets",
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
    ]
    launch.refuse_foreign_targets(OmegaConf.create({"all": [{"_target_": target} for target in targets]}))


@pytest.mark.parametrize("key", ["+attack.x", "dataset.mean", "+hydra.callbacks.x"])
def test_a_target_made_by_a_resolver_is_refused(go, evil, key):
    go(f"{key}='${{oc.create:{{_target_:evil_for_test.run}}}}'")
    assert not evil()


@pytest.mark.parametrize(
    "words",
    [("--config-dir", "."), ("--config-dir=.",), ("--config-name", "other"), ("--config-path=/tmp",), ("-cd.",)],
)
def test_another_primary_config_is_refused(go, words):
    assert go(*words) == 2
    assert go.err.startswith(f"error: {words[0]} is neither KEY=VALUE nor an option")
    assert go.plans == []


def test_a_pickle_is_not_read(go, tmp_path):
    import pickle

    class Touch:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sentinel",))

    (tmp_path / "config.pickle").write_bytes(pickle.dumps(Touch()))
    assert go("--experimental-rerun", str(tmp_path / "config.pickle")) == 2
    assert not (tmp_path / "sentinel").exists()


# ------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("defense.isolation=fct", "defense/isolation=fct"),
        ("defense.removal=hiding,retrain", "defense/removal=hiding,retrain"),
        ("+defense.removal=hiding", "+defense/removal=hiding"),
        ("~defense.removal=hiding", "~defense/removal=hiding"),
        ("defense/isolation=fct", "defense/isolation=fct"),
        ("defense.isolation.eps=3", "defense.isolation.eps=3"),
        ("defense.isolation={eps:3}", "defense.isolation={eps:3}"),
        ("defense.isolations=fct", "defense.isolations=fct"),
        ("defense.isolation", "defense.isolation"),
        ("--config-dir=defense.isolation=x", "--config-dir=defense.isolation=x"),
        ("output_root=a=b", "output_root=a=b"),
    ],
)
def test_subgroup(word, wanted):
    assert launch._subgroup(word) == wanted


def test_a_subgroup_is_chosen_with_a_dot(go):
    assert go("defense.removal=mixed_ce", "defense.removal.lambda_p=0.5") == 0
    (plan,) = go.plans
    assert type(plan.defense.removal).__name__ == "MixedCE"
    assert plan.defense.removal.lambda_p == 0.5


def test_options_may_stand_between_the_overrides(go):
    assert go("seed=3,4", "-m", "attack=none") == 0
    assert [plan.seed for plan in go.plans] == [3, 4]
    names = {plan.tracking.group for plan in go.plans}
    assert len(names) == 1  # what the jobs of one sweep share
    assert re.fullmatch(r"sweep-[0-9a-f]{8}", names.pop())
    assert go("seed=5", "--cfg", "job", "attack=none", "--resolve") == 0
    assert go.plans == []
    assert "seed: 5" in go.out
    assert "backdoor_bench.attacks.none.NoAttack" in go.out


def test_the_command_line_is_given_back(go):
    import sys

    before = list(sys.argv)
    go("attack=none")
    assert sys.argv == before


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_lists_every_file_of_every_group(go, word):
    assert go("seed=nonsense", word) == 0
    groups = [*launch.GROUPS, "defense/isolation", "defense/removal"]
    listed = 0
    for group in groups:
        files = sorted((CONF / group).glob("*.yaml"))
        if not files:
            continue
        section = go.out.split(f"\n{group.replace('/', '.')}:\n")[1].split("\n\n")[0]
        names = [line.split()[0] for line in section.splitlines()]
        assert names == [file.stem for file in files]
        for file, line in zip(files, section.splitlines(), strict=True):
            first = next(one for one in file.read_text().splitlines() if not one.startswith("# @package"))
            assert line.endswith(first.removeprefix("#").strip() if first.startswith("#") else file.stem)
        listed += len(files)
    assert listed > 30
    folders = {str(path.parent.relative_to(CONF)) for path in CONF.rglob("*.yaml")}
    overlays = {
        folder for folder in folders if folder.startswith(("train", "paper_", "budget_", "hydra/")) or folder == "."
    }
    assert folders - overlays <= set(groups), "a group that --help does not know"


def test_every_example_of_the_help_composes(go):
    go("--help")
    examples = re.findall(r"^  python run\.py (.*?)(?: {2,}|$)", go.out.split("examples:")[1], re.MULTILINE)
    examples = [text.split() for text in examples if text.strip()]
    assert len(examples) >= 5
    for words in examples:
        words = [launch._subgroup(word) for word in words if launch._is_override(word)]
        launch.check_command(CONF, words)


# ------------------------------------------------------------------ sweeps


@pytest.mark.parametrize("text", ["seed=range(3,3)", "seed=range(5,1)"])
def test_an_empty_sweep_is_refused(text):
    with pytest.raises(ConfigError, match=re.escape(f"{text} sweeps over no value")):
        launch.check_command(CONF, [text])


def test_jobs_of_a_sweep_are_counted():
    launch.check_command(CONF, ["seed=range(100)", "attack.seed=range(100)"])
    with pytest.raises(ConfigError, match="the sweep has 10001 jobs, more than 10000"):
        launch.check_command(CONF, ["seed=range(10001)"])
    launch.check_command(CONF, ["seed=range(10001)"], many=True)
    with pytest.raises(ConfigError, match="the sweep has 10100 jobs"):
        launch.check_command(CONF, ["seed=range(101)", "attack.seed=range(50)", "attack=badnets,sig"])


def test_swept_values_are_checked_one_by_one(go):
    assert go("-m", "attack=none", "seed=-1,two,1") == 8
    assert [plan.seed for plan in go.plans] == [1]
    assert "2 of 3 jobs failed, the others finished" in go.err
    assert "seed=-1 is not allowed" in go.err
    assert "seed='two' is not allowed" in go.err
    assert go.out.count("result: ") == 1


def test_a_swept_group_with_an_unknown_name_stops_everything(go):
    assert go("-m", "attack=none,badnet") == 2
    assert "attack=badnet is unknown (did you mean badnets?)" in go.err
    assert go.plans == []


def test_a_glob_sweeps_over_the_names_that_match(go):
    assert go("-m", "attack=glob(badnets_*)", "attack.seed=0") == 0
    assert len(go.plans) == len(list((CONF / "attack").glob("badnets_*.yaml")))


@pytest.mark.parametrize("text", ["attack=glob(nothing_*)", "attack=glob(*,exclude=*)"])
def test_a_glob_that_matches_nothing_is_an_empty_sweep(text):
    with pytest.raises(ConfigError, match=re.escape(f"{text} sweeps over no value")):
        launch.check_command(CONF, [text])


def test_many_jobs_are_allowed_on_request(go):
    assert go("-m", "attack=none", "seed=range(10001)") == 2
    assert "or add --many to run them all" in go.err
    assert go("--many", "attack=none") == 0


def test_one_failing_job_does_not_stop_the_others(go):
    plans = []

    def task(plan):
        plans.append(plan.seed)
        if plan.seed == 0:
            raise DataError("a file is broken")
        if plan.seed == 1:
            raise ZeroDivisionError("a bug")
        return Path("done")

    assert go("-m", "attack=none", "seed=0,1,2", task=task) == 8
    assert plans == [0, 1, 2]
    assert "DataError: a file is broken" in go.err
    assert "ZeroDivisionError: a bug" in go.err
    assert "2 of 3 jobs failed" in go.err


def test_an_interrupted_sweep_leaves_the_rest_for_the_next_time(go):
    plans = []

    def task(plan):
        plans.append(plan.seed)
        raise Interrupted("stopped by SIGTERM")

    assert go("-m", "attack=none", "seed=0,1", task=task) == 7
    assert plans == [0]


# ------------------------------------------------------------------ exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("c"), 2), (DataError("d"), 3), (Diverged("v"), 4), (DiskError("k"), 6), (Interrupted("i"), 7),
        (torch.OutOfMemoryError("CUDA out of memory"), 5), (MemoryError(), 5), (KeyboardInterrupt(), 7),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to\nallocate"), 5),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)  # fmt: skip
def test_errors_of_a_job_become_exit_codes(go, error, code):
    def task(plan):
        raise error

    assert go("attack=none", task=task) == code
    assert go.err.startswith("error: ")
    assert go.err.count("\n") == 1
    assert "result:" not in go.out
    if code == 5:
        assert "lower train.batch_size (now " in go.err


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), RuntimeError("shapes do not fit")])
def test_a_bug_is_not_hidden(go, error):
    def task(plan):
        raise error

    with pytest.raises(type(error), match=str(error)):
        go("attack=none", task=task)


def test_traceback_is_shown_on_request(go):
    def task(plan):
        raise DataError("a file is broken")

    assert go("--traceback", "attack=none", task=task) == 3
    assert "Traceback" in go.err
    assert go.err.endswith("error: a file is broken\n")


def test_a_plan_says_where_everything_goes(go, tmp_path):
    assert go("attack=sig", "seed=4", "attack.seed=9", "defense=no_defense", "attack.poison_rate=0.5") == 0
    (plan,) = go.plans
    assert plan.variant.startswith("attack.poison_rate=0.5,attack.seed=9,hardware.threads=1")
    assert plan.run_dir == tmp_path / "outputs" / "toy" / "tiny" / "sig" / "no_defense" / plan.variant / "seed4"
    assert plan.cache_dir == tmp_path / "outputs" / "cache"
    assert (plan.seed, plan.attack_seed, plan.poisons, plan.tracking.group) == (4, 9, True, None)
    assert plan.names == {"dataset": "toy", "model": "tiny", "attack": "sig", "defense": "no_defense"}
    assert "hydra" not in plan.config
    assert not (tmp_path / "outputs").exists()


# ------------------------------------------------------------------ messages


def message(*overrides):
    with pytest.raises(Exception) as caught:
        launch.check_command(CONF, list(overrides))
    return launch.explain(caught.value, CONF, list(overrides))


def names(group):
    return ", ".join(sorted(file.stem for file in (CONF / group).glob("*.yaml")))


@pytest.mark.parametrize(
    ("group", "name", "nearest"),
    [
        ("attack", "badnet", "badnets"),
        ("dataset", "cifar_10", "cifar10"),
        ("model", "resnet19", "resnet18"),
        ("defense/removal", "hidding", "hiding"),
        ("hardware", "gpus", "gpu"),
    ],
)
def test_unknown_choice_of_a_group(group, name, nearest):
    assert message(f"{group}={name}") == f"{group}={name} is unknown (did you mean {nearest}?); valid: {names(group)}"


def test_unknown_choice_without_anything_near():
    assert message("attack=qqqq") == f"attack=qqqq is unknown; valid: {names('attack')}"


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("attack.poison_rat=0.1", "attack.poison_rat", "attack.poison_rate"),
        ("defense.isolation.epz=3", "defense.isolation.epz", "defense.isolation.eps"),
        ("sed=1", "sed", "seed"),
        ("atack=badnets", "atack", "attack"),
        ("train.epoch=3", "train.epoch", "train.epochs"),
        ("~train.epoch", "train.epoch", "train.epochs"),
    ],
)
def test_unknown_key(override, key, nearest):
    told = message(override)
    assert (
        told == f"{key} is no key of the configuration (did you mean {nearest}?); python run.py --help lists the groups"
    )


def test_key_of_another_choice():
    told = message("attack=none", "attack.poison_rate=0.1")
    assert told.startswith("attack.poison_rate does not exist with the groups chosen here")


def test_missing_value():
    assert (
        message("seed=???") == "seed has no value: give it on the command line (seed=...)"
    )  # attack.seed refers to it
    with pytest.raises(ConfigError, match=r"train\.gamma has no value: give it on the command line"):
        launch.check_command(CONF, ["train.gamma=???"])


def test_unreadable_override(go):
    assert go("attack=[") == 2
    assert "attack=[ cannot be read as KEY=VALUE" in go.err
    assert go("atack", "seed=1") == 2
    assert "atack is neither KEY=VALUE nor an option (did you mean attack?)" in go.err
    assert go.plans == []


@pytest.mark.parametrize("key", ["train.augment", "holdout", "evaluation", "resume"])
def test_a_section_is_not_a_value(key):
    with pytest.raises(ConfigError, match=rf"{re.escape(key)}=3 is not allowed: it is a section of keys"):
        launch.check_command(CONF, [f"{key}=3"])


@pytest.mark.parametrize("group", ["attack", "train"])
def test_a_number_for_a_group_is_a_configuration_error(group):
    assert group in (message(f"{group}=3") or "")


def test_errors_of_others_are_not_explained():
    assert launch.explain(ZeroDivisionError("x"), CONF, []) is None


def test_hydra_full_error_is_left_on(go):
    go("attack=none")
    assert os.environ["HYDRA_FULL_ERROR"] == "1"
