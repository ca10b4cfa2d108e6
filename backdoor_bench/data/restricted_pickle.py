"""Reading the pickles of the CIFAR batches without letting them run code."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from backdoor_bench.errors import DataError


def _latin1(text: str, encoding: str) -> bytes:
    """What Python 3 writes for bytes under protocol 2: ``_codecs.encode(text, 'latin1')``, and no other codec."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"codec {encoding} is not allowed")
    return text.encode("latin1")


# How NumPy 1 and 2 spell what rebuilds an array, and where NumPy 2 keeps it.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"): ("numpy._core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"): ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"): ("numpy", "ndarray"),
    ("numpy", "dtype"): ("numpy", "dtype"),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}; only NumPy arrays and plain containers are read"
            )
        return super().find_class(*_ALLOWED[module, name])


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary pickled in ``path``, keys as text; a pickle that names anything but arrays is refused (DataError).

    Python 2 pickles come with text decoded as Latin-1.
    """
    try:
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{path} cannot be read as a batch of arrays: {error}; fetch the data again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, expected a dictionary; fetch the data again")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}
