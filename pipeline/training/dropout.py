"""Dropout of hidden units: all concepts of a batch drop the same.

Features of the input are dropped concept by concept: few steps would see too few sets of them.

``S`` members, ``R`` rows, ``C`` columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dropped:
    """What takes part in one step of training: masks of 0, or 1 / share kept.

    Attributes:
        inputs: of the features, ``[S or 1, B, features]``.
        units: of the hidden units at each site, a place where a student drops, ``[S or 1, 1, C]`` each.
    """

    inputs: Tensor
    units: tuple[Tensor, ...]


def add(stream: Tensor, change: Tensor, dropped: Dropped | None, site: int) -> Tensor:
    """A change on top of a stream, ``[S, R, C]`` both, scaled so that its expectation stays.

    Args:
        stream: what all units have so far.
        change: of all units.
        dropped: what takes part; None for all.
        site: which of the student's.
    """
    return stream + change if dropped is None else torch.addcmul(stream, change, dropped.units[site])
