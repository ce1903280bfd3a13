"""Curricula: an order of the training concepts from easy to hard, and how many of them each epoch shows.

Bengio et al. (2009), "Curriculum learning"; the pace is linear in the epochs (Platanios et al., 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.dataset import Subset
from pipeline.metrics import cosines
from pipeline.settings import Cell
from pipeline.training.closed_form import fit_ridge, ridge_spectrum

START = 0.25  # share of the training concepts that the first epoch shows
CURRICULA = ("none", "frequency", "ridge")


def easiest_first(cell: Cell, subset: Subset) -> Tensor | None:
    """Indices of the training concepts, the easiest first, ``[N]``; None without a curriculum."""
    if cell.curriculum == "none":
        return None
    if cell.curriculum == "frequency":
        from wordfreq import zipf_frequency  # takes a third of a second to load

        frequencies = [zipf_frequency(subset.concepts[row], subset.language) for row in subset.train.rows]
        return torch.tensor(frequencies).argsort(descending=True, stable=True)
    return leave_one_out(subset).argsort(descending=True, stable=True)


def leave_one_out(subset: Subset) -> Tensor:
    """Cosine of each training concept's vector with its prediction by ridge regression on all others, ``[N]``."""
    # In closed form: with the hat matrix H, the residual without a concept is its residual over 1 - H_ii. The prior
    # map of the regression stays that of all concepts: it has a handful of numbers.
    prior, spectrum = ridge_spectrum(subset)
    strength = torch.tensor(fit_ridge(subset).strength, dtype=torch.float64)
    weight = prior + spectrum.weight(strength)
    found = []
    for inputs, targets in subset.train.chunks():
        x, y = inputs.double(), targets.double() / subset.scale
        leverage = ((x @ spectrum.directions).square() / (spectrum.values + strength)).sum(1, keepdim=True)
        found.append(cosines(y - (y - x @ weight) / (1 - leverage).clamp(min=1e-9), y))
    return torch.cat(found)


def num_shown(cell: Cell, epoch: int, size: int) -> int:
    """How many of the easiest concepts an epoch (from 0) shows, of ``size``."""
    share = min(1.0, START + (1 - START) * epoch / max(1.0, cell.pace * cell.epochs))
    return max(min(size, 2), int(share * size))
