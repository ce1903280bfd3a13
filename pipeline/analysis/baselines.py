"""What anyone can do without training: the floor under every table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.dataset import Subset
from pipeline.data.examples import MAX_CHUNK, Examples, row_slices


def constant_mean(_subset: Subset, side: Examples) -> Tensor:
    """The mean training vector for every concept: 0 once centred, ``[N, d_model]``."""
    return torch.zeros_like(side.targets)


def nearest(subset: Subset, side: Examples) -> Tensor:
    """The vector of the training concept whose features have the highest cosine, ``[N, d_model]``."""
    inputs, number = subset.train.inputs, len(side.rows)
    highest, found = torch.full((number,), -torch.inf), torch.zeros(number, dtype=torch.long)
    for rows in row_slices(inputs):
        directions = F.normalize(inputs[rows], dim=-1)
        for first in range(0, number, MAX_CHUNK):
            own = slice(first, first + MAX_CHUNK)
            similarity, place = (F.normalize(side.inputs[own], dim=-1) @ directions.mT).max(-1)
            is_nearer = similarity > highest[own]  # the first of equal ones stays
            highest[own] = similarity.where(is_nearer, highest[own])
            found[own] = (rows.start + place).where(is_nearer, found[own])
    return subset.train.targets[found]


BASELINES = {"mean": constant_mean, "nearest": nearest}
