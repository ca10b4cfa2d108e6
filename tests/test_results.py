"""The run folder: what counts as the same run, what is refused, tables that are safe to open, models that come back."""

import csv
import json
import os

import pytest
import torch
import yaml

from backdoor_bench.errors import ConfigError, DataError
from backdoor_bench.removal.hiding import without_dummy
from backdoor_bench.results import (
    NOT_HASHED,
    RunFolder,
    cell_hash,
    config_hash,
    differing_keys,
    flagged_rows,
    load_model,
    save_model,
    write_table,
)

CONFIG = {
    "seed": 0,
    "output_root": "outputs",
    "cache_root": "outputs/cache",
    "tracking": {"mode": "offline"},
    "resume": {"redo": False},
    "attack": {"poison_rate": 0.1, "order": [1, 2], "nested": {"a": None}},
    "model": {
        "_target_": "backdoor_bench.models.small_cnn.SmallCNN", "_convert_": "all", "widths": [8, 16],
        "normalise": "dataset",
    },
}  # fmt: skip
META = {
    "class_names": ["a", "b", "c", "d"], "num_outputs": 4, "dummy_class": None, "image_size": 16,
    "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4],
}  # fmt: skip


# ------------------------------------------------------------------ the same run


@pytest.mark.parametrize("key", ["output_root", "cache_root", "tracking", "resume", "sweep", "hydra"])
def test_hash_leaves_out_what_cannot_change_a_result(key):
    assert config_hash({**CONFIG, key: "something else"}) == config_hash(CONFIG)
    assert config_hash({name: value for name, value in CONFIG.items() if name != key}) == config_hash(CONFIG)
    assert differing_keys({**CONFIG, key: "something else"}, CONFIG) == []
    assert key in NOT_HASHED
    # Only at the top: a method may have a key of that name.
    inside = {**CONFIG, "attack": {**CONFIG["attack"], key: 1}}
    assert config_hash(inside) != config_hash(CONFIG)
    assert differing_keys(inside, CONFIG) == [f"attack.{key}"]


@pytest.mark.parametrize(
    ("section", "key"),
    [("dataset", "cache_dir"), ("dataset", "download"), ("dataset", "verify"), ("dataset", "memory_limit_gib"),
     ("train", "snapshots"), ("train", "checkpoint_seconds"), ("hardware", "resident_gib")],
)  # fmt: skip
def test_hash_leaves_out_keys_of_a_section(section, key):
    one, two = ({**CONFIG, section: {key: value, "other": 1}} for value in (1, 2))
    assert config_hash(one) == config_hash(two)
    assert differing_keys(one, two) == []
    assert config_hash({**CONFIG, key: 1}) != config_hash(CONFIG)
    assert differing_keys({**CONFIG, section: {key: 1, "other": 2}}, one) == [f"{section}.other"]
    assert f"{section}.{key}" in NOT_HASHED


def test_cell_hash_is_that_of_all_seeds_and_places():
    config = {
        **CONFIG, "dataset": {"root": "a", "limit": 5}, "attack": {"rate": 0.1, "seed": 0, "parts": [{"seed": 0, "x": 1}]}
    }  # fmt: skip
    other = {
        **config, "seed": 1, "hardware": {"threads": 1}, "evaluation": {"floor": "train"}, "output_root": "b",
        "dataset": {"root": "b", "limit": 5}, "attack": {"rate": 0.1, "seed": 1, "parts": [{"seed": 1, "x": 1}]},
    }  # fmt: skip
    assert cell_hash(config) == cell_hash(other)
    for change in (
        {"dataset": {"root": "a", "limit": 6}},
        {"attack": {**config["attack"], "rate": 0.2}},
        {"model": {}},
    ):
        assert cell_hash({**config, **change}) != cell_hash(config)


def test_nothing_else_is_left_out():
    assert len(NOT_HASHED) == 6 + 7


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 1), ("attack", {}), ("model", None), ("hardware", {"threads": 2}), ("evaluation", {})]
)
def test_hash_depends_on_all_else(key, value):
    assert config_hash({**CONFIG, key: value}) != config_hash(CONFIG)


def test_hash_does_not_depend_on_the_order_of_keys():
    assert config_hash(dict(reversed(CONFIG.items()))) == config_hash(CONFIG)
    assert len(config_hash(CONFIG)) == 64


def test_differing_keys_are_dotted_and_sorted():
    other = {
        "seed": 1,
        "output_root": "elsewhere",
        "attack": {"poison_rate": 0.2, "order": [1, 2, 3], "nested": {"a": 0}, "new": 1},
        "model": {**CONFIG["model"], "widths": (8, 16)},
    }
    assert differing_keys(CONFIG, other) == [
        "attack.nested.a",
        "attack.new",
        "attack.order",
        "attack.poison_rate",
        "seed",
    ]
    assert differing_keys(other, CONFIG) == differing_keys(CONFIG, other)
    assert differing_keys({"a": {"b": 1}}, {"a": 1}) == ["a"]


