"""Experiments: their jobs are the printed cells, their overlays compose, their rates are the papers'."""

import csv
import math
import sys
from collections import Counter
from fractions import Fraction
from math import floor

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from backdoor_bench import experiments
from backdoor_bench.attacks.common import poison_count, poison_pool
from backdoor_bench.data.checks import holdout_count
from backdoor_bench.errors import ConfigError, DataError
from backdoor_bench.plan import prepare
from tests.conftest import CONF

ROOT = CONF.parent
NAMES = experiments.names(CONF)
TABLES = [f"{paper}_table{n}" for paper, numbers in {
    "trap": range(1, 7), "tr": range(1, 13), "ebd": (1, 2, 3, 5, 6, 7), "meca": range(2, 8),
}.items() for n in numbers]  # fmt: skip
FIGURES = [f"{paper}_fig{n}" for paper, numbers in {
    "trap": range(4, 9), "ebd": (4, 5, 6, 11, 12, 13), "meca": (6, 7),
}.items() for n in numbers]  # fmt: skip
HARDWARE = ["hardware=cpu", "hardware.threads=1", "tracking=disabled"]
# Which group's choice the second half of an overlay's name is.
OVERLAYS = {
    "paper_dataset": "dataset",
    "paper_model": "model",
    "paper_attack": "attack",
    "paper_isolation": "defense/isolation",
    "paper_removal": "defense/removal",
    "paper_defense": "defense",
    "budget_paper": "paper",
    "budget_attack": "attack",
    "budget_isolation": "defense/isolation",
    "budget_removal": "defense/removal",
    "budget_defense": "defense",
}
OVERLAY_FILES = sorted(file for folder in OVERLAYS for file in (CONF / folder).glob("*.yaml"))


def jobs_of(name, chosen=None, **more):
    return experiments.jobs(CONF, experiments.load(CONF, name), chosen, **more)


