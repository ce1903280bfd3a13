"""What anyone can do without training: the floor under every table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.dataset import Examples, Subset


def constant_mean(_subset: Subset, side: Examples) -> Tensor:
    """The mean training vector for every concept: 0 once centred, ``[N, d_model]``."""
    return torch.zeros_like(side.targets)


def nearest(subset: Subset, side: Examples) -> Tensor:
    """The vector of the training concept whose features have the highest cosine, ``[N, d_model]``."""
    similarity = F.normalize(side.inputs, dim=-1) @ F.normalize(subset.train.inputs, dim=-1).mT  # [N, train]
    return subset.train.targets[similarity.argmax(-1)]


BASELINES = {"mean": constant_mean, "nearest": nearest}