def test_a_configuration_survives_its_file(tmp_path):
    config = {**CONFIG, "lr": 5e-4, "tiny": 1e-30, "big": 1e16, "name": "ja: nein", "yes": "yes", "date": "2024-01-01"}
    with RunFolder(tmp_path, config) as folder:
        folder.begin()
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert stored == config
    assert config_hash(stored) == config_hash(config)
    with RunFolder(tmp_path, config):
        pass


# ------------------------------------------------------------------ the folder


def test_a_result_is_found_again(tmp_path):
    with RunFolder(tmp_path / "run", CONFIG) as folder:
        assert folder.finished() is None
        folder.begin()
        path = folder.write_result({"metrics": {"acc": 0.5, "asr": None}})
        assert path == tmp_path / "run" / "result.json"
    stored = json.loads(path.read_text())
    assert stored == {"schema": 1, "metrics": {"acc": 0.5, "asr": None}, "config_hash": config_hash(CONFIG)}
    with RunFolder(tmp_path / "run", {**CONFIG, "output_root": "moved"}) as folder:
        assert folder.finished() == stored
        folder.begin()
        assert folder.finished() is None
    assert not (tmp_path / "run" / ".holder").exists()


def test_a_result_is_strict_json(tmp_path):
    """NaN and infinity, which JSON does not have, become null."""
    with RunFolder(tmp_path, CONFIG) as folder:
        text = folder.write_result({"acc": float("nan"), "list": [float("inf"), 1.5]}).read_text()
    stored = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (stored["acc"], stored["list"]) == (None, [None, 1.5])


def test_another_configuration_is_refused_and_the_folder_is_free_again(tmp_path):
    with RunFolder(tmp_path, CONFIG) as folder:
        folder.begin()
    other = {**CONFIG, "seed": 3, "attack": {**CONFIG["attack"], "poison_rate": 0.2}}
    refused = RunFolder(tmp_path, other)
    with pytest.raises(ConfigError, match=r"differs in attack\.poison_rate, seed\)"), refused:
        pass
    with RunFolder(tmp_path, CONFIG):  # the lock was given back
        pass
    assert refused.hash != config_hash(CONFIG)


@pytest.mark.parametrize("text", ["- a\n- list\n", "a: [1,\n", "", "just text\n"])
def test_an_unreadable_configuration_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError, match=r"config\.yaml cannot be read"), RunFolder(tmp_path, CONFIG):
        pass


def test_a_folder_in_use_names_its_holder(tmp_path):
    with RunFolder(tmp_path, CONFIG):
        with pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on"), RunFolder(tmp_path, CONFIG):
            pass
        assert (tmp_path / ".holder").exists()


def test_a_result_of_a_newer_version_is_refused(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"schema": 2, "config_hash": config_hash(CONFIG)}))
    with RunFolder(tmp_path, CONFIG) as folder, pytest.raises(DataError, match="has schema 2, this version reads 1"):
        folder.finished()
    assert (tmp_path / "result.json").exists()


@pytest.mark.parametrize("text", ["", '{"schema": 1, "config_', "[1]", "null", '{"schema": 1, "config_hash": "other"}'])
def test_a_torn_or_foreign_result_is_none(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with RunFolder(tmp_path, CONFIG) as folder:
        assert folder.finished() is None


def test_a_file_where_the_folder_should_be(tmp_path):
    from backdoor_bench.errors import DiskError

    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError, match="set another output_root"), RunFolder(tmp_path / "file" / "run", CONFIG):
        pass


# ------------------------------------------------------------------ tables


def listing(flagged, score=None, truth=None, files=None):
    count = len(flagged)
    return flagged_rows(
        torch.arange(count) % 2,
        ["cat", "=dog"],
        files,
        torch.tensor(flagged).bool(),
        None if score is None else torch.tensor(score),
        None if truth is None else torch.tensor(truth).bool(),
    )


def test_flagged_rows_come_first_each_group_by_score():
    rows = listing([0, 1, 0, 1, 0], [0.5, 0.2, 3.0, 0.9, 0.5])
    assert [row["index"] for row in rows] == [3, 1, 2, 0, 4]  # equal scores in the order of the set
    assert [row["score"] for row in rows] == pytest.approx([0.9, 0.2, 3.0, 0.5, 0.5])
    assert [row["flagged"] for row in rows] == [1, 1, 0, 0, 0]
    assert [row["class"] for row in rows] == ["=dog", "=dog", "cat", "cat", "cat"]


def test_without_score_or_truth_or_files():
    rows = listing([0, 1, 0])
    assert rows[0] == {
        "index": 1, "file": None, "label": 1, "class": "=dog", "score": 1.0, "flagged": 1, "poisoned": None,
    }  # fmt: skip
    assert [row["index"] for row in rows] == [1, 0, 2]


def test_truth_and_files_follow_their_rows():
    rows = listing([0, 0, 1], [0.1, 0.3, 0.2], [1, 0, 0], ["x.png", "y.png", "z.png"])
    assert [(row["file"], row["poisoned"]) for row in rows] == [("z.png", 0), ("y.png", 0), ("x.png", 1)]