def printed_rows(table):
    with (ROOT / "backdoor_bench" / "reference" / f"{table}.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def compose_config(words):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(words), return_hydra_config=True)


def plan_of(words):
    """The run of a command line, made ready: every key of every overlay has been taken by its class."""
    config = compose_config([*words, *HARDWARE])
    choices = dict(config.hydra.runtime.choices)
    return prepare(config, list(words), None, choices)


# ---------------------------------------------------------------------- the files


def test_there_is_an_experiment_for_every_table_and_figure():
    assert {*TABLES, *FIGURES} <= {*NAMES}
    assert {row for row in experiments.tables() if "_text" not in row} == {*TABLES}


@pytest.mark.parametrize("name", NAMES)
def test_title_and_paper(name):
    experiment = experiments.load(CONF, name)
    assert experiment.paper == name.partition("_")[0]
    assert 15 < len(experiment.title) < 100
    assert {"trap": "TRAP", "tr": "T&R", "ebd": "EBD", "meca": "MeCa"}[experiment.paper] in experiment.title


@pytest.mark.parametrize("file", OVERLAY_FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_an_overlay_is_named_after_what_exists_and_says_what_it_is(file):
    owner, _, choice = file.stem.partition("_")
    group = "paper" if file.parent.name.startswith("paper") else "budget"
    assert (CONF / group / f"{owner}.yaml").is_file()
    assert (CONF / OVERLAYS[file.parent.name] / f"{choice}.yaml").is_file()
    package, first = file.read_text().splitlines()[:2]
    assert package.startswith("# @package ")
    assert first.startswith("# ")


def test_every_folder_of_overlays_is_in_the_defaults_in_this_order():
    entries = [next(iter(e)) for e in OmegaConf.load(CONF / "config.yaml").defaults if not isinstance(e, str)]
    entries = [entry.removeprefix("optional ") for entry in entries]
    listed = [entry for entry in entries if entry.startswith(("paper", "budget", "experiment"))]
    half = len(OVERLAYS) - 5
    assert listed == ["paper", *list(OVERLAYS)[:half], "experiment", "budget", *list(OVERLAYS)[half:]]
    folders = {path.name for path in CONF.iterdir() if path.name.startswith(("paper_", "budget_"))}
    assert folders <= {*OVERLAYS}


def test_the_list_of_experiments_in_the_docs_is_up_to_date():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import list_experiments
    finally:
        sys.path.pop(0)
    now = list_experiments.PAGE.read_text()
    assert list_experiments.page(now) == now, f"run {list_experiments.COMMAND}"
    assert all(f"| `{name}` |" in now for name in NAMES)


# ---------------------------------------------------------------------- printed cells


@pytest.mark.parametrize("table", [name for name in TABLES if name != "trap_table5"])
def test_a_table_has_one_job_a_printed_cell(table):
    jobs = jobs_of(table)
    cells = {
        (row["dataset"], row["model"], row["attack"], row["defense"], row["poison_rate"])
        for row in printed_rows(table)
        if row["attack"] != "average"
    }
    assert len(jobs) == len(cells)
    assert Counter(cell[1:] for job in jobs for cell in job.printed) == Counter(cells)
    for job in jobs:
        (_, dataset, model, attack, defense, _), *others = job.printed
        assert not others
        method = "isolate_only" if (table, defense) == ("trap_table3", "abl") else defense.partition(":")[0]
        expected = {"dataset": dataset, "model": model, "attack": attack, "defense": method}
        assert {key: job.groups[key] for key in expected} == expected


def test_the_averages_of_trap_table5_are_expanded():
    jobs = jobs_of("trap_table5")
    assert len(jobs) == (7 + 7 - 1) * 6  # eps=3 and min_samples=50 are the same runs
    assert Counter(len(job.printed) for job in jobs) == {1: 72, 2: 6}
    assert {cell for job in jobs for cell in job.printed} == {row.cell for row in experiments.printed("trap_table5")}
    plain = [job for job in jobs if not job.settings]
    assert {job.groups["attack"] for job in plain} == {"badnets", "trojan", "blend_strip", "blend_kitty", "sig", "cl"}
    assert {cell[4] for job in plain for cell in job.printed} == {"trap:eps=3", "trap:min_samples=50"}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("trap_fig4", 11 * 4),
        ("trap_fig5", 11 * 4),
        ("trap_fig6", 11),
        ("trap_fig7", 11 * 5 - 1),  # SIG at 1 % is left out
        ("trap_fig8", 11),
        ("trap_adaptive", 4),
        ("ebd_fig4", 7 * 4),
        ("ebd_fig5", 7 * 3),
        ("ebd_fig6", 7 * 5),
        ("ebd_fig11", 3),
        ("ebd_fig12", 1),
        ("ebd_fig13", 1 + 6 + 6),
        ("meca_fig6", 8),
        ("meca_fig7", 8 * 5),
    ],
)
def test_a_figure_has_the_jobs_of_its_sweep(name, count):
    assert len(jobs_of(name)) == count


def test_figures_stand_for_the_numbers_that_the_text_reads_from_them():
    def values(name):
        experiment = experiments.load(CONF, name)
        cells = {cell for job in jobs_of(name) for cell in job.printed}
        rows = (row for table in experiment.tables for row in experiments.printed(table) if row.cell in cells)
        return {row.value for row in rows if experiment.notes in row.notes}

    assert values("trap_fig4") == {83.17, 94.77, 48.63, 54.07, 94.94}
    assert values("trap_fig5") == {0.93, 0.01}
    assert values("trap_fig6") == {27.56, 36.45}
    assert values("trap_adaptive") == {93.35, 100, 92.71, 37.27}
    assert values("ebd_fig4") == {24.72}
    assert values("ebd_fig12") == {99}


def test_the_same_run_serves_several_tables():
    keys = {name: {job.key for job in jobs_of(name)} for name in NAMES}
    assert keys["trap_fig8"] < keys["trap_table1"]
    assert keys["trap_fig4"] == keys["trap_fig5"]
    assert len(keys["trap_table3"] & keys["trap_table1"]) == 11 * 2  # trap and nonlinearity
    assert len(keys["trap_table4"] & keys["trap_fig7"]) == 5 * 2  # trap at 5 and 20 %
    assert len(keys["tr_table6"] & keys["tr_table1"]) == 4 * 2  # 10 % is the default
    for part in ("tr_table4", "tr_table5", "tr_table8", "tr_table9"):
        assert keys[part] & keys["tr_table1"], part
    assert len(keys["ebd_table3"] & keys["ebd_table1"]) == 7
    assert keys["meca_fig6"] < keys["meca_table2"] | keys["meca_table3"]


