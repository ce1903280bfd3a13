"""Ridge regression: the linear student in closed form, its regularisation chosen on validation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.features import Subset
from pipeline.metrics import cosines

# In units of the mean eigenvalue of the features' Gram matrix, so that it does not depend on scale or size.
STRENGTHS = np.logspace(-4, 2, 49)


def fit(subset: Subset) -> tuple[dict[str, Tensor], float, float]:
    """Solve for every strength at once through one singular value decomposition (float64).

    Returns:
        The parameters (``weight``, ``[1, features, d_model]``), the chosen strength, and its validation cosine.
    """
    x, y = subset.train.inputs.double(), subset.train.targets.double() / subset.scale
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    strengths = torch.from_numpy(STRENGTHS) * s.square().mean()
    shrink = s / (s.square() + strengths[:, None])  # [strengths, rank]
    projected = subset.val.inputs.double() @ vh.mT  # [val, rank]
    answers = torch.einsum("nr,kr,rd->knd", projected, shrink, u.mT @ y)  # [strengths, val, d_model]
    scores = cosines(answers, subset.val.targets.double()).mean(-1)  # [strengths]
    best = int(scores.argmax())
    weight = vh.mT @ (shrink[best, :, None] * (u.mT @ y))  # [features, d_model]
    return {"weight": weight.float()[None]}, float(strengths[best]), float(scores[best])


def apply(parameters: dict[str, Tensor], inputs: Tensor, _masks: None = None) -> Tensor:
    """Predict: ``[S, B, features]`` to ``[S, B, d_model]``."""
    return torch.bmm(inputs, parameters["weight"])
