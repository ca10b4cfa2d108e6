"""Random numbers that belong to a row of the data: the same in whatever batch or order a row is stamped."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform_of_rows(seed: int, purpose: str, index: Tensor, count: int) -> Tensor:
    """float64 ``[B, count]`` in [0, 1): number k of row i is a hash of (seed, purpose, i, k) and of nothing else.

    index: int64 ``[B]``, row numbers. The hash is SplitMix64 (Steele et al. 2014), whole tensors at a time; the result
    is on the device of ``index``.
    """
    start = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "big", signed=True)
    rows = _mixed(index.to(torch.int64) + start)
    numbers = _mixed(rows[:, None] + torch.arange(count, device=index.device) * _signed(GOLDEN))
    return (_shifted(numbers, 11)).double() * 2.0**-53


def _mixed(state: Tensor) -> Tensor:
    """SplitMix64's output function; int64 arithmetic wraps around as its 64-bit words do."""
    state = state + _signed(GOLDEN)
    state = (state ^ _shifted(state, 30)) * _signed(MIX1)
    state = (state ^ _shifted(state, 27)) * _signed(MIX2)
    return state ^ _shifted(state, 31)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Unsigned right shift of int64 words."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
