"""Ridge regression: the linear student in closed form, its regularisation chosen on validation."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import Subset
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


def residual_prior(subset: Subset) -> Tensor:
    """The map that passes what is read of the residual stream on, each part times its gain, ``[features, d_model]``.

    Every block adds to the residual stream, so what an early block left is still in it. The gains are those of least
    squares on columns of equal weight: the few that are much larger than the others follow rules of their own.
    """
    x, y = subset.train.inputs.double(), subset.train.targets.double() / subset.scale
    d_model, weights = y.shape[1], 1 / y.std(0).clamp(min=1e-12)
    residual_columns = subset.features.residual_columns
    weight = torch.zeros(x.shape[1], d_model, dtype=torch.float64)
    if residual_columns:
        parts = torch.stack([(weights * x[:, part]).flatten() for part in residual_columns], 1)  # [N d_model, parts]
        gains = torch.linalg.lstsq(parts, (weights * y).flatten()[:, None]).solution
        for part, gain in zip(residual_columns, gains, strict=True):
            weight[part] = gain * torch.eye(d_model, dtype=torch.float64)
    return weight


@functools.lru_cache(maxsize=64)
def fit(subset: Subset) -> Fit:
    """Solve for every strength at once, in the dual form through the Gram matrix's eigenvectors (float64).

    ``w = W + X^T U (L + s)^-1 U^T (Y - X W)`` for inputs ``X``, targets ``Y``, ``X X^T = U L U^T`` and the map ``W``
    towards which it is shrunk, `residual_prior` (Saunders, Gammerman and Vovk, 1998, "Ridge regression learning
    algorithm in dual variables").
    """
    prior = residual_prior(subset)
    x = subset.train.inputs.double()
    y = subset.train.targets.double() / subset.scale - x @ prior
    values, u = subset.gram
    strengths = torch.from_numpy(STRENGTHS) * values.sum() / min(x.shape)
    shrink = 1 / (values + strengths[:, None])  # [strengths, N]
    rotated = u.mT @ y  # [N, d_model]
    held, truth = subset.val.inputs.double(), subset.val.targets.double()
    projected, passed = held @ (x.mT @ u), held @ prior  # [val, N], [val, d_model]
    scores = [cosines(passed + projected @ (s[:, None] * rotated), truth).mean() for s in shrink]
    best = int(torch.stack(scores).argmax())
    weight = prior + x.mT @ (u @ (shrink[best, :, None] * rotated))  # [features, d_model]
    return Fit({"weight": weight.float()}, float(strengths[best]), float(scores[best]))


def apply(parameters: dict[str, Tensor], inputs: Tensor, _dropped: None = None) -> Tensor:
    """Predict: ``[S, B, features]`` to ``[S, B, d_model]``."""
    return torch.bmm(inputs, parameters["weight"])
