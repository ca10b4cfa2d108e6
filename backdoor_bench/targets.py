"""Which class a configuration may name by ``_target_``."""

from __future__ import annotations

import re
from pathlib import Path


def is_ours(target: str, within: str = "backdoor_bench") -> bool:
    """Whether ``target`` is a class written in one of this package's files below ``within``; nothing is imported.

    A prefix would not do: ``backdoor_bench.results.os.system`` has it too.
    """
    module, _, name = target.rpartition(".")
    parts = module.split(".")
    if not f"{module}.".startswith(f"{within}.") or not all(part.isidentifier() for part in (*parts, name)):
        return False
    path = Path(__file__).resolve().parent.joinpath(*parts[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.is_file() and re.search(rf"^class {name}\b", file.read_text(encoding="utf-8"), re.MULTILINE) is not None
