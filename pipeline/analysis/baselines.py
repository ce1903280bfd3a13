"""What anyone can do without training: the floor under every table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.dataset import Subset
from pipeline.data.examples import Examples


def constant_mean(_subset: Subset, side: Examples) -> Tensor:
    """The mean training vector for every concept: 0 once centred, ``[N, d_model]``."""
    return torch.zeros_like(side.targets)


def nearest(subset: Subset, side: Examples) -> Tensor:
    """The vector of the training concept whose features have the highest cosine, ``[N, d_model]``."""
    found = torch.zeros(len(side.rows), dtype=torch.long)
    best = torch.full((len(side.rows),), -torch.inf)
    start, inputs = 0, F.normalize(side.inputs, dim=-1)
    for chunk, _ in subset.train.chunks():
        similarity, place = (inputs @ F.normalize(chunk, dim=-1).mT).max(-1)  # [N]
        found = torch.where(similarity > best, start + place, found)
        best = best.maximum(similarity)
        start += len(chunk)
    return subset.train.targets[found]


BASELINES = {"mean": constant_mean, "nearest": nearest}
