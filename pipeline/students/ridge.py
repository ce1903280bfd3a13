"""Ridge regression: the linear student in closed form, its regularisation chosen on validation."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.features import Subset
from pipeline.metrics import cosines

# In units of the mean eigenvalue of the features' Gram matrix, so that it does not depend on scale or size.
STRENGTHS = np.logspace(-4, 2, 49)


@dataclass(frozen=True)
class Fit:
    """A ridge regression.

    Attributes:
        parameters: without the member axis; ``weight`` is the last map, to targets in units of the subset's scale.
        strength: the regularisation chosen.
        val_cosine: validation cosine with it.
    """

    parameters: dict[str, Tensor]
    strength: float
    val_cosine: float


@functools.lru_cache(maxsize=64)
def fit(subset: Subset) -> Fit:
    """Solve for every strength at once, in the dual form through the Gram matrix's eigenvectors (float64).

    ``w = X^T U (L + s)^-1 U^T Y`` for inputs ``X``, targets ``Y`` and ``X X^T = U L U^T`` (Saunders, Gammerman and
    Vovk, 1998, "Ridge regression learning algorithm in dual variables").
    """
    x, y = subset.train.inputs.double(), subset.train.targets.double() / subset.scale
    values, u = subset.gram
    strengths = torch.from_numpy(STRENGTHS) * values.sum() / min(x.shape)
    shrink = 1 / (values + strengths[:, None])  # [strengths, N]
    rotated = u.mT @ y  # [N, d_model]
    projected = subset.val.inputs.double() @ (x.mT @ u)  # [val, N]
    scores = [cosines(projected @ (s[:, None] * rotated), subset.val.targets.double()).mean() for s in shrink]
    best = int(torch.stack(scores).argmax())
    weight = x.mT @ (u @ (shrink[best, :, None] * rotated))  # [features, d_model]
    return Fit({"weight": weight.float()}, float(strengths[best]), float(scores[best]))


def apply(parameters: dict[str, Tensor], inputs: Tensor, _masks: None = None) -> Tensor:
    """Predict: ``[S, B, features]`` to ``[S, B, d_model]``."""
    return torch.bmm(inputs, parameters["weight"])
