"""Attacks inside attacks: how a nested one is built, and how its errors name its keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from backdoor_bench.attacks.common import Settings
from backdoor_bench.errors import ConfigError, DataError
from backdoor_bench.types import StampingAttack


class Component(StampingAttack, Settings, Protocol):
    """An attack that can be a part."""


def built(name: str, made: partial[Component] | Component) -> Component:
    """The nested attack ``name``; ConfigError where it cannot be a part."""
    kind: Any = made.func if isinstance(made, partial) else type(made)
    if not hasattr(kind, "triggers"):  # asked before it is made: it would not know the shared keys either
        raise ConfigError(
            f"attack.{name} is {kind.__name__}, which has no trigger of its own to put on rows; choose another, e.g. "
            f"attack@attack.{name}=badnets"
        )
    with named(name):
        part = made() if isinstance(made, partial) else made
    if getattr(part, "controls_training", False):
        raise ConfigError(
            f"attack.{name} is {kind.__name__}, which owns the training loss; two attacks cannot share it: set its "
            f"static form or choose another, e.g. attack@attack.{name}=badnets"
        )
    return part


@contextmanager
def named(name: str) -> Iterator[None]:
    """Errors inside speak of ``attack.<name>.<key>``: a nested attack knows its keys as ``attack.<key>``."""
    try:
        yield
    except (ConfigError, DataError) as error:
        told = re.sub(r"\battack\.(?=[a-z_])", f"attack.{name}.", str(error))
        raise type(error)(told) from error
