"""Students in closed form: ridge regression and kernel ridge regression, with regularisation chosen on validation."""

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
# Of the kernel: in units of its matrix's mean eigenvalue, and exponents at the mean squared distance of concepts.
KERNEL_STRENGTHS = np.logspace(-4, 1, 21)
KERNEL_WIDTHS = (0.2, 0.4, 0.8, 1.6)


@dataclass(frozen=True)
class Fit:
    """A fitted student, with the regularisation that was chosen on validation."""

    parameters: dict[str, Tensor]  # without the member axis; `weight` maps to targets in units of the subset's scale
    strength: float
    val_cosine: float


def residual_prior(subset: Subset) -> Tensor:
    """Scaled identity from each residual input to the target, ``[features, d_model]``; zero for other inputs."""
    # Every block adds to the residual stream, so the output of an early block is still part of it. The scales come
    # from least squares on standardised columns: otherwise the few very large columns would decide alone.
    x, y = subset.train.inputs.double(), subset.train.targets.double() / subset.scale
    d_model, weights = y.shape[1], 1 / y.std(0).clamp(min=1e-12)
    residual_columns = subset.features.residual_columns
    weight = torch.zeros(x.shape[1], d_model, dtype=torch.float64)
    if residual_columns:
        parts = torch.stack([(weights * x[:, part]).flatten() for part in residual_columns], 1)  # [N d_model, streams]
        gains = torch.linalg.lstsq(parts, (weights * y).flatten()[:, None]).solution
        for part, gain in zip(residual_columns, gains, strict=True):
            weight[part] = gain * torch.eye(d_model, dtype=torch.float64)
    return weight


@functools.lru_cache(maxsize=64)
def fit_ridge(subset: Subset) -> Fit:
    """Ridge regression for every strength at once, in the dual form through the Gram matrix's eigenvectors.

    ``w = W + X^T U (L + s)^-1 U^T (Y - X W)`` for inputs ``X``, targets ``Y``, ``X X^T = U L U^T`` and the prior map
    ``W`` towards which it is shrunk (Saunders, Gammerman and Vovk, 1998, "Ridge regression learning algorithm in dual
    variables").

    Returns:
        The fit with the best validation cosine, computed in float64.
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


def apply_linear(parameters: dict[str, Tensor], inputs: Tensor, _masks: None = None) -> Tensor:
    """Predict: ``[S, B, features]`` to ``[S, B, d_model]``."""
    return torch.bmm(inputs, parameters["weight"])


def gaussian(inputs: Tensor, support: Tensor, width: Tensor) -> Tensor:
    """``exp(-width * squared distance)``, ``[S, B, features]`` and ``[S, N, features]`` to ``[S, B, N]``."""
    return torch.exp(-width * torch.cdist(inputs, support).square())


def fit_kernel(subset: Subset) -> Fit:
    """Kernel ridge regression on top of `residual_prior`, for every width and strength; the best on validation."""
    prior = residual_prior(subset)
    x, held = subset.train.inputs.double(), subset.val.inputs.double()
    y, truth = subset.train.targets.double() / subset.scale - x @ prior, subset.val.targets.double()
    passed = held @ prior  # [val, d_model]
    typical = torch.pdist(x).square().mean()
    best = Fit({}, 0.0, -2.0)
    for width in KERNEL_WIDTHS:
        scaled = (width / typical).reshape(1, 1, 1)
        values, u = torch.linalg.eigh(gaussian(x[None], x[None], scaled)[0])
        across = gaussian(held[None], x[None], scaled)[0] @ u  # [val, N]
        rotated = u.mT @ y  # [N, d_model]
        for strength in torch.from_numpy(KERNEL_STRENGTHS) * values.clamp(min=0).mean():
            shrunk = rotated / (values.clamp(min=0) + strength)[:, None]
            score = cosines(passed + across @ shrunk, truth).mean().item()
            if score > best.val_cosine:
                dual = u @ shrunk
                maps = {"weight": dual, "skip.weight": prior, "support": x, "width": scaled[0]}
                best = Fit({name: value.float() for name, value in maps.items()}, float(strength), score)
    return best


def apply_kernel(parameters: dict[str, Tensor], inputs: Tensor, _masks: None = None) -> Tensor:
    """Predict: ``[S, B, features]`` to ``[S, B, d_model]``."""
    near = gaussian(inputs, parameters["support"], parameters["width"])
    return torch.bmm(near, parameters["weight"]) + torch.bmm(inputs, parameters["skip.weight"])
