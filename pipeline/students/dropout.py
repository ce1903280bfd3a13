"""Dropout of hidden units: all concepts of a batch drop the same.

So where products are slow, what a step drops need not be multiplied: the columns of the weights that make it are left
out, and the gradient of what is left is put back in its place (Graham, Reizenstein and Robinson, 2015, "Efficient
batchwise dropout training using submatrices"). Elsewhere moving the columns takes longer than their products, and the
units are multiplied by a mask. Features of the input are dropped concept by concept: few steps would see too few sets.

``S`` members, ``R`` rows, ``C`` columns, ``K`` columns that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dropped:
    """What takes part in one step of training.

    Attributes:
        inputs: mask of the features, ``[S or 1, B, features]``, 0 or 1 / share kept.
        units: the hidden units that are kept at each site, a place where a student drops, ``[S or 1, 1, K]`` each,
            where the weights that make them are cut to these.
        masks: masks of the units at each site, ``[S or 1, 1, C]`` each, where the weights are whole.
    """

    inputs: Tensor
    units: tuple[Tensor, ...] = ()
    masks: tuple[Tensor, ...] = ()


def cutting_pays(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether leaving out columns is faster than masks: on processors whose products are slow beside their memory.

    It spares 15 % of the scaling grid's products. Where products are fast the grid took 15 % longer so than with masks
    (AMX, bfloat16), or as long (AVX-512, float32).
    """
    return device.type == "cpu" and dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2"


def cut(values: Tensor, units: Tensor) -> Tensor:
    """The columns of some units, ``[S, R, C]`` and ``[S or 1, 1, K]`` to ``[S, R, K]``."""
    return values.gather(-1, _everywhere(units, values))


def put_back(part: Tensor, units: Tensor, whole: Tensor) -> Tensor:
    """Make ``whole`` ``[S, R, C]`` zero but for these columns."""
    return whole.zero_().scatter_(-1, _everywhere(units, whole), part.to(whole.dtype))


def add(stream: Tensor, change: Tensor, dropped: Dropped | None, site: int) -> Tensor:
    """A change on top of a stream ``[S, R, C]``, scaled so that its expectation stays.

    Args:
        stream: what all units have so far.
        change: of all units, ``[S, R, C]``, or of those that are kept where the weights are cut, ``[S, R, K]``.
        dropped: what takes part; None for all.
        site: which of the student's.
    """
    if dropped is None:
        return stream + change
    if dropped.masks:
        return torch.addcmul(stream, change, dropped.masks[site])
    units = dropped.units[site]
    scaled = change * (stream.shape[-1] / units.shape[-1])
    return stream.scatter_add(-1, _everywhere(units, stream), scaled)


def _everywhere(units: Tensor, values: Tensor) -> Tensor:
    return units.expand(len(values), values.shape[-2], -1)
