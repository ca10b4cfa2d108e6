"""A run made ready: objects built from the configuration, everything checked that needs no data, names and keys fixed.

With launch.py the only module below run.py that knows Hydra.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from backdoor_bench.data.checks import holdout_count
from backdoor_bench.errors import ConfigError, check_choice, check_flag, check_range
from backdoor_bench.results import (
    GROUPS_IN_PATH,
    KEYS_NOT_IN_VARIANT,
    config_hash,
    decides,
    hashed_part,
    variant_name,
)
from backdoor_bench.training.config import TrainConfig
from backdoor_bench.training.hardware import Hardware
from backdoor_bench.types import Facts


@dataclass(frozen=True)
class Plan:
    """config: resolved plain configuration (hardware as it is on this machine). Paths are absolute or relative to the
    current folder; settings: the command line's overrides that decide what is computed, groups in the path, paper, budget,
    seed, hardware and the place of the data aside; *_scope: what a poisoned set and a victim depend on, for the cache."""

    config: dict[str, Any]
    dataset: Any
    model: Any
    attack: Any
    defense: Any
    train: TrainConfig
    tracking: Any
    hardware: Hardware
    seed: int
    attack_seed: int
    names: dict[str, str]
    settings: list[str]
    variant: str
    run_dir: Path
    cache_dir: Path
    floor: str
    redo: bool
    restart: bool

    @property
    def poisons(self) -> bool:
        """Whether the attack changes the training set or the training."""
        return bool(getattr(self.attack, "poisons", True))

    def poison_scope(self, poisons: bool | None = None) -> dict[str, Any]:
        """What the poisoned set depends on; ``poisons=False`` gives the clean set's."""
        keep = self.poisons if poisons is None else poisons
        attack = self.config["attack"] if keep else None
        # What a user knows of the truth changes no image; the images themselves are hashed when they are loaded.
        dataset = {k: v for k, v in hashed_part(self.config["dataset"], "dataset.").items() if k != "truth"}
        files = {key: value for key, value in self.config["files"].items() if keep and key != "dataset"}
        return {"dataset": dataset, "attack": attack, "holdout": self.config["holdout"], "files": files}

    def victim_scope(self, poisons: bool | None = None) -> dict[str, Any]:
        """What the undefended model depends on."""
        return {
            "poison": self.poison_scope(poisons),
            "model": self.config["model"],
            "train": self.train.key(),
            "seed": self.seed,
        }


def prepare(config: DictConfig, overrides: list[str], sweep: str | None, choices: Mapping[str, str]) -> Plan:
    """Build and check everything that can be without data. Raises ConfigError with key, value and allowed range.

    overrides: the command line's, for the folder name. sweep: the name its jobs share, W&B's group. choices: the chosen
    file of each group.
    """
    check_range("seed", config.seed, 0, 2**31 - 1, integer=True)
    check_choice("evaluation.floor", config.evaluation.floor, ("never", "train"))
    for key in ("restart", "redo"):
        check_flag(f"resume.{key}", config.resume[key])
    check_choice("holdout.source", config.holdout.source, ("reserved", "seen"))
    size = config.holdout.size
    if not (type(size) is int and size >= 0) and not (type(size) is float and 0 < size < 1):
        raise ConfigError(
            f"holdout.size={size!r} is not allowed: it must be a number of images, or a share of them between 0 and 1"
        )
    for key in ("output_root", "cache_root"):
        if "\0" in str(config[key]):
            raise ConfigError(f"{key} holds a NUL character: give a folder's name")

    hardware = instantiate(config.hardware).resolve()
    train = instantiate(config.train, _partial_=True)(hardware=hardware)  # passed to instantiate it would become a dict
    dataset = instantiate(config.dataset)
    model = instantiate(config.model)
    attack = instantiate(config.attack)
    defense = instantiate(config.defense)
    tracking = instantiate(config.tracking)
    if tracking.group is None and sweep is not None:
        tracking = replace(tracking, group=sweep)

    facts = _facts(config, dataset, train, model)
    for part in (model, attack, defense):
        if hasattr(part, "check"):
            part.check(facts)
    _check_pair(attack, defense, choices)

    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    plain: dict[str, Any] = {str(key): value for key, value in resolved.items() if key != "hydra"}
    names = {group: str(choices[group]) for group in ("dataset", "model", "attack", "defense")}
    plain["names"] = names
    for group in ("paper", "experiment", "budget"):
        plain[group] = choices.get(group)
    plain["files"] = _files(dataset, attack, plain["attack"])
    plain["hardware"] = {"_target_": plain["hardware"]["_target_"], **vars(hardware)}

    shown = [text for text in map(_shown, overrides) if text]
    # On a machine without a GPU the CPU is what auto means.
    if choices["hardware"] not in ("auto", "cpu") or (choices["hardware"] == "cpu" and torch.cuda.is_available()):
        shown.append(f"hardware={choices['hardware']}")
    variant = variant_name(shown, config_hash(plain))
    root = Path(str(config.output_root)).expanduser()
    run_dir = root.joinpath(*names.values(), variant, f"seed{config.seed}")
    return Plan(
        config=plain, dataset=dataset, model=model, attack=attack, defense=defense, train=train, tracking=tracking,
        hardware=hardware, seed=int(config.seed), attack_seed=int(config.attack.get("seed", config.seed)), names=names,
        settings=sorted(text for text in overrides if decides(text)), variant=variant, run_dir=run_dir,
        cache_dir=Path(str(config.cache_root)).expanduser(),
        floor=config.evaluation.floor, redo=bool(config.resume.redo), restart=bool(config.resume.restart),
    )  # fmt: skip