@pytest.mark.parametrize(
    ("flagged", "score", "wanted"),
    [
        ([1, 1, 1], [0.50, 0.52, 0.51], [1, 2, 0]),
        ([1, 0], [0.5, 5e6], [0, 1]),
        ([0, 1], [float("inf"), 0.5], [1, 0]),
    ],
)
def test_order_holds_for_close_and_for_large_scores(flagged, score, wanted):
    assert [row["index"] for row in listing(flagged, score)] == wanted


def test_tables_are_safe_in_a_spreadsheet(tmp_path):
    files = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", " \t=1", 'plain, "quoted"\nname']
    write_table(tmp_path / "t.csv", listing([1, 1, 1, 0, 0, 0], files=files))
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["'" + name for name in files[:5]] + files[5:]
    assert [row["class"] for row in rows] == ["cat", "'=dog"] * 3
    assert [row["score"] for row in rows] == ["1.0"] * 3 + ["0.0"] * 3
    assert {row["poisoned"] for row in rows} == {""}


def test_columns_of_a_table(tmp_path):
    rows = [{"a": 1, "b": None}, {"b": -0.5, "c": "x"}]
    write_table(tmp_path / "t.csv", rows)
    assert (tmp_path / "t.csv").read_text() == "a,b,c\n1,,\n,-0.5,x\n"
    write_table(tmp_path / "t.csv", rows, ("c", "b"))
    assert (tmp_path / "t.csv").read_text() == "c,b\n,\nx,-0.5\n"


# ------------------------------------------------------------------ models


def build(outputs):
    from backdoor_bench.models.small_cnn import SmallCNN

    model = SmallCNN(widths=[8, 16], normalise="dataset").build(outputs, 16, tuple(META["mean"]), tuple(META["std"]))
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """``saved(model, **meta)`` leaves a run folder with that model."""

    def save(model, **meta):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        save_model(tmp_path, model, {**META, **meta})
        return tmp_path

    return save


@pytest.mark.parametrize("outputs", [4, 5])
def test_a_model_comes_back(saved, outputs):
    """With 5 outputs: a hiding model with the dummy class last."""
    model = build(outputs)
    loaded, meta = load_model(str(saved(model, num_outputs=outputs, dummy_class=4 if outputs == 5 else None)))
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert loaded(images).shape == (3, outputs)
    assert not loaded.training
    assert (meta["num_outputs"], meta["class_names"], meta["image_size"]) == (outputs, ["a", "b", "c", "d"], 16)


def test_a_hiding_model_without_dummy_class_comes_back_as_evaluated(saved):
    whole = build(5)
    model = without_dummy(whole, 4)
    loaded, meta = load_model(saved(model))
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
        torch.testing.assert_close(loaded(images), whole(images)[:, :4])
    assert loaded(images).shape == (3, meta["num_outputs"])


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_an_altered_model_is_refused(saved, name):
    folder = saved(build(4))
    data = bytearray((folder / name).read_bytes())
    place = data.index(b'"image_size": 16') + 14 if name == "model.json" else len(data) - 5
    data[place] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(DataError, match="altered"):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "config.yaml"])
def test_a_missing_file_is_named(saved, name):
    folder = saved(build(4))
    (folder / name).unlink()
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        load_model(folder)


def with_model(folder, spec):
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "model": spec}))


@pytest.mark.parametrize("target", ["os.system", "subprocess.run", "backdoor_bench_evil.run", "xbackdoor_bench.run"])
def test_a_foreign_model_class_is_refused(saved, target):
    folder = saved(build(4))
    with_model(folder, {"_target_": target, "_convert_": "all"})
    with pytest.raises(DataError, match=f"foreign model class {target}"):
        load_model(folder)


def test_yaml_tags_are_not_run(saved, tmp_path):
    folder = saved(build(4))
    sentinel = tmp_path / "sentinel"
    (folder / "config.yaml").write_text(f"model: !!python/object/apply:pathlib.Path.touch [{sentinel}]\n")
    with pytest.raises((DataError, yaml.YAMLError)):
        load_model(folder)
    assert not sentinel.exists()


def test_a_model_class_must_be_one_of_our_models(saved, tmp_path):
    """A run folder from elsewhere must not be able to run what it names."""
    folder, sentinel = saved(build(4)), tmp_path / "sentinel"
    nested = {"_target_": "pathlib.Path.touch", "self": str(sentinel)}
    with_model(folder, {"_target_": "backdoor_bench.plan.instantiate", "config": nested})
    with pytest.raises(DataError, match="foreign model class"):
        load_model(folder)
    assert not sentinel.exists()


@pytest.mark.parametrize("text", ["model: [1,\n", "- 1\n", "seed: 0\n", "model: {widths: [8]}\n"])
def test_a_torn_configuration_is_a_data_error(saved, text):
    folder = saved(build(4))
    (folder / "config.yaml").write_text(text)
    with pytest.raises(DataError, match=r"config\.yaml"):
        load_model(folder)