def test_a_cell_without_its_method_is_listed_not_dropped():
    jobs = jobs_of("trap_table3")
    missing = {word for job in jobs for word in job.missing}
    exist = {f"defense={file.stem}" for file in (CONF / "defense").glob("*.yaml")}
    assert missing == {f"defense={name}" for name in ("ac", "nonlinearity")} - exist
    assert {"dataset=imagenet_subset"} <= {word for job in jobs_of("trap_table1") for word in job.missing}
    assert not {word for job in jobs for word in job.missing} & {"defense=trap", "defense=fct", "defense=spectral"}


# ---------------------------------------------------------------------- composing


def covering():
    """(name, job) of printed cells whose groups and settings together are all that any experiment has."""
    seen = set()
    for name in [*TABLES, *FIGURES, "trap_adaptive"]:
        for job in jobs_of(name):
            if job.missing:
                continue
            groups, paper = job.groups, job.groups["paper"]
            dataset = groups["dataset"] if paper == "tr" else ""  # T&R's rate and target differ between data sets
            items = {("attack", paper, groups["attack"], dataset)}
            items |= {(group, paper, groups[group]) for group in ("dataset", "model", "defense")}
            items |= {("setting", paper, word if "/" in word else word.partition("=")[0]) for word in job.settings}
            if not items <= seen:
                seen |= items
                yield name, job


COVERING = list(covering())


def full_size(dataset):
    return 15_600 if dataset == "imagenet12" else OmegaConf.load(CONF / "dataset" / f"{dataset}.yaml").train_size


def conventional_count(paper, rate, attack, labels, whole):
    """How many images the paper means by its rate (papers/README.md, "What the rate counts")."""
    rate = Fraction(rate)
    members = int((labels == attack.target_class).sum()) if attack.target_class is not None else 0
    if paper in ("trap", "ebd"):
        pool = {"all2one": len(labels) - members, "clean": members, "all2all": len(labels)}[attack.label_rule]
        if type(attack).__name__ == "AdapBlend":  # draws from all images (specs/attacks.md A19)
            pool = len(labels)
        return floor(rate * pool)
    if attack.label_rule == "source2target":
        members = int((labels == attack.source_class).sum())
    return min(floor(rate * whole), members if attack.label_rule != "all2one" else len(labels))


@pytest.mark.parametrize(("name", "job"), COVERING, ids=[f"{n}-{'-'.join(j.overrides[3:])}" for n, j in COVERING])
def test_a_job_composes_and_poisons_what_the_paper_prints(name, job):
    plan = plan_of(job.overrides)
    assert plan.settings == [*job.settings]
    assert plan.names == {key: job.groups[key] for key in ("dataset", "model", "attack", "defense")}
    rates = {cell[5] for cell in job.printed}
    attack, paper, dataset = plan.attack, job.groups["paper"], job.groups["dataset"]
    if name == "trap_table6":
        assert attack.first.poison_rate + attack.second.poison_rate == pytest.approx(0.01)
    elif rates and rates not in ({"0"}, {""}):
        (rate,) = rates
        whole = full_size(dataset)
        held = holdout_count(plan.config["holdout"]["size"], whole)
        labels = torch.arange(whole - held) % plan.dataset.num_classes
        pool = int(poison_pool(attack, labels).sum())
        count = poison_count(attack, pool, len(labels), warn=lambda message: None)
        assert count == conventional_count(paper, rate, attack, labels, whole)


