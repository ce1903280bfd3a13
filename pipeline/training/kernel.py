"""Kernel ridge regression with a Gaussian kernel: the nonlinear student in closed form."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.data.dataset import Subset
from pipeline.metrics import cosines
from pipeline.training.ridge import Fit, residual_prior

STRENGTHS = np.logspace(-4, 1, 21)  # in units of the kernel matrix's mean eigenvalue
WIDTHS = (0.2, 0.4, 0.8, 1.6)  # exponent at the mean squared distance between training concepts


def gaussian(inputs: Tensor, support: Tensor, width: Tensor) -> Tensor:
    """``exp(-width * squared distance)``, ``[S, B, features]`` and ``[S, N, features]`` to ``[S, B, N]``."""
    return torch.exp(-width * torch.cdist(inputs, support).square())


def fit(subset: Subset) -> Fit:
    """Solve for every width and strength in float64, on top of `residual_prior`; the best by validation cosine."""
    prior = residual_prior(subset)
    x, held = subset.train.inputs.double(), subset.val.inputs.double()
    y, truth = subset.train.targets.double() / subset.scale - x @ prior, subset.val.targets.double()
    passed = held @ prior  # [val, d_model]
    typical = torch.pdist(x).square().mean()
    best = Fit({}, 0.0, -2.0)
    for width in WIDTHS:
        scaled = (width / typical).reshape(1, 1, 1)
        values, u = torch.linalg.eigh(gaussian(x[None], x[None], scaled)[0])
        across = gaussian(held[None], x[None], scaled)[0] @ u  # [val, N]
        rotated = u.mT @ y  # [N, d_model]
        for strength in torch.from_numpy(STRENGTHS) * values.clamp(min=0).mean():
            shrunk = rotated / (values.clamp(min=0) + strength)[:, None]
            score = cosines(passed + across @ shrunk, truth).mean().item()
            if score > best.val_cosine:
                dual = u @ shrunk
                maps = {"weight": dual, "skip.weight": prior, "support": x, "width": scaled[0]}
                best = Fit({name: value.float() for name, value in maps.items()}, float(strength), score)
    return best


def apply(parameters: dict[str, Tensor], inputs: Tensor, _masks: None = None) -> Tensor:
    """Predict: ``[S, B, features]`` to ``[S, B, d_model]``."""
    near = gaussian(inputs, parameters["support"], parameters["width"])
    return torch.bmm(near, parameters["weight"]) + torch.bmm(inputs, parameters["skip.weight"])