def _check_pair(attack: Any, defense: Any, choices: Mapping[str, str]) -> None:
    """Refuse an attack that owns the training with a defence that cannot go along."""
    if not getattr(attack, "controls_training", False):
        return
    if not getattr(defense, "honours_train_loss", False):
        raise ConfigError(
            f"attack={choices['attack']} owns the training loss, which defense={choices['defense']} cannot honour; "
            "choose the attack's static form or a defence that trains plainly (no_defense, trap, tr)"
        )
    isolation = getattr(defense, "isolation", None)
    if isolation is not None and not getattr(isolation, "honours_train_loss", False):
        raise ConfigError(
            f"attack={choices['attack']} owns the training loss, which defense.isolation={choices['defense/isolation']} of "
            f"defense={choices['defense']} cannot honour: it trains a model of its own by another loss; choose the attack's "
            "static form or an isolation that trains plainly or not at all (trap, fct, spectral, oracle)"
        )
    if not getattr(attack, "fixed_set", True) and isolation is not None:
        raise ConfigError(
            f"attack={choices['attack']} with attack.mode=online draws its poison anew in every batch, so there is no "
            f"poisoned row that the isolation of defense={choices['defense']} could find; set attack.mode=static, or "
            "choose no_defense or tr"
        )


def _files(dataset: Any, attack: Any, values: Any) -> dict[str, str]:
    """Hashes of the files behind the configuration: a folder's images, an attack's own picture. Without them a changed
    file would pass for the old one."""
    found = {}
    for name, part in (("dataset", dataset), ("attack", attack)):
        if hasattr(part, "fingerprint"):
            found[name] = part.fingerprint()
    for key, value in _leaves("attack", values):
        path = Path(value).expanduser() if isinstance(value, str) and value else None
        if path is not None and path.is_file():
            with path.open("rb") as file:
                found[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested dictionaries."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, value


def _facts(config: DictConfig, dataset: Any, train: TrainConfig, model: Any) -> Facts:
    size = dataset.train_size if dataset.limit is None else min(dataset.limit, dataset.train_size or dataset.limit)
    holdout = holdout_count(config.holdout.size, size)
    if size is not None and holdout >= size:
        raise ConfigError(
            f"holdout.size={holdout} is not allowed: the training set has {size} images, so it must lie in "
            f"0..{size - 1}"
        )
    if size is not None and config.holdout.source == "reserved":
        size -= holdout

    def outline() -> Any:
        with torch.device("meta"):
            # Where the data tell the number of classes any will do: only the head depends on it.
            return model.build(dataset.num_classes or 2, dataset.image_size, dataset.mean, dataset.std)

    return Facts(
        num_classes=dataset.num_classes,
        image_size=dataset.image_size,
        train_size=size,
        epochs=train.epochs,
        steps_per_epoch=None if size is None else train.steps_per_epoch(size),
        holdout_size=holdout,
        holdout_source=str(config.holdout.source),
        outline=outline,
    )


def _shown(override: str) -> str | None:
    """An override as it appears in the folder name; None for what the path says already or what changes no result."""
    key = override.split("=", 1)[0].lstrip("+~")
    if key in GROUPS_IN_PATH or key.split(".")[0].split("/")[0] in KEYS_NOT_IN_VARIANT:
        return None
    if key in ("paper", "experiment", "budget"):
        return None if override.endswith("=null") else override
    return override