def test_known_counts_of_the_papers():
    """specs/attacks.md 3.4 from the composed rates themselves, not from another reading of the README."""

    def attack_of(*words):
        config = compose_config(words)
        OmegaConf.resolve(config.attack)
        return config.attack

    tr = attack_of("paper=tr", "dataset=cifar10", "attack=l2_inv")
    assert floor(Fraction(str(tr.poison_rate)) * 47_500) == 5_000
    assert (tr.poison_base, tr.poison_order, tr.target_class) == ("whole", "first", 0)
    gtsrb = attack_of("paper=tr", "dataset=gtsrb", "attack=smooth")
    assert floor(Fraction(str(gtsrb.poison_rate)) * (39_209 - 1_960)) == 3_920
    assert (gtsrb.target_class, gtsrb.fit, gtsrb.poison_order) == (1, "gtsrb", "random")
    for held, rate in ((250, "0.100503"), (500, "0.101011"), (1250, "0.102565")):
        assert floor(Fraction(rate) * (50_000 - held)) == 5_000


# ---------------------------------------------------------------------- precedence


def test_command_line_over_budget_over_experiment_over_paper():
    words = ["paper=tr", "dataset=cifar10", "attack=iab", "defense=tr"]
    paper = compose_config(words)
    small = compose_config([*words, "budget=small"])
    assert (paper.train.epochs, paper.holdout.size, paper.attack.gen_limit) == (200, 0.05, 10_000)
    assert (small.train.epochs, small.holdout.size, small.attack.gen_limit) == (20, 0.05, 2000)
    choices = small.hydra.runtime.choices
    assert (paper.hydra.runtime.choices.model, choices.model, choices.budget) == ("wrn16_1", "small_cnn", "small")
    own = compose_config([*words, "budget=small", "model=resnet18", "train.epochs=3", "holdout.size=700"])
    assert (own.train.epochs, own.holdout.size, own.hydra.runtime.choices.model) == (3, 700, "resnet18")
    assert own.train.optimizer == "adam"  # what neither says stays the paper's


def test_overlays_of_an_isolation_go_with_it_into_any_defence():
    swapped = plan_of(["paper=trap", "attack=badnets", "defense=trap", "defense/isolation=oracle", "budget=small"])
    assert type(swapped.defense.isolation).__name__ == "OracleIsolation"
    alone = compose_config(["paper=trap", "defense=isolate_only"])
    assert alone.defense.isolation.first_detection_step == 0
    repaired = plan_of(["paper=meca", "attack=badnets", "defense=fct", "defense/removal=unlearning"])
    assert (repaired.defense.isolation.alpha_c, repaired.defense.removal.lr) == (0.4, 1e-4)


def test_the_stem_of_ebd_follows_data_set_model_and_defence():
    def stem(*words):
        return plan_of(["paper=ebd", "attack=badnets", *words]).model

    assert stem("dataset=cifar10", "defense=dbr").stem == "cifar_maxpool"
    assert stem("dataset=cifar10", "defense=dst").stem == "auto"
    assert stem("dataset=cifar100", "defense=dbr").stem == "auto"
    assert not hasattr(stem("dataset=cifar10", "defense=dbr", "budget=small"), "stem")


@pytest.mark.parametrize("budget", ["small", "medium", "full"])
def test_budgets(budget):
    plain = compose_config(["paper=ebd", "dataset=cifar10"])
    scaled = compose_config(["paper=ebd", "dataset=cifar10", f"budget={budget}"])
    assert scaled.train.epochs == {"small": 20, "medium": 30, "full": 200}[budget]
    assert (scaled.dataset.limit is None) == (budget != "small")
    assert (scaled.model == plain.model) == (budget != "small")
    if budget == "full":
        assert scaled.train == plain.train
    assert experiments.budget_groups(CONF, budget) == ({"model": "small_cnn"} if budget == "small" else {})
    assert experiments.budget_groups(CONF, None) == {}


