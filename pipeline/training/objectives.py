"""Training objectives: pure functions from a stack's predictions to one loss per member, and weighted sums of them.

``S`` members, ``B`` concepts a batch; ``weights`` is 0 for the rows that pad a last, shorter batch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import InputError, choices
from pipeline.metrics import cosines

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
TERM = re.compile(r"(?:(\d+\.?\d*|\.\d+)\*)?([a-z]+)")


def cosine(predicted: Tensor, truth: Tensor, weights: Tensor, _temperature: float) -> Tensor:
    """1 - cosine, averaged over the batch: ``[S, B, d_model]`` twice and ``[S, B]`` to ``[S]``."""
    return _average(1 - cosines(predicted, truth), weights)


def mse(predicted: Tensor, truth: Tensor, weights: Tensor, _temperature: float) -> Tensor:
    """Squared error over the vector's dimensions, averaged over the batch, in units of the target's variance."""
    return _average((predicted - truth).square().mean(-1), weights)


def infonce(predicted: Tensor, truth: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of identifying a concept's true vector in the batch by cosine, in both directions."""
    # van den Oord, Li and Vinyals (2018), "Representation learning with contrastive predictive coding", in the
    # symmetric form of Radford et al. (2021).
    similarity = F.normalize(predicted, dim=-1) @ F.normalize(truth, dim=-1).mT / temperature  # [S, B, B]
    is_padding = weights == 0
    similarity = similarity.masked_fill(is_padding[:, None, :] | is_padding[:, :, None], -1e9)
    own = similarity.diagonal(dim1=-2, dim2=-1)  # [S, B]
    lost = similarity.logsumexp(-1) + similarity.logsumexp(-2) - 2 * own
    return _average(lost / 2, weights)


def _average(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum(-1) / weights.sum(-1)


TERMS = {"cosine": cosine, "mse": mse, "infonce": infonce}


@functools.cache
def parse_objective(objective: str) -> dict[str, float]:
    """The weight of each of `TERMS` in an objective such as ``cosine`` or ``cosine+0.1*infonce``."""
    found: dict[str, float] = {}
    for part in objective.replace(" ", "").split("+"):
        if not (match := TERM.fullmatch(part)) or match[2] not in TERMS:
            raise choices("objective", match[2] if match else part, [*TERMS, "sums such as cosine+0.1*infonce"])
        weight = float(match[1] or 1)
        if weight <= 0 or match[2] in found:
            raise InputError(f"--objective {objective}: expected positive weights, and each term once")
        found[match[2]] = weight
    return found


def is_scale_sensitive(objective: str) -> bool:
    """Whether the objective depends on the length of a prediction; cosines do not."""
    return "mse" in parse_objective(objective)


def objective_of(objective: str, temperature: float) -> Objective:
    """The function from predictions, truths and row weights to the loss of each member, ``[S]``."""
    weighted = [(TERMS[name], weight) for name, weight in parse_objective(objective).items()]

    def loss(predicted: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
        values = [weight * term(predicted, truth, weights, temperature) for term, weight in weighted]
        return functools.reduce(torch.add, values)

    return loss
