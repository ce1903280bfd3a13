"""Dropout of hidden units that costs no arithmetic: what a step drops, it does not multiply.

All concepts of a batch drop the same units, so the columns of the weights that make them are left out, and the
gradient of what is left is put back in its place (Graham, Reizenstein and Robinson, 2015, "Efficient batchwise dropout
training using submatrices"). Features of the input are dropped concept by concept: few steps would see too few sets.

``S`` members, ``R`` rows, ``C`` columns, ``K`` columns that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Dropped:
    """What takes part in one step of training.

    Attributes:
        inputs: mask of the features, ``[S or 1, B, features]``, 0 or 1 / share kept.
        units: the hidden units that are kept at each site, a place where a student drops, ``[S or 1, 1, K]`` each.
    """

    inputs: Tensor
    units: tuple[Tensor, ...]


def cut(values: Tensor, units: Tensor) -> Tensor:
    """The columns of some units, ``[S, R, C]`` and ``[S or 1, 1, K]`` to ``[S, R, K]``."""
    return values.gather(-1, _everywhere(units, values))


def put_back(part: Tensor, units: Tensor, whole: Tensor) -> Tensor:
    """Make ``whole`` ``[S, R, C]`` zero but for these columns."""
    return whole.zero_().scatter_(-1, _everywhere(units, whole), part.to(whole.dtype))


def add(stream: Tensor, change: Tensor, units: Tensor) -> Tensor:
    """A change ``[S, R, K]`` of some units on top of all ``[S, R, C]``, scaled so that its expectation stays."""
    scaled = change * (stream.shape[-1] / units.shape[-1])
    return stream.scatter_add(-1, _everywhere(units, stream), scaled)


def _everywhere(units: Tensor, values: Tensor) -> Tensor:
    return units.expand(len(values), values.shape[-2], -1)