def test_small_keeps_what_a_paper_compares():
    """Schedules still step, metrics read one early model, shares stay shares, a table keeps one training set."""
    ebd = ["paper=ebd", "dataset=cifar10", "budget=small"]
    for dataset in ("cifar10", "imagenet200"):
        recipe = compose_config([*ebd, f"dataset={dataset}"]).train
        assert (recipe.epochs, recipe.schedule, recipe.milestones) == (20, "multistep", [10, 15])
    early = [
        compose_config([*ebd, "defense=dbr", f"defense/isolation={name}"]) for name in ("fct", "sce", "rank_spectral")
    ]
    assert len({str(config.defense.isolation.training) for config in early}) == 1
    for dataset, held in (("cifar10", 500), ("photo_digits", 250), ("toy", 25)):
        words = ["paper=tr", f"dataset={dataset}", "attack=badnets_grid", "budget=small"]
        for defense in ("no_defense", "tr"):
            plan = plan_of([*words, f"defense={defense}"])
            size = min(plan.dataset.limit or math.inf, plan.dataset.train_size)
            assert holdout_count(plan.config["holdout"]["size"], size) == held
            poisoned = poison_count(plan.attack, size - held, size - held, warn=lambda message: None)
            assert poisoned in (size // 10, size // 10 - 1)  # the published rate is rounded for 47,500 images
    sizes = [compose_config([*job.overrides, "budget=small"]).holdout.size for job in jobs_of("tr_table9")]
    assert sorted(sizes) == [0.005, 0.01, 0.025, 0.05]
    assert compose_config(["defense=tr", "budget=small"]).holdout.size == 0  # without a paper nobody grants one
    imagenet = compose_config(["paper=tr", "dataset=imagenet12", "budget=small"])
    assert (imagenet.holdout.size, imagenet.train.optimizer, imagenet.train.lr) == (0.1, "adam", 1e-3)


def test_medium_scales_stages_with_epochs_of_their_own():
    words = ["dataset=cifar10", "budget=medium"]
    assert compose_config(["paper=tr", *words, "defense=tr"]).defense.removal.recipes.paper.epochs == 100
    for name in ("dst", "baseline1", "baseline2"):
        assert compose_config(["paper=ebd", *words, f"defense={name}"]).defense.extractor_epochs == 60


def test_what_traps_tables_say_of_their_methods():
    natural = compose_config(["paper=trap", "dataset=cifar10", "attack=natural"]).attack
    assert natural.batch_size == 40  # a ResNet's
    iab = compose_config(["paper=trap", "dataset=cifar10", "attack=iab"]).attack
    assert (iab.mask_epochs, iab.gen_width, iab.gen_limit) == (25, 32, None)
    small = compose_config(["paper=trap", "dataset=cifar10", "attack=iab", "budget=small"]).attack
    assert (small.mask_epochs, small.gen_width, small.gen_limit) == (8, 16, 2000)
    # On other data nothing of 50,000 images is left over: the paper's 50 neighbours find nothing among 5,000.
    moved = compose_config(["paper=trap", "dataset=photo_digits", "defense=trap"]).defense.isolation
    assert (moved.detect_epochs, moved.min_samples, moved.scale_min_samples) == (10, 50, "auto")
    assert (moved.embedding.iterations, moved.scale_iterations) == (1000, "auto")


def test_an_experiment_itself_composes():
    for name in ("tr_table6", "trap_table5", "ebd_fig12"):
        assert compose_config([f"experiment={name}"]).sweep.tables


# ---------------------------------------------------------------------- expanding, narrowing, moving


@pytest.fixture
def make(tmp_path):
    """``make("sweep: ...")`` -> (conf folder, experiment) with the methods badnets, sig | trap, dbr | a, b | m."""
    files = {
        "attack": ("badnets", "sig"), "defense": ("trap", "dbr"), "dataset": ("a", "b"), "model": ("m", "n"),
        "defense/isolation": ("fct",), "paper": ("trap",),
    }  # fmt: skip
    for group, names in files.items():
        for name in names:
            (tmp_path / group).mkdir(parents=True, exist_ok=True)
            (tmp_path / group / f"{name}.yaml").touch()
    (tmp_path / "experiment").mkdir()

    def make(text):
        (tmp_path / "experiment" / "own.yaml").write_text(
            f"# @package _global_\n# A grid of one's own\ndefaults: [override /paper: trap]\n{text}\n"
        )
        return tmp_path, experiments.load(tmp_path, "own")

    return make


GRID = """
sweep:
  cells:
    - dataset=a,b model=m
      attack=badnets,sig defense=trap,dbr
"""


def test_a_grid_is_expanded_in_order(make):
    conf, experiment = make(GRID)
    assert experiment.title == "A grid of one's own"
    jobs = experiments.jobs(conf, experiment)
    assert len(jobs) == 8
    assert jobs[1].overrides == ["paper=trap", "dataset=a", "model=m", "attack=badnets", "defense=dbr"]
    assert jobs[-1].overrides == ["paper=trap", "dataset=b", "model=m", "attack=sig", "defense=dbr"]
    assert all(job.printed == () and job.missing == () for job in jobs)


def test_values_that_jobs_have_narrow_them(make):
    conf, experiment = make(GRID)
    jobs = experiments.jobs(conf, experiment, {"attack": ["sig"], "dataset": ["b", "a"]})
    assert [job.groups["dataset"] for job in jobs] == ["a", "a", "b", "b"]
    assert {job.groups["attack"] for job in jobs} == {"sig"}


def test_a_value_that_no_job_has_takes_the_place_of_theirs(make):
    conf, experiment = make("sweep: {cells: ['dataset=a model=m attack=badnets defense=trap,dbr']}")
    jobs = experiments.jobs(conf, experiment, {"dataset": ["b"]})
    assert [job.overrides[1] for job in jobs] == ["dataset=b"] * 2
    both = experiments.jobs(conf, experiment, {"dataset": ["a", "b"]})
    assert [job.overrides[1] for job in both] == ["dataset=a"] * 2 + ["dataset=b"] * 2


def test_beside_values_that_jobs_have_a_new_one_replaces_what_has_no_file(make):
    conf, experiment = make("sweep: {cells: ['dataset=a,gone model=m attack=badnets,sig defense=trap']}")
    jobs = experiments.jobs(conf, experiment, {"dataset": ["a", "b"]})
    assert [job.groups["dataset"] for job in jobs] == ["a", "a", "b", "b"]
    assert {job.groups["dataset"] for job in experiments.jobs(conf, experiment, {"dataset": ["b"]})} == {"b"}
    table = jobs_of("trap_table1", {"dataset": ["cifar10", "cifar100", "imagenet200"]})
    moved = [job for job in table if job.groups["dataset"] == "imagenet200"]
    assert len(table) == 275
    assert {cell[1] for job in moved for cell in job.printed} == {"imagenet_subset"}


def test_jobs_that_a_move_makes_equal_become_one(make):
    conf, experiment = make(GRID)
    moved = experiments.jobs(conf, experiment, {"dataset": ["a"]}, fixed={"model": "n"})
    assert len(moved) == 4
    assert {job.groups["model"] for job in moved} == {"n"}
    table = jobs_of("trap_table1", {"dataset": ["photo_digits"], "defense": ["trap"], "attack": ["badnets"]})
    assert len(table) == 1
    assert {cell[1] for cell in table[0].printed} == {"cifar10", "cifar100", "imagenet_subset"}
    assert table[0].missing == ()


def test_the_command_line_chooses_before_the_budget(make):
    conf, experiment = make(GRID)
    jobs = experiments.jobs(conf, experiment, {"model": ["m"]}, fixed={"model": "n"})
    assert {job.groups["model"] for job in jobs} == {"m"}


def test_what_is_narrowed_to_nothing_is_an_error(make):
    conf, experiment = make("sweep: {cells: [dataset=a model=m attack=badnets defense=trap, dataset=b attack=sig]}")
    with pytest.raises(ConfigError, match="experiment=own has no job left"):
        experiments.jobs(conf, experiment, {"dataset": ["a"], "attack": ["sig"]})
    conf, experiment = make("sweep: {}")
    with pytest.raises(ConfigError, match="the sweep is empty"):
        experiments.jobs(conf, experiment)


def test_unknown_names_are_errors_with_a_hint(make):
    conf, experiment = make(GRID)
    with pytest.raises(ConfigError, match=r"attack=badnet is unknown \(did you mean badnets\?\); valid: badnets, sig"):
        experiments.jobs(conf, experiment, {"attack": ["badnet"]})
    with pytest.raises(ConfigError, match=r"experiment=trap_table is unknown \(did you mean trap_table\d"):
        experiments.load(CONF, "trap_table")
    with pytest.raises(ConfigError, match="there is no printed table 'trap_table9'; there are ebd_table1"):
        experiments.printed("trap_table9")


def test_a_name_longer_than_a_files_is_unknown(make):
    conf, experiment = make(GRID)
    with pytest.raises(ConfigError, match="is unknown; valid: a, b"):
        experiments.jobs(conf, experiment, {"dataset": ["x" * 300]})
    assert experiments.budget_groups(conf, "x" * 300) == {}


@pytest.mark.parametrize("name", ["../config", "a/b", ""])
def test_a_name_is_no_path(name):
    with pytest.raises(ConfigError, match="is unknown"):
        experiments.load(CONF, name)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sweep: [", "own.yaml is no YAML"),
        ("train: {epochs: 7}\nsweep: {}", r"train is no key of an experiment; .* sweep\.set \(\[train\.KEY=\.\.\.\]\)"),
        ("sweep: [a]", "sweep must hold some of the keys"),
        ("sweep: {variants: [a]}", r"sweep\.variants=\['a'\] is not allowed: it must be a mapping"),
        ("sweep: {tables: trap_table1}", r"sweep\.tables='trap_table1' is not allowed: it must be a list"),
    ],
)
def test_a_malformed_file_names_the_key(make, text, told):
    with pytest.raises(ConfigError, match=told):
        make(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [("[a]", "must hold the keys defaults and sweep"), ("defaults: ['override /paper']", "defaults may hold"),
     ("defaults: [override /model: m]", "defaults may hold")],
)  # fmt: skip
def test_a_file_may_choose_a_paper_alone(tmp_path, text, told):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        experiments.load(tmp_path, "own")


def test_errors_in_an_experiments_file(make):
    with pytest.raises(ConfigError, match=r"sweep\.cell is no key of an experiment"):
        make("sweep: {cell: []}")
    conf, experiment = make("sweep: {cells: [dataset=a model]}")
    with pytest.raises(ConfigError, match="'model' in an experiment is no KEY=VALUE"):
        experiments.jobs(conf, experiment)
    conf, experiment = make("sweep: {tables: [trap_table5], average_of: [badnets]}")
    with pytest.raises(DataError, match=r"does not say what 'trap:eps=0\.5' means"):
        experiments.jobs(conf, experiment)
    conf, experiment = make("sweep: {tables: [trap_table4], rate: {0.05: x=1}}")
    with pytest.raises(DataError, match=r"does not say what the poisoning rate 0\.005 means"):
        experiments.jobs(conf, experiment)


def test_settings_are_sorted_and_subgroups_written_as_hydra_wants_them(make):
    cells = "cells: ['dataset=a model=m attack=sig defense=dbr z.y=1 defense.isolation=fct,kl a.b=2']"
    conf, experiment = make(f"sweep: {{{cells}, set: [c.d=3, dataset=b]}}")
    first, second = experiments.jobs(conf, experiment)
    assert first.settings == ("a.b=2", "c.d=3", "defense/isolation=fct", "z.y=1")
    assert first.groups["dataset"] == "b"
    assert (first.missing, second.missing) == ((), ("defense/isolation=kl",))


def test_rates_and_notes_select_and_set():
    rates = {job.printed[0][5]: job.settings for job in jobs_of("tr_table6", {"defense": ["tr"]})}
    assert rates == {"0.05": ("attack.poison_rate=0.052632",), "0.1": (), "0.2": ("attack.poison_rate=0.210527",)}
    table4 = {job.printed[0][5]: job.settings for job in jobs_of("trap_table4")}
    assert table4["0.005"] == ("attack.poison_rate=0.005",)
    assert not any(job.settings for job in jobs_of("meca_table5") if job.groups["attack"] == "none")
    assert {cell[5] for job in jobs_of("trap_adaptive") for cell in job.printed} == {""}


def test_every_experiments_file_is_plain_yaml_of_known_keys():
    for name in NAMES:
        value = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())
        assert set(value) == {"defaults", "sweep"}
        assert set(value["sweep"]) <= {*experiments.FIELDS}
